//! The parser of the streams of `xl save`, and the layout of what it accepts, on any bytes and from a pipe too: no panic, and
//! nothing outside of the stream.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sim::codecs::xen_stream(bytes));
