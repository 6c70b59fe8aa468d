//! Which of an engine's chunks a daemon has, as the daemon tells: for engines that publish KV
//! events, and routers that listen to them.
//!
//! An engine is told of chunks that it asked for, and of no others. What it is told holds until it
//! is told otherwise: while a daemon cannot be reached nothing is told, and when it is back, its
//! snapshot says what has changed.
//!
//! Of all that the daemon has 20 to 40 bytes are kept for each chunk. Without it, nobody could say
//! whether a chunk that leaves a tier has a copy in another.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvasir_client::{CallError, Client, Tier, WatchEvent, WatchedChange};
use kvasir_types::ChunkKey;
use lru::LruCache;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tracing::warn;

/// Chunks that an engine wants to be told about, each with what the engine calls it.
///
/// Dropping it ends the watch.
#[derive(Debug)]
pub struct Residency<T> {
    known: Arc<Mutex<Known<T>>>,
    follower: JoinHandle<()>,
}

/// What became of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change<T> {
    /// The daemon has it, in one tier at least.
    Stored(T),
    /// It has not; or it is not followed any more, and the engine cannot know.
    Removed(T),
}

impl<T: Clone + Send + 'static> Residency<T> {
    /// Follows the daemon of `client`, on `runtime`. Of more than `limit` chunks, those that were
    /// asked for first are given up.
    pub fn follow(client: Client, runtime: &Handle, limit: NonZeroUsize) -> Self {
        let known = Arc::new(Mutex::new(Known::new(limit)));
        let follower = runtime.spawn(follow(client, Arc::clone(&known)));
        Self { known, follower }
    }

    /// Asks to be told about chunks, whether they are there already or come one day.
    pub fn expect(&self, chunks: impl IntoIterator<Item = (ChunkKey, T)>) {
        let mut known = lock(&self.known);
        for (key, name) in chunks {
            known.expect(&key, name);
        }
    }

    /// What has become of them since this was called last, in order. One that is removed is not
    /// followed any more until it is asked for again.
    pub fn take(&self) -> Vec<Change<T>> {
        std::mem::take(&mut lock(&self.known).changes)
    }

    /// Gives all of them up.
    pub fn clear(&self) {
        lock(&self.known).clear();
    }
}

impl<T> Drop for Residency<T> {
    fn drop(&mut self) {
        self.follower.abort();
    }
}

fn lock<T>(known: &Mutex<Known<T>>) -> MutexGuard<'_, Known<T>> {
    // Each of its calls leaves it whole.
    known.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
struct Known<T> {
    /// All that the daemon has: for each chunk, a bit for each tier.
    present: HashMap<Id, u8>,
    /// The snapshot that is arriving.
    arriving: HashMap<Id, u8>,
    position: Position,
    /// What was asked for.
    chunks: LruCache<Id, Chunk<T>>,
    changes: Vec<Change<T>>,
}

#[derive(Debug)]
struct Chunk<T> {
    name: T,
    is_told: bool,
}

/// Keys are digests: any 64 bits of them will do.
type Id = u64;

