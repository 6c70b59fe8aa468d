//! A device that fails as real ones do.
//!
//! [`Faulty`] passes everything on to [`DirectIo`] and, as often as its [`Faults`] say,
//! fails, stops half-way, flips a bit, or stalls instead. It remembers what was written,
//! punched, created and removed since the last sync, so that [`Faulty::cut_power`] can
//! undo any part of it. It can also lie ([`Lie`]): a test of tests.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvasir_store::{DirectIo, Medium, MediumFile};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

/// What a device writes in one piece, whatever happens.
const SECTOR_BYTES: usize = 512;
const BLOCK_BYTES: usize = 4096;

/// How often each thing goes wrong: probabilities of one operation.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// A read fails with `EIO`.
    pub read_error: f64,
    /// A write fails with `EIO`, after some of it was written.
    pub write_error: f64,
    /// A write finds the device full, after some of it was written.
    pub full: f64,
    /// A sync fails; what was written since the last may be lost.
    pub sync_error: f64,
    /// A hole cannot be punched.
    pub punch_error: f64,
    /// A read or write is short.
    pub short: f64,
    /// One bit of what was read is wrong; what is stored is right.
    pub flip_read: f64,
    /// One bit is stored wrong, and nobody is told.
    pub flip_write: f64,
}

/// What a broken device, or a store built wrong, claims.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    /// That something is durable which was only written.
    Synced,
    /// That something was written which reaches the file up to this much later, if at
    /// all; and that it is durable then.
    Written(Duration),
}

/// A medium on which operations fail.
#[derive(Clone, Debug)]
pub struct Faulty(Arc<Device>);

#[derive(Debug)]
struct Device {
    state: Mutex<State>,
    released: Condvar,
}

#[derive(Debug)]
struct State {
    random: StdRng,
    faults: Faults,
    stalled: bool,
    powered: bool,
    /// How often the power came back.
    lives: u64,
    lie: Option<Lie>,
    injected: u64,
    /// For each file what its unsynced writes and holes replaced, oldest first.
    unsynced: HashMap<PathBuf, Vec<(u64, Vec<u8>)>>,
    /// Files whose name was not synced.
    unnamed: Vec<PathBuf>,
    /// Files whose removal was not synced; they lie beside, under another name.
    removed: Vec<PathBuf>,
}

impl Faulty {
    /// A device without faults so far.
    pub fn new(seed: u64) -> Self {
        Self(Arc::new(Device {
            state: Mutex::new(State {
                random: StdRng::seed_from_u64(seed),
                faults: Faults::default(),
                stalled: false,
                powered: true,
                lives: 0,
                lie: None,
                injected: 0,
                unsynced: HashMap::new(),
                unnamed: Vec::new(),
                removed: Vec::new(),
            }),
            released: Condvar::new(),
        }))
    }

    /// Faults from now on.
    pub fn set(&self, faults: Faults) {
        self.0.lock().faults = faults;
    }

    /// Reads and writes wait until [`release`](Self::release).
    pub fn stall(&self) {
        self.0.lock().stalled = true;
    }

    /// Ends a stall.
    pub fn release(&self) {
        self.0.lock().stalled = false;
        self.0.released.notify_all();
    }

    /// Tells a lie from now on, or none.
    pub fn lie(&self, lie: Option<Lie>) {
        self.0.lock().lie = lie;
    }

    /// Everything fails from now on, and changes nothing, until
    /// [`power_on`](Self::power_on) or [`cut_power`](Self::cut_power).
    pub fn power_off(&self) {
        self.0.lock().powered = false;
    }

    /// Everything works again, on files as they are: what a killed process leaves.
    pub fn power_on(&self) {
        let mut state = self.0.lock();
        state.powered = true;
        state.lives += 1;
    }

    /// How many faults there were.
    pub fn injected(&self) -> u64 {
        self.0.lock().injected
    }

