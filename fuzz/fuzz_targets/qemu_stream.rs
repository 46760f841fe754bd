//! The parser of saved migration streams, and the layout of what it accepts, on any bytes: no panic, and nothing outside of the file.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sim::codecs::qemu_stream(bytes));