fn id(key: &ChunkKey) -> Id {
    let [a, b, c, d, e, f, g, h, ..] = *key.as_bytes();
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

/// Where a listener is in a daemon's changes: epoch and sequence.
#[derive(Clone, Copy, Debug)]
enum Position {
    /// A snapshot has to come first.
    Nowhere,
    /// Within one.
    Within(u64, u64),
    /// Behind a snapshot, and what came since.
    Behind(u64, u64),
}

impl<T: Clone> Known<T> {
    fn new(limit: NonZeroUsize) -> Self {
        Self {
            present: HashMap::new(),
            arriving: HashMap::new(),
            position: Position::Nowhere,
            chunks: LruCache::new(limit),
            changes: Vec::new(),
        }
    }

    fn expect(&mut self, key: &ChunkKey, name: T) {
        let id = id(key);
        if self.chunks.get(&id).is_some() {
            return;
        }
        // Of a daemon that cannot be reached it is told when it is back.
        let is_told =
            matches!(self.position, Position::Behind(..)) && self.present.contains_key(&id);
        if is_told {
            self.changes.push(Change::Stored(name.clone()));
        }
        if let Some((_, given_up)) = self.chunks.push(id, Chunk { name, is_told }) {
            self.changes.extend(given_up.removed());
        }
    }

    fn clear(&mut self) {
        while let Some((_, chunk)) = self.chunks.pop_lru() {
            self.changes.extend(chunk.removed());
        }
    }

    /// What is known holds, and a snapshot has to come before anything else.
    fn disconnected(&mut self) {
        self.position = Position::Nowhere;
        self.arriving = HashMap::new();
    }

    fn take(&mut self, event: WatchEvent) -> Result<(), OutOfStep> {
        let WatchEvent {
            epoch,
            sequence,
            change,
        } = event;
        match (change, self.position) {
            (WatchedChange::Snapshot { copies, more }, position) => {
                if let Position::Within(of, at) = position
                    && (of, at) != (epoch, sequence)
                {
                    return Err(OutOfStep);
                }
                for (key, tier) in copies {
                    *self.arriving.entry(id(&key)).or_default() |= bit(tier);
                }
                self.position = if more {
                    Position::Within(epoch, sequence)
                } else {
                    self.end_snapshot();
                    Position::Behind(epoch, sequence)
                };
                return Ok(());
            }
            // The snapshot has it.
            (_, Position::Behind(of, at)) if of == epoch && sequence <= at => return Ok(()),
            (WatchedChange::Stored { key, tier }, Position::Behind(of, at))
                if of == epoch && at.checked_add(1) == Some(sequence) =>
            {
                self.stored(id(&key), tier);
            }
            (WatchedChange::Removed { key, tier }, Position::Behind(of, at))
                if of == epoch && at.checked_add(1) == Some(sequence) =>
            {
                self.removed(id(&key), tier);
            }
            _ => return Err(OutOfStep),
        }
        self.position = Position::Behind(epoch, sequence);
        Ok(())
    }

    fn stored(&mut self, id: Id, tier: Tier) {
        *self.present.entry(id).or_default() |= bit(tier);
        if let Some(chunk) = self.chunks.peek_mut(&id) {
            self.changes.extend(chunk.stored());
        }
    }

    fn removed(&mut self, id: Id, tier: Tier) {
        if let Entry::Occupied(mut tiers) = self.present.entry(id) {
            *tiers.get_mut() &= !bit(tier);
            if *tiers.get() == 0 {
                tiers.remove();
                self.gone(id);
            }
        }
    }

    fn gone(&mut self, id: Id) {
        // One that has not come yet may still come.
        if self.chunks.peek(&id).is_some_and(|chunk| chunk.is_told)
            && let Some(chunk) = self.chunks.pop(&id)
        {
            self.changes.extend(chunk.removed());
        }
    }

    fn end_snapshot(&mut self) {
        self.present = std::mem::take(&mut self.arriving);
        let mut gone = Vec::new();
        for (id, chunk) in &mut self.chunks {
            if self.present.contains_key(id) {
                self.changes.extend(chunk.stored());
            } else {
                gone.push(*id);
            }
        }
        for id in gone {
            self.gone(id);
        }
    }
}

impl<T: Clone> Chunk<T> {
    fn stored(&mut self) -> Option<Change<T>> {
        let is_told = std::mem::replace(&mut self.is_told, true);
        (!is_told).then(|| Change::Stored(self.name.clone()))
    }

    fn removed(self) -> Option<Change<T>> {
        self.is_told.then_some(Change::Removed(self.name))
    }
}

fn bit(tier: Tier) -> u8 {
    match tier {
        Tier::Memory => 1,
        Tier::Disk => 2,
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the daemon's changes do not follow from each other")]
struct OutOfStep;

/// Why a daemon is not followed at the moment.
#[derive(Debug, thiserror::Error)]
enum FollowError {
    #[error("the watch failed")]
    Call(#[from] CallError),
    #[error("the daemon ended the watch")]
    Ended,
    #[error(transparent)]
    OutOfStep(#[from] OutOfStep),
}

async fn follow<T: Clone>(client: Client, known: Arc<Mutex<Known<T>>>) {
    let mut is_said = false;
    loop {
        let Err(error) = session(&client, &known, &mut is_said).await;
        lock(&known).disconnected();
        if !std::mem::replace(&mut is_said, true) {
            let error: &(dyn std::error::Error + 'static) = &error;
            warn!(
                error,
                "the daemon does not tell what it has; it is asked again"
            );
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn session<T: Clone>(
    client: &Client,
    known: &Mutex<Known<T>>,
    is_said: &mut bool,
) -> Result<std::convert::Infallible, FollowError> {
    let mut watch = client.watch().await?;
    loop {
        let event = watch.next().await?.ok_or(FollowError::Ended)?;
        lock(known).take(event)?;
        *is_said = false;
    }
}

/// How long after a failure the daemon is asked again.
const PAUSE: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use proptest::prelude::*;

    use super::*;

    const CHUNKS: u8 = 8;
    const TIERS: [Tier; 2] = [Tier::Memory, Tier::Disk];

    fn key(chunk: u8) -> ChunkKey {
        ChunkKey::from_bytes([chunk; 32])
    }

    fn known(limit: usize) -> Known<u8> {
        Known::new(NonZeroUsize::new(limit).unwrap())
    }

    /// A daemon that says what it does.
    #[derive(Default)]
    struct Daemon {
        epoch: u64,
        sequence: u64,
        copies: HashSet<(u8, usize)>,
    }

    impl Daemon {
        fn has(&self, chunk: u8) -> bool {
            (0..TIERS.len()).any(|tier| self.copies.contains(&(chunk, tier)))
        }

        /// What a listener hears of a change, if it is one.
        fn change(&mut self, chunk: u8, tier: usize) -> WatchEvent {
            self.sequence += 1;
            let (key, of) = (key(chunk), TIERS[tier]);
            let change = if self.copies.insert((chunk, tier)) {
                WatchedChange::Stored { key, tier: of }
            } else {
                self.copies.remove(&(chunk, tier));
                WatchedChange::Removed { key, tier: of }
            };
            WatchEvent {
                epoch: self.epoch,
                sequence: self.sequence,
                change,
            }
        }

        fn snapshot(&self) -> Vec<WatchEvent> {
            let mut copies: Vec<_> = self.copies.iter().copied().collect();
            copies.sort_unstable();
            let mut parts: Vec<_> = copies.chunks(3).map(<[_]>::to_vec).collect();
            parts.push(Vec::new());
            let last = parts.len() - 1;
            let part = |(at, part): (usize, Vec<(u8, usize)>)| WatchEvent {
                epoch: self.epoch,
                sequence: self.sequence,
                change: WatchedChange::Snapshot {
                    copies: part.iter().map(|it| (key(it.0), TIERS[it.1])).collect(),
                    more: at < last,
                },
            };
            parts.into_iter().enumerate().map(part).collect()
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Change(u8, usize),
        Expect(u8),
        /// The connection is lost; so many changes go unheard; then it is back, maybe after it was
        /// lost in the middle of a snapshot.
        Lose(Vec<(u8, usize)>, bool),
        Restart,
        Clear,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let change = || (0..CHUNKS, 0..TIERS.len());
        let step = prop_oneof![
            8 => change().prop_map(|(chunk, tier)| Step::Change(chunk, tier)),
            4 => (0..CHUNKS).prop_map(Step::Expect),
            1 => (prop::collection::vec(change(), 0..6), any::<bool>())
                .prop_map(|(unheard, twice)| Step::Lose(unheard, twice)),
            1 => Just(Step::Restart),
            1 => Just(Step::Clear),
        ];
        prop::collection::vec(step, 0..80)
    }

    proptest! {
        /// What an engine was told of is there, and what it waits for is not.
        #[test]
        fn what_is_told_is_what_is_there(steps in steps(), limit in 1..=usize::from(CHUNKS)) {
            let (mut known, mut daemon) = (known(limit), Daemon::default());
            // What the engine has been told last of each, and what it asked for since.
            let (mut told, mut asked) = (HashMap::new(), HashSet::new());
            let mut is_in_step = false;
            for step in steps {
                match step {
                    Step::Change(chunk, tier) => {
                        let event = daemon.change(chunk, tier);
                        prop_assert_eq!(known.take(event).is_ok(), is_in_step);
                    }
                    Step::Expect(chunk) => {
                        let before = known.changes.len();
                        known.expect(&key(chunk), chunk);
                        asked.insert(chunk);
                        let is_stored = |it: &Change<u8>| matches!(it, Change::Stored(_));
                        let told = known.changes[before..].iter().any(is_stored);
                        prop_assert!(is_in_step || !told, "nobody could know");
                    }
                    Step::Lose(unheard, twice) => {
                        if twice {
                            known.disconnected();
                            let _ = known.take(daemon.snapshot().swap_remove(0));
                        }
                        known.disconnected();
                        for (chunk, tier) in unheard {
                            daemon.change(chunk, tier);
                        }
                        for part in daemon.snapshot() {
                            known.take(part).unwrap();
                        }
                        is_in_step = true;
                    }
                    Step::Restart => {
                        daemon = Daemon { epoch: daemon.epoch + 1, ..Daemon::default() };
                        prop_assert_eq!(known.take(daemon.change(0, 0)), Err(OutOfStep));
                        known.disconnected();
                        is_in_step = false;
                    }
                    Step::Clear => {
                        known.clear();
                        asked.clear();
                    }
                }
                for change in std::mem::take(&mut known.changes) {
                    let (chunk, is_there) = match change {
                        Change::Stored(chunk) => (chunk, true),
                        Change::Removed(chunk) => (chunk, false),
                    };
                    prop_assert_ne!(told.insert(chunk, is_there).unwrap_or(false), is_there);
                    if !is_there {
                        asked.remove(&chunk);
                    }
                }
                for chunk in 0..CHUNKS {
                    let is_told = told.get(&chunk).copied().unwrap_or(false);
                    let follows = known.chunks.peek(&id(&key(chunk)));
                    prop_assert_eq!(is_told, follows.is_some_and(|it| it.is_told));
                    if limit == usize::from(CHUNKS) {
                        prop_assert_eq!(follows.is_some(), asked.contains(&chunk));
                    }
                    if follows.is_some() && is_in_step {
                        prop_assert_eq!(is_told, daemon.has(chunk));
                    }
                }
                prop_assert!(known.chunks.len() <= limit);
            }
        }
    }

    #[test]
    fn what_does_not_follow_is_refused() {
        let mut daemon = Daemon::default();
        let mut it = known(8);
        assert_eq!(it.take(daemon.change(1, 0)), Err(OutOfStep), "no snapshot");
        let parts = daemon.snapshot();
        it.take(parts[0].clone()).unwrap();
        let other = daemon.change(2, 0);
        assert_eq!(it.take(other.clone()), Err(OutOfStep), "within a snapshot");
        assert_eq!(
            it.take(daemon.snapshot()[0].clone()),
            Err(OutOfStep),
            "another one"
        );
        it.take(parts[1].clone()).unwrap();
        // What a snapshot has, and a change again, say nothing.
        it.take(WatchEvent {
            sequence: 1,
            ..other.clone()
        })
        .unwrap();
        it.take(other.clone()).unwrap();
        it.take(other.clone()).unwrap();
        assert_eq!(it.present.len(), 2);
        let behind = WatchEvent {
            sequence: 4,
            ..other.clone()
        };
        assert_eq!(it.take(behind), Err(OutOfStep), "one is missing");
        let gone = daemon.change(2, 0);
        for event in [other, gone.clone()] {
            let elsewhere = WatchEvent {
                epoch: 9,
                sequence: 3,
                ..event
            };
            assert_eq!(it.take(elsewhere), Err(OutOfStep), "another start");
        }
        it.take(gone).unwrap();
        assert_eq!(it.present.len(), 1);
    }
}
