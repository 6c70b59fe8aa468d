//! A Redis server of our own.

use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use redis::{Client, Connection, ConnectionAddr};
use tempfile::TempDir;

/// A `redis-server` on a Unix socket, which keeps nothing. Killed when dropped.
pub(super) struct RedisServer {
    child: Child,
    dir: TempDir,
}

impl RedisServer {
    pub(super) fn start() -> anyhow::Result<Self> {
        // Not in the directory of the disk part: the name of a socket is short.
        let dir = tempfile::tempdir()?;
        let child = Command::new("redis-server")
            .args(["--port", "0", "--save", "", "--appendonly", "no"])
            .args(["--daemonize", "no", "--loglevel", "warning"])
            .args(["--unixsocketperm", "700", "--unixsocket"])
            .arg(dir.path().join(SOCKET))
            .arg("--dir")
            .arg(dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .context("cannot start redis-server")?;
        let mut server = Self { child, dir };
        server.wait_until_ready()?;
        Ok(server)
    }

    fn wait_until_ready(&mut self) -> anyhow::Result<()> {
        let begun = Instant::now();
        loop {
            let error = match self.connect() {
                Ok(_) => return Ok(()),
                Err(error) => error,
            };
            if let Some(status) = self.child.try_wait()? {
                bail!("redis-server ended with {status} before it served");
            }
            if begun.elapsed() > START_TIMEOUT {
                return Err(error.context("redis-server does not serve"));
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    pub(super) fn connect(&self) -> anyhow::Result<Connection> {
        let address = ConnectionAddr::Unix(self.dir.path().join(SOCKET));
        Ok(Client::open(address)?.get_connection()?)
    }

    pub(super) fn process(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const SOCKET: &str = "redis.sock";
const START_TIMEOUT: Duration = Duration::from_secs(10);
