//! The receiver of a multicast channel as a list of operations against a simple model; see
//! `sim::multicast::receiver_operations`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sim::multicast::receiver_operations::run(bytes));
