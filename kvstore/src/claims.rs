//! One writer per key: later writers wait and then look again.

use std::collections::HashMap;
use std::sync::PoisonError;

use kvasir_types::ChunkKey;
use tokio::sync::watch;

use crate::sync::{Arc, Mutex, MutexGuard};

/// The keys that are being written.
#[derive(Clone, Debug, Default)]
pub(crate) struct Claims(Arc<Mutex<Keys>>);

type Keys = HashMap<ChunkKey, watch::Receiver<()>>;

/// The right to write a key; ends on drop.
#[derive(Debug)]
pub(crate) struct Claim {
    claims: Claims,
    key: ChunkKey,
    /// Dropped after the key was freed, which wakes those who wait.
    _ended: watch::Sender<()>,
}

impl Claims {
    /// Waits until nobody else writes `key`.
    pub(crate) async fn claim(&self, key: ChunkKey) -> Claim {
        loop {
            let mut other = match self.try_claim(key) {
                Ok(claim) => return claim,
                Err(other) => other,
            };
            // Nothing is ever sent: this returns when the sender is dropped.
            let _ = other.changed().await;
        }
    }

    fn try_claim(&self, key: ChunkKey) -> Result<Claim, watch::Receiver<()>> {
        let mut keys = self.lock();
        if let Some(other) = keys.get(&key) {
            return Err(other.clone());
        }
        let (ended, receiver) = watch::channel(());
        keys.insert(key, receiver);
        Ok(Claim {
            claims: self.clone(),
            key,
            _ended: ended,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Keys> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.claims.lock().remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn the_second_writer_waits_for_the_first() {
        let claims = Claims::default();
        let key = ChunkKey::from_bytes([1; 32]);
        let first = claims.claim(key).await;
        let other = claims.claim(ChunkKey::from_bytes([2; 32])).now_or_never();
        assert!(other.is_some(), "other keys are free");
        let mut second = Box::pin(claims.claim(key));
        assert!(second.as_mut().now_or_never().is_none());
        drop(first);
        drop(second.await);
        assert!(claims.claim(key).now_or_never().is_some());
    }
}
