//! The sender of a multicast channel as a list of operations against a simple model; see `sim::multicast::sender_operations`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sim::multicast::sender_operations::run(bytes));
