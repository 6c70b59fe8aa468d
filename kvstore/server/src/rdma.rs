//! The data plane by one-sided reads: memory that an RDMA device lends to other hosts.
//!
//! It is a part of the one over QUIC, whose connections it needs. Without the feature `rdma`
//! there is none, and saying which device to use is an error.

use std::error::Error;

use crate::config::RdmaSettings;

/// Why no RDMA device can be used, though one is asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RdmaError {
    /// This program was built without.
    #[error(
        "`[rdma]` names a device, and this daemon is built without RDMA; build it with the feature `rdma`, or leave `device` out"
    )]
    Absent,
    /// There is no such device.
    #[error("no RDMA device is called {0}; `rdma link` lists those that are there")]
    NoDevice(String),
    /// It cannot be used.
    #[error("the RDMA device of `[rdma]` cannot be used")]
    Device(#[source] Box<dyn Error + Send + Sync>),
}

#[cfg(feature = "rdma")]
pub(crate) use with::{find, listen};
#[cfg(not(feature = "rdma"))]
pub(crate) use without::{find, listen};

/// An open device.
#[cfg(feature = "rdma")]
pub(crate) type Device = kvasir_transport::rdma::Device;
/// There is none.
#[cfg(not(feature = "rdma"))]
pub(crate) type Device = std::convert::Infallible;

#[cfg(feature = "rdma")]
mod with {
    use std::net::SocketAddr;
    use std::sync::Arc;

    use kvasir_transport::quic::{ConnectError, Identity, Listener, QuicConfig, Trust};
    use kvasir_transport::rdma::{self, Device, DeviceConfig, Lender, LenderConfig};

    use super::{RdmaError, RdmaSettings};
    use crate::data::Chunks;
    use crate::service::Shared;

    /// The device that settings say, or any.
    pub(crate) async fn find(settings: &RdmaSettings) -> Result<Option<Device>, RdmaError> {
        if !settings.enabled {
            return Ok(None);
        }
        let config = DeviceConfig {
            name: settings.device.clone(),
            ..DeviceConfig::default()
        };
        // System calls, of which some wait for the device.
        let found = tokio::task::spawn_blocking(move || Device::find(&config)).await;
        let found = found.map_err(|error| RdmaError::Device(error.into()))?;
        match (found, &settings.device) {
            (Ok(None), Some(name)) => Err(RdmaError::NoDevice(name.clone())),
            (Ok(found), _) => Ok(found),
            (Err(error), Some(_)) => Err(RdmaError::Device(error.into())),
            // What was not asked for need not work.
            (Err(error), None) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "RDMA is not used");
                Ok(None)
            }
        }
    }

    /// Listens for QUIC. Payload that lies in the arena is lent through `device`.
    pub(crate) fn listen(
        device: Option<&Device>,
        address: SocketAddr,
        identity: &Identity,
        clients: Option<&Trust>,
        shared: &Arc<Shared>,
        config: QuicConfig,
    ) -> Result<Listener, ConnectError> {
        let lender = device.zip(shared.store.arena()).map(|(device, arena)| {
            let lending = LenderConfig {
                // Processes of the host may have another half, and writers need the rest.
                most_lent: shared.store.stats().memory.capacity / 4,
                ..LenderConfig::default()
            };
            Lender::new(device.clone(), Arc::clone(arena), lending)
        });
        let source = Arc::new(Chunks::new(Arc::clone(shared)));
        rdma::listen(lender, address, identity, clients, source, config)
    }
}

#[cfg(not(feature = "rdma"))]
mod without {
    use std::net::SocketAddr;
    use std::sync::Arc;

    use kvasir_transport::quic::{ConnectError, Identity, Listener, QuicConfig, Trust};

    use super::{Device, RdmaError, RdmaSettings};
    use crate::data::Chunks;
    use crate::service::Shared;

    /// None.
    pub(crate) async fn find(settings: &RdmaSettings) -> Result<Option<Device>, RdmaError> {
        match (&settings.device, settings.enabled) {
            (Some(_), true) => Err(RdmaError::Absent),
            _ => Ok(None),
        }
    }

    /// Listens for QUIC.
    pub(crate) fn listen(
        _: Option<&Device>,
        address: SocketAddr,
        identity: &Identity,
        clients: Option<&Trust>,
        shared: &Arc<Shared>,
        config: QuicConfig,
    ) -> Result<Listener, ConnectError> {
        let source = Arc::new(Chunks::new(Arc::clone(shared)));
        Listener::new(address, identity, clients, source, config)
    }
}
