//! The back end of a Xen paging ring against any front end; see `sim::xen_ring`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sim::xen_ring::run(bytes));
