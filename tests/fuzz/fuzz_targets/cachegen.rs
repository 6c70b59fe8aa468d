//! See `kvasir_fuzz::cachegen`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kvasir_fuzz::cachegen(bytes));
