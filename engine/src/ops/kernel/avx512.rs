//! 512-bit vectors, without and with the dot product of `bf16` pairs.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::isa::Kernel;
use super::simd::Simd;

/// Proof of AVX-512 (F and BW).
#[derive(Clone, Copy)]
pub(in crate::ops) struct Avx512(());

/// Proof of AVX-512 (F and BW) and AVX512-BF16, and perhaps of tiles.
#[derive(Clone, Copy)]
pub(in crate::ops) struct Avx512Bf16 {
    tiles: bool,
}

impl Avx512 {
    /// # Safety
    /// The processor must have AVX-512 F and BW.
    pub(super) unsafe fn new() -> Self {
        Self(())
    }
}

impl Avx512Bf16 {
    /// # Safety
    /// The processor must have AVX-512 F, BW and BF16.
    pub(super) unsafe fn new() -> Self {
        Self { tiles: false }
    }

    /// # Safety
    /// As [`Avx512Bf16::new`], and tiles must be [available](super::amx::is_available).
    pub(super) unsafe fn with_tiles() -> Self {
        Self { tiles: true }
    }
}

/// What both have in common.
macro_rules! plain_operations {
    () => {
        type F32 = __m512;
        const LANES: usize = 16;
        const TILE: (usize, usize) = (8, 3);

        #[inline(always)]
        fn splat(self, value: f32) -> __m512 {
            unsafe { _mm512_set1_ps(value) }
        }
        #[inline(always)]
        unsafe fn load(self, from: *const f32) -> __m512 {
            unsafe { _mm512_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32, value: __m512) {
            unsafe { _mm512_storeu_ps(to, value) }
        }
        #[inline(always)]
        unsafe fn load_bf16(self, from: *const bf16) -> __m512 {
            unsafe {
                let narrow = _mm256_loadu_si256(from.cast());
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(narrow)))
            }
        }
        #[inline(always)]
        unsafe fn load_f16(self, from: *const f16) -> __m512 {
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
        }
        #[inline(always)]
        fn add(self, a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        fn sub(self, a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_sub_ps(a, b) }
        }
        #[inline(always)]
        fn mul(self, a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_mul_ps(a, b) }
        }
        #[inline(always)]
        fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        fn max(self, a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_max_ps(a, b) }
        }
        #[inline(always)]
        fn min(self, a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_min_ps(a, b) }
        }
        #[inline(always)]
        fn reciprocal(self, a: __m512) -> __m512 {
            unsafe {
                // 14 good bits, doubled by a step of Newton's.
                let guess = _mm512_rcp14_ps(a);
                _mm512_mul_ps(guess, _mm512_fnmadd_ps(a, guess, _mm512_set1_ps(2.0)))
            }
        }
        #[inline(always)]
        fn abs(self, a: __m512) -> __m512 {
            unsafe { _mm512_abs_ps(a) }
        }
        #[inline(always)]
        fn copy_sign(self, magnitude: __m512, sign: __m512) -> __m512 {
            unsafe {
                let rest = _mm512_set1_epi32(0x7fff_ffff);
                let (magnitude, sign) = (_mm512_castps_si512(magnitude), _mm512_castps_si512(sign));
                // Bit by bit: from `magnitude` where `rest` is set, else from `sign`.
                _mm512_castsi512_ps(_mm512_ternarylogic_epi32::<0xca>(rest, magnitude, sign))
            }
        }
        #[inline(always)]
        fn scale_by_power(self, a: __m512, n: __m512) -> __m512 {
            unsafe { _mm512_scalef_ps(a, n) }
        }
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
        #[inline(always)]
        unsafe fn store_columns(self, rows: &[__m512; 16], to: &[*mut f32; 16]) {
            unsafe {
                // In each quarter of a vector, four values of a lane; of the quarters, first the even and the odd ones.
                let mut fours = [_mm512_setzero_ps(); 16];
                for four in 0..4 {
                    let [a, b] = [rows[4 * four], rows[4 * four + 1]];
                    let [c, d] = [rows[4 * four + 2], rows[4 * four + 3]];
                    let double = |value| _mm512_castps_pd(value);
                    let (low, high) = (double(_mm512_unpacklo_ps(a, b)), double(_mm512_unpackhi_ps(a, b)));
                    let (next_low, next_high) = (double(_mm512_unpacklo_ps(c, d)), double(_mm512_unpackhi_ps(c, d)));
                    fours[4 * four] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, next_low));
                    fours[4 * four + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, next_low));
                    fours[4 * four + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high, next_high));
                    fours[4 * four + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high, next_high));
                }
                for lane in 0..4 {
                    let [a, b, c, d] = [fours[lane], fours[4 + lane], fours[8 + lane], fours[12 + lane]];
                    let (even, odd) = (_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
                    let (far_even, far_odd) = (_mm512_shuffle_f32x4::<0x88>(c, d), _mm512_shuffle_f32x4::<0xdd>(c, d));
                    self.store(to[lane], _mm512_shuffle_f32x4::<0x88>(even, far_even));
                    self.store(to[4 + lane], _mm512_shuffle_f32x4::<0x88>(odd, far_odd));
                    self.store(to[8 + lane], _mm512_shuffle_f32x4::<0xdd>(even, far_even));
                    self.store(to[12 + lane], _mm512_shuffle_f32x4::<0xdd>(odd, far_odd));
                }
            }
        }
        #[inline(always)]
        fn sum(self, a: __m512) -> f32 {
            unsafe { _mm512_reduce_add_ps(a) }
        }
        #[inline(always)]
        fn largest(self, a: __m512) -> f32 {
            unsafe { _mm512_reduce_max_ps(a) }
        }
        #[inline(always)]
        unsafe fn load_some(self, from: *const f32, count: usize) -> __m512 {
            unsafe { _mm512_maskz_loadu_ps(first(count), from) }
        }
        #[inline(always)]
        unsafe fn store_some(self, to: *mut f32, value: __m512, count: usize) {
            unsafe { _mm512_mask_storeu_ps(to, first(count), value) }
        }
    };
}

