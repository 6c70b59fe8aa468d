//! The profiles that chunks name: this engine's own, and others that the daemon keeps.
//!
//! No request waits for a profile: one may have 70 MB, and that is more than most prefixes
//! are worth. A chunk that names one which is not here is computed, as if it were absent;
//! meanwhile the profile is fetched, once, and the next request has it. What the daemon does
//! not have is not asked for again for a while.
//!
//! The engine's own profile is uploaded in the background: at the start, and whenever the
//! daemon turns out not to have it, as one without a disk tier after a restart.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvasir_client::{CallError, Client};
use kvasir_codec::Profile;
use kvasir_types::{KvLayout, ProfileDigest};
use tokio::runtime::Handle;
use tokio::task::AbortHandle;
use tracing::{debug, info, warn};

use crate::CodecConfig;

/// The profiles of one engine.
#[derive(Debug)]
pub(crate) struct Profiles {
    own: Option<Arc<Profile>>,
    layout: KvLayout,
    client: Client,
    runtime: Handle,
    others: Mutex<Others>,
    upload: Option<AbortHandle>,
}

/// What is known of profiles that are not the engine's own.
#[derive(Debug, Default)]
struct Others {
    /// At most [`MOST_HERE`], the one used last at the end.
    here: Vec<Arc<Profile>>,
    /// At most [`MOST_ABSENT`], and until when: those that are of no use now, the one
    /// learnt of last at the end.
    absent: VecDeque<(ProfileDigest, Instant)>,
    /// Whether one is being fetched. The next one waits for a later request, so that one is
    /// in memory at a time.
    asking: bool,
}

#[derive(Debug, PartialEq)]
enum Known {
    Here(Arc<Profile>),
    /// Not here, and whoever was told so fetches it.
    Ask,
    /// Not here.
    No,
}

impl Profiles {
    /// Begins to upload the engine's own profile.
    pub(crate) fn start(
        client: Client,
        runtime: Handle,
        config: &CodecConfig,
        layout: KvLayout,
    ) -> Arc<Self> {
        let own = config.encoding.profile.clone();
        let upload = own.clone().map(|profile| {
            let uploading = keep_uploaded(client.clone(), profile);
            runtime.spawn(uploading).abort_handle()
        });
        Arc::new(Self {
            own,
            layout,
            client,
            runtime,
            others: Mutex::default(),
            upload,
        })
    }

    /// A profile, if it is here. Else it is fetched for those who come later.
    pub(crate) fn get(self: &Arc<Self>, digest: ProfileDigest) -> Option<Arc<Profile>> {
        let own = self.own.as_ref();
        if let Some(own) = own.filter(|own| own.digest() == digest.as_bytes()) {
            return Some(Arc::clone(own));
        }
        match self.others().find(digest, Instant::now()) {
            Known::Here(profile) => return Some(profile),
            Known::No => (),
            Known::Ask => {
                let profiles = Arc::clone(self);
                self.runtime.spawn(async move {
                    let asked = profiles.ask(digest).await;
                    profiles.others().learn(digest, asked, Instant::now());
                });
            }
        }
        None
    }

    /// The profile, or how long it is of no use to ask again.
    async fn ask(&self, digest: ProfileDigest) -> Result<Arc<Profile>, Duration> {
        match self.client.get_profile(digest).await {
            // How its keys were turned, a chunk says itself.
            Ok(Some(profile)) if profile.fits(&self.layout, profile.shape().pairing) => {
                info!(%digest, bytes = profile.as_bytes().len(), "fetched a profile");
                Ok(Arc::new(profile))
            }
            Ok(Some(_)) => {
                warn!(%digest, "chunks name a profile of another model; computing them");
                Err(UNUSABLE)
            }
            Ok(None) => {
                warn!(%digest, "chunks name a profile that nobody uploaded; computing them");
                Err(ABSENT)
            }
            Err(error @ CallError::Profile { .. }) => {
                warn!(%error, "computing the chunks that name it");
                Err(UNUSABLE)
            }
            Err(error) => {
                warn!(%digest, %error, "a profile was not fetched; computing chunks that name it");
                Err(ABSENT)
            }
        }
    }

    fn others(&self) -> MutexGuard<'_, Others> {
        self.others.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Profiles {
    fn drop(&mut self) {
        if let Some(upload) = &self.upload {
            upload.abort();
        }
    }
}

impl Others {
    fn find(&mut self, digest: ProfileDigest, now: Instant) -> Known {
        let found = |profile: &Arc<Profile>| profile.digest() == digest.as_bytes();
        if let Some(place) = self.here.iter().position(found) {
            let profile = self.here.remove(place);
            self.here.push(Arc::clone(&profile));
            return Known::Here(profile);
        }
        self.absent.retain(|(_, until)| *until > now);
        if self.asking || self.absent.iter().any(|(absent, _)| *absent == digest) {
            return Known::No;
        }
        self.asking = true;
        Known::Ask
    }

