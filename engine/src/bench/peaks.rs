//! Loops of nothing but multiply-adds between registers, one for each kind that processors have.

use std::hint::black_box;

use crate::Precision;

/// How often a kernel goes round in one call.
pub(super) const ROUNDS: u64 = 100_000;

/// Sums that do not wait for each other: more than any processor's latency times its ports.
const CHAINS: usize = 16;

/// One kind of multiply-add.
pub(super) struct Kernel {
    pub precision: Precision,
    pub instructions: &'static str,
    pub flops_per_round: f64,
    /// Goes round so many times.
    pub run: fn(u64),
}

/// The kernels that this processor can run.
pub(super) fn kernels() -> Vec<Kernel> {
    let found = native::kernels();
    if found.iter().any(|kernel| kernel.precision == Precision::F32) {
        return found;
    }
    let portable = Kernel {
        precision: Precision::F32,
        instructions: "multiply-add as compiled",
        flops_per_round: (2 * CHAINS * LANES) as f64,
        run: portable,
    };
    found.into_iter().chain([portable]).collect()
}

/// Lanes of the portable kernel: a NEON register of them.
const LANES: usize = 4;

fn portable(rounds: u64) {
    let (a, b) = (black_box([0.5f32; LANES]), black_box([1.0f32; LANES]));
    let mut sums = [[0f32; LANES]; CHAINS];
    for _ in 0..rounds {
        for sum in &mut sums {
            for lane in 0..LANES {
                sum[lane] = multiply_add(a[lane], b[lane], sum[lane]);
            }
        }
    }
    black_box(sums);
}

/// One instruction where the target always has it; elsewhere `mul_add` would be a library call.
#[inline(always)]
fn multiply_add(a: f32, b: f32, sum: f32) -> f32 {
    if cfg!(any(target_arch = "aarch64", target_feature = "fma")) { a.mul_add(b, sum) } else { a * b + sum }
}

#[cfg(not(target_arch = "x86_64"))]
mod native {
    pub(super) fn kernels() -> Vec<super::Kernel> {
        Vec::new()
    }
}

#[cfg(target_arch = "x86_64")]
mod native {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::{CHAINS, Kernel};
    use crate::Precision::{Bf16, F32};
    use crate::ops::Isa;

    pub(super) fn kernels() -> Vec<Kernel> {
        let kernel = |precision, instructions, flops_per_instruction: usize, chains: usize, run| Kernel {
            precision,
            instructions,
            flops_per_round: (flops_per_instruction * chains) as f64,
            run,
        };
        let mut kernels = Vec::new();
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            kernels.push(kernel(F32, "AVX2 FMA", 16, AVX2_CHAINS, |rounds| {
                // SAFETY: the instructions were found above.
                #[allow(unsafe_code)]
                unsafe {
                    avx2(rounds);
                }
            }));
        }
        if is_x86_feature_detected!("avx512f") {
            kernels.push(kernel(F32, "AVX-512 FMA", 32, CHAINS, |rounds| {
                // SAFETY: the instructions were found above.
                #[allow(unsafe_code)]
                unsafe {
                    avx512(rounds);
                }
            }));
        }
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16") {
            kernels.push(kernel(Bf16, "AVX-512 BF16 dot product", 64, CHAINS, |rounds| {
                // SAFETY: the instructions were found above.
                #[allow(unsafe_code)]
                unsafe {
                    avx512_bf16(rounds);
                }
            }));
        }
        if Isa::available().contains(&Isa::Amx) {
            kernels.push(kernel(Bf16, "AMX tiles", 16 * 16 * 32 * 2, AMX_CHAINS, |rounds| {
                // SAFETY: the instructions were found above and the system has permitted them.
                #[allow(unsafe_code)]
                unsafe {
                    amx(rounds);
                }
            }));
        }
        kernels
    }

    /// Of the 16 registers there, two hold the factors.
    const AVX2_CHAINS: usize = 12;
    /// Of the eight tiles, four hold factors.
    const AMX_CHAINS: usize = 4;

    #[target_feature(enable = "avx2,fma")]
    fn avx2(rounds: u64) {
        let (a, b) = (_mm256_set1_ps(black_box(0.5)), _mm256_set1_ps(black_box(1.0)));
        let mut sums = [_mm256_setzero_ps(); AVX2_CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(a, b, *sum);
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx512f")]
    fn avx512(rounds: u64) {
        let (a, b) = (_mm512_set1_ps(black_box(0.5)), _mm512_set1_ps(black_box(1.0)));
        let mut sums = [_mm512_setzero_ps(); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(a, b, *sum);
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn avx512_bf16(rounds: u64) {
        let ones = _mm512_set1_ps(black_box(1.0));
        let (a, b) = (_mm512_cvtne2ps_pbh(ones, ones), _mm512_cvtne2ps_pbh(ones, ones));
        let mut sums = [_mm512_setzero_ps(); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, a, b);
            }
        }
        black_box(sums);
    }

    /// What `ldtilecfg` reads: eight tiles of 16 rows of 64 bytes.
    #[repr(C, align(64))]
    struct Tiles {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }

    /// # Safety
    /// The processor must have AMX with bf16, and the system must have permitted it.
    #[allow(unsafe_code)]
    unsafe fn amx(rounds: u64) {
        let mut tiles = Tiles { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        tiles.row_bytes[..8].fill(64);
        tiles.rows[..8].fill(16);
        // SAFETY: the configuration is read from a whole `Tiles`; everything else happens between tiles, all named
        // as overwritten, and they are released at the end. Multiplying zeros takes as long as anything else.
        unsafe {
            std::arch::asm!(
                "ldtilecfg [{tiles}]",
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "dec {rounds}",
                "jnz 2b",
                "tilerelease",
                tiles = in(reg) &raw const tiles,
                rounds = inout(reg) rounds.max(1) => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}
