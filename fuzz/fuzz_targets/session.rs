//! The page server's session on any bytes in any pieces; see `sim::client`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sim::client::run(bytes));
