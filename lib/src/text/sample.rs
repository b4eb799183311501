//! A seeded draw without replacement, the same on every machine and with every version of the crates.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// Gives the items of `items` in a random order that depends on the seed and their number alone.
pub fn shuffled<T>(mut items: Vec<T>, seed: u64) -> impl Iterator<Item = T> {
    let mut draw = Draw::new(seed);
    // Fisher and Yates, from the end: as lazy as the caller.
    std::iter::from_fn(move || {
        let left = items.len();
        (left > 0).then(|| items.swap_remove(draw.below(left as u64) as usize))
    })
}

/// Numbers from ChaCha8. The seed is its key; no distribution of a library stands between, whose versions differ.
struct Draw(ChaCha8Rng);

impl Draw {
    fn new(seed: u64) -> Self {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        Self(ChaCha8Rng::from_seed(key))
    }

    /// A number below `n`, each with the same probability: draws from the incomplete last multiple of `n` are dropped.
    fn below(&mut self, n: u64) -> u64 {
        let dropped = (u64::MAX % n + 1) % n;
        loop {
            let x = self.0.next_u64();
            if x <= u64::MAX - dropped {
                return x % n;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_is_fixed_for_ever() {
        let order = |n: u32, seed| shuffled((0..n).collect(), seed).collect::<Vec<_>>();
        assert_eq!(order(10, 42), PINNED);
        assert_ne!(order(10, 43), PINNED);
        let mut all = order(1000, 7);
        all.sort_unstable();
        assert_eq!(all, (0..1000).collect::<Vec<_>>());
        assert!(order(0, 1).is_empty());
    }

    const PINNED: [u32; 10] = [9, 6, 8, 5, 0, 7, 3, 4, 1, 2];

    #[test]
    fn every_item_comes_first_equally_often() {
        let mut first = [0; 5];
        for seed in 0..5000 {
            first[shuffled((0..5).collect(), seed).next().unwrap()] += 1;
        }
        assert!(first.iter().all(|&n| (900..1100).contains(&n)), "{first:?}");
    }
}
