//! Serves things that lie in an arena over the carrier RDMA, or gets them from another process
//! and says how fast.
//!
//! ```text
//! rdma_get serve ADDRESS CERTIFICATE
//! rdma_get get ADDRESS CERTIFICATE SIZE OUTSTANDING COUNT
//! ```
//!
//! Who serves writes its certificate to a file, and serves for ever. A thing has as many bytes
//! as a request's body says, in pieces of 256 KiB.

use std::collections::HashMap;
use std::error::Error;
use std::fs;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use bytes::Bytes;
use kvasir_mem::Arena;
use kvasir_transport::quic::{Identity, QuicConfig, Trust};
use kvasir_transport::rdma::{self, Device, DeviceConfig, Lender, LenderConfig};
use kvasir_transport::rdma::{Reader, ReaderConfig};
use kvasir_transport::session::FetchEvent;
use kvasir_transport::{Carrier, DataPath, FetchOptions, Lost, Source, Thing};
use tokio::task::JoinSet;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    match arguments[..] {
        ["serve", address, certificate] => runtime.block_on(serve(address.parse()?, certificate)),
        ["get", address, certificate, size, outstanding, count] => {
            let [size, outstanding, count] = [size.parse()?, outstanding.parse()?, count.parse()?];
            let rate = get(address.parse()?, certificate, size, outstanding, count);
            println!("{:.3}", runtime.block_on(rate)?);
            Ok(())
        }
        _ => Err(USAGE.into()),
    }
}

/// The byte at a place of every thing.
fn byte(at: usize) -> u8 {
    at.wrapping_mul(31).to_le_bytes()[1]
}

/// Things, one of each length, as they are asked for.
struct Things {
    arena: Arc<Arena>,
    made: Mutex<HashMap<usize, Bytes>>,
}

struct Made(Bytes);

impl Source for Things {
    type Thing = Made;

    async fn open(&self, body: Bytes, _: Option<Instant>) -> std::result::Result<Made, Bytes> {
        let text = std::str::from_utf8(&body).ok();
        let length = text.and_then(|text| text.parse().ok());
        let length: usize = length.ok_or_else(|| Bytes::from_static(b"not a length"))?;
        let mut made = self
            .made
            .lock()
            .map_err(|_| Bytes::from_static(b"broken"))?;
        if let Some(bytes) = made.get(&length) {
            return Ok(Made(bytes.clone()));
        }
        let block = self.arena.block(length).ok().flatten();
        let mut block = block.ok_or_else(|| Bytes::from_static(b"no room in the arena"))?;
        for (at, place) in block.iter_mut().enumerate() {
            *place = byte(at);
        }
        let bytes = Bytes::from_owner(block).slice(..length);
        made.insert(length, bytes.clone());
        Ok(Made(bytes))
    }
}

impl Thing for Made {
    fn total(&self) -> u64 {
        self.0.len() as u64
    }

    fn description(&self) -> Bytes {
        Bytes::new()
    }

    fn end_of(&self, _: u64) -> u64 {
        self.total()
    }

    async fn read(&self, range: Range<u64>) -> std::result::Result<Vec<Bytes>, Lost> {
        let place = |at: u64| usize::try_from(at).unwrap_or(usize::MAX).min(self.0.len());
        Ok(vec![self.0.slice(place(range.start)..place(range.end))])
    }
}

async fn serve(address: SocketAddr, certificate: &str) -> Result<()> {
    let device = Device::find(&DeviceConfig::default())?.ok_or("there is no RDMA device")?;
    let arena = Arena::new(ARENA_BYTES)?;
    let lender = Lender::new(device, Arc::clone(&arena), LenderConfig::default());
    let identity = Identity::self_signed(&[NAME])?;
    let things = Arc::new(Things {
        arena,
        made: Mutex::default(),
    });
    let config = QuicConfig::default();
    let listener = rdma::listen(Some(lender), address, &identity, None, things, config)?;
    fs::write(certificate, identity.certificate())?;
    println!("listening on {}", listener.address());
    std::future::pending().await
}

/// Gets so many things, some of them at once: megabytes per second.
async fn get(
    address: SocketAddr,
    certificate: &str,
    size: usize,
    outstanding: usize,
    count: usize,
) -> Result<f64> {
    let reader = Reader::find(&ReaderConfig::default())?;
    let trust = Trust::from_der(&fs::read(certificate)?)?;
    let config = QuicConfig::default();
    let path = rdma::connect(reader, address, NAME, &trust, None, config)?;
    // The first one is made, and registered.
    if !fetch(path.clone(), size, true).await? {
        return Err("other bytes came than were served".into());
    }
    let carrier = path.status().carrier;
    if carrier != Carrier::Rdma {
        return Err(format!("bytes came over {carrier}").into());
    }
    let start = Instant::now();
    let mut getters = JoinSet::new();
    for getter in 0..outstanding {
        let path = path.clone();
        getters.spawn(async move {
            for _ in (getter..count).step_by(outstanding) {
                fetch(path.clone(), size, false).await?;
            }
            Result::Ok(())
        });
    }
    for done in getters.join_all().await {
        done?;
    }
    let bytes = u32::try_from(size * count).map_or(f64::INFINITY, f64::from);
    Ok(bytes / start.elapsed().as_secs_f64() / 1e6)
}

/// Gets one; whether its bytes are right, where that is looked at.
async fn fetch(path: DataPath, size: usize, looks: bool) -> Result<bool> {
    let mut request = path.fetch(Bytes::from(size.to_string()), FetchOptions::default());
    let (mut came, mut right) = (0, true);
    while let Some(event) = request.next().await {
        match event {
            FetchEvent::Data { offset, bytes, .. } => {
                let at = usize::try_from(offset)?;
                came += bytes.len();
                right &= !looks || bytes.iter().copied().eq((at..at + bytes.len()).map(byte));
            }
            FetchEvent::Complete { .. } if came == size => return Ok(right),
            FetchEvent::Described { .. } => {}
            other => return Err(format!("a get ended with {other:?}").into()),
        }
    }
    Err("a get ended early".into())
}

const USAGE: &str =
    "rdma_get serve ADDRESS CERTIFICATE | get ADDRESS CERTIFICATE SIZE OUTSTANDING COUNT";
const NAME: &str = "kvasir.example";
const ARENA_BYTES: usize = 256 << 20;
