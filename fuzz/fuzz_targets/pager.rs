//! The pager as a list of operations against a simple model; see `sim::operations`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sim::operations::run(bytes));
