//! The compact encoding of frame sets on any bytes: no panic, and what it accepts is what the set encodes to.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sim::codecs::frame_set(bytes));
