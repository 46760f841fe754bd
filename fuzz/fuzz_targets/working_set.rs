//! Working sets: any reports of any clones are merged into something sound.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sim::working_sets::run(bytes));
