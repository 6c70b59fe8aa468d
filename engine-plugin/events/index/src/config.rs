//! Which engines and daemons are followed.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use kvasir_client::Endpoint;

/// An engine: `NAME=tcp://HOST:PORT[,replay=tcp://HOST:PORT][,…]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// What it is called in answers.
    pub name: String,
    /// Where it publishes: `tcp://HOST:PORT`.
    pub address: String,
    /// Where it sends batches again.
    pub replay: Option<String>,
    /// Beginning of its topic. Default: empty, which is every topic.
    pub topic: String,
    /// The model that it serves; empty: not said.
    pub model: String,
    /// Its data-parallel rank.
    pub rank: u32,
    /// How many ranks it has, each at the ports that follow: vLLM's `--data-parallel-size`.
    /// Default: 1.
    pub ranks: u32,
    /// How often it is asked whether a batch was lost that no other followed; within this time
    /// what was lost so is offered. Default: 1 second. Without a replay address it is not asked.
    pub check: Duration,
}

/// A daemon: `HOST:PORT[,namespace=HEX]…[,model=NAME]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DaemonConfig {
    /// Its control calls.
    pub endpoint: Endpoint,
    /// Digests of the namespaces, one for each rank of the engine, that blocks are looked for in.
    pub namespaces: Vec<[u8; 32]>,
    /// The model of these; empty: not said.
    pub model: String,
}

/// Text that says no engine or daemon.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// An engine without a name.
    #[error("`{0}` has no name; write NAME=tcp://HOST:PORT")]
    Name(String),
    /// An address that cannot be connected to.
    #[error("`{0}` is not an address; write tcp://HOST:PORT")]
    Address(String),
    /// A daemon's address.
    #[error(transparent)]
    Daemon(#[from] kvasir_client::ParseEndpointError),
    /// An option that there is not, or that has no such value.
    #[error("`{option}` is not an option; there are {known}")]
    Option {
        /// What stands there.
        option: String,
        /// What may stand there.
        known: &'static str,
    },
}

impl EngineConfig {
    /// What it is called in logs.
    pub(crate) fn id(&self) -> String {
        format!("{}/{}", self.name, self.rank)
    }

    /// One for each rank, at ports of its own.
    ///
    /// # Errors
    /// A port is beyond the last.
    pub fn each_rank(&self) -> Result<Vec<Self>, ConfigError> {
        let of = |rank| {
            let replay = self.replay.as_ref();
            Ok(Self {
                address: shifted(&self.address, rank)?,
                replay: replay.map(|replay| shifted(replay, rank)).transpose()?,
                rank,
                ..self.clone()
            })
        };
        (0..self.ranks).map(of).collect()
    }
}

impl FromStr for EngineConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let mut parts = text.split(',');
        let first = parts.next().unwrap_or_default();
        let named = first.split_once('=').filter(|(name, _)| !name.is_empty());
        let (name, address) = named.ok_or_else(|| ConfigError::Name(first.to_owned()))?;
        let mut engine = Self {
            name: name.to_owned(),
            address: shifted(address, 0)?,
            replay: None,
            topic: String::new(),
            model: String::new(),
            rank: 0,
            ranks: 1,
            check: Duration::from_secs(1),
        };
        for option in parts {
            let unknown = || ConfigError::Option {
                option: option.to_owned(),
                known: "replay=tcp://HOST:PORT, topic=TEXT, model=NAME, ranks=1 to 1024, check-ms=10 and more",
            };
            let within = |value: &str, least: u64, most: u64| {
                let number = value.parse().ok();
                let number = number.filter(|it| (least..=most).contains(it));
                number.ok_or_else(unknown)
            };
            match option.split_once('=').ok_or_else(unknown)? {
                ("replay", address) => engine.replay = Some(shifted(address, 0)?),
                ("topic", topic) => engine.topic = topic.to_owned(),
                ("model", model) => engine.model = model.to_owned(),
                ("ranks", ranks) => {
                    engine.ranks = u32::try_from(within(ranks, 1, 1024)?).unwrap_or(1);
                }
                ("check-ms", time) => {
                    engine.check = Duration::from_millis(within(time, 10, 1 << 32)?);
                }
                _ => return Err(unknown()),
            }
        }
        Ok(engine)
    }
}