    /// Loses power and gets it back: any sector that was not synced may be as it was
    /// before, any file whose name was not synced may be gone, and any whose removal was
    /// not synced may be there again. Nobody may use the files meanwhile.
    ///
    /// # Errors
    /// The real device failed.
    pub fn cut_power(&self) -> io::Result<()> {
        let mut state = self.0.lock();
        let State {
            random,
            unsynced,
            unnamed,
            removed,
            ..
        } = &mut *state;
        for path in removed.drain(..) {
            if random.random_bool(0.5) && !path.exists() {
                fs::rename(kept(&path), path)?;
            } else {
                fs::remove_file(kept(&path))?;
            }
        }
        for (path, changes) in unsynced.drain() {
            let file = match File::options().write(true).open(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                file => file?,
            };
            // One share for all of it: often everything or nothing is lost.
            let lost = random.random_range(0.0..=1.0);
            for (offset, before) in changes.into_iter().rev() {
                // Where there was nothing, the file system may not know of the place.
                if before.iter().all(|&byte| byte == 0) && random.random_bool(lost / 2.0) {
                    MediumFile::punch(&file, offset..offset + before.len() as u64)?;
                    continue;
                }
                for (number, sector) in before.chunks(SECTOR_BYTES).enumerate() {
                    if random.random_bool(lost) {
                        file.write_all_at(sector, offset + (number * SECTOR_BYTES) as u64)?;
                    }
                }
            }
        }
        for path in unnamed.drain(..) {
            if random.random_bool(0.5) {
                fs::remove_file(path)?;
            }
        }
        state.powered = true;
        state.lives += 1;
        Ok(())
    }
}

impl Device {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits out a stall; then draws.
    fn draw(&self, probability: impl Fn(&Faults) -> f64) -> bool {
        let mut state = self.lock();
        while state.stalled {
            state = self
                .released
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let probability = probability(&state.faults);
        let happens = state.random.random_bool(probability);
        state.injected += u64::from(happens);
        happens
    }

    fn powered(&self) -> io::Result<()> {
        match self.lock().powered {
            true => Ok(()),
            // A process without power does nothing more. This one still runs, so it gets
            // an error that makes it drop no chunk.
            false => Err(rustix::io::Errno::NOMEM.into()),
        }
    }

    fn lie(&self) -> Option<Lie> {
        self.lock().lie
    }

    fn below(&self, end: usize) -> usize {
        self.lock().random.random_range(0..end.max(1))
    }
}

impl Medium for Faulty {
    fn create(&self, path: &Path) -> io::Result<Box<dyn MediumFile>> {
        self.0.powered()?;
        let file = DirectIo.create(path)?;
        self.0.lock().unnamed.push(path.to_owned());
        Ok(Box::new(FaultyFile::new(self, path, file)))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn MediumFile>> {
        self.0.powered()?;
        Ok(Box::new(FaultyFile::new(self, path, DirectIo.open(path)?)))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.0.powered()?;
        let mut state = self.0.lock();
        let named = state.unnamed.len();
        state.unnamed.retain(|unnamed| unnamed != path);
        if named == state.unnamed.len() && path.exists() {
            fs::hard_link(path, kept(path))?;
            state.removed.push(path.to_owned());
        }
        DirectIo.remove(path)
    }

    fn sync_directory(&self, path: &Path) -> io::Result<()> {
        self.0.powered()?;
        if self.0.draw(|faults| faults.sync_error) {
            return Err(broken());
        }
        if self.0.lie() == Some(Lie::Synced) {
            return Ok(());
        }
        DirectIo.sync_directory(path)?;
        let mut state = self.0.lock();
        state
            .unnamed
            .retain(|unnamed| unnamed.parent() != Some(path));
        for removed in state.removed.extract_if(.., |it| it.parent() == Some(path)) {
            fs::remove_file(kept(&removed))?;
        }
        Ok(())
    }
}

/// Where a removed file lies until its removal is durable.
fn kept(path: &Path) -> PathBuf {
    path.with_extension("removed")
}

#[derive(Debug)]
struct FaultyFile {
    device: Arc<Device>,
    path: PathBuf,
    file: Arc<dyn MediumFile>,
}

impl FaultyFile {
    fn new(medium: &Faulty, path: &Path, file: Box<dyn MediumFile>) -> Self {
        Self {
            device: Arc::clone(&medium.0),
            path: path.to_owned(),
            file: file.into(),
        }
    }

    /// Some whole blocks fewer than `len`, if that is more than one.
    fn part_of(&self, len: usize) -> usize {
        self.device.below(len / BLOCK_BYTES) * BLOCK_BYTES
    }

    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        if let Some(Lie::Written(delay)) = self.device.lie() {
            self.write_later(bytes, offset, delay)?;
            return Ok(bytes.len());
        }
        self.remember(offset..offset + bytes.len() as u64)?;
        self.file.write_at(bytes, offset)
    }

