//! The inner loops: a short scalar reference and, beside it, the fast path for this processor. Both give the same bits;
//! one shared list of shapes tests the two.
//!
//! Where products are summed the order is fixed: by lanes whose number does not depend on the processor, or along one
//! chain of fused multiply-adds. `f32::mul_add` is correctly rounded on every processor (by a library call where it has
//! no such instruction), and the compiler fuses nothing by itself.

pub mod attention;
pub mod bandwidth;
pub mod cholesky;
pub mod compare;
pub mod decode;
pub mod dequantize;
pub mod elementwise;
pub mod math;
pub mod matmul;
pub mod moments;
pub mod random;
pub mod round;
pub mod route;
pub mod transpose;

/// Compiles `$body` twice, for the baseline processor and for AVX2 with FMA, and picks the version for this processor.
macro_rules! for_this_cpu {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:ident) => {
        $(#[$doc])*
        #[inline]
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                fn fast($($arg: $ty),*) $(-> $ret)? {
                    $body($($arg),*)
                }
                if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                    // SAFETY: AVX2 and FMA are there.
                    return unsafe { fast($($arg),*) };
                }
            }
            $body($($arg),*)
        }
    };
}

pub(crate) use for_this_cpu;
