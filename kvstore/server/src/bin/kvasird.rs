//! `kvasird`: the cache daemon.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    kvasir_server::daemon::main(std::env::args_os())
}
