//! `kvasir-index`: which engine holds which blocks.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    kvasir_index::program::main(std::env::args_os())
}
