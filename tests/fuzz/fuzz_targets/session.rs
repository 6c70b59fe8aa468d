//! See `kvasir_fuzz::session`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kvasir_fuzz::session(bytes));
