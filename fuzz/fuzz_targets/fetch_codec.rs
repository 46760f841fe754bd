//! The fetch protocol's decoder on any bytes: no panic, and what it accepts encodes to what it decodes from again.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sim::codecs::fetch(bytes));
