//! The data plane over QUIC: who the daemon is, and where it listens.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvasir_proto::v1;
use kvasir_transport::quic::{ConnectError, Identity, Listener, QuicConfig, TlsError, Trust};
use kvasir_transport::session::Config;

use crate::config::QuicSettings;
use crate::rdma::{self, Device};
use crate::service::Shared;

/// Why the data plane cannot be offered over QUIC.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QuicError {
    /// A certificate without its key, or the reverse.
    #[error("`[quic]` has only one of `certificate` and `key`; set both, or none")]
    Half,
    /// A file cannot be read.
    #[error("cannot read {path}; check `[quic]`")]
    Read {
        /// The file.
        path: PathBuf,
        /// What happened.
        #[source]
        source: io::Error,
    },
    /// Certificates or keys cannot be used.
    #[error("`[quic]`: certificates or keys cannot be used; `kvasir cert` makes some that can")]
    Tls(#[from] TlsError),
    /// The address cannot be listened on.
    #[error(
        "cannot listen for QUIC; choose another address with `listen` of `[quic]`, or set `enabled = false` there"
    )]
    Listen(#[from] ConnectError),
}

/// Listens as `settings` say; else on the port of UDP that has the same number as that of the
/// control calls, at `control`, or on a free one if the control calls are on a free one, too.
/// With a device, fetchers that have one can read one-sidedly.
pub(crate) fn start(
    settings: &QuicSettings,
    control: SocketAddr,
    any_port: bool,
    device: Option<&Device>,
    shared: &Arc<Shared>,
) -> Result<(Listener, v1::QuicPath), QuicError> {
    let (identity, mut path) = match (&settings.certificate, &settings.key) {
        (Some(certificate), Some(key)) => {
            let identity = Identity::from_pem(&read(certificate)?, &read(key)?)?;
            (identity, v1::QuicPath::default())
        }
        (None, None) => {
            let identity = Identity::self_signed(&[SELF_NAME])?;
            let path = v1::QuicPath {
                name: SELF_NAME.to_owned(),
                certificate: identity.certificate().to_vec().into(),
                ..v1::QuicPath::default()
            };
            (identity, path)
        }
        _ => return Err(QuicError::Half),
    };
    let clients = match &settings.client_ca {
        Some(path) => Some(Trust::from_pem(&read(path)?)?),
        None => None,
    };
    let config = QuicConfig {
        session: Config {
            read_ahead: shared.limits.read_ahead.as_u64(),
            linger: shared.limits.stream_idle(),
            ..Config::default()
        },
        ..QuicConfig::default()
    };
    let listen =
        |address| rdma::listen(device, address, &identity, clients.as_ref(), shared, config);
    let listener = match listen(settings.listen.unwrap_or(control)) {
        // Somebody else has that port of UDP; nobody expects a certain one.
        Err(ConnectError::Socket(..)) if any_port && settings.listen.is_none() => {
            listen(SocketAddr::new(control.ip(), 0))?
        }
        listener => listener?,
    };
    path.port = listener.address().port().into();
    path.rdma = device.is_some() && shared.store.arena().is_some();
    Ok((listener, path))
}

fn read(path: &Path) -> Result<Vec<u8>, QuicError> {
    fs::read(path).map_err(|source| QuicError::Read {
        path: path.to_owned(),
        source,
    })
}

/// In certificates that the daemon makes for itself.
const SELF_NAME: &str = "kvasird";
