//! Vectors as plain arrays: right on every processor, and as fast as the compiler makes them.

use half::{bf16, f16};

use super::isa::Kernel;
use super::simd::Simd;

const LANES: usize = 8;

/// No instructions that need asking for.
#[derive(Clone, Copy)]
pub(in crate::ops) struct Portable;

#[inline(always)]
fn each(a: [f32; LANES], b: [f32; LANES], op: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|lane| op(a[lane], b[lane]))
}

impl Simd for Portable {
    type F32 = [f32; LANES];
    type Pairs = [[bf16; 2]; LANES];
    const LANES: usize = LANES;
    const TILE: (usize, usize) = (4, 2);

    #[inline(never)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }
    #[inline(always)]
    fn splat(self, value: f32) -> Self::F32 {
        [value; LANES]
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> Self::F32 {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<Self::F32>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, value: Self::F32) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<Self::F32>().write_unaligned(value) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> Self::F32 {
        // SAFETY: the caller's promise.
        let values = unsafe { from.cast::<[bf16; LANES]>().read_unaligned() };
        values.map(widen)
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> Self::F32 {
        // SAFETY: the caller's promise.
        let values = unsafe { from.cast::<[f16; LANES]>().read_unaligned() };
        values.map(f16::to_f32)
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16, value: Self::F32) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[bf16; LANES]>().write_unaligned(value.map(bf16::from_f32)) }
    }
    #[inline(always)]
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        each(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        each(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        each(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32 {
        std::array::from_fn(|lane| mul_add(a[lane], b[lane], c[lane]))
    }
    #[inline(always)]
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        each(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32 {
        each(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn reciprocal(self, a: Self::F32) -> Self::F32 {
        a.map(|a| 1.0 / a)
    }
    #[inline(always)]
    fn abs(self, a: Self::F32) -> Self::F32 {
        a.map(f32::abs)
    }
    #[inline(always)]
    fn copy_sign(self, magnitude: Self::F32, sign: Self::F32) -> Self::F32 {
        each(magnitude, sign, f32::copysign)
    }
    #[inline(always)]
    fn scale_by_power(self, a: Self::F32, n: Self::F32) -> Self::F32 {
        each(a, n, |a, n| a * f32::from_bits(((n as i32 + 127) << 23) as u32))
    }
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
    #[inline(always)]
    unsafe fn store_columns(self, rows: &[Self::F32; 16], to: &[*mut f32; 16]) {
        for (lane, to) in to.iter().enumerate().take(LANES) {
            let column: [f32; LANES] = std::array::from_fn(|row| rows[row][lane]);
            // SAFETY: the caller's promise.
            unsafe { self.store(*to, column) }
        }
    }
    #[inline(always)]
    fn sum(self, a: Self::F32) -> f32 {
        ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]))
    }
    #[inline(always)]
    fn largest(self, a: Self::F32) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, |most, lane| if lane > most { lane } else { most })
    }
    #[inline(always)]
    unsafe fn splat_pair(self, from: *const bf16) -> Self::Pairs {
        // SAFETY: the caller's promise.
        [unsafe { from.cast::<[bf16; 2]>().read_unaligned() }; LANES]
    }
    #[inline(always)]
    unsafe fn load_pairs(self, from: *const bf16) -> Self::Pairs {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<Self::Pairs>().read_unaligned() }
    }
    #[inline(always)]
    fn half(self, pairs: Self::Pairs, place: usize) -> Self::F32 {
        pairs.map(|pair| widen(pair[place]))
    }
    #[inline(always)]
    fn dot(self, sums: Self::F32, a: Self::Pairs, b: Self::Pairs) -> Self::F32 {
        std::array::from_fn(|lane| {
            let second = mul_add(widen(a[lane][1]), widen(b[lane][1]), sums[lane]);
            mul_add(widen(a[lane][0]), widen(b[lane][0]), second)
        })
    }
}

/// Exact; the library's own conversion also quiets NaNs, which costs.
#[inline(always)]
fn widen(value: bf16) -> f32 {
    f32::from_bits(u32::from(value.to_bits()) << 16)
}

/// Fused only where the target surely has it: elsewhere it would be a call per number.
#[inline(always)]
fn mul_add(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_arch = "aarch64", target_feature = "fma")) { a.mul_add(b, c) } else { a * b + c }
}
