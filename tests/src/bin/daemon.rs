//! `kvasird`, so that end-to-end tests can start it as a process.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    kvasir_server::daemon::main(std::env::args_os())
}
