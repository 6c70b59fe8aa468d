//! See `kvasir_fuzz::prelude`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kvasir_fuzz::prelude(bytes));
