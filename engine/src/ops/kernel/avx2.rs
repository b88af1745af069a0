//! 256-bit vectors with fused multiply-add (and half-precision loads, which no such processor lacks).

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::isa::Kernel;
use super::simd::Simd;

/// Proof of AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(in crate::ops) struct Avx2(());

impl Avx2 {
    /// # Safety
    /// The processor must have AVX2, FMA and F16C.
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

// SAFETY: every intrinsic needs the instructions that the type proves; the pointers are the callers'
// promises.
impl Simd for Avx2 {
    type F32 = __m256;
    type Pairs = __m256i;
    const LANES: usize = 8;
    const TILE: (usize, usize) = (6, 2);
    const PAIR_TILE: (usize, usize) = (4, 2);

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        #[inline(never)]
        #[target_feature(enable = "avx2,fma,f16c")]
        fn call<S: Simd, K: Kernel>(simd: S, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        unsafe { call(self, kernel) }
    }
    #[inline(always)]
    fn splat(self, value: f32) -> __m256 {
        unsafe { _mm256_set1_ps(value) }
    }
    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> __m256 {
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, value: __m256) {
        unsafe { _mm256_storeu_ps(to, value) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> __m256 {
        unsafe {
            let narrow = _mm_loadu_si128(from.cast());
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(narrow)))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> __m256 {
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16, value: __m256) {
        unsafe {
            let bits = _mm256_castps_si256(value);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
            // A NaN must stay one: rounding could carry it into infinity or zero.
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(value, value));
            let chosen = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan));
            let packed = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(chosen, chosen));
            _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(packed));
        }
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    fn mul_add(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_min_ps(a, b) }
    }
    #[inline(always)]
    fn reciprocal(self, a: __m256) -> __m256 {
        unsafe { _mm256_div_ps(_mm256_set1_ps(1.0), a) }
    }
    #[inline(always)]
    fn abs(self, a: __m256) -> __m256 {
        unsafe { _mm256_andnot_ps(_mm256_set1_ps(-0.0), a) }
    }
    #[inline(always)]
    fn copy_sign(self, magnitude: __m256, sign: __m256) -> __m256 {
        unsafe {
            let bit = _mm256_set1_ps(-0.0);
            _mm256_or_ps(_mm256_andnot_ps(bit, magnitude), _mm256_and_ps(bit, sign))
        }
    }
    #[inline(always)]
    fn scale_by_power(self, a: __m256, n: __m256) -> __m256 {
        unsafe {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent)))
        }
    }
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
    #[inline(always)]
    unsafe fn store_columns(self, rows: &[__m256; 16], to: &[*mut f32; 16]) {
        unsafe {
            let double = |value| _mm256_castps_pd(value);
            let single = |value| _mm256_castpd_ps(value);
            let mut fours = [_mm256_setzero_ps(); 8];
            for half in 0..2 {
                let [a, b] = [rows[4 * half], rows[4 * half + 1]];
                let [c, d] = [rows[4 * half + 2], rows[4 * half + 3]];
                let (low, high) = (double(_mm256_unpacklo_ps(a, b)), double(_mm256_unpackhi_ps(a, b)));
                let (next_low, next_high) = (double(_mm256_unpacklo_ps(c, d)), double(_mm256_unpackhi_ps(c, d)));
                fours[4 * half] = single(_mm256_unpacklo_pd(low, next_low));
                fours[4 * half + 1] = single(_mm256_unpackhi_pd(low, next_low));
                fours[4 * half + 2] = single(_mm256_unpacklo_pd(high, next_high));
                fours[4 * half + 3] = single(_mm256_unpackhi_pd(high, next_high));
            }
            for lane in 0..4 {
                self.store(to[lane], _mm256_permute2f128_ps::<0x20>(fours[lane], fours[4 + lane]));
                self.store(to[4 + lane], _mm256_permute2f128_ps::<0x31>(fours[lane], fours[4 + lane]));
            }
        }
    }
    #[inline(always)]
    fn sum(self, a: __m256) -> f32 {
        unsafe {
            let half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
            _mm_cvtss_f32(_mm_add_ss(quarter, _mm_shuffle_ps::<1>(quarter, quarter)))
        }
    }
    #[inline(always)]
    fn largest(self, a: __m256) -> f32 {
        unsafe {
            let half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let quarter = _mm_max_ps(half, _mm_movehl_ps(half, half));
            _mm_cvtss_f32(_mm_max_ss(quarter, _mm_shuffle_ps::<1>(quarter, quarter)))
        }
    }
    #[inline(always)]
    unsafe fn splat_pair(self, from: *const bf16) -> __m256i {
        unsafe { _mm256_set1_epi32(from.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn load_pairs(self, from: *const bf16) -> __m256i {
        unsafe { _mm256_loadu_si256(from.cast()) }
    }
    #[inline(always)]
    fn half(self, pairs: __m256i, place: usize) -> __m256 {
        unsafe {
            _mm256_castsi256_ps(match place {
                0 => _mm256_slli_epi32::<16>(pairs),
                _ => _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000_u32 as i32)),
            })
        }
    }
    #[inline(always)]
    fn dot(self, sums: __m256, a: __m256i, b: __m256i) -> __m256 {
        unsafe {
            let sums = _mm256_fmadd_ps(self.half(a, 1), self.half(b, 1), sums);
            _mm256_fmadd_ps(self.half(a, 0), self.half(b, 0), sums)
        }
    }
}