/// A mask of the first `count` lanes.
#[inline(always)]
fn first(count: usize) -> __mmask16 {
    ((1u32 << count) - 1) as __mmask16
}

/// One of the two values of each pair of `bf16`.
/// # Safety
/// The processor must have AVX-512 F.
#[inline(always)]
unsafe fn half(pairs: __m512i, place: usize) -> __m512 {
    unsafe {
        _mm512_castsi512_ps(match place {
            0 => _mm512_slli_epi32::<16>(pairs),
            _ => _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32)),
        })
    }
}

// SAFETY: every intrinsic needs the instructions that the type proves; the pointers are the callers'
// promises.
impl Simd for Avx512 {
    type Pairs = __m512i;
    const PAIR_TILE: (usize, usize) = (8, 2);
    plain_operations!();

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        #[inline(never)]
        #[target_feature(enable = "avx512f,avx512bw")]
        fn call<S: Simd, K: Kernel>(simd: S, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        unsafe { call(self, kernel) }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16, value: __m512) {
        unsafe {
            let bits = _mm512_castps_si512(value);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
            // A NaN must stay one: rounding could carry it into infinity or zero.
            let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(value, value);
            let chosen = _mm512_mask_blend_epi32(nan, rounded, quiet);
            _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(chosen)));
        }
    }
    #[inline(always)]
    unsafe fn splat_pair(self, from: *const bf16) -> __m512i {
        unsafe { _mm512_set1_epi32(from.cast::<i32>().read_unaligned()) }
    }
    #[inline(always)]
    unsafe fn load_pairs(self, from: *const bf16) -> __m512i {
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    fn half(self, pairs: __m512i, place: usize) -> __m512 {
        unsafe { half(pairs, place) }
    }
    #[inline(always)]
    fn dot(self, sums: __m512, a: __m512i, b: __m512i) -> __m512 {
        unsafe {
            let sums = _mm512_fmadd_ps(self.half(a, 1), self.half(b, 1), sums);
            _mm512_fmadd_ps(self.half(a, 0), self.half(b, 0), sums)
        }
    }
}

// SAFETY: as above.
impl Simd for Avx512Bf16 {
    type Pairs = __m512bh;
    plain_operations!();

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) -> K::Output {
        #[inline(never)]
        #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
        fn call<S: Simd, K: Kernel>(simd: S, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        unsafe { call(self, kernel) }
    }

    #[inline(always)]
    fn has_tiles(self) -> bool {
        self.tiles
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16, value: __m512) {
        unsafe {
            let narrow: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(value));
            _mm256_storeu_si256(to.cast(), narrow);
        }
    }
    #[inline(always)]
    unsafe fn splat_pair(self, from: *const bf16) -> __m512bh {
        unsafe { std::mem::transmute(_mm512_set1_epi32(from.cast::<i32>().read_unaligned())) }
    }
    #[inline(always)]
    unsafe fn load_pairs(self, from: *const bf16) -> __m512bh {
        unsafe { std::mem::transmute(_mm512_loadu_si512(from.cast())) }
    }
    #[inline(always)]
    fn half(self, pairs: __m512bh, place: usize) -> __m512 {
        unsafe { half(std::mem::transmute::<__m512bh, __m512i>(pairs), place) }
    }
    #[inline(always)]
    fn dot(self, sums: __m512, a: __m512bh, b: __m512bh) -> __m512 {
        unsafe { _mm512_dpbf16_ps(sums, a, b) }
    }
}
