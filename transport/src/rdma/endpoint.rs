//! What two ends tell each other to connect their queue pairs.

#![deny(clippy::indexing_slicing)]

/// Where a queue pair is, and how it is to be talked to.
///
/// ```text
/// version (u8) ‖ MTU (u8) ‖ responder resources (u8) ‖ 0 (u8) ‖ number (u32)
/// ‖ packet sequence number (u32) ‖ LID (u16) ‖ 0 (u16) ‖ GID (16 bytes)
/// ```
///
/// Numbers are little-endian, the GID is as on the wire. It says where to send packets, so it
/// is to come over a channel that authenticates the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The queue pair's number, 24 bits.
    pub queue_pair: u32,
    /// Number of the first packet, 24 bits.
    pub psn: u32,
    /// Address of its port; with RoCE it says network and IP address.
    pub gid: [u8; 16],
    /// Local identifier of its port; 0 with RoCE.
    pub lid: u16,
    /// The most that its port takes in a packet.
    pub mtu: Mtu,
    /// How many reads it answers at once; one at least.
    pub responder_resources: u8,
}

/// Payload of a packet: `enum ibv_mtu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mtu(u8);

/// Why bytes are not an [`Endpoint`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EndpointError {
    /// Too few or too many.
    #[error("an endpoint of {0} bytes, not of {len}", len = Endpoint::LEN)]
    Length(usize),
    /// Of another version.
    #[error("an endpoint of version {0}, not of version {VERSION}")]
    Version(u8),
    /// A field has a value that no queue pair has.
    #[error("an endpoint whose {0} cannot be")]
    Field(&'static str),
}

impl Endpoint {
    /// Bytes of every endpoint.
    pub const LEN: usize = 32;

    /// As bytes.
    pub fn to_bytes(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        let mut rest = bytes.as_mut_slice();
        let mut put = |field: &[u8]| {
            let (place, others) = std::mem::take(&mut rest).split_at_mut(field.len());
            place.copy_from_slice(field);
            rest = others;
        };
        put(&[VERSION, self.mtu.0, self.responder_resources, 0]);
        put(&self.queue_pair.to_le_bytes());
        put(&self.psn.to_le_bytes());
        put(&self.lid.to_le_bytes());
        put(&[0; 2]);
        put(&self.gid);
        bytes
    }

    /// Out of bytes that anybody may have sent.
    ///
    /// # Errors
    /// They are no endpoint that a queue pair could be connected with.
    pub fn parse(bytes: &[u8]) -> Result<Self, EndpointError> {
        let exact: &[u8; Self::LEN] = bytes
            .try_into()
            .map_err(|_| EndpointError::Length(bytes.len()))?;
        let [version, mtu, responder_resources, _, rest @ ..] = *exact;
        if version != VERSION {
            return Err(EndpointError::Version(version));
        }
        let [q0, q1, q2, q3, p0, p1, p2, p3, l0, l1, _, _, gid @ ..] = rest;
        let endpoint = Self {
            queue_pair: u32::from_le_bytes([q0, q1, q2, q3]),
            psn: u32::from_le_bytes([p0, p1, p2, p3]),
            gid,
            lid: u16::from_le_bytes([l0, l1]),
            mtu: Mtu::from_code(mtu).ok_or(EndpointError::Field("MTU"))?,
            responder_resources,
        };
        endpoint.check()?;
        Ok(endpoint)
    }

    fn check(&self) -> Result<(), EndpointError> {
        // 0 and 1 are for management, the last one is for multicast (InfiniBand Architecture
        // Specification, volume 1, 3.5.3 and 10.2.4).
        if !(2..LAST_QUEUE_PAIR).contains(&self.queue_pair) {
            return Err(EndpointError::Field("queue pair's number"));
        }
        if self.psn > LAST_PSN {
            return Err(EndpointError::Field("packet sequence number"));
        }
        let multicast = self.gid.first() == Some(&0xff);
        if multicast || self.gid == [0; 16] {
            return Err(EndpointError::Field("GID"));
        }
        if self.responder_resources == 0 {
            return Err(EndpointError::Field("number of reads answered"));
        }
        Ok(())
    }
}

