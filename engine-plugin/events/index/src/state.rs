//! The index, shared by those who fill it and those who ask.

use std::sync::{PoisonError, RwLock};

use kvasir_events::hash::Hash;
use kvasir_events::{Index, Limits, Mirror, Publisher, Source, SourceId};

use crate::config::{DaemonConfig, EngineConfig};

/// The index, and what does not change.
#[derive(Debug)]
pub(crate) struct State {
    index: RwLock<Index>,
    /// By publisher; empty where none was said.
    models: Vec<String>,
    none_hash: Hash,
}

impl State {
    /// Engines first, in order, then daemons.
    pub(crate) fn new(
        engines: &[EngineConfig],
        daemons: &[DaemonConfig],
        none_hash: Hash,
        limits: Limits,
    ) -> Self {
        let engine = |it: &EngineConfig| {
            let id = SourceId {
                name: it.name.clone(),
                rank: it.rank,
            };
            let publisher = Publisher::new(it.replay.is_some(), none_hash, limits);
            (id, Source::Engine(publisher))
        };
        let daemon = |it: &DaemonConfig| {
            let id = SourceId {
                name: it.to_string(),
                rank: 0,
            };
            let mirror = Mirror::new(it.namespaces.clone(), limits);
            (id, Source::Daemon(mirror))
        };
        let sources = engines.iter().map(engine);
        let models = engines.iter().map(|it| it.model.clone());
        Self {
            index: RwLock::new(Index::new(
                sources.chain(daemons.iter().map(daemon)).collect(),
            )),
            models: models
                .chain(daemons.iter().map(|it| it.model.clone()))
                .collect(),
            none_hash,
        }
    }

    pub(crate) const fn none_hash(&self) -> &Hash {
        &self.none_hash
    }

    /// The model of the publisher at a place.
    pub(crate) fn model(&self, at: usize) -> &str {
        self.models.get(at).map_or("", String::as_str)
    }

    pub(crate) fn read<T>(&self, read: impl FnOnce(&Index) -> T) -> T {
        // Whoever panicked changed a publisher by whole batches.
        read(&self.index.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn with_engine<T>(&self, at: usize, change: impl FnOnce(&mut Publisher) -> T) -> T {
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        change(
            index
                .engine(at)
                .expect("engines are followed at their own places"),
        )
    }

    pub(crate) fn with_daemon<T>(&self, at: usize, change: impl FnOnce(&mut Mirror) -> T) -> T {
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        change(
            index
                .daemon(at)
                .expect("daemons are followed at their own places"),
        )
    }
}
