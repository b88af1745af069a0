//! What attention asks of vectors beyond [`Simd`], and its kernels compiled for each instruction set.

use half::bf16;

use super::element::Element;
use super::isa::Isa;
use super::portable::Portable;
use super::simd::Simd;
#[cfg(target_arch = "x86_64")]
use super::{avx2::Avx2, avx512::Avx512, avx512::Avx512Bf16};

/// What a softmax between two products needs.
pub(in crate::ops) trait Softmax: Simd {
    /// To the nearest whole number; infinities and NaN stay.
    fn round(self, a: Self::F32) -> Self::F32;
    /// a · 2^n for any whole n, 0 or infinite where `f32` ends. A NaN `a` stays one.
    fn scale_by_any_power(self, a: Self::F32, n: Self::F32) -> Self::F32;
    /// Stores `first` and `second` as pairs of `bf16`, rounded to nearest, ties away from zero.
    /// # Safety
    /// `to` must be writable for 2 × [`Simd::LANES`] values.
    unsafe fn store_pairs(self, to: *mut bf16, first: Self::F32, second: Self::F32);
}

/// The formats that attention is computed in.
pub(in crate::ops) trait Probability: Element {
    /// 2^x; a NaN or an infinite x gives NaN.
    fn power<S: Softmax, const V: usize>(simd: S, x: [S::F32; V]) -> [S::F32; V];
    /// Stores one line of `DEPTH` positions; with one, `second` is left out.
    /// # Safety
    /// `to` must be writable for [`Simd::LANES`] × `DEPTH` values.
    unsafe fn store_line<S: Softmax>(simd: S, to: *mut Self, first: S::F32, second: S::F32);
}

impl Probability for f32 {
    #[inline(always)]
    fn power<S: Softmax, const V: usize>(simd: S, x: [S::F32; V]) -> [S::F32; V] {
        // The best fit over half a power to either side; its relative error is 7.5e-8.
        power(simd, x, [1.327_647_2e-3, 9.675_541e-3, 5.550_713e-2, 2.402_212e-1, 6.931_469_4e-1, 1.0])
    }
    #[inline(always)]
    unsafe fn store_line<S: Softmax>(simd: S, to: *mut f32, first: S::F32, _second: S::F32) {
        // SAFETY: the caller's promise.
        unsafe { simd.store(to, first) }
    }
}

impl Probability for bf16 {
    #[inline(always)]
    fn power<S: Softmax, const V: usize>(simd: S, x: [S::F32; V]) -> [S::F32; V] {
        // As above; the relative error is 7.5e-5, a fiftieth of what rounding to `bf16` adds.
        power(simd, x, [5.517_167e-2, 2.426_111_3e-1, 6.932_609_7e-1, 9.999_280_6e-1])
    }
    #[inline(always)]
    unsafe fn store_line<S: Softmax>(simd: S, to: *mut bf16, first: S::F32, second: S::F32) {
        // SAFETY: the caller's promise.
        unsafe { simd.store_pairs(to, first, second) }
    }
}

/// 2^x by a polynomial for the rest that the nearest whole power leaves, highest term first; step by step
/// for all vectors, which do not wait for each other.
#[inline(always)]
fn power<S: Softmax, const V: usize, const N: usize>(simd: S, mut x: [S::F32; V], terms: [f32; N]) -> [S::F32; V] {
    let (mut whole, mut series) = (x, [simd.splat(terms[0]); V]);
    for vector in 0..V {
        whole[vector] = simd.round(x[vector]);
        x[vector] = simd.sub(x[vector], whole[vector]);
    }
    for term in &terms[1..] {
        for vector in 0..V {
            series[vector] = simd.mul_add(series[vector], x[vector], simd.splat(*term));
        }
    }
    for vector in 0..V {
        series[vector] = simd.scale_by_any_power(series[vector], whole[vector]);
    }
    series
}

/// Work that is compiled for each instruction set; see [`Kernel`](super::isa::Kernel).
pub(super) trait SoftmaxKernel {
    /// All that this calls must be `#[inline(always)]`.
    fn run<S: Softmax>(self, simd: S);
}

