//! The kernel on the CPU: `emulation/main.cpp`, as a process.

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use kvasir_codec::DecodeTables;

use super::Decode;
use crate::batch::Batch;
use crate::decoder::CudaDecodeError;

/// Warps that run: fewer than most batches have cells, so that each decodes several.
const WARPS: u32 = 3;

pub(super) struct Emulator {
    process: Child,
}

impl Emulator {
    pub(super) fn start() -> Self {
        let process = Command::new(executable())
            // The process is killed, and nothing is freed then.
            .env("ASAN_OPTIONS", "detect_leaks=0")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        Self {
            process: process.unwrap(),
        }
    }
}

impl Decode for Emulator {
    fn run(&mut self, batch: &Batch<'_>, buffers: &mut [Vec<u8>]) -> Result<(), CudaDecodeError> {
        // The buffers side by side.
        let mut starts = Vec::new();
        let mut destination = Vec::new();
        for buffer in &*buffers {
            destination.resize(destination.len().next_multiple_of(16), 0);
            starts.extend((destination.len() as u64).to_le_bytes());
            destination.extend_from_slice(buffer);
        }
        let tables = DecodeTables::current();
        let [base, thirds] = [tables.base, tables.thirds].map(|table| {
            let bytes = table.into_iter().flat_map(u32::to_le_bytes);
            bytes.collect::<Vec<u8>>()
        });
        let mut input = Vec::new();
        for count in [batch.cell_count(), batch.numbers_per_warp, WARPS] {
            input.extend(count.to_le_bytes());
        }
        let others = [&base, &thirds, &starts, &destination];
        let others = others.map(Vec::as_slice);
        for section in batch.sections().into_iter().chain(others) {
            input.extend((section.len() as u64).to_le_bytes());
            input.extend_from_slice(section);
        }
        let pipe = self.process.stdin.as_mut().unwrap();
        pipe.write_all(&input).expect("the emulator reads on");
        pipe.flush().unwrap();
        let mut results = vec![0; 4 * batch.layer_of_cell.len()];
        let pipe = self.process.stdout.as_mut().unwrap();
        for bytes in [&mut destination, &mut results] {
            let read = pipe.read_exact(bytes);
            read.expect("the emulator ends no sooner: see what it says above");
        }
        let mut from = 0usize;
        for buffer in buffers {
            from = from.next_multiple_of(16);
            let len = buffer.len();
            buffer.copy_from_slice(&destination[from..from + len]);
            from += len;
        }
        let (results, _) = results.as_chunks();
        let results: Vec<u32> = results.iter().map(|&r| u32::from_le_bytes(r)).collect();
        Ok(batch.check(&results)?)
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// Compiles the emulator, once a process, beside this test.
fn executable() -> &'static Path {
    static EXECUTABLE: OnceLock<PathBuf> = OnceLock::new();
    EXECUTABLE.get_or_init(|| {
        let test = std::env::current_exe().unwrap();
        let out = test.with_file_name("decode-cu-emulated");
        // Tests of another process may be compiling it too.
        let mine = out.with_extension(std::process::id().to_string());
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("emulation/main.cpp");
        let status = Command::new("c++")
            .args(["-std=c++17", "-O1", "-Wall", "-Werror"])
            // As the kernel rounds.
            .arg("-ffp-contract=off")
            .arg("-fno-strict-aliasing")
            // Lanes leave their stacks by longjmp, which these would not understand.
            .args(["-U_FORTIFY_SOURCE", "--param", "asan-stack=0"])
            .args(["-fsanitize=address,undefined", "-fno-sanitize-recover=all"])
            .arg("-o")
            .args([&mine, &source])
            .status()
            .expect("a C++ compiler, as RocksDB needs one");
        assert!(status.success(), "the kernel does not compile as C++");
        std::fs::rename(&mine, &out).unwrap();
        out
    })
}
