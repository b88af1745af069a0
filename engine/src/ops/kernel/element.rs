//! The formats that products are computed from.

use half::bf16;

use super::panels::PANEL;
use super::simd::Simd;
use crate::ops::buffer::Value;

/// A format of activations and packed weights. Sums are always `f32`.
pub(in crate::ops) trait Element: Value + Default {
    /// Inner positions that one multiply-add covers.
    const DEPTH: usize;
    /// What a multiply-add takes: [`Simd::LANES`] × [`Element::DEPTH`] values.
    type Factor<S: Simd>: Copy;

    /// Positions × vectors of outputs whose sums fit into the registers.
    fn tile<S: Simd>() -> (usize, usize);
    /// [`Element::DEPTH`] neighbouring values in every lane.
    /// # Safety
    /// `from` must be readable for [`Element::DEPTH`] values.
    unsafe fn splat_factor<S: Simd>(simd: S, from: *const Self) -> Self::Factor<S>;
    /// # Safety
    /// `from` must be readable for [`Simd::LANES`] × [`Element::DEPTH`] values.
    unsafe fn load_factor<S: Simd>(simd: S, from: *const Self) -> Self::Factor<S>;
    /// One inner position of a factor: the first, or the second where there are two.
    /// # Safety
    /// As [`Element::load_factor`].
    unsafe fn load_position<S: Simd>(simd: S, from: *const Self, position: usize) -> S::F32;
    /// Stores a factor's inner positions, of which the second may not exist, rounded to nearest.
    /// # Safety
    /// `to` must be writable for [`Simd::LANES`] × [`Element::DEPTH`] values.
    unsafe fn store_positions<S: Simd>(simd: S, to: *mut Self, positions: [S::F32; 2]);
    /// sums + a · b.
    fn multiply_add<S: Simd>(simd: S, sums: S::F32, a: Self::Factor<S>, b: Self::Factor<S>) -> S::F32;

    /// # Safety
    /// As [`Simd::load`].
    unsafe fn load<S: Simd>(simd: S, from: *const Self) -> S::F32;
    /// # Safety
    /// As [`Simd::store`].
    unsafe fn store<S: Simd>(simd: S, to: *mut Self, value: S::F32);
    /// # Safety
    /// As [`Simd::load_some`].
    unsafe fn load_some<S: Simd>(simd: S, from: *const Self, count: usize) -> S::F32;
    /// # Safety
    /// As [`Simd::store_some`].
    unsafe fn store_some<S: Simd>(simd: S, to: *mut Self, value: S::F32, count: usize);

    fn from_f32(value: f32) -> Self;
    fn to_f32(self) -> f32;

    /// Rounds inner positions of a panel and lays them out as packed weights are; there are as many
    /// values as places.
    fn lay_out(positions: &[[f32; PANEL]], to: &mut [Self]);
}

// SAFETY: each method passes its caller's promise on.
impl Element for f32 {
    const DEPTH: usize = 1;
    type Factor<S: Simd> = S::F32;

