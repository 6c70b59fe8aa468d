//! The calls.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use futures::stream::{self, BoxStream, StreamExt as _};
use kvasir_proto::v1::cache_server::Cache;
use kvasir_proto::{InvalidField, MAX_PIN_TTL_MS, convert, v1};
use kvasir_store::{PinId, Store, TierKind};
use kvasir_types::ChunkKey;
use tonic::{Request, Response, Status, Streaming};

use crate::admission::Admission;
use crate::config::Limits;
use crate::counters::Counters;
use crate::{get, hold, list, paths, process, profiles, put, refusal, watch, wire};

/// Serves one store. Clones are handles to the same service.
#[derive(Clone, Debug)]
pub(crate) struct Service(Arc<Shared>);

/// What every call has at hand.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) store: Store,
    pub(crate) limits: Limits,
    pub(crate) admission: Admission,
    pub(crate) counters: Counters,
    /// Where the data plane is, once it is there.
    pub(crate) paths: OnceLock<v1::PathsResponse>,
    data_dir: String,
    started: Instant,
}

type Answer<T> = Result<Response<T>, Status>;
type Messages<T> = BoxStream<'static, Result<T, Status>>;

impl Service {
    pub(crate) fn new(store: Store, limits: Limits, data_dir: String) -> Self {
        Self(Arc::new(Shared {
            store,
            admission: Admission::new(&limits),
            limits,
            counters: Counters::default(),
            paths: OnceLock::new(),
            data_dir,
            started: Instant::now(),
        }))
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.0
    }
}

#[tonic::async_trait]
impl Cache for Service {
    type GetStream = Messages<v1::GetResponse>;
    type GetProfileStream = Messages<v1::GetProfileResponse>;
    type ListStream = Messages<v1::ListResponse>;
    type WatchStream = Messages<v1::WatchResponse>;
    type HoldStream = Messages<v1::HoldResponse>;
    type PathsStream = Messages<v1::PathsResponse>;

    async fn lookup(&self, request: Request<v1::LookupRequest>) -> Answer<v1::LookupResponse> {
        let keys = convert::keys("keys", &request.get_ref().keys)?;
        let answer = self.0.store.lookup(&keys);
        let hits = answer.found.iter().flatten().count();
        self.0.counters.lookup_keys.add(keys.len());
        self.0.counters.lookup_hits.add(hits);
        let found = || answer.found.iter();
        Ok(Response::new(v1::LookupResponse {
            // At most as many as there are keys.
            prefix_chunks: u32::try_from(answer.prefix).unwrap_or(u32::MAX),
            tiers: found()
                .map(|slot| slot.map_or(v1::Tier::Unspecified, |found| wire::tier(found.tier)))
                .map(i32::from)
                .collect(),
            bytes: found()
                .map(|slot| slot.map_or(0, |found| found.bytes))
                .collect(),
        }))
    }

