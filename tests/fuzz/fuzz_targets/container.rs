//! See `kvasir_fuzz::container`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| kvasir_fuzz::container(bytes));