    #[inline(always)]
    fn tile<S: Simd>() -> (usize, usize) {
        S::TILE
    }
    #[inline(always)]
    unsafe fn splat_factor<S: Simd>(simd: S, from: *const f32) -> S::F32 {
        simd.splat(unsafe { from.read() })
    }
    #[inline(always)]
    unsafe fn load_factor<S: Simd>(simd: S, from: *const f32) -> S::F32 {
        unsafe { simd.load(from) }
    }
    #[inline(always)]
    unsafe fn load_position<S: Simd>(simd: S, from: *const f32, _position: usize) -> S::F32 {
        unsafe { simd.load(from) }
    }
    #[inline(always)]
    unsafe fn store_positions<S: Simd>(simd: S, to: *mut f32, [only, _]: [S::F32; 2]) {
        unsafe { simd.store(to, only) }
    }
    #[inline(always)]
    fn multiply_add<S: Simd>(simd: S, sums: S::F32, a: S::F32, b: S::F32) -> S::F32 {
        simd.mul_add(a, b, sums)
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const f32) -> S::F32 {
        unsafe { simd.load(from) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(simd: S, to: *mut f32, value: S::F32) {
        unsafe { simd.store(to, value) }
    }
    #[inline(always)]
    unsafe fn load_some<S: Simd>(simd: S, from: *const f32, count: usize) -> S::F32 {
        unsafe { simd.load_some(from, count) }
    }
    #[inline(always)]
    unsafe fn store_some<S: Simd>(simd: S, to: *mut f32, value: S::F32, count: usize) {
        unsafe { simd.store_some(to, value, count) }
    }
    #[inline(always)]
    fn from_f32(value: f32) -> f32 {
        value
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn lay_out(positions: &[[f32; PANEL]], to: &mut [f32]) {
        to.copy_from_slice(positions.as_flattened());
    }
}

// SAFETY: as above.
impl Element for bf16 {
    const DEPTH: usize = 2;
    type Factor<S: Simd> = S::Pairs;

    #[inline(always)]
    fn tile<S: Simd>() -> (usize, usize) {
        S::PAIR_TILE
    }
    #[inline(always)]
    unsafe fn splat_factor<S: Simd>(simd: S, from: *const bf16) -> S::Pairs {
        unsafe { simd.splat_pair(from) }
    }
    #[inline(always)]
    unsafe fn load_factor<S: Simd>(simd: S, from: *const bf16) -> S::Pairs {
        unsafe { simd.load_pairs(from) }
    }
    #[inline(always)]
    unsafe fn load_position<S: Simd>(simd: S, from: *const bf16, position: usize) -> S::F32 {
        let pairs = unsafe { simd.load_pairs(from) };
        simd.half(pairs, position)
    }
    #[inline(always)]
    unsafe fn store_positions<S: Simd>(simd: S, to: *mut bf16, [first, second]: [S::F32; 2]) {
        unsafe { simd.store_pairs(to, first, second) }
    }
    #[inline(always)]
    fn multiply_add<S: Simd>(simd: S, sums: S::F32, a: S::Pairs, b: S::Pairs) -> S::F32 {
        simd.dot(sums, a, b)
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const bf16) -> S::F32 {
        unsafe { simd.load_bf16(from) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(simd: S, to: *mut bf16, value: S::F32) {
        unsafe { simd.store_bf16(to, value) }
    }
    #[inline(always)]
    unsafe fn load_some<S: Simd>(simd: S, from: *const bf16, count: usize) -> S::F32 {
        unsafe { simd.load_some_bf16(from, count) }
    }
    #[inline(always)]
    unsafe fn store_some<S: Simd>(simd: S, to: *mut bf16, value: S::F32, count: usize) {
        unsafe { simd.store_some_bf16(to, value, count) }
    }
    #[inline(always)]
    fn from_f32(value: f32) -> bf16 {
        bf16::from_f32(value)
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
    #[inline(always)]
    fn lay_out(positions: &[[f32; PANEL]], to: &mut [bf16]) {
        for ([first, second], to) in positions.as_chunks().0.iter().zip(to.as_chunks_mut::<{ 2 * PANEL }>().0) {
            for ((first, second), to) in first.iter().zip(second).zip(to.as_chunks_mut().0) {
                *to = [bf16::from_bits(rounded(*first)), bf16::from_bits(rounded(*second))];
            }
        }
    }
}

/// The bits of the nearest `bf16`, ties to even: as [`bf16::from_f32`], but without a branch, so that
/// vectors of them are rounded at once.
#[inline(always)]
fn rounded(value: f32) -> u16 {
    let bits = value.to_bits();
    let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    let bits = if bits & 0x7fff_ffff > 0x7f80_0000 { bits | 0x0040_0000 } else { nearest };
    (bits >> 16) as u16
}
