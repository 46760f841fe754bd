//! The decoders of descriptors, image indices and working sets, on any bytes and on files whose checksums are right: no panic, and what they
//! accept encodes to what it decodes from again.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sim::files::file(bytes));
