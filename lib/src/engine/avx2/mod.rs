//! The kernels for AVX2, FMA and F16C, and with AVX-VNNI in place of some of it.

pub mod codes;
pub mod exact;
pub mod floats;
pub mod panels;
pub mod scales;
pub mod vector;

use std::arch::x86_64::*;

/// Whether this processor has what they need.
pub fn is_here() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

/// Whether it has 8-bit products that are summed in 32 bits, beside [`is_here`].
pub fn has_vnni() -> bool {
    is_here() && is_x86_feature_detected!("avxvnni")
}

/// 16 bytes at `low` and 16 at `high`.
///
/// # Safety
/// Both can be read.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn two_halves(low: *const u8, high: *const u8) -> __m256i {
    // SAFETY: the caller's.
    unsafe {
        _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(_mm_loadu_si128(low.cast())), _mm_loadu_si128(high.cast()))
    }
}

/// 32 bytes.
///
/// # Safety
/// They can be read.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load(from: *const u8) -> __m256i {
    // SAFETY: the caller's.
    unsafe { _mm256_loadu_si256(from.cast()) }
}
