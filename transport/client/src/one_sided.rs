//! What reads the daemon's memory, where there is an RDMA device. Without the feature `rdma`
//! there is none.

#[cfg(feature = "rdma")]
pub(crate) use with::{Readers, connect};
#[cfg(not(feature = "rdma"))]
pub(crate) use without::{Readers, connect};

#[cfg(feature = "rdma")]
mod with {
    use kvasir_transport::rdma::{DeviceConfig, Reader, ReaderConfig};
    use tokio::sync::OnceCell;
    use tokio::task::spawn_blocking;

    pub(crate) use kvasir_transport::rdma::connect;

    /// Finds a device when it is first asked for, and keeps it.
    #[derive(Debug)]
    pub(crate) struct Readers {
        device: Option<String>,
        found: OnceCell<Option<Reader>>,
    }

    impl Readers {
        pub(crate) fn new(device: Option<String>) -> Self {
            Self {
                device,
                found: OnceCell::new(),
            }
        }

        pub(crate) async fn reader(&self) -> Option<Reader> {
            let find = || async {
                let config = ReaderConfig {
                    device: DeviceConfig {
                        name: self.device.clone(),
                        ..DeviceConfig::default()
                    },
                    ..ReaderConfig::default()
                };
                // System calls, which lock memory.
                let found = spawn_blocking(move || Reader::find(&config)).await.ok()?;
                let report = |error: &kvasir_transport::rdma::ReaderError| {
                    let error = error as &dyn std::error::Error;
                    tracing::warn!(error, "RDMA is not used; gets go over QUIC");
                };
                found.inspect_err(report).ok().flatten()
            };
            self.found.get_or_init(find).await.clone()
        }
    }
}

#[cfg(not(feature = "rdma"))]
mod without {
    use std::convert::Infallible;
    use std::net::SocketAddr;

    use kvasir_transport::DataPath;
    use kvasir_transport::quic::{self, ConnectError, Identity, QuicConfig, Trust};

    #[derive(Debug)]
    pub(crate) struct Readers;

    impl Readers {
        pub(crate) fn new(_: Option<String>) -> Self {
            Self
        }

        pub(crate) async fn reader(&self) -> Option<Infallible> {
            None
        }
    }

    pub(crate) fn connect(
        _: Option<Infallible>,
        address: SocketAddr,
        name: &str,
        trust: &Trust,
        identity: Option<&Identity>,
        config: QuicConfig,
    ) -> Result<DataPath, ConnectError> {
        quic::connect(address, name, trust, identity, config)
    }
}