/// Runs `kernel` with the instructions of `isa`, which must be available.
#[cfg(target_arch = "x86_64")]
pub(super) fn dispatch<K: SoftmaxKernel>(isa: Isa, kernel: K) {
    #[target_feature(enable = "avx2,fma")]
    fn avx2<K: SoftmaxKernel>(kernel: K, simd: Avx2) {
        kernel.run(simd);
    }
    #[target_feature(enable = "avx512f,avx512bw")]
    fn avx512<K: SoftmaxKernel>(kernel: K, simd: Avx512) {
        kernel.run(simd);
    }
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn avx512_bf16<K: SoftmaxKernel>(kernel: K, simd: Avx512Bf16) {
        kernel.run(simd);
    }
    debug_assert!(isa <= Isa::best(), "{isa} is not available");
    // SAFETY: an `Isa` comes from `available` alone, which has asked the processor.
    unsafe {
        match isa {
            Isa::Portable => kernel.run(Portable),
            Isa::Avx2 => avx2(kernel, Avx2::new()),
            Isa::Avx512 => avx512(kernel, Avx512::new()),
            Isa::Avx512Bf16 | Isa::Amx => avx512_bf16(kernel, Avx512Bf16::new()),
        }
    }
}

/// Runs `kernel` with what the compiler makes of it.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn dispatch<K: SoftmaxKernel>(_isa: Isa, kernel: K) {
    kernel.run(Portable);
}

impl Softmax for Portable {
    #[inline(always)]
    fn round(self, a: Self::F32) -> Self::F32 {
        // Adding and taking away 1.5 · 2^23 rounds; what is larger has no fraction.
        const ROUNDER: f32 = 12_582_912.0;
        a.map(|a| if a.abs() < 4_194_304.0 { (a + ROUNDER) - ROUNDER } else { a })
    }
    #[inline(always)]
    fn scale_by_any_power(self, a: Self::F32, n: Self::F32) -> Self::F32 {
        // An exponent of 0 is the number 0 and one of 255 is infinity.
        std::array::from_fn(|lane| {
            let exponent = n[lane].clamp(-127.0, 128.0) as i32 + 127;
            a[lane] * f32::from_bits((exponent as u32) << 23)
        })
    }
    #[inline(always)]
    unsafe fn store_pairs(self, to: *mut bf16, first: Self::F32, second: Self::F32) {
        let half = |value: f32| value.to_bits().wrapping_add(0x8000);
        let pairs: [u32; Self::LANES] =
            std::array::from_fn(|lane| half(second[lane]) & 0xffff_0000 | half(first[lane]) >> 16);
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[u32; Self::LANES]>().write_unaligned(pairs) }
    }
}

#[cfg(target_arch = "x86_64")]
mod vectors {
    use std::arch::x86_64::*;

    use half::bf16;

    use super::{Avx2, Avx512, Avx512Bf16, Simd, Softmax};

    // SAFETY: every intrinsic needs the instructions that the type proves; the pointers are the callers'
    // promises.
    impl Softmax for Avx2 {
        #[inline(always)]
        fn round(self, a: __m256) -> __m256 {
            unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
        }
        #[inline(always)]
        fn scale_by_any_power(self, a: __m256, n: __m256) -> __m256 {
            unsafe {
                // An exponent of 0 is the number 0 and one of 255 is infinity.
                let n = self.max(self.splat(-127.0), self.min(self.splat(128.0), n));
                let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
                _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent)))
            }
        }
        #[inline(always)]
        unsafe fn store_pairs(self, to: *mut bf16, first: __m256, second: __m256) {
            unsafe {
                let half = _mm256_set1_epi32(0x8000);
                let first = _mm256_srli_epi32::<16>(_mm256_add_epi32(_mm256_castps_si256(first), half));
                let second = _mm256_add_epi32(_mm256_castps_si256(second), half);
                _mm256_storeu_si256(to.cast(), _mm256_blend_epi16::<0b1010_1010>(first, second));
            }
        }
    }

    macro_rules! with_512_bits {
        ($($simd:ty)*) => {
            // SAFETY: as above.
            $(impl Softmax for $simd {
                #[inline(always)]
                fn round(self, a: __m512) -> __m512 {
                    unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
                }
                #[inline(always)]
                fn scale_by_any_power(self, a: __m512, n: __m512) -> __m512 {
                    unsafe { _mm512_scalef_ps(a, n) }
                }
                #[inline(always)]
                unsafe fn store_pairs(self, to: *mut bf16, first: __m512, second: __m512) {
                    unsafe {
                        let half = _mm512_set1_epi32(0x8000);
                        let first = _mm512_srli_epi32::<16>(_mm512_add_epi32(_mm512_castps_si512(first), half));
                        let second = _mm512_add_epi32(_mm512_castps_si512(second), half);
                        let pairs = _mm512_mask_blend_epi16(0xaaaa_aaaa, first, second);
                        _mm512_storeu_si512(to.cast(), pairs);
                    }
                }
            })*
        };
    }
    with_512_bits!(Avx512 Avx512Bf16);
}
