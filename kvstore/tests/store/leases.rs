//! Leases with names.

use kvasir_store::{HoldRefused, LeaseId, Store, TierKind};
use kvasir_types::ByteSize;

use crate::{all, close, key, memory_only, object, on_disk};

#[tokio::test]
async fn a_name_reads_what_was_leased_whatever_becomes_of_it() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    for number in 0..3 {
        let _ = store.put(object(number)).await.unwrap();
    }
    close(store).await;
    let store = Store::open(on_disk(directory.path())).await.unwrap();
    let mut session = store.lease_session();
    let mut leases = Vec::new();
    for number in [0, 1] {
        leases.push(store.lease(key(number)).await.unwrap());
    }
    let id = session.hold(leases).unwrap();
    assert_eq!(LeaseId::from_u64(id.as_u64()), id);
    assert!(!session.was_used());
    for number in 0..3 {
        assert!(store.delete(key(number)).await.unwrap());
        let _ = store.put(object(number)).await.unwrap();
    }
    for number in [0, 1] {
        let lease = store.leased(id, &key(number)).unwrap();
        let layers = lease.read_extents(all()).await.unwrap();
        assert_eq!(layers, object(number).extents());
    }
    assert!(store.leased(id, &key(2)).is_none(), "it was not leased");
    assert!(session.was_used() && !session.was_used());
    assert_eq!(store.stats().leases, 2);

    assert!(session.release(id));
    assert!(!session.release(id));
    assert!(!store.lease_lasts(id));
    assert_eq!(store.stats().leases, 0);
    // The slot is used again, the name is not.
    let lease = store.lease(key(0)).await.unwrap();
    let next = session.hold(vec![lease]).unwrap();
    assert_ne!(next, id);
    assert!(store.leased(id, &key(0)).is_none());
    assert!(!store.lease_session().release(next), "another's");
    drop(session);
    assert!(store.leased(next, &key(0)).is_none());
    assert_eq!(store.stats().leases, 0);
}

#[tokio::test]
async fn names_hold_half_of_a_tier_at_most() {
    let bytes = object(0).header().object_bytes();
    let capacity = ByteSize::bytes(Store::charged_bytes(object(0).header()) * 4);
    let store = Store::open(memory_only(capacity)).await.unwrap();
    for number in 0..3 {
        let _ = store.put(object(number)).await.unwrap();
    }
    let mut session = store.lease_session();
    let mut ids = Vec::new();
    for number in 0..3 {
        let lease = store.lease(key(number)).await.unwrap();
        ids.push(session.hold(vec![lease]));
    }
    let refused = HoldRefused {
        tier: TierKind::Memory,
        wanted: bytes,
        held: bytes * 2,
        limit: capacity.as_u64() / 2,
    };
    assert_eq!(ids[2], Err(refused));
    assert_eq!(store.stats().leases, 2, "what was refused is not held");
    assert!(session.release(ids[0].unwrap()));
    let lease = store.lease(key(2)).await.unwrap();
    session.hold(vec![lease]).unwrap();
}