    async fn put(&self, request: Request<Streaming<v1::PutRequest>>) -> Answer<v1::PutResponse> {
        put::receive(&self.0, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn get(&self, request: Request<v1::GetRequest>) -> Answer<Self::GetStream> {
        let stream = get::serve(Arc::clone(&self.0), request.get_ref()).await?;
        Ok(Response::new(stream))
    }

    async fn hold(&self, request: Request<Streaming<v1::HoldRequest>>) -> Answer<Self::HoldStream> {
        let stream = hold::serve(Arc::clone(&self.0), request.into_inner())?;
        Ok(Response::new(stream))
    }

    async fn pin(&self, request: Request<v1::PinRequest>) -> Answer<v1::PinResponse> {
        let request = request.get_ref();
        let keys = convert::keys("keys", &request.keys)?;
        if !(1..=MAX_PIN_TTL_MS).contains(&request.ttl_ms) {
            let problem = format!("{} is not within 1..={MAX_PIN_TTL_MS}", request.ttl_ms);
            return Err(InvalidField::new("ttl_ms", problem).into());
        }
        let ttl = Duration::from_millis(request.ttl_ms);
        // The store pins all keys or none; between its lookup and its pin a chunk may
        // be evicted.
        for _ in 0..PIN_ATTEMPTS {
            let present = present(&self.0.store, &keys);
            match self.0.store.pin(&present, ttl) {
                Ok(id) => {
                    return Ok(Response::new(v1::PinResponse {
                        pin_id: id.as_u64(),
                        pinned: u32::try_from(present.len()).unwrap_or(u32::MAX),
                    }));
                }
                Err(refused) => match refusal::pin(&refused) {
                    Some(status) => return Err(status),
                    None => continue,
                },
            }
        }
        Err(Status::aborted(
            "the chunks are being evicted faster than they can be pinned; try again",
        ))
    }

    async fn unpin(&self, request: Request<v1::UnpinRequest>) -> Answer<v1::UnpinResponse> {
        let id = PinId::from_u64(request.get_ref().pin_id);
        let found = self.0.store.unpin(id);
        Ok(Response::new(v1::UnpinResponse { found }))
    }

    async fn delete(&self, request: Request<v1::DeleteRequest>) -> Answer<v1::DeleteResponse> {
        let keys = convert::keys("keys", &request.get_ref().keys)?;
        let store = &self.0.store;
        let results: Vec<_> = stream::iter(keys)
            .map(|key| store.delete(key))
            .buffer_unordered(PARALLEL)
            .collect()
            .await;
        let mut deleted = 0;
        for result in results {
            deleted += u32::from(result.map_err(|error| refusal::delete(&error))?);
        }
        Ok(Response::new(v1::DeleteResponse { deleted }))
    }

    async fn list(&self, request: Request<v1::ListRequest>) -> Answer<Self::ListStream> {
        let request = request.get_ref();
        let after = match request.after.as_ref() {
            [] => None,
            bytes => Some(convert::key("after", bytes)?),
        };
        let limit = match request.limit {
            0 => usize::MAX,
            limit => usize::try_from(limit).unwrap_or(usize::MAX),
        };
        Ok(Response::new(list::serve(
            Arc::clone(&self.0),
            after,
            limit,
        )?))
    }

    async fn put_profile(
        &self,
        request: Request<Streaming<v1::PutProfileRequest>>,
    ) -> Answer<v1::PutProfileResponse> {
        profiles::put(&self.0, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn get_profile(
        &self,
        request: Request<v1::GetProfileRequest>,
    ) -> Answer<Self::GetProfileStream> {
        let stream = profiles::get(Arc::clone(&self.0), request.get_ref()).await?;
        Ok(Response::new(stream))
    }

    async fn list_profiles(
        &self,
        _: Request<v1::ListProfilesRequest>,
    ) -> Answer<v1::ListProfilesResponse> {
        Ok(Response::new(profiles::list(&self.0)))
    }

    async fn delete_profile(
        &self,
        request: Request<v1::DeleteProfileRequest>,
    ) -> Answer<v1::DeleteProfileResponse> {
        profiles::delete(&self.0, request.get_ref())
            .await
            .map(Response::new)
    }

    async fn stats(&self, _: Request<v1::StatsRequest>) -> Answer<v1::StatsResponse> {
        Ok(Response::new(self.0.stats()))
    }

    async fn paths(&self, _: Request<v1::PathsRequest>) -> Answer<Self::PathsStream> {
        Ok(Response::new(paths::serve(Arc::clone(&self.0))?))
    }

    async fn watch(&self, _: Request<v1::WatchRequest>) -> Answer<Self::WatchStream> {
        Ok(Response::new(watch::serve(Arc::clone(&self.0))?))
    }
}

impl Shared {
    fn stats(&self) -> v1::StatsResponse {
        let stats = self.store.stats();
        let memory = Some((TierKind::Memory, stats.memory));
        let disk = stats.disk.map(|usage| (TierKind::Disk, usage));
        let tiers = || memory.iter().chain(&disk);
        let resident = process::resident();
        v1::StatsResponse {
            version: env!("CARGO_PKG_VERSION").into(),
            uptime_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
            data_dir: self.data_dir.clone(),
            tiers: tiers()
                .map(|(kind, usage)| wire::usage(*kind, usage))
                .collect(),
            pins: stats.pins,
            pinned_bytes: tiers().map(|(_, usage)| usage.pinned_bytes).sum(),
            leases: stats.leases,
            lookup_keys: self.counters.lookup_keys.get(),
            lookup_hits: self.counters.lookup_hits.get(),
            received_bytes: self.counters.received_bytes.get(),
            sent_bytes: self.counters.sent_bytes.get(),
            resident_bytes: resident.now,
            peak_resident_bytes: resident.peak,
            profiles: stats.profiles.profiles,
            profile_bytes: stats.profiles.bytes,
            profile_capacity_bytes: stats.profiles.capacity,
        }
    }
}

fn present(store: &Store, keys: &[ChunkKey]) -> Vec<ChunkKey> {
    let found = store.lookup(keys).found;
    let pairs = keys.iter().zip(found);
    pairs
        .filter_map(|(key, found)| found.map(|_| *key))
        .collect()
}

/// Deletions and opens of one call that wait for the device together.
pub(crate) const PARALLEL: usize = 16;
const PIN_ATTEMPTS: usize = 8;
