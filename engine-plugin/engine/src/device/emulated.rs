//! A device on the CPU: `emulation/main.cpp`, as a process.
//!
//! Streams are queues. One of them is prompt: what is asked of it is done at once, with as much
//! of the other as it waits for. The other does nothing before somebody waits for it. So work
//! that is not ordered by an event is done in the order that is least expected.

use std::collections::VecDeque;
use std::io::{BufReader, BufWriter, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use super::DeviceError;
use super::launch::{Launch, type_number};
use super::machine::{Machine, Product, Stream};

#[derive(Debug)]
pub(crate) struct Emulated {
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    process: Process,
    prompt: Stream,
    /// Of both streams, what is not done yet.
    queues: [VecDeque<Work>; 2],
    /// Events so far, and of each whether all before it is done.
    events: Vec<bool>,
}

#[derive(Debug)]
enum Work {
    /// Commands, as the process takes them.
    Commands(Vec<u8>),
    In(Arc<Mutex<Vec<u8>>>, usize, u64),
    Out(u64, usize, Arc<Mutex<Vec<u8>>>),
    Record(usize),
    Wait(usize),
}

#[derive(Debug)]
struct Process {
    child: Child,
    input: BufWriter<ChildStdin>,
    output: BufReader<ChildStdout>,
}

/// Memory of the process.
#[derive(Debug)]
pub(super) struct Allocation {
    address: u64,
    state: Arc<Mutex<State>>,
}

/// Memory of the host.
#[derive(Debug)]
pub(super) struct EmulatedPinned(Arc<Mutex<Vec<u8>>>);

impl Emulated {
    /// A process of its own.
    pub(super) fn start(prompt: Stream) -> Arc<Machine> {
        let mut child = Command::new(executable())
            // The process is killed, and nothing is freed then.
            .env("ASAN_OPTIONS", "detect_leaks=0")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let process = Process {
            input: BufWriter::new(child.stdin.take().unwrap()),
            output: BufReader::new(child.stdout.take().unwrap()),
            child,
        };
        let state = State {
            process,
            prompt,
            queues: [VecDeque::new(), VecDeque::new()],
            events: Vec::new(),
        };
        Arc::new(Machine::Emulated(Self {
            state: Arc::new(Mutex::new(state)),
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    #[expect(clippy::unnecessary_wraps, reason = "as a GPU has it")]
    pub(super) fn name(&self) -> Result<String, DeviceError> {
        Ok("emulated".to_owned())
    }

    /// Few, so that rows are split unevenly.
    pub(super) fn processors(&self) -> usize {
        3
    }

    #[expect(clippy::unnecessary_wraps, reason = "as a GPU has it")]
    pub(super) fn free_bytes(&self) -> Result<u64, DeviceError> {
        Ok(1 << 30)
    }

    pub(super) fn alloc(&self, bytes: usize) -> (u64, Allocation) {
        let mut state = self.state();
        state.process.send(&command(b'A', &[bytes as u64]));
        let mut address = [0; 8];
        state.process.receive(&mut address);
        let address = u64::from_le_bytes(address);
        let state = self.state.clone();
        (address, Allocation { address, state })
    }

    #[expect(clippy::unnecessary_wraps, reason = "as a GPU has it")]
    pub(super) fn fill_zero(&self, address: u64, bytes: usize) -> Result<(), DeviceError> {
        let commands = command(b'Z', &[address, bytes as u64]);
        self.state().push(Stream::Compute, Work::Commands(commands));
        Ok(())
    }

    #[expect(clippy::unnecessary_wraps, reason = "as a GPU has it")]
    pub(super) fn upload(&self, address: u64, from: &[u8]) -> Result<(), DeviceError> {
        let mut commands = command(b'W', &[address, from.len() as u64]);
        commands.extend_from_slice(from);
        self.state().push(Stream::Compute, Work::Commands(commands));
        Ok(())
    }

    #[expect(clippy::unnecessary_wraps, reason = "as a GPU has it")]
    pub(super) fn download(&self, address: u64, out: &mut [u8]) -> Result<(), DeviceError> {
        let mut state = self.state();
        state.drain(Stream::Compute, None);
        state.process.read(address, out);
        Ok(())
    }

    #[expect(clippy::unnecessary_wraps, reason = "as a GPU has it")]
    pub(super) fn copy_in(
        &self,
        pinned: &EmulatedPinned,
        bytes: usize,
        address: u64,
    ) -> Result<(), DeviceError> {
        let work = Work::In(pinned.0.clone(), bytes, address);
        self.state().push(Stream::Copy, work);
        Ok(())
    }

    #[expect(clippy::unnecessary_wraps, reason = "as a GPU has it")]
    pub(super) fn copy_out(
        &self,
        address: u64,
        bytes: usize,
        pinned: &EmulatedPinned,
    ) -> Result<(), DeviceError> {
        let work = Work::Out(address, bytes, pinned.0.clone());
        self.state().push(Stream::Copy, work);
        Ok(())
    }

    #[expect(clippy::unnecessary_wraps, reason = "as a GPU has it")]
    pub(super) fn launch(&self, stream: Stream, launch: Launch) -> Result<(), DeviceError> {
        let mut commands = vec![b'L'];
        let mut name = [0; 24];
        name[..launch.kernel.len()].copy_from_slice(launch.kernel.as_bytes());
        commands.extend(name);
        let sizes = [launch.blocks, launch.threads, launch.shared_bytes];
        commands.extend(sizes.into_iter().flat_map(|n| u64::from(n).to_le_bytes()));
        commands.extend((launch.arguments.len() as u64).to_le_bytes());
        commands.extend(launch.arguments);
        self.state().push(stream, Work::Commands(commands));
        Ok(())
    }

    #[expect(clippy::unnecessary_wraps, reason = "as a GPU has it")]
    pub(super) fn multiply(&self, product: Product) -> Result<(), DeviceError> {
        let commands = command(
            b'M',
            &[
                product.weight,
                product.input,
                product.output,
                product.rows as u64,
                product.inputs as u64,
                product.outputs as u64,
                type_number(product.dtype).into(),
                product.accumulate.into(),
            ],
        );
        self.state().push(Stream::Compute, Work::Commands(commands));
        Ok(())
    }

    pub(super) fn record(&self, stream: Stream) -> u64 {
        let mut state = self.state();
        let event = state.events.len();
        state.events.push(false);
        state.push(stream, Work::Record(event));
        event as u64
    }

    pub(super) fn wait(&self, stream: Stream, event: u64) {
        let event = usize::try_from(event).unwrap();
        self.state().push(stream, Work::Wait(event));
    }

    pub(super) fn finish(&self, event: u64) {
        let event = usize::try_from(event).unwrap();
        let mut state = self.state();
        for stream in [Stream::Compute, Stream::Copy] {
            if !state.events[event] {
                state.drain(stream, Some(event));
            }
        }
        assert!(state.events[event], "events are recorded before");
    }
}

impl State {
    fn push(&mut self, stream: Stream, work: Work) {
        self.queues[stream as usize].push_back(work);
        if stream == self.prompt {
            self.drain(stream, None);
        }
    }

    /// Does the work of a stream, until an event of its own, if it has it.
    fn drain(&mut self, stream: Stream, until: Option<usize>) {
        while let Some(work) = self.queues[stream as usize].pop_front() {
            match work {
                Work::Commands(commands) => self.process.send(&commands),
                Work::In(pinned, bytes, address) => {
                    let pinned = pinned.lock().unwrap();
                    let mut commands = command(b'W', &[address, bytes as u64]);
                    commands.extend_from_slice(&pinned[..bytes]);
                    self.process.send(&commands);
                }
                Work::Out(address, bytes, pinned) => {
                    let mut pinned = pinned.lock().unwrap();
                    self.process.read(address, &mut pinned[..bytes]);
                }
                Work::Record(event) => {
                    self.events[event] = true;
                    if until == Some(event) {
                        return;
                    }
                }
                Work::Wait(event) => {
                    if !self.events[event] {
                        let other = match stream {
                            Stream::Compute => Stream::Copy,
                            Stream::Copy => Stream::Compute,
                        };
                        self.drain(other, Some(event));
                    }
                    assert!(self.events[event], "streams wait for each other");
                }
            }
        }
    }
}

impl Process {
    fn send(&mut self, commands: &[u8]) {
        let sent = self.input.write_all(commands);
        sent.expect("the emulator reads on: see what it says above");
    }

    fn receive(&mut self, out: &mut [u8]) {
        self.input.flush().expect("the emulator reads on");
        let received = self.output.read_exact(out);
        received.expect("the emulator answers: see what it says above");
    }

    fn read(&mut self, address: u64, out: &mut [u8]) {
        self.send(&command(b'R', &[address, out.len() as u64]));
        self.receive(out);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // A failed test leaves the lock poisoned, and the process to be killed.
        let Ok(mut state) = self.state.lock() else {
            return;
        };
        // As a GPU does: memory that is in use is freed after that.
        state.drain(Stream::Compute, None);
        state.drain(Stream::Copy, None);
        let freed = command(b'F', &[self.address]);
        state.process.input.write_all(&freed).ok();
    }
}

impl EmulatedPinned {
    pub(super) fn new(bytes: usize) -> Self {
        Self(Arc::new(Mutex::new(vec![0xee; bytes])))
    }

    pub(super) fn write(&self, parts: &[&[u8]]) {
        let mut memory = self.0.lock().unwrap();
        let mut rest = &mut memory[..];
        for part in parts {
            let (now, later) = rest.split_at_mut(part.len());
            now.copy_from_slice(part);
            rest = later;
        }
    }

    pub(super) fn read(&self, out: &mut [u8]) {
        out.copy_from_slice(&self.0.lock().unwrap()[..out.len()]);
    }
}

fn command(letter: u8, numbers: &[u64]) -> Vec<u8> {
    let numbers = numbers.iter().flat_map(|number| number.to_le_bytes());
    std::iter::once(letter).chain(numbers).collect()
}

/// Compiles the emulator, once a process, beside this test.
fn executable() -> &'static Path {
    static EXECUTABLE: OnceLock<PathBuf> = OnceLock::new();
    EXECUTABLE.get_or_init(|| {
        let test = std::env::current_exe().unwrap();
        let out = test.with_file_name("engine-cu-emulated");
        // Tests of another process may be compiling it too.
        let mine = out.with_extension(std::process::id().to_string());
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("emulation/main.cpp");
        let status = Command::new("c++")
            .args(["-std=c++17", "-O1", "-Wall", "-Werror"])
            .args(["-Wno-unknown-pragmas", "-fno-strict-aliasing"])
            // Lanes leave their stacks by longjmp, which these would not understand.
            .args(["-U_FORTIFY_SOURCE", "--param", "asan-stack=0"])
            .args(["-fsanitize=address,undefined", "-fno-sanitize-recover=all"])
            .arg("-o")
            .args([&mine, &source])
            .status()
            .expect("a C++ compiler, as RocksDB needs one");
        assert!(status.success(), "the kernels do not compile as C++");
        std::fs::rename(&mine, &out).unwrap();
        out
    })
}
