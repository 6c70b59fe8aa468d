//! The data plane on one host.

use std::env;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use kvasir_proto::v1;
use kvasir_transport::session::Config;
use kvasir_transport::shm::{ListenError, Listener, ShmConfig, Token};
use rustix::process::geteuid;
use rustix::rand::{GetRandomFlags, getrandom};

use crate::config::SharedMemorySettings;
use crate::data::Chunks;
use crate::service::Shared;

/// Listens as `settings` say. `None` where they say no, or payload does not lie in memory that
/// can be shared.
pub(crate) fn start(
    settings: &SharedMemorySettings,
    control: SocketAddr,
    shared: &Arc<Shared>,
) -> Result<Option<(Listener, v1::SharedMemoryPath)>, ListenError> {
    let arena = shared.store.arena().cloned();
    let Some(arena) = arena.filter(|_| settings.enabled) else {
        return Ok(None);
    };
    let socket = settings.socket.clone();
    let socket = socket.unwrap_or_else(|| directory().join(format!("{}.sock", control.port())));
    let token = token()?;
    let defaults = ShmConfig::default();
    let config = ShmConfig {
        session: Config {
            read_ahead: shared.limits.read_ahead.as_u64(),
            linger: shared.limits.stream_idle(),
            ..defaults.session
        },
        // Writers need the other half.
        most_lent: shared.store.stats().memory.capacity / 2,
        ..defaults
    };
    let source = Arc::new(Chunks::new(Arc::clone(shared)));
    let listener = Listener::new(socket, token, arena, source, config)?;
    let path = v1::SharedMemoryPath {
        socket: listener.path().display().to_string(),
        token: token.to_vec().into(),
    };
    Ok(Some((listener, path)))
}

/// No other daemon has it.
fn token() -> Result<Token, ListenError> {
    let mut token = Token::default();
    getrandom(&mut token, GetRandomFlags::empty())
        .map_err(|error| ListenError::Token(error.into()))?;
    Ok(token)
}

/// Where only this user can enter.
fn directory() -> PathBuf {
    match env::var_os("XDG_RUNTIME_DIR").filter(|path| !path.is_empty()) {
        Some(runtime) => PathBuf::from(runtime).join("kvasir"),
        None => env::temp_dir().join(format!("kvasir-{}", geteuid().as_raw())),
    }
}
