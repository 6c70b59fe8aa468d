//! Lends memory over RDMA, or reads what another process lends and says how fast.
//!
//! ```text
//! rdma_read hold ADDRESS BYTES
//! rdma_read read ADDRESS SIZE OUTSTANDING COUNT
//! ```
//!
//! The two tell each other their queue pairs' endpoints over TCP, which stands for the
//! authenticated channel that a session has. Who holds lends for as long as that connection
//! lasts.

use std::error::Error;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use bytes::Bytes;
use kvasir_mem::AlignedBuffer;
use kvasir_transport::rdma::{
    Device, DeviceConfig, Endpoint, Pool, QueuePairConfig, Region, RemoteKey, RemoteRange,
};
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinSet;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["hold", address, bytes] => hold(address, bytes.parse()?),
        ["read", address, size, outstanding, count] => {
            read(address, size.parse()?, outstanding.parse()?, count.parse()?)
        }
        _ => Err("rdma_read hold ADDRESS BYTES | read ADDRESS SIZE OUTSTANDING COUNT".into()),
    }
}

fn device() -> Result<Device> {
    Device::find(&DeviceConfig::default())?.ok_or_else(|| "there is no RDMA device".into())
}

fn runtime() -> Result<Runtime> {
    Ok(Builder::new_current_thread().build()?)
}

/// The byte at a place of what is lent.
fn byte(at: usize) -> u8 {
    at.wrapping_mul(31).to_le_bytes()[1]
}

/// Lends everybody who connects the same bytes.
fn hold(address: &str, bytes: usize) -> Result<()> {
    let device = device()?;
    let mut memory = AlignedBuffer::zeroed(bytes)?;
    for (at, place) in memory.iter_mut().enumerate() {
        *place = byte(at);
    }
    let memory = Arc::new(memory);
    let region = Region::register(&device, Arc::clone(&memory))?;
    let bytes = Bytes::from_owner(Shared(memory)).slice(..bytes);
    let listener = TcpListener::bind(address)?;
    println!("listening on {}", listener.local_addr()?);
    for peer in listener.incoming() {
        let (device, region, bytes) = (device.clone(), region.clone(), bytes.clone());
        let peer = peer?;
        thread::spawn(move || {
            if let Err(error) = lend(&device, &region, bytes, peer) {
                eprintln!("a peer was given up: {error}");
            }
        });
    }
    Ok(())
}

struct Shared(Arc<AlignedBuffer>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

fn lend(device: &Device, region: &Region, bytes: Bytes, mut peer: TcpStream) -> Result<()> {
    let prepared = device.prepare(&QueuePairConfig::default())?;
    let mut theirs = [0; Endpoint::LEN];
    peer.read_exact(&mut theirs)?;
    let ours = prepared.endpoint().to_bytes();
    let queue_pair = prepared.connect(&Endpoint::parse(&theirs)?)?;
    let loan = runtime()?.block_on(queue_pair.lend(region, bytes))?;
    let RemoteRange {
        key,
        offset,
        length,
    } = loan.range();
    peer.write_all(&ours)?;
    peer.write_all(&key.0.to_le_bytes())?;
    peer.write_all(&offset.to_le_bytes())?;
    peer.write_all(&length.to_le_bytes())?;
    // Until the peer hangs up.
    peer.read_to_end(&mut Vec::new())?;
    Ok(())
}

/// Reads parts of `size` bytes, `count` in all, so many at a time: says megabytes per second.
fn read(address: &str, size: u64, outstanding: u8, count: u64) -> Result<()> {
    let device = device()?;
    let config = QueuePairConfig {
        outstanding_reads: outstanding,
        ..QueuePairConfig::default()
    };
    let prepared = device.prepare(&config)?;
    let pool = Pool::new(&device, outstanding.into(), usize::try_from(size)?)?;
    let mut peer = TcpStream::connect(address)?;
    peer.write_all(&prepared.endpoint().to_bytes())?;
    let mut theirs = [0; Endpoint::LEN];
    peer.read_exact(&mut theirs)?;
    let queue_pair = prepared.connect(&Endpoint::parse(&theirs)?)?;
    let (mut key, mut offset, mut length) = ([0; 4], [0; 8], [0; 8]);
    peer.read_exact(&mut key)?;
    peer.read_exact(&mut offset)?;
    peer.read_exact(&mut length)?;
    let key = RemoteKey(u32::from_le_bytes(key));
    let (offset, length) = (u64::from_le_bytes(offset), u64::from_le_bytes(length));
    let parts = length / size.max(1);
    if parts == 0 {
        return Err(format!("{length} bytes are lent, which is less than {size}").into());
    }
    let part = move |number: u64| RemoteRange {
        key,
        offset: offset + number % parts * size,
        length: size,
    };
    // As many readers as reads that may be outstanding, each with every so-manieth part.
    let queue_pair = Arc::new(queue_pair);
    let start = Instant::now();
    let read: u64 = runtime()?.block_on(async {
        let mut readers = JoinSet::new();
        for reader in 0..u64::from(outstanding) {
            let (queue_pair, pool) = (Arc::clone(&queue_pair), pool.clone());
            readers.spawn(async move {
                let mut read = 0;
                for number in (reader..count).step_by(outstanding.into()) {
                    let bytes = queue_pair.read(&pool, part(number)).await?;
                    read += bytes.len() as u64;
                }
                Result::Ok(read)
            });
        }
        let read: Result<Vec<u64>> = readers.join_all().await.into_iter().collect();
        Result::Ok(read?.iter().sum())
    })?;
    let seconds = start.elapsed().as_secs_f64();
    let bytes = u32::try_from(read).map_or(f64::INFINITY, f64::from);
    println!("{:.3}", bytes / seconds / 1e6);
    Ok(())
}
