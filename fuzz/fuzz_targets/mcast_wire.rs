//! The decoder of multicast datagrams on any bytes: no panic, and what it accepts encodes to what it decodes from again.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| sim::codecs::mcast_wire(bytes));
