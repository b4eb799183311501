//! Random numbers for tests and measurements, the same everywhere: xorshift64* (Vigna 2016, arXiv 1402.6246). What a job's output depends
//! on is drawn elsewhere.

/// A stream of numbers.
pub struct Draw(u64);

impl Draw {
    /// The stream that begins with `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// 64 bits, of which the upper ones are better.
    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// From -1 to 1.
    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// Below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() >> 32) as usize % n
    }

    /// Bytes.
    pub fn bytes(&mut self, n: usize) -> Vec<u8> {
        let mut bytes = vec![0; n];
        for chunk in bytes.chunks_mut(4) {
            chunk.copy_from_slice(&((self.bits() >> 32) as u32).to_le_bytes()[..chunk.len()]);
        }
        bytes
    }
}
