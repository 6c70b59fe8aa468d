//! Devices, and what all queue pairs of one share.

use std::collections::HashMap;
use std::ffi::CString;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ibverbs_sys as ffi;
use rustix::io::Errno;

use super::completions::Poller;
use super::endpoint::Mtu;
use super::queue_pair::Connection;
use super::verbs::{CompletionQueue, Context, ProtectionDomain};

/// Which device, and how it is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Its name, such as `mlx5_0` or `rxe0`. Default: the first that is usable.
    pub name: Option<String>,
    /// Its entry in the table of GIDs (`show_gids`, or `/sys/class/infiniband/*/ports/1/gids`).
    /// Default: RoCEv2 over IPv4, or else over IPv6, or else InfiniBand.
    pub gid_index: Option<u8>,
    /// Requests of all queue pairs together that may be outstanding, fewer if the device has no
    /// room for them; some 64 bytes each. With queue pairs as they are by default, room for 128 of
    /// these. Default: 16,384.
    pub outstanding: u32,
}

impl Default for DeviceConfig {
    fn default() -> Self {
        Self {
            name: None,
            gid_index: None,
            outstanding: 16_384,
        }
    }
}

/// An RDMA device that is open, cheap to clone.
#[derive(Clone, Debug)]
pub struct Device {
    pub(super) shared: Arc<Shared>,
    /// Lasts as long as any handle.
    _poller: Arc<Poller>,
}

/// What a device can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The most bytes that are registered at once.
    pub region_bytes: u64,
    /// The most bytes of one message; longer reads are split.
    pub message_bytes: u32,
    /// The most bytes of one packet, on the port as it is.
    pub mtu: Mtu,
    /// Requests of one queue pair that may be outstanding.
    pub queue_depth: u32,
    /// Reads of one queue pair that may be outstanding.
    pub initiator_depth: u8,
    /// Reads of a peer that one queue pair answers at once.
    pub responder_resources: u8,
    /// Memory windows; 0 if it has none of type 2, and nothing can be lent.
    pub windows: u32,
}

/// What all queue pairs of a device share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) completions: Arc<CompletionQueue>,
    pub(super) domain: Arc<ProtectionDomain>,
    pub(super) limits: Limits,
    pub(super) gid: Gid,
    /// Local identifier of the port.
    pub(super) lid: u16,
    queue_pairs: Mutex<QueuePairs>,
}

/// Queue pairs that are not destroyed, and what room there is for their completions.
#[derive(Debug)]
struct QueuePairs {
    by_number: HashMap<u32, Arc<Connection>>,
    room: u32,
    /// Whether nobody takes completions any more.
    broken: bool,
}

/// An entry of the table of GIDs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Gid {
    pub(super) index: u8,
    pub(super) bytes: [u8; 16],
    kind: GidKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum GidKind {
    RoceV2,
    InfiniBand,
    /// RoCE version 1 among them, which no router forwards.
    Other,
}

