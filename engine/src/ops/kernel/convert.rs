//! Numbers as a checkpoint stores them, on their way into memory.

use half::{bf16, f16};

use super::element::Element;
use super::isa::Kernel;
use super::simd::Simd;

/// A format of plain numbers that vectors are loaded from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ops) enum Plain {
    F32,
    F16,
    Bf16,
}

impl Plain {
    /// Bytes of a number.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The vector of the first numbers in `bytes`, with zeros behind the last one.
    #[inline(always)]
    pub(super) fn load_first<S: Simd>(self, simd: S, bytes: &[u8]) -> S::F32 {
        if bytes.len() >= S::LANES * self.bytes() {
            // SAFETY: there are a vector's numbers.
            return unsafe { self.load(simd, bytes.as_ptr()) };
        }
        let mut last = [0u8; 16 * 4];
        last[..bytes.len()].copy_from_slice(bytes);
        // SAFETY: there is room for the widest vector's numbers.
        unsafe { self.load(simd, last.as_ptr()) }
    }

    /// A vector of numbers.
    /// # Safety
    /// `from` must be readable for [`Simd::LANES`] numbers; no alignment is asked for.
    #[inline(always)]
    unsafe fn load<S: Simd>(self, simd: S, from: *const u8) -> S::F32 {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::F32 => simd.load(from.cast()),
                Self::F16 => simd.load_f16(from.cast::<f16>()),
                Self::Bf16 => simd.load_bf16(from.cast::<bf16>()),
            }
        }
    }
}

/// Reads little-endian numbers, aligned or not, and rounds them to nearest, ties to even.
pub(in crate::ops) struct Convert<'a, E> {
    pub from: &'a [u8],
    pub format: Plain,
    /// As many as `from` holds.
    pub to: &'a mut [E],
}

impl<E: Element> Kernel for Convert<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { from, format, to } = self;
        let each = format.bytes();
        assert_eq!(from.len(), to.len() * each, "bytes of numbers");
        let whole = to.len() - to.len() % S::LANES;
        for at in (0..whole).step_by(S::LANES) {
            // SAFETY: `whole` numbers lie within both.
            unsafe { E::store(simd, to.as_mut_ptr().add(at), format.load(simd, from.as_ptr().add(at * each))) }
        }
        let rest = to.len() - whole;
        if rest > 0 {
            let last = format.load_first(simd, &from[whole * each..]);
            // SAFETY: `to` has `rest` more numbers.
            unsafe { E::store_some(simd, to.as_mut_ptr().add(whole), last, rest) }
        }
    }
}
