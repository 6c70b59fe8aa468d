//! An authority of one's own, for a few hosts that know each other.

use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, date_time_ymd,
};

use super::TlsError;

/// Vouches for certificates with a key that nobody else has.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key, in PEM.
#[derive(Clone, Debug)]
pub struct Issued {
    /// The certificate.
    pub certificate: String,
    /// Its key, in PKCS #8.
    pub key: String,
}

/// What a certificate is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Holders show it.
    Server,
    /// Fetchers show it.
    Client,
}

impl Authority {
    /// A new one, whose certificate holds for `validity`.
    ///
    /// # Errors
    /// [`TlsError::Make`]
    pub fn new(validity: Duration) -> Result<(Self, Issued), TlsError> {
        let key = KeyPair::generate().map_err(TlsError::Make)?;
        let mut params = Self::params();
        hold_for(&mut params, validity);
        let certificate = params.self_signed(&key).map_err(TlsError::Make)?;
        let issued = Issued {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
        };
        let issuer = Issuer::new(Self::params(), key);
        Ok((Self { issuer }, issued))
    }

    /// One that was made before, of its key in PEM.
    ///
    /// # Errors
    /// [`TlsError::Make`]: not such a key.
    pub fn from_pem(key: &str) -> Result<Self, TlsError> {
        let key = KeyPair::from_pem(key).map_err(TlsError::Make)?;
        Ok(Self {
            issuer: Issuer::new(Self::params(), key),
        })
    }

    /// A certificate for whoever has these names: hosts' names or addresses, or for a client
    /// any name. It holds for `validity`.
    ///
    /// # Errors
    /// [`TlsError::Make`]: a name that is none.
    pub fn issue(
        &self,
        names: &[String],
        purpose: Purpose,
        validity: Duration,
    ) -> Result<Issued, TlsError> {
        let key = KeyPair::generate().map_err(TlsError::Make)?;
        let mut params = CertificateParams::new(names).map_err(TlsError::Make)?;
        params.distinguished_name = named(names.first().map_or("", String::as_str));
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![match purpose {
            Purpose::Server => ExtendedKeyUsagePurpose::ServerAuth,
            Purpose::Client => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        hold_for(&mut params, validity);
        let certificate = params.signed_by(&key, &self.issuer);
        Ok(Issued {
            certificate: certificate.map_err(TlsError::Make)?.pem(),
            key: key.serialize_pem(),
        })
    }

    /// The same ones every time, so that an authority is known by its key.
    fn params() -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name = named("Kvasir");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params
    }
}

fn named(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

/// From an hour ago on, because clocks differ.
fn hold_for(params: &mut CertificateParams, validity: Duration) {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    let now = date_time_ymd(1970, 1, 1) + now.unwrap_or_default();
    params.not_before = now - CLOCKS_DIFFER;
    params.not_after = now + validity;
}

const CLOCKS_DIFFER: Duration = Duration::from_secs(60 * 60);