impl FromStr for DaemonConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let mut parts = text.split(',');
        let mut daemon = Self {
            endpoint: parts.next().unwrap_or_default().parse()?,
            namespaces: Vec::new(),
            model: String::new(),
        };
        for option in parts {
            let unknown = || ConfigError::Option {
                option: option.to_owned(),
                known: "namespace=64 hexadecimal digits, model=NAME",
            };
            match option.split_once('=').ok_or_else(unknown)? {
                // A key and a namespace's digest look alike.
                ("namespace", digest) => {
                    let digest: kvasir_types::ChunkKey = digest.parse().map_err(|_| unknown())?;
                    daemon.namespaces.push(*digest.as_bytes());
                }
                ("model", model) => daemon.model = model.to_owned(),
                _ => return Err(unknown()),
            }
        }
        Ok(daemon)
    }
}

/// An address, `by` ports further on.
fn shifted(address: &str, by: u32) -> Result<String, ConfigError> {
    let shift = |address: &str| {
        let (host, port) = address.strip_prefix("tcp://")?.rsplit_once(':')?;
        let port = u32::from(port.parse::<u16>().ok()?).checked_add(by)?;
        let port = u16::try_from(port).ok().filter(|port| *port > 0)?;
        Some(format!(
            "tcp://{}:{port}",
            Some(host).filter(|it| !it.is_empty())?
        ))
    };
    shift(address).ok_or_else(|| ConfigError::Address(address.to_owned()))
}

impl fmt::Display for DaemonConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let endpoint = self.endpoint.to_string();
        f.write_str(endpoint.strip_prefix("http://").unwrap_or(&endpoint))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_is_a_name_an_address_and_options() {
        let engine: EngineConfig = "a=tcp://host:5557".parse().unwrap();
        assert_eq!((engine.name.as_str(), engine.ranks), ("a", 1));
        assert_eq!(
            (engine.replay, engine.check),
            (None, Duration::from_secs(1))
        );
        let text = "b=tcp://[::1]:5557,replay=tcp://h:6000,topic=kv,model=m,ranks=2,check-ms=20";
        let engine: EngineConfig = text.parse().unwrap();
        assert_eq!((engine.topic.as_str(), engine.model.as_str()), ("kv", "m"));
        assert_eq!(engine.check, Duration::from_millis(20));
        let ranks = engine.each_rank().unwrap();
        let places: Vec<_> = ranks
            .iter()
            .map(|it| (it.rank, it.address.as_str(), it.replay.as_deref().unwrap()))
            .collect();
        let expected = [
            (0, "tcp://[::1]:5557", "tcp://h:6000"),
            (1, "tcp://[::1]:5558", "tcp://h:6001"),
        ];
        assert_eq!(places, expected);
        for wrong in [
            "",
            "tcp://host:1",
            "=tcp://host:1",
            "a=host:1",
            "a=tcp://host",
            "a=tcp://:1",
            "a=tcp://host:0",
            "a=tcp://host:1,b",
            "a=tcp://host:1,b=c",
            "a=tcp://host:1,ranks=0",
            "a=tcp://host:1,check-ms=9",
            "a=tcp://host:1,replay=",
        ] {
            assert!(wrong.parse::<EngineConfig>().is_err(), "{wrong}");
        }
        let last: EngineConfig = "a=tcp://host:65535,ranks=2".parse().unwrap();
        assert!(last.each_rank().is_err());
    }

    #[test]
    fn a_daemon_is_an_address_and_namespaces() {
        let daemon: DaemonConfig = "localhost:7420".parse().unwrap();
        assert!(daemon.namespaces.is_empty());
        let digest = "0f".repeat(32);
        let text = format!("localhost:7420,namespace={digest},namespace={digest},model=m");
        let daemon: DaemonConfig = text.parse().unwrap();
        assert_eq!(daemon.namespaces, [[15; 32]; 2]);
        assert_eq!(
            (daemon.model.as_str(), daemon.to_string()),
            ("m", "localhost:7420".into())
        );
        for wrong in ["", "localhost:7420,namespace=0f", "localhost:7420,x=y"] {
            assert!(wrong.parse::<DaemonConfig>().is_err(), "{wrong}");
        }
    }
}
