//! Which instructions this processor has, and how a kernel written once is compiled for each of them.

use std::fmt;
use std::sync::OnceLock;

use super::portable::Portable;
use super::simd::Simd;
#[cfg(target_arch = "x86_64")]
use super::{amx, avx2::Avx2, avx512::Avx512, avx512::Avx512Bf16};
use crate::ops::buffer::Format;
use crate::{Error, Result};

/// An instruction set that there are kernels for, slowest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Isa {
    /// Whatever the compiler makes of plain Rust.
    Portable,
    /// 256-bit vectors with fused multiply-add.
    Avx2,
    /// 512-bit vectors.
    Avx512,
    /// 512-bit vectors and the dot product of `bf16` pairs.
    Avx512Bf16,
    /// The above and tiles of `bf16`.
    Amx,
}

/// The best instruction set to use, if not the processor's.
static LIMIT: OnceLock<Isa> = OnceLock::new();
static BEST: OnceLock<Isa> = OnceLock::new();

impl Isa {
    const ALL: [Self; 5] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Bf16, Self::Amx];

    /// The best one of this processor within the limit; asked for once.
    pub fn best() -> Self {
        *BEST.get_or_init(|| Self::available().last().copied().unwrap_or(Self::Portable))
    }

    /// All that this processor can run within the limit, slowest first.
    pub fn available() -> Vec<Self> {
        let limit = *LIMIT.get().unwrap_or(&Self::Amx);
        Self::ALL.into_iter().take_while(|isa| *isa <= limit && isa.is_available()).collect()
    }

    /// Keeps the process to the instructions called `word`, to see what a lesser machine does.
    ///
    /// # Errors
    /// [`crate::Error::Request`] for a word that stands for none, or once kernels have been chosen.
    pub fn limit(word: &str) -> Result<()> {
        let limit = Self::parse(word)?;
        if BEST.get().is_some() || LIMIT.set(limit).is_err() {
            return Err(Error::request("instructions", "chosen once, before anything is computed", word));
        }
        Ok(())
    }

    fn parse(word: &str) -> Result<Self> {
        let words = || Self::ALL.map(Self::as_str).join(", ");
        let known = Self::ALL.into_iter().find(|isa| isa.as_str() == word);
        known.ok_or_else(|| Error::request("instructions", format!("one of {}", words()), word))
    }

    #[cfg(target_arch = "x86_64")]
    fn is_available(self) -> bool {
        match self {
            Self::Portable => true,
            Self::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            Self::Avx512 => is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw"),
            Self::Avx512Bf16 => is_x86_feature_detected!("avx512bf16"),
            Self::Amx => amx::is_available(),
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn is_available(self) -> bool {
        self == Self::Portable
    }

    /// Whether products of numbers in `format` go by tiles.
    pub(in crate::ops) fn multiplies_by_tiles(self, format: Format) -> bool {
        self == Self::Amx && format == Format::Bf16
    }

    /// The word for it in logs and tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512-bf16",
            Self::Amx => "amx-bf16",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Work that is compiled for each instruction set.
pub(in crate::ops) trait Kernel {
    /// What it gives back.
    type Output;

    /// Does the work. Implementations and all that they call must be `#[inline(always)]`: only then do
    /// they become part of a function that may use the instructions.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Runs `kernel` with the instructions of `isa`, which must be available.
#[cfg(target_arch = "x86_64")]
pub(in crate::ops) fn dispatch<K: Kernel>(isa: Isa, kernel: K) -> K::Output {
    #[target_feature(enable = "avx2,fma,f16c")]
    fn avx2<K: Kernel>(kernel: K, simd: Avx2) -> K::Output {
        kernel.run(simd)
    }
    #[target_feature(enable = "avx512f,avx512bw")]
    fn avx512<K: Kernel>(kernel: K, simd: Avx512) -> K::Output {
        kernel.run(simd)
    }
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn avx512_bf16<K: Kernel>(kernel: K, simd: Avx512Bf16) -> K::Output {
        kernel.run(simd)
    }
    debug_assert!(isa <= Isa::best(), "{isa} is not available");
    // SAFETY: an `Isa` comes from `available` alone, which has asked the processor.
    unsafe {
        match isa {
            Isa::Portable => kernel.run(Portable),
            Isa::Avx2 => avx2(kernel, Avx2::new()),
            Isa::Avx512 => avx512(kernel, Avx512::new()),
            Isa::Avx512Bf16 => avx512_bf16(kernel, Avx512Bf16::new()),
            Isa::Amx => avx512_bf16(kernel, Avx512Bf16::with_tiles()),
        }
    }
}

/// Runs `kernel` with what the compiler makes of it.
#[cfg(not(target_arch = "x86_64"))]
pub(in crate::ops) fn dispatch<K: Kernel>(_isa: Isa, kernel: K) -> K::Output {
    kernel.run(Portable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_one_of_the_words_or_refused() {
        for isa in Isa::ALL {
            assert_eq!(Isa::parse(isa.as_str()).unwrap(), isa);
        }
        let refusal = Isa::parse("sse2").unwrap_err().to_string();
        assert!(refusal.contains("instructions") && refusal.contains("avx2") && refusal.contains("sse2"));
    }
}
