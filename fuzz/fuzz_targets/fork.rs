//! Whole simulated forks: the input is the seed, so that coverage guides the search through the scenarios.
#![no_main]

libfuzzer_sys::fuzz_target!(|seed: u64| {
    sim::run(seed);
});
