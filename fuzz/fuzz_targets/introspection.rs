//! The introspection of a Linux guest's memory, on a sound one that is edited anywhere: no panic, no walk without end.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sim::linux_memory::edited(bytes));
