//! Elementary functions for the forward: pure arithmetic with fused multiply-adds, no branch and no call, so that loops
//! vectorize and every processor gives the same bits. The host's libm is not used where bits are promised.

/// Independent sums of a reduction; combined by [`tree`].
pub const LANES: usize = 8;

/// 1.5 * 2^23: added to a small number it leaves the nearest integer in the low bits.
const TO_INTEGER: f32 = 12_582_912.0;

/// e^x within 2 units in the last place; 0 below -87.3 (where results would be subnormal), infinite above 88.7.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts so that r is exact enough (Cody and Waite, 1980); e^r by its
/// Taylor polynomial, whose error at degree 7 is below 1e-8; then n goes into the exponent, in two halves so that n = 128
/// fits.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = x.clamp(-87.3, 88.8);
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, TO_INTEGER);
    let n = shifted - TO_INTEGER;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, clamped));
    const INVERSE_FACTORIALS: [f32; 7] = [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
    let mut p = 1.0 / 5040.0;
    let mut i = 0;
    while i < INVERSE_FACTORIALS.len() {
        p = r.mul_add(p, INVERSE_FACTORIALS[i]);
        i += 1;
    }
    let n = n as i32;
    let half = n >> 1;
    let power = |n: i32| f32::from_bits(((n + 127) as u32) << 23);
    let y = p * power(half) * power(n - half);
    if x < -87.3 { 0.0 } else { y }
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The sum of the lanes, in a fixed order.
#[inline(always)]
pub fn tree(s: [f32; LANES]) -> f32 {
    ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]))
}

/// Sum of a[i] * b[i]: lane j is the chain of fused multiply-adds over i = j mod 8.
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (a8, a_rest) = a.as_chunks::<LANES>();
    let (b8, b_rest) = b.as_chunks::<LANES>();
    for (x, y) in a8.iter().zip(b8) {
        for j in 0..LANES {
            lanes[j] = x[j].mul_add(y[j], lanes[j]);
        }
    }
    for (j, (x, y)) in a_rest.iter().zip(b_rest).enumerate() {
        lanes[j] = x.mul_add(*y, lanes[j]);
    }
    tree(lanes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]
        #[test]
        fn exp_is_within_two_units(x in -87.3f32..88.72) {
            let want = libm::exp(f64::from(x));
            let error = (f64::from(exp(x)) - want).abs() / want;
            prop_assert!(error < 2.0 * f64::from(f32::EPSILON) / 2.0 * 2.0, "exp({x}) is off by {error:e}");
        }
    }

    #[test]
    fn exp_at_its_edges() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-100.0), 0.0);
        assert_eq!(exp(100.0), f32::INFINITY);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
        assert_eq!(sigmoid(-200.0), 0.0);
        assert_eq!(sigmoid(200.0), 1.0);
        assert!(exp(88.722).is_finite());
    }
}
