//! Reads extents of leased chunks, for gets over any wire.

use std::time::Duration;

use bytes::Bytes;
use kvasir_proto::sequence::Place;
use kvasir_proto::v1::chunk_lost::Reason;
use kvasir_store::{Lease, ReadError, Store};
use kvasir_types::{Checksum, ExtentIdx};

/// An extent and the checksum that its header states, which the store has compared.
pub(crate) async fn extent(
    store: &Store,
    lease: &Lease,
    place: &Place,
) -> Result<(Bytes, Checksum), Reason> {
    let failed = match read(lease, place.extent).await {
        Ok(read) => return Ok(read),
        Err(ReadError::Throttled(_)) => return Err(Reason::Throttled),
        Err(error) => error,
    };
    let key = lease.key();
    // The bad copy is gone; another tier may have a good one.
    if matches!(failed, ReadError::Corrupt { .. })
        && let Some(other) = store.lease(*key).await
        && other.layout() == lease.layout()
        && other.level() == lease.level()
        && let Ok(read) = read(&other, place.extent).await
    {
        return Ok(read);
    }
    tracing::warn!(%key, extent = %place.extent, error = %failed, "a chunk was lost while being sent");
    Err(match failed {
        ReadError::Corrupt { .. } => Reason::Corrupt,
        _ => Reason::Device,
    })
}

/// As [`extent`]; waits a little where memory is short: other receivers are about to let go.
pub(crate) async fn extent_patiently(
    store: &Store,
    lease: &Lease,
    place: &Place,
) -> Result<(Bytes, Checksum), Reason> {
    for _ in 0..THROTTLED_WAITS {
        match extent(store, lease, place).await {
            Err(Reason::Throttled) => tokio::time::sleep(THROTTLED_WAIT).await,
            read => return read,
        }
    }
    extent(store, lease, place).await
}

async fn read(lease: &Lease, extent: ExtentIdx) -> Result<(Bytes, Checksum), ReadError> {
    let out_of_range = || ReadError::OutOfRange {
        range: extent.alone(),
        extents: lease.header().all().end(),
    };
    let entry = lease.header().extent(extent).ok_or_else(out_of_range)?;
    let checksum = entry.checksum;
    let data = lease.read_extents(extent.alone()).await?.pop();
    Ok((data.ok_or_else(out_of_range)?, checksum))
}

const THROTTLED_WAIT: Duration = Duration::from_millis(5);
/// A quarter of a second in all.
const THROTTLED_WAITS: u32 = 50;