impl Mtu {
    /// As `enum ibv_mtu` counts: 1 is 256 bytes, 5 is 4,096.
    pub fn from_code(code: u8) -> Option<Self> {
        (1..=5).contains(&code).then_some(Self(code))
    }

    /// As `enum ibv_mtu` counts.
    pub fn code(self) -> u8 {
        self.0
    }

    /// Bytes.
    pub fn bytes(self) -> u32 {
        128 << self.0
    }
}

const VERSION: u8 = 1;
const LAST_PSN: u32 = (1 << 24) - 1;
const LAST_QUEUE_PAIR: u32 = (1 << 24) - 1;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    prop_compose! {
        fn endpoints()(
            queue_pair in 2..LAST_QUEUE_PAIR,
            psn in 0..=LAST_PSN,
            mut gid in any::<[u8; 16]>(),
            lid: u16,
            mtu in 1u8..=5,
            responder_resources in 1u8..,
        ) -> Endpoint {
            gid[0] = 0x20;
            Endpoint { queue_pair, psn, gid, lid, mtu: Mtu(mtu), responder_resources }
        }
    }

    proptest! {
        #[test]
        fn comes_back_as_it_was(endpoint in endpoints()) {
            prop_assert_eq!(Endpoint::parse(&endpoint.to_bytes()), Ok(endpoint));
        }

        /// Whatever is parsed can be connected with.
        #[test]
        fn hostile_bytes_are_refused_or_valid(bytes in any::<[u8; Endpoint::LEN]>(), versioned: bool) {
            let mut bytes = bytes;
            if versioned {
                bytes[0] = VERSION;
            }
            if let Ok(endpoint) = Endpoint::parse(&bytes) {
                prop_assert!(endpoint.queue_pair > 1 && endpoint.queue_pair < LAST_QUEUE_PAIR);
                prop_assert!(endpoint.psn <= LAST_PSN);
                prop_assert!((256..=4096).contains(&endpoint.mtu.bytes()));
                prop_assert_ne!(endpoint.responder_resources, 0);
            }
        }

        #[test]
        fn of_another_length_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            prop_assume!(bytes.len() != Endpoint::LEN);
            prop_assert_eq!(Endpoint::parse(&bytes), Err(EndpointError::Length(bytes.len())));
        }
    }

    #[test]
    fn each_field_is_checked() {
        let valid = Endpoint {
            queue_pair: 17,
            psn: 5,
            gid: [1; 16],
            lid: 0,
            mtu: Mtu(5),
            responder_resources: 16,
        };
        let parse = |endpoint: Endpoint| Endpoint::parse(&endpoint.to_bytes());
        assert_eq!(parse(valid), Ok(valid));
        let refused = |endpoint: Endpoint| matches!(parse(endpoint), Err(EndpointError::Field(_)));
        for queue_pair in [0, 1, LAST_QUEUE_PAIR, u32::MAX] {
            assert!(refused(Endpoint {
                queue_pair,
                ..valid
            }));
        }
        assert!(refused(Endpoint {
            psn: 1 << 24,
            ..valid
        }));
        assert!(refused(Endpoint {
            gid: [0; 16],
            ..valid
        }));
        assert!(refused(Endpoint {
            gid: [0xff; 16],
            ..valid
        }));
        assert!(refused(Endpoint {
            mtu: Mtu(0),
            ..valid
        }));
        assert!(refused(Endpoint {
            mtu: Mtu(6),
            ..valid
        }));
        assert!(refused(Endpoint {
            responder_resources: 0,
            ..valid
        }));
        let mut other = valid.to_bytes();
        other[0] = 2;
        assert_eq!(Endpoint::parse(&other), Err(EndpointError::Version(2)));
    }

    #[test]
    fn bytes_of_an_mtu() {
        let bytes = (1..=5).filter_map(Mtu::from_code).map(Mtu::bytes);
        assert!(bytes.eq([256, 512, 1024, 2048, 4096]));
    }
}
