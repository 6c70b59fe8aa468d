//! Leases that have names, for holders in other processes.
//!
//! A holder across the wire cannot own a [`Lease`]; it names one that its session owns
//! here. Names are never used twice within a run: a slot that is used again has a new
//! generation, so a stale name finds nothing rather than something else. All leases of
//! a session end with it. No safety rests on a clock: a lease that ended early costs
//! its holder a miss.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvasir_types::ChunkKey;

use crate::lease::Lease;
use crate::tier::TierKind;

/// The name of some leases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LeaseId {
    slot: u32,
    generation: u32,
}

impl LeaseId {
    /// From [`as_u64`](Self::as_u64).
    pub const fn from_u64(id: u64) -> Self {
        let [a, b, c, d, e, f, g, h] = id.to_le_bytes();
        Self {
            slot: u32::from_le_bytes([a, b, c, d]),
            generation: u32::from_le_bytes([e, f, g, h]),
        }
    }

    /// The generation in the upper half, the slot in the lower.
    pub const fn as_u64(self) -> u64 {
        (self.generation as u64) << 32 | self.slot as u64
    }
}

/// More bytes would be held than named leases may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{wanted} bytes more would be held in the {tier} tier, where {held} of at most {limit} are; \
     release leases, or hold fewer chunks"
)]
pub struct HoldRefused {
    /// The tier.
    pub tier: TierKind,
    /// Bytes asked for.
    pub wanted: u64,
    /// Bytes held.
    pub held: u64,
    /// The limit.
    pub limit: u64,
}

/// All named leases of a store.
#[derive(Clone, Debug)]
pub(crate) struct Leases(Arc<Mutex<Table>>);

#[derive(Debug)]
struct Table {
    slots: Vec<Slot>,
    free: Vec<u32>,
    first_generation: u32,
    memory: Bound,
    disk: Bound,
}

#[derive(Debug)]
struct Slot {
    generation: u32,
    held: Option<Held>,
}

#[derive(Debug)]
struct Held {
    leases: HashMap<ChunkKey, Arc<Lease>>,
    used: Arc<AtomicBool>,
}

#[derive(Clone, Copy, Debug)]
struct Bound {
    held: u64,
    limit: u64,
}

/// One holder's leases. All of them end when this is dropped.
#[derive(Debug)]
pub struct LeaseSession {
    table: Leases,
    ids: Vec<LeaseId>,
    used: Arc<AtomicBool>,
}

impl Leases {
    /// At most `memory` and `disk` bytes are held. `epoch` decides where generations
    /// start, so that another run's names are not this run's.
    pub(crate) fn new(epoch: u64, memory: u64, disk: u64) -> Self {
        let first_generation = LeaseId::from_u64(epoch).generation;
        Self(Arc::new(Mutex::new(Table {
            slots: Vec::new(),
            free: Vec::new(),
            first_generation,
            memory: Bound {
                held: 0,
                limit: memory,
            },
            disk: Bound {
                held: 0,
                limit: disk,
            },
        })))
    }

    pub(crate) fn session(&self) -> LeaseSession {
        LeaseSession {
            table: self.clone(),
            ids: Vec::new(),
            used: Arc::default(),
        }
    }

    /// The lease of one chunk.
    pub(crate) fn get(&self, id: LeaseId, key: &ChunkKey) -> Option<Arc<Lease>> {
        let table = self.lock();
        let slot = table.slots.get(id.slot as usize)?;
        let held = slot
            .held
            .as_ref()
            .filter(|_| slot.generation == id.generation)?;
        held.used.store(true, Ordering::Relaxed);
        held.leases.get(key).map(Arc::clone)
    }

    /// Whether the name is in use.
    pub(crate) fn lasts(&self, id: LeaseId) -> bool {
        let table = self.lock();
        let slot = table.slots.get(id.slot as usize);
        slot.is_some_and(|slot| slot.generation == id.generation && slot.held.is_some())
    }

    fn insert(&self, held: Held) -> Result<LeaseId, HoldRefused> {
        let mut table = self.lock();
        let bytes = bytes_of(&held);
        for (tier, wanted) in bytes {
            let bound = *table.bound(tier);
            if wanted > bound.limit.saturating_sub(bound.held) {
                return Err(HoldRefused {
                    tier,
                    wanted,
                    held: bound.held,
                    limit: bound.limit,
                });
            }
        }
        for (tier, wanted) in bytes {
            table.bound(tier).held += wanted;
        }
        let generation = table.first_generation;
        let slot = match table.free.pop() {
            Some(slot) => slot,
            None => {
                table.slots.push(Slot {
                    generation,
                    held: None,
                });
                u32::try_from(table.slots.len() - 1).expect("memory ends before 2^32 leases")
            }
        };
        let place = &mut table.slots[slot as usize];
        place.held = Some(held);
        Ok(LeaseId {
            slot,
            generation: place.generation,
        })
    }

    fn remove(&self, id: LeaseId) -> bool {
        let mut table = self.lock();
        let Some(slot) = table.slots.get_mut(id.slot as usize) else {
            return false;
        };
        if slot.generation != id.generation {
            return false;
        }
        let Some(held) = slot.held.take() else {
            return false;
        };
        slot.generation = slot.generation.wrapping_add(1);
        table.free.push(id.slot);
        for (tier, bytes) in bytes_of(&held) {
            table.bound(tier).held -= bytes;
        }
        // What the leases hold is freed after the lock is.
        drop(table);
        true
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn bound(&mut self, tier: TierKind) -> &mut Bound {
        match tier {
            TierKind::Memory => &mut self.memory,
            TierKind::Disk => &mut self.disk,
        }
    }
}

impl LeaseSession {
    /// Names leases. Of several leases of one chunk, the first stays.
    ///
    /// # Errors
    /// All named leases together would hold more than half of a tier. Then these end.
    pub fn hold(&mut self, leases: Vec<Lease>) -> Result<LeaseId, HoldRefused> {
        let mut by_key = HashMap::with_capacity(leases.len());
        for lease in leases {
            if let Entry::Vacant(entry) = by_key.entry(*lease.key()) {
                entry.insert(Arc::new(lease));
            }
        }
        let id = self.table.insert(Held {
            leases: by_key,
            used: Arc::clone(&self.used),
        })?;
        self.ids.push(id);
        Ok(id)
    }

    /// Ends leases. Says whether this session had them.
    pub fn release(&mut self, id: LeaseId) -> bool {
        let place = self.ids.iter().position(|own| *own == id);
        place.is_some_and(|place| {
            self.ids.swap_remove(place);
            self.table.remove(id)
        })
    }

    /// Whether a lease was read by its name since this was asked last.
    pub fn was_used(&self) -> bool {
        self.used.swap(false, Ordering::Relaxed)
    }
}

impl Drop for LeaseSession {
    fn drop(&mut self) {
        for id in std::mem::take(&mut self.ids) {
            self.table.remove(id);
        }
    }
}

/// What leases hold in each tier.
fn bytes_of(held: &Held) -> [(TierKind, u64); 2] {
    [TierKind::Memory, TierKind::Disk].map(|tier| {
        let leases = held.leases.values().filter(|lease| lease.tier() == tier);
        (tier, leases.map(|lease| lease.bytes()).sum())
    })
}
