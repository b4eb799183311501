//! Random numbers of tests: seeded, and the seed is printed, so that a failure can be had again.
#![allow(dead_code, reason = "each test file uses its part")]

/// A small generator (splitmix64).
pub struct Random(u64);

impl Random {
    /// From this seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// From the seed in the environment variable `name`, else a fixed one; prints it.
    pub fn from_env(name: &str) -> Self {
        let seed = std::env::var(name).map_or(20, |s| s.parse().unwrap_or_else(|_| panic!("{name} is a number")));
        println!("{name}={seed}");
        Self(seed)
    }

    /// The next 64 bits.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Less than `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}
