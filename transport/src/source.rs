//! What a holder holds.

use std::future::Future;
use std::ops::Range;
use std::time::Instant;

use bytes::Bytes;

/// Finds what requests ask for.
pub trait Source: Send + Sync + 'static {
    /// What is found, and stays as it is until it is dropped.
    type Thing: Thing;

    /// Finds what `body` asks for. Nobody waits for it after `deadline`.
    ///
    /// # Errors
    /// Why there is nothing, as the fetcher understands it.
    fn open(
        &self,
        body: Bytes,
        deadline: Option<Instant>,
    ) -> impl Future<Output = Result<Self::Thing, Bytes>> + Send;
}

/// Bytes that a holder sends: the same ones however often they are read.
pub trait Thing: Send + Sync + 'static {
    /// How many there are.
    fn total(&self) -> u64;

    /// What they are, as the fetcher understands it.
    fn description(&self) -> Bytes;

    /// Where the part ends that has a place: what is better read, and sent, as one.
    fn end_of(&self, at: u64) -> u64;

    /// The bytes at some places, in pieces one after the other, from the first on. Fewer where
    /// the rest would have to be waited for: it is asked for again.
    ///
    /// # Errors
    /// Places that cannot be read, some of those asked for among them; the others will be
    /// asked for again.
    fn read(&self, range: Range<u64>) -> impl Future<Output = Result<Vec<Bytes>, Lost>> + Send;
}

/// Bytes that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    /// Their places.
    pub ranges: Vec<Range<u64>>,
    /// Why, as the fetcher understands it.
    pub reason: u32,
}
