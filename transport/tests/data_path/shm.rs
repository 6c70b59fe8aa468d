//! Shared memory.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kvasir_mem::Arena;
use kvasir_transport::DataPath;
use kvasir_transport::shm::{self, ListenError, Listener, ShmConfig, Token};

use crate::suite::{self, Carrier, Numbers};

const TOKEN: Token = [7; 16];

struct Shm {
    listener: Listener,
    directory: tempfile::TempDir,
}

fn config() -> ShmConfig {
    ShmConfig {
        session: suite::config(),
        most_backoff: Duration::from_millis(50),
        // So that some of what lies in the arena goes over the socket.
        most_lent: 1 << 20,
        ..ShmConfig::default()
    }
}

fn listen(path: PathBuf, source: Numbers) -> Result<Listener, ListenError> {
    let arena = Arc::clone(source.arena().unwrap());
    Listener::new(path, TOKEN, arena, Arc::new(source), config())
}

impl Carrier for Shm {
    fn serve(source: Numbers) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = listen(directory.path().join("own/socket"), source).unwrap();
        Self {
            listener,
            directory,
        }
    }

    fn arena() -> Option<Arc<Arena>> {
        Some(Arena::new(256 << 20).unwrap())
    }

    fn connect(&self) -> DataPath {
        shm::connect(self.listener.path(), TOKEN, config())
    }

    fn astray(&self) -> [DataPath; 2] {
        let nobody = self.directory.path().join("nobody");
        [
            shm::connect(nobody, TOKEN, config()),
            shm::connect(self.listener.path(), [8; 16], config()),
        ]
    }

    async fn restart(self, source: Numbers) -> Self {
        let Self {
            listener,
            directory,
        } = self;
        let path = listener.path().to_owned();
        drop(listener);
        let listener = listen(path, source).unwrap();
        Self {
            listener,
            directory,
        }
    }

    fn drain(self, within: Duration) -> impl Future<Output = ()> + Send + 'static {
        self.listener.drain(within)
    }
}

crate::conforms!(Shm);