/// Why a device that is there cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FindError {
    /// The system does not say which there are.
    #[error("RDMA devices cannot be listed")]
    List(#[source] io::Error),
    /// It cannot be opened, or its port is down.
    #[error("{device}: the device cannot be opened, or its port is not active")]
    Open {
        /// Its name.
        device: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It has no address to connect with.
    #[error("{device}: no usable GID; give its interface an IP address, or say which GID")]
    Gid {
        /// Its name.
        device: String,
    },
    /// What queue pairs share cannot be made.
    #[error("{device}: the device cannot be set up")]
    Setup {
        /// Its name.
        device: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

impl Device {
    /// Looks for a device and opens it. `None` if there is none, none of that name, or, without
    /// a name, none that is usable: then there is no RDMA here.
    ///
    /// # Errors
    /// The device of that name cannot be used, or none can be listed.
    pub fn find(config: &DeviceConfig) -> Result<Option<Self>, FindError> {
        let devices = match ibverbs::devices() {
            Ok(devices) => devices,
            // A kernel without RDMA.
            Err(error) if error.raw_os_error() == Some(Errno::NOSYS.raw_os_error()) => {
                return Ok(None);
            }
            Err(error) => return Err(FindError::List(error)),
        };
        for device in &devices {
            let Some(name) = device.name() else { continue };
            let text = name.to_string_lossy().into_owned();
            if config.name.as_ref().is_some_and(|wanted| *wanted != text) {
                continue;
            }
            match Self::open(&device, name.to_owned(), text, config) {
                Err(error) if config.name.is_none() => {
                    tracing::debug!(error = &error as &dyn std::error::Error, "passed over");
                }
                found => return found.map(Some),
            }
        }
        Ok(None)
    }

    fn open(
        device: &ibverbs::Device<'_>,
        name: CString,
        text: String,
        config: &DeviceConfig,
    ) -> Result<Self, FindError> {
        let listed = device.open().map_err(|source| FindError::Open {
            device: text.clone(),
            source,
        })?;
        let gids: Vec<Gid> = listed
            .gid_table()
            .iter()
            .filter_map(Gid::from_entry)
            .collect();
        drop(listed);
        let Some(gid) = choose_gid(&gids, config.gid_index) else {
            return Err(FindError::Gid { device: text });
        };
        let setup = || -> io::Result<Self> {
            let context = Context::open(&name)?.ok_or(io::ErrorKind::NotFound)?;
            Self::set_up(context, gid, config)
        };
        setup().map_err(|source| FindError::Setup {
            device: text,
            source,
        })
    }

    fn set_up(context: Context, gid: Gid, config: &DeviceConfig) -> io::Result<Self> {
        let device = context.query_device()?;
        let port = context.query_port()?;
        let context = Arc::new(context);
        let entries = config.outstanding.clamp(1, count(device.max_cqe).max(1));
        let completions =
            CompletionQueue::new(&context, i32::try_from(entries).unwrap_or(i32::MAX))?;
        let shared = Arc::new(Shared {
            completions: Arc::new(completions),
            domain: Arc::new(ProtectionDomain::new(&context)?),
            limits: Limits::new(&device, &port)?,
            gid,
            lid: port.lid,
            queue_pairs: Mutex::new(QueuePairs {
                by_number: HashMap::new(),
                room: entries,
                broken: false,
            }),
        });
        Ok(Self {
            _poller: Arc::new(Poller::start(&shared)?),
            shared,
        })
    }

    /// What it can do.
    pub fn limits(&self) -> &Limits {
        &self.shared.limits
    }

    pub(super) fn domain(&self) -> &Arc<ProtectionDomain> {
        &self.shared.domain
    }
}

impl Limits {
    fn new(device: &ffi::ibv_device_attr, port: &ffi::ibv_port_attr) -> io::Result<Self> {
        let has_windows = device.device_cap_flags
            & (ffi::IBV_DEVICE_MEM_WINDOW_TYPE_2A | ffi::IBV_DEVICE_MEM_WINDOW_TYPE_2B);
        let mtu = u8::try_from(port.active_mtu).ok().and_then(Mtu::from_code);
        Ok(Self {
            region_bytes: device.max_mr_size,
            // What no message may exceed on any device (specification, volume 1, 9.4.3).
            message_bytes: port.max_msg_sz.clamp(1, 1 << 31),
            mtu: mtu.ok_or(io::ErrorKind::InvalidData)?,
            queue_depth: count(device.max_qp_wr),
            initiator_depth: small(device.max_qp_init_rd_atom),
            responder_resources: small(device.max_qp_rd_atom),
            windows: if has_windows == 0 {
                0
            } else {
                count(device.max_mw)
            },
        })
    }
}

impl Shared {
    fn queue_pairs(&self) -> MutexGuard<'_, QueuePairs> {
        // Every change is one step.
        self.queue_pairs
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps room for the completions of a queue pair; whether there was any.
    pub(super) fn reserve(&self, depth: u32) -> bool {
        let mut queue_pairs = self.queue_pairs();
        let left = queue_pairs.room.checked_sub(depth);
        if let Some(left) = left.filter(|_| !queue_pairs.broken) {
            queue_pairs.room = left;
            return true;
        }
        false
    }

    /// Gives it back. The queue pair is destroyed, and all its completions were taken.
    pub(super) fn release(&self, depth: u32) {
        self.queue_pairs().room += depth;
    }

    /// Completions with that number are its. Whether anybody takes them.
    pub(super) fn insert(&self, number: u32, connection: Arc<Connection>) -> bool {
        let mut queue_pairs = self.queue_pairs();
        queue_pairs.by_number.insert(number, connection);
        !queue_pairs.broken
    }

    /// All its completions were taken. Before it is destroyed: then another one may get its
    /// number.
    pub(super) fn remove(&self, number: u32) {
        let removed = self.queue_pairs().by_number.remove(&number);
        drop(removed);
    }

    pub(super) fn queue_pair(&self, number: u32) -> Option<Arc<Connection>> {
        self.queue_pairs().by_number.get(&number).cloned()
    }

    /// Whether all were destroyed.
    pub(super) fn is_idle(&self) -> bool {
        self.queue_pairs().by_number.is_empty()
    }

    /// Nobody takes completions any more. Whose are missing.
    pub(super) fn break_down(&self) -> Vec<Arc<Connection>> {
        let mut queue_pairs = self.queue_pairs();
        queue_pairs.broken = true;
        queue_pairs.by_number.values().cloned().collect()
    }
}

impl Gid {
    fn from_entry(entry: &ibverbs::GidEntry) -> Option<Self> {
        if entry.port_num != 1 {
            return None;
        }
        let mut bytes = [0; 16];
        let (prefix, interface) = bytes.split_at_mut(8);
        prefix.copy_from_slice(&entry.gid.subnet_prefix().to_be_bytes());
        interface.copy_from_slice(&entry.gid.interface_id().to_be_bytes());
        Some(Self {
            // Address vectors have a byte for it.
            index: u8::try_from(entry.gid_index).ok()?,
            bytes,
            kind: match entry.gid_type {
                ffi::IBV_GID_TYPE_ROCE_V2 => GidKind::RoceV2,
                ffi::IBV_GID_TYPE_IB => GidKind::InfiniBand,
                _ => GidKind::Other,
            },
        })
    }

    /// Less is better; `None` is not chosen unless it is asked for.
    fn rank(&self) -> Option<u8> {
        let address = std::net::Ipv6Addr::from(self.bytes);
        match self.kind {
            GidKind::RoceV2 if address.to_ipv4_mapped().is_some() => Some(0),
            GidKind::RoceV2 if !address.is_unicast_link_local() => Some(1),
            GidKind::RoceV2 => Some(2),
            GidKind::InfiniBand => Some(3),
            GidKind::Other => None,
        }
    }
}

/// The one that is asked for, or the best one.
fn choose_gid(gids: &[Gid], wanted: Option<u8>) -> Option<Gid> {
    match wanted {
        Some(index) => gids.iter().copied().find(|gid| gid.index == index),
        None => gids
            .iter()
            .filter_map(|gid| Some((gid.rank()?, gid.index, *gid)))
            .min_by_key(|&(rank, index, _)| (rank, index))
            .map(|(.., gid)| gid),
    }
}

fn count(attribute: i32) -> u32 {
    u32::try_from(attribute).unwrap_or(0)
}

fn small(attribute: i32) -> u8 {
    u8::try_from(attribute.max(0)).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINK_LOCAL: &str = "fe80::1";
    const IPV4: &str = "::ffff:10.9.9.1";
    const IPV6: &str = "2001:db8::1";

    fn gid(index: u8, kind: GidKind, address: &str) -> Gid {
        let address: std::net::Ipv6Addr = address.parse().unwrap();
        Gid {
            index,
            bytes: address.octets(),
            kind,
        }
    }

    #[test]
    fn a_gid_that_is_routed_is_chosen() {
        use GidKind::{InfiniBand, Other, RoceV2};
        let link_local = gid(0, RoceV2, LINK_LOCAL);
        let v1 = gid(1, Other, IPV4);
        let v4 = gid(2, RoceV2, IPV4);
        let v6 = gid(3, RoceV2, IPV6);
        let second = gid(4, RoceV2, IPV4);
        let infiniband = gid(0, InfiniBand, LINK_LOCAL);
        let choose = |gids: &[Gid]| choose_gid(gids, None);
        assert_eq!(choose(&[link_local, v1, v6, v4, second]), Some(v4));
        assert_eq!(choose(&[link_local, v1, v6]), Some(v6));
        assert_eq!(choose(&[v1, link_local]), Some(link_local));
        assert_eq!(choose(&[infiniband]), Some(infiniband));
        assert_eq!(choose(&[v1]), None);
        assert_eq!(choose_gid(&[v1, v4], Some(1)), Some(v1));
        assert_eq!(choose_gid(&[v1, v4], Some(7)), None);
    }

    #[test]
    fn limits_are_what_fits() {
        let mut device = ffi::ibv_device_attr {
            max_mr_size: u64::MAX,
            max_qp_wr: -1,
            max_qp_rd_atom: 128,
            max_qp_init_rd_atom: 300,
            max_mw: 17,
            ..Default::default()
        };
        let mut port = ffi::ibv_port_attr {
            active_mtu: ffi::IBV_MTU_4096,
            max_msg_sz: u32::MAX,
            ..Default::default()
        };
        let limits = Limits::new(&device, &port).unwrap();
        assert_eq!(limits.queue_depth, 0);
        assert_eq!(
            (limits.initiator_depth, limits.responder_resources),
            (255, 128)
        );
        assert_eq!(limits.message_bytes, 1 << 31);
        assert_eq!(limits.windows, 0);
        assert_eq!(limits.mtu.bytes(), 4096);
        device.device_cap_flags = ffi::IBV_DEVICE_MEM_WINDOW_TYPE_2B;
        assert_eq!(Limits::new(&device, &port).unwrap().windows, 17);
        port.active_mtu = 77;
        assert!(Limits::new(&device, &port).is_err());
    }

    /// Machines without RDMA, which most are, have no device and no error.
    #[test]
    fn of_a_name_that_no_device_has_there_is_none() {
        let config = DeviceConfig {
            name: Some("no-such-device".to_owned()),
            ..DeviceConfig::default()
        };
        assert!(Device::find(&config).unwrap().is_none());
    }
}