    /// Writes from another thread, unless the power goes before.
    fn write_later(&self, bytes: &[u8], offset: u64, delay: Duration) -> io::Result<()> {
        let mut late = aligned(bytes.len())?;
        late[..bytes.len()].copy_from_slice(bytes);
        let (len, device) = (bytes.len(), Arc::clone(&self.device));
        let file = Arc::clone(&self.file);
        let (lives, delay) = {
            let mut state = device.lock();
            let share = state.random.random_range(0.0..=1.0);
            (state.lives, delay.mul_f64(share))
        };
        std::thread::spawn(move || {
            std::thread::sleep(delay);
            let state = device.lock();
            if state.powered && state.lives == lives {
                // Nobody waits for the outcome; that is the lie.
                let _ = file.write_at(&late[..len], offset);
            }
        });
        Ok(())
    }

    /// Keeps what a range holds until it is overwritten for good.
    fn remember(&self, range: Range<u64>) -> io::Result<()> {
        let len = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
        let mut before = aligned(len)?;
        let old = self.file.read_at(&mut before, range.start)?;
        before[old..].fill(0);
        let before = before[..len].to_vec();
        let mut state = self.device.lock();
        let changes = state.unsynced.entry(self.path.clone()).or_default();
        changes.push((range.start, before));
        Ok(())
    }
}

impl MediumFile for FaultyFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.device.powered()?;
        if self.device.draw(|faults| faults.read_error) {
            return Err(broken());
        }
        let len = if buffer.len() > BLOCK_BYTES && self.device.draw(|faults| faults.short) {
            BLOCK_BYTES + self.part_of(buffer.len() - BLOCK_BYTES)
        } else {
            buffer.len()
        };
        let read = self.file.read_at(&mut buffer[..len], offset)?;
        if read > 0 && self.device.draw(|faults| faults.flip_read) {
            buffer[self.device.below(read)] ^= 1 << self.device.below(8);
        }
        Ok(read)
    }

    fn write_at(&self, buffer: &[u8], offset: u64) -> io::Result<usize> {
        self.device.powered()?;
        let failure = if self.device.draw(|faults| faults.write_error) {
            Some(broken())
        } else if self.device.draw(|faults| faults.full) {
            Some(io::ErrorKind::StorageFull.into())
        } else {
            None
        };
        if let Some(failure) = failure {
            self.write(&buffer[..self.part_of(buffer.len())], offset)?;
            return Err(failure);
        }
        if buffer.len() > BLOCK_BYTES && self.device.draw(|faults| faults.short) {
            let part = BLOCK_BYTES + self.part_of(buffer.len() - BLOCK_BYTES);
            return self.write(&buffer[..part], offset);
        }
        if self.device.draw(|faults| faults.flip_write) {
            let mut wrong = aligned(buffer.len())?;
            wrong[..buffer.len()].copy_from_slice(buffer);
            wrong[self.device.below(buffer.len())] ^= 1 << self.device.below(8);
            return self.write(&wrong[..buffer.len()], offset);
        }
        self.write(buffer, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.device.powered()?;
        if self.device.draw(|faults| faults.sync_error) {
            return Err(broken());
        }
        if self.device.lie().is_some() {
            return Ok(());
        }
        // What is written meanwhile may or may not be covered.
        let covered = self
            .device
            .lock()
            .unsynced
            .get(&self.path)
            .map_or(0, Vec::len);
        self.file.sync()?;
        if let Some(writes) = self.device.lock().unsynced.get_mut(&self.path) {
            writes.drain(..covered.min(writes.len()));
        }
        Ok(())
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        self.device.powered()?;
        if self.device.draw(|faults| faults.punch_error) {
            return Err(broken());
        }
        let mut from = range.start;
        while let Some(data) = self.file.data(from)?.filter(|it| it.start < range.end) {
            self.remember(data.start.max(range.start)..data.end.min(range.end))?;
            from = data.end;
        }
        self.file.punch(range)
    }

    fn data(&self, from: u64) -> io::Result<Option<Range<u64>>> {
        self.device.powered()?;
        self.file.data(from)
    }
}

fn aligned(len: usize) -> io::Result<kvasir_mem::AlignedBuffer> {
    kvasir_mem::AlignedBuffer::zeroed(len)
}

/// `EIO`.
fn broken() -> io::Error {
    rustix::io::Errno::IO.into()
}
