//! What is running when the crash comes.

use std::future::Future;
use std::ops::Range;

use kvasir_types::Durability;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::task::JoinSet;

use super::ledger::Kind;
use super::{Got, Ledger};

/// A store or a daemon, as its clients see it. Errors are values: what is not
/// acknowledged may or may not have happened.
pub trait Target: Clone + Send + Sync + 'static {
    /// Stores a chunk. Says whether it was acknowledged as durable.
    fn put(&self, number: u32, durability: Durability) -> impl Future<Output = bool> + Send;

    /// Reads all of a chunk.
    fn get(&self, number: u32) -> impl Future<Output = Got> + Send;

    /// Deletes a chunk. Says whether that was acknowledged.
    fn delete(&self, number: u32) -> impl Future<Output = bool> + Send;

    /// Bytes of chunks on disk, and their limit.
    fn disk_usage(&self) -> impl Future<Output = (u64, u64)> + Send;
}

/// Clients that put, get and delete until they are stopped.
#[derive(Debug)]
pub struct Load {
    clients: JoinSet<()>,
}

impl Load {
    /// Chunks that a load of `clients` uses.
    pub const fn chunks(clients: u32) -> u32 {
        SHARED + clients * OWN
    }

    /// Starts `clients` clients. Each has chunks that only it puts and deletes; all
    /// of them put some that nobody deletes, often the same at once.
    ///
    /// # Panics
    /// A read gives wrong bytes.
    pub fn start<T: Target>(target: &T, ledger: &Ledger, clients: u32, seed: u64) -> Self {
        let mut running = JoinSet::new();
        for client in 0..clients {
            let random = StdRng::seed_from_u64(seed ^ (u64::from(client) << 32));
            let own = SHARED + client * OWN..SHARED + (client + 1) * OWN;
            running.spawn(run(target.clone(), ledger.clone(), own, random));
        }
        Self { clients: running }
    }

    /// Stops every client, whatever it is doing, and waits until it has.
    ///
    /// # Panics
    /// A client found wrong bytes.
    pub async fn stop(mut self) {
        self.clients.abort_all();
        while let Some(ended) = self.clients.join_next().await {
            if let Err(error) = ended
                && error.is_panic()
            {
                std::panic::resume_unwind(error.into_panic());
            }
        }
    }
}

async fn run<T: Target>(target: T, ledger: Ledger, own: Range<u32>, mut random: StdRng) {
    loop {
        let shared = random.random_bool(0.2);
        let number = random.random_range(if shared { 0..SHARED } else { own.clone() });
        let dice = random.random_range(0..100);
        let kind = if dice < 20 {
            Kind::Get
        } else if !shared && ledger.is_stored(number) && dice < 70 {
            Kind::Delete
        } else if random.random_bool(0.25) {
            Kind::Put(Durability::Memory)
        } else {
            Kind::Put(Durability::Durable)
        };
        let pending = ledger.begin(number, kind);
        let acknowledged = match kind {
            Kind::Put(durability) => target.put(number, durability).await,
            Kind::Delete => target.delete(number).await,
            Kind::Get => {
                let got = target.get(number).await;
                assert_ne!(got, Got::Wrong, "chunk {number}");
                true
            }
        };
        ledger.end(pending, acknowledged);
        // What fails at once should not spin.
        tokio::task::yield_now().await;
    }
}

/// Chunks that all clients put.
const SHARED: u32 = 6;
/// Chunks of one client.
const OWN: u32 = 12;
