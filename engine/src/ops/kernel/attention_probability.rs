//! What attention asks of the formats that it is computed in.

use half::bf16;

use super::element::Element;
use super::simd::Simd;

/// The formats that attention is computed in.
pub(in crate::ops) trait Probability: Element {
    /// 2^x; a NaN or an infinite x gives NaN.
    fn power<S: Simd, const V: usize>(simd: S, x: [S::F32; V]) -> [S::F32; V];
    /// Stores one line of `DEPTH` positions; with one, `second` is left out.
    /// # Safety
    /// `to` must be writable for [`Simd::LANES`] × `DEPTH` values.
    unsafe fn store_line<S: Simd>(simd: S, to: *mut Self, first: S::F32, second: S::F32);
}

impl Probability for f32 {
    #[inline(always)]
    fn power<S: Simd, const V: usize>(simd: S, x: [S::F32; V]) -> [S::F32; V] {
        // The best fit over half a power to either side; its relative error is 7.5e-8.
        power(simd, x, [1.327_647_2e-3, 9.675_541e-3, 5.550_713e-2, 2.402_212e-1, 6.931_469_4e-1, 1.0])
    }
    #[inline(always)]
    unsafe fn store_line<S: Simd>(simd: S, to: *mut f32, first: S::F32, _second: S::F32) {
        // SAFETY: the caller's promise.
        unsafe { simd.store(to, first) }
    }
}

impl Probability for bf16 {
    #[inline(always)]
    fn power<S: Simd, const V: usize>(simd: S, x: [S::F32; V]) -> [S::F32; V] {
        // As above; the relative error is 7.5e-5, a fiftieth of what rounding to `bf16` adds.
        power(simd, x, [5.517_167e-2, 2.426_111_3e-1, 6.932_609_7e-1, 9.999_280_6e-1])
    }
    #[inline(always)]
    unsafe fn store_line<S: Simd>(simd: S, to: *mut bf16, first: S::F32, second: S::F32) {
        // SAFETY: the caller's promise.
        unsafe { simd.store_pairs(to, first, second) }
    }
}

/// 2^x by a polynomial for the rest that the nearest whole power leaves, highest term first; step by step
/// for all vectors, which do not wait for each other.
#[inline(always)]
fn power<S: Simd, const V: usize, const N: usize>(simd: S, mut x: [S::F32; V], terms: [f32; N]) -> [S::F32; V] {
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
