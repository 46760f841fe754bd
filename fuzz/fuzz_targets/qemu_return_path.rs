//! What a QEMU sends back to the source of its migration, decoded from any bytes cut anyhow: no panic, and the same messages.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sim::codecs::qemu_return_path(bytes));
