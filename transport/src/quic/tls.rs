//! Who a holder is, and whom a fetcher believes.

use std::sync::Arc;

use quinn::crypto::rustls::{NoInitialCipherSuite, QuicClientConfig, QuicServerConfig};
use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;

use super::{ONE_SIDED_PROTOCOL, PROTOCOL};

/// A certificate with those that vouch for it, and its key.
#[derive(Debug)]
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

/// Certificates that are believed: those of authorities, or one that is pinned.
#[derive(Clone, Debug)]
pub struct Trust {
    roots: Arc<RootCertStore>,
}

/// What is wrong with certificates and keys.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// They cannot be read.
    #[error("not a certificate or a key in PEM")]
    Pem(#[source] rustls::pki_types::pem::Error),
    /// There are none.
    #[error("no certificate in PEM")]
    Nothing,
    /// They cannot be used.
    #[error("certificate and key cannot be used")]
    Unusable(#[from] rustls::Error),
    /// What is trusted cannot vouch for a client.
    #[error("clients cannot be verified with what is trusted")]
    Clients(#[source] rustls::server::VerifierBuilderError),
    /// QUIC needs a cipher that is not there.
    #[error(transparent)]
    Cipher(#[from] NoInitialCipherSuite),
    /// A certificate cannot be made.
    #[error("a certificate cannot be made")]
    Make(#[source] rcgen::Error),
}

impl Identity {
    /// Of PEM: a certificate with those that vouch for it, and a key.
    ///
    /// # Errors
    /// [`TlsError::Pem`]
    pub fn from_pem(chain: &[u8], key: &[u8]) -> Result<Self, TlsError> {
        let chain = CertificateDer::pem_slice_iter(chain).collect::<Result<_, _>>();
        Ok(Self {
            chain: chain.map_err(TlsError::Pem)?,
            key: PrivateKeyDer::from_pem_slice(key).map_err(TlsError::Pem)?,
        })
    }

    /// A new one that vouches for itself, under these names. Whoever is to believe it needs
    /// its certificate.
    ///
    /// # Errors
    /// [`TlsError::Make`]
    pub fn self_signed(names: &[&str]) -> Result<Self, TlsError> {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let made = rcgen::generate_simple_self_signed(names).map_err(TlsError::Make)?;
        let key = PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into());
        Ok(Self {
            chain: vec![made.cert.der().clone()],
            key,
        })
    }

    /// DER of its certificate, without those that vouch for it.
    pub fn certificate(&self) -> &[u8] {
        self.chain.first().map_or(&[], |certificate| certificate)
    }

    /// What whoever pins it has to believe.
    ///
    /// # Errors
    /// There is no certificate.
    pub fn trust(&self) -> Result<Trust, TlsError> {
        let mut roots = RootCertStore::empty();
        if let Some(certificate) = self.chain.first() {
            roots.add(certificate.clone())?;
        }
        Ok(Trust {
            roots: Arc::new(roots),
        })
    }

    fn parts(&self) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        (self.chain.clone(), self.key.clone_key())
    }

    /// For a holder; with `clients`, fetchers must have a certificate that these vouch for.
    ///
    /// # Errors
    /// [`TlsError`]
    pub fn serving(&self, clients: Option<&Trust>) -> Result<QuicServerConfig, TlsError> {
        self.serving_over(clients, false)
    }

    /// As [`serving`](Self::serving); if it can be, one-sided reads are agreed on.
    pub(super) fn serving_over(
        &self,
        clients: Option<&Trust>,
        one_sided: bool,
    ) -> Result<QuicServerConfig, TlsError> {
        let (chain, key) = self.parts();
        let builder = rustls::ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?;
        let builder = match clients {
            None => builder.with_no_client_auth(),
            Some(trust) => {
                let roots = Arc::clone(&trust.roots);
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(roots, provider()).build();
                builder.with_client_cert_verifier(verifier.map_err(TlsError::Clients)?)
            }
        };
        let mut config = builder.with_single_cert(chain, key)?;
        config.alpn_protocols = protocols(one_sided);
        Ok(QuicServerConfig::try_from(config)?)
    }
}

impl Trust {
    /// Of PEM: certificates of authorities, or of a holder itself.
    ///
    /// # Errors
    /// [`TlsError::Pem`], [`TlsError::Nothing`], [`TlsError::Unusable`]
    pub fn from_pem(certificates: &[u8]) -> Result<Self, TlsError> {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(certificates) {
            roots.add(certificate.map_err(TlsError::Pem)?)?;
        }
        if roots.is_empty() {
            return Err(TlsError::Nothing);
        }
        Ok(Self {
            roots: Arc::new(roots),
        })
    }

    /// One certificate, of DER: that of a holder itself.
    ///
    /// # Errors
    /// [`TlsError::Unusable`]
    pub fn from_der(certificate: &[u8]) -> Result<Self, TlsError> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_slice(certificate))?;
        Ok(Self {
            roots: Arc::new(roots),
        })
    }

    /// For a fetcher, which shows `identity` where it is asked to.
    ///
    /// # Errors
    /// [`TlsError`]
    pub fn fetching(&self, identity: Option<&Identity>) -> Result<QuicClientConfig, TlsError> {
        self.fetching_over(identity, false)
    }

    /// As [`fetching`](Self::fetching); if it can be, one-sided reads are agreed on.
    pub(super) fn fetching_over(
        &self,
        identity: Option<&Identity>,
        one_sided: bool,
    ) -> Result<QuicClientConfig, TlsError> {
        let builder = rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(Arc::clone(&self.roots));
        let mut config = match identity {
            None => builder.with_no_client_auth(),
            Some(identity) => {
                let (chain, key) = identity.parts();
                builder.with_client_auth_cert(chain, key)?
            }
        };
        config.alpn_protocols = protocols(one_sided);
        Ok(QuicClientConfig::try_from(config)?)
    }
}

/// What an end speaks, the better one first.
fn protocols(one_sided: bool) -> Vec<Vec<u8>> {
    let one_sided = one_sided.then_some(ONE_SIDED_PROTOCOL);
    one_sided
        .into_iter()
        .chain([PROTOCOL])
        .map(<[u8]>::to_vec)
        .collect()
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}