    fn learn(
        &mut self,
        digest: ProfileDigest,
        asked: Result<Arc<Profile>, Duration>,
        now: Instant,
    ) {
        self.asking = false;
        match asked {
            Ok(profile) => {
                self.here.push(profile);
                if self.here.len() > MOST_HERE {
                    self.here.remove(0);
                }
            }
            Err(absent) => {
                self.absent.push_back((digest, now + absent));
                if self.absent.len() > MOST_ABSENT {
                    self.absent.pop_front();
                }
            }
        }
    }
}

/// Looks every now and then whether the daemon has the profile, and uploads it if not. Never
/// ends.
async fn keep_uploaded(client: Client, profile: Arc<Profile>) {
    let digest = ProfileDigest::from_bytes(*profile.digest());
    let mut refused = false;
    loop {
        let wait = match upload(&client, digest, &profile).await {
            Ok(uploaded) => {
                if uploaded {
                    info!(%digest, "uploaded the profile");
                }
                refused = false;
                LOOK_AGAIN
            }
            Err(error) if error.is_transient() => {
                debug!(%error, "the profile is not uploaded yet");
                TRY_AGAIN
            }
            Err(error) => {
                if !refused {
                    let error = with_causes(&error);
                    warn!(%digest, error, "the daemon does not keep the profile; others compute");
                }
                refused = true;
                LOOK_AGAIN
            }
        };
        tokio::time::sleep(wait).await;
    }
}

/// Whether it had to be uploaded.
async fn upload(
    client: &Client,
    digest: ProfileDigest,
    profile: &Arc<Profile>,
) -> Result<bool, CallError> {
    let kept = client.profiles().await?;
    if kept.iter().any(|kept| kept.digest == digest) {
        return Ok(false);
    }
    client.put_profile(profile).await?;
    Ok(true)
}

/// A refusal's reason is its cause.
fn with_causes(error: &CallError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// Profiles of others that are kept in memory.
const MOST_HERE: usize = 4;
/// Digests that are remembered as absent.
const MOST_ABSENT: usize = 64;
/// How long a profile is taken for absent.
const ABSENT: Duration = Duration::from_secs(10);
/// How long one is that arrived, and was of no use.
const UNUSABLE: Duration = Duration::from_secs(3600);
/// How often the daemon is asked whether it has the profile: one small call.
const LOOK_AGAIN: Duration = Duration::from_secs(10);
/// After a daemon that did not answer.
const TRY_AGAIN: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use kvasir_codec::{ProfileBasis, ProfilePlane, ProfileShape};
    use kvasir_types::{DType, Planes};

    use super::*;

    fn profile(number: u8) -> (ProfileDigest, Arc<Profile>) {
        let layout = KvLayout::new(1, 1, Planes::Single { dim: 1 }, 16, DType::F32).unwrap();
        let basis = ProfileBasis::new(vec![0.0], vec![1.0], &[1.0], &[1.0]);
        let plane = ProfilePlane {
            unit: f32::from(number) + 1.0,
            bases: vec![basis],
        };
        let profile = Profile::new(ProfileShape::of(&layout, None), vec![plane]).unwrap();
        let digest = ProfileDigest::from_bytes(*profile.digest());
        (digest, Arc::new(profile))
    }

    #[test]
    fn a_profile_is_asked_for_once() {
        let (now, mut others) = (Instant::now(), Others::default());
        let (first, arrived) = profile(1);
        let (second, _) = profile(2);
        assert_eq!(others.find(first, now), Known::Ask);
        assert_eq!(others.find(first, now), Known::No, "it is on its way");
        assert_eq!(others.find(second, now), Known::No, "one at a time");
        others.learn(first, Ok(Arc::clone(&arrived)), now);
        assert_eq!(others.find(first, now), Known::Here(arrived));
        assert_eq!(others.find(second, now), Known::Ask);
    }

    #[test]
    fn what_is_absent_is_not_asked_for_again_for_a_while() {
        let (now, mut others) = (Instant::now(), Others::default());
        let (digest, _) = profile(1);
        assert_eq!(others.find(digest, now), Known::Ask);
        others.learn(digest, Err(ABSENT), now);
        let soon = now + ABSENT / 2;
        assert_eq!(others.find(digest, soon), Known::No);
        assert_eq!(others.find(profile(2).0, soon), Known::Ask, "others are");
        others.learn(profile(2).0, Err(ABSENT), soon);
        assert_eq!(others.find(digest, now + ABSENT), Known::Ask);
    }

    #[test]
    fn the_profile_used_least_recently_goes_first() {
        let (now, mut others) = (Instant::now(), Others::default());
        let profiles: Vec<_> = (0..5).map(profile).collect();
        for (digest, profile) in &profiles[..4] {
            others.learn(*digest, Ok(Arc::clone(profile)), now);
        }
        assert!(matches!(others.find(profiles[0].0, now), Known::Here(_)));
        others.learn(profiles[4].0, Ok(Arc::clone(&profiles[4].1)), now);
        assert_eq!(others.here.len(), MOST_HERE);
        assert!(matches!(others.find(profiles[0].0, now), Known::Here(_)));
        assert_eq!(others.find(profiles[1].0, now), Known::Ask);
        for (digest, _) in (0..100).map(profile) {
            others.learn(digest, Err(ABSENT), now);
        }
        assert_eq!(others.absent.len(), MOST_ABSENT);
    }
}
