//! What a kernel may do with vectors of `f32`, whatever their width.

use half::{bf16, f16};

use super::isa::Kernel;

/// One instruction set's vectors. A value of the type proves that the processor has them.
///
/// Every method is inlined into a function that may use the instructions; see
/// [`Kernel`](super::isa::Kernel).
pub(in crate::ops) trait Simd: Copy + Send + Sync {
    /// [`Simd::LANES`] numbers.
    type F32: Copy;
    /// [`Simd::LANES`] pairs of `bf16`.
    type Pairs: Copy;
    /// Numbers in a vector: a divisor of 16.
    const LANES: usize;
    /// Positions × vectors of outputs whose sums fit into the registers beside a vector's factors: 8, 6 or 4 of up
    /// to 3. One register too few, and a sum goes through memory in each step.
    const TILE: (usize, usize);
    /// The same for [pairs](Simd::dot), which may need registers for either half.
    const PAIR_TILE: (usize, usize) = Self::TILE;

    /// Whether products of `bf16` go by tiles, which this thread may use.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn has_tiles(self) -> bool {
        false
    }

    /// Runs `kernel` in a function of its own, of which the program has one copy however often it is called.
    fn call<K: Kernel>(self, kernel: K) -> K::Output;

    fn splat(self, value: f32) -> Self::F32;
    /// # Safety
    /// `from` must be readable for [`Simd::LANES`] values; no alignment is asked for.
    unsafe fn load(self, from: *const f32) -> Self::F32;
    /// # Safety
    /// `to` must be writable for [`Simd::LANES`] values.
    unsafe fn store(self, to: *mut f32, value: Self::F32);
    /// # Safety
    /// As [`Simd::load`].
    unsafe fn load_bf16(self, from: *const bf16) -> Self::F32;
    /// # Safety
    /// As [`Simd::load`].
    unsafe fn load_f16(self, from: *const f16) -> Self::F32;
    /// Rounds to nearest, ties to even.
    /// # Safety
    /// As [`Simd::store`].
    unsafe fn store_bf16(self, to: *mut bf16, value: Self::F32);

    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32;
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// a · b + c, rounded once where the processor can.
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// A NaN on either side gives `b`.
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// A NaN on either side gives `b`.
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// 1 / a within two units in the last place, for a > 0.
    fn reciprocal(self, a: Self::F32) -> Self::F32;
    fn abs(self, a: Self::F32) -> Self::F32;
    /// `magnitude` with the sign of `sign`.
    fn copy_sign(self, magnitude: Self::F32, sign: Self::F32) -> Self::F32;
    /// a · 2^n for whole n of -126 to 127.
    fn scale_by_power(self, a: Self::F32, n: Self::F32) -> Self::F32;
    /// To the nearest whole number; infinities and NaN stay.
    fn round(self, a: Self::F32) -> Self::F32;
    /// a · 2^n for any whole n, 0 or infinite where `f32` ends. A NaN `a` stays one.
    fn scale_by_any_power(self, a: Self::F32, n: Self::F32) -> Self::F32;
    /// Stores `first` and `second` as pairs of `bf16`, rounded to nearest, ties away from zero.
    /// # Safety
    /// `to` must be writable for 2 × [`Simd::LANES`] values.
    unsafe fn store_pairs(self, to: *mut bf16, first: Self::F32, second: Self::F32);
    /// Stores the first [`Simd::LANES`] of `rows` as columns: the values that they have in lane `l` at `to[l]`.
    /// # Safety
    /// The first [`Simd::LANES`] of `to` must each be writable for as many values.
    unsafe fn store_columns(self, rows: &[Self::F32; 16], to: &[*mut f32; 16]);
    /// The sum of the lanes, always in the same order.
    fn sum(self, a: Self::F32) -> f32;
    /// The largest lane.
    fn largest(self, a: Self::F32) -> f32;

    /// One pair in every lane.
    /// # Safety
    /// `from` must be readable for two values.
    unsafe fn splat_pair(self, from: *const bf16) -> Self::Pairs;
    /// # Safety
    /// `from` must be readable for 2 × [`Simd::LANES`] values.
    unsafe fn load_pairs(self, from: *const bf16) -> Self::Pairs;
    /// The first or, for `place` 1, the second of each pair.
    fn half(self, pairs: Self::Pairs, place: usize) -> Self::F32;
    /// sums + a₀ · b₀ + a₁ · b₁ of each pair, in `f32`.
    fn dot(self, sums: Self::F32, a: Self::Pairs, b: Self::Pairs) -> Self::F32;

    /// The first `count` values, zeros behind them.
    /// # Safety
    /// `from` must be readable for `count` values, of which there are at most [`Simd::LANES`].
    #[inline(always)]
    unsafe fn load_some(self, from: *const f32, count: usize) -> Self::F32 {
        let mut values = [0f32; 16];
        // SAFETY: the caller's promise; 16 is the widest vector.
        unsafe {
            std::ptr::copy_nonoverlapping(from, values.as_mut_ptr(), count);
            self.load(values.as_ptr())
        }
    }

    /// # Safety
    /// `to` must be writable for `count` values, of which there are at most [`Simd::LANES`].
    #[inline(always)]
    unsafe fn store_some(self, to: *mut f32, value: Self::F32, count: usize) {
        let mut values = [0f32; 16];
        // SAFETY: as above.
        unsafe {
            self.store(values.as_mut_ptr(), value);
            std::ptr::copy_nonoverlapping(values.as_ptr(), to, count);
        }
    }

    /// As [`Simd::load_some`].
    /// # Safety
    /// As [`Simd::load_some`].
    #[inline(always)]
    unsafe fn load_some_bf16(self, from: *const bf16, count: usize) -> Self::F32 {
        let mut values = [bf16::ZERO; 16];
        // SAFETY: as above.
        unsafe {
            std::ptr::copy_nonoverlapping(from, values.as_mut_ptr(), count);
            self.load_bf16(values.as_ptr())
        }
    }

    /// As [`Simd::store_some`].
    /// # Safety
    /// As [`Simd::store_some`].
    #[inline(always)]
    unsafe fn store_some_bf16(self, to: *mut bf16, value: Self::F32, count: usize) {
        let mut values = [bf16::ZERO; 16];
        // SAFETY: as above.
        unsafe {
            self.store_bf16(values.as_mut_ptr(), value);
            std::ptr::copy_nonoverlapping(values.as_ptr(), to, count);
        }
    }
}

#[cfg(test)]
mod tests;
