//! The innermost loop: a few positions times a few vectors of outputs, whose sums stay in registers
//! while the inner positions go by. Each sum is formed in the order of its inner positions, whatever
//! the tile, so how work is cut never shows in the result.

use super::element::Element;
use super::isa::Kernel;
use super::panels::PANEL;
use super::simd::Simd;

/// A run of inner positions that lie side by side in the left factor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ops) struct Piece {
    /// Where it starts, in values from the start of a position's window.
    pub left: usize,
    /// Its first inner position, in multiples of `DEPTH`.
    pub first: usize,
    /// Its length, in multiples of `DEPTH`.
    pub steps: usize,
}

/// What a line of tiles is computed from.
pub(super) struct Strip<'a, E> {
    /// The first position's window.
    pub left: *const E,
    /// Values from one position's window to the next one's.
    pub left_stride: usize,
    pub positions: usize,
    /// The packed weights.
    pub right: *const E,
    /// Inner positions of the packed weights.
    pub inner: usize,
    /// The first vector of outputs, counted over all panels.
    pub vector: usize,
    /// Vectors of outputs, at most [`Element::tile`]'s.
    pub vectors: usize,
    pub pieces: &'a [Piece],
    /// Sums of the first position and vector.
    pub sums: *mut f32,
    /// Values from one position's sums to the next one's.
    pub sums_stride: usize,
    /// Whether to go on from what the sums hold.
    pub go_on: bool,
}

impl<E: Element> Strip<'_, E> {
    /// Computes all positions of the strip.
    ///
    /// # Safety
    /// All that the strip points to must be there, and the sums be nobody else's.
    #[inline(always)]
    pub unsafe fn run<S: Simd>(self, simd: S) {
        simd.call(Promised(self));
    }

    /// # Safety
    /// As [`Strip::run`].
    #[inline(always)]
    unsafe fn vectors<S: Simd>(&self, simd: S) {
        debug_assert!(self.vectors <= E::tile::<S>().1);
        // SAFETY: the caller's promise.
        unsafe {
            match self.vectors {
                1 => self.columns::<S, 1>(simd),
                3 if E::tile::<S>().1 == 3 => self.columns::<S, 3>(simd),
                _ => self.columns::<S, 2>(simd),
            }
        }
    }

    /// # Safety
    /// As [`Strip::run`].
    #[inline(always)]
    unsafe fn columns<S: Simd, const V: usize>(&self, simd: S) {
        let mut at = 0;
        // SAFETY: the caller's promise; `at` stays within the positions.
        unsafe {
            if E::tile::<S>().0 == 8 {
                while at + 8 <= self.positions {
                    self.tile::<S, 8, V>(simd, at);
                    at += 8;
                }
            }
            if E::tile::<S>().0 == 6 {
                // Eight are two fours: pairs wait for their sums.
                while at + 6 <= self.positions && at + 8 != self.positions {
                    self.tile::<S, 6, V>(simd, at);
                    at += 6;
                }
            }
            while at + 4 <= self.positions {
                self.tile::<S, 4, V>(simd, at);
                at += 4;
            }
            if at + 2 <= self.positions {
                self.tile::<S, 2, V>(simd, at);
                at += 2;
            }
            if at < self.positions {
                self.tile::<S, 1, V>(simd, at);
            }
        }
    }

    /// # Safety
    /// As [`Strip::run`]; the `M` positions from `at` on must be of the strip.
    #[inline(always)]
    unsafe fn tile<S: Simd, const M: usize, const V: usize>(&self, simd: S, at: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let left = self.left.add(at * self.left_stride);
            let sums = self.sums.add(at * self.sums_stride);
            let right: [*const E; V] = std::array::from_fn(|vector| {
                let output = (self.vector + vector) * S::LANES;
                self.right.add(output / PANEL * self.inner * PANEL + output % PANEL * E::DEPTH)
            });
            let mut totals = [[simd.splat(0.0); V]; M];
            if self.go_on {
                for (position, totals) in totals.iter_mut().enumerate() {
                    for (vector, total) in totals.iter_mut().enumerate() {
                        *total = simd.load(sums.add(position * self.sums_stride + vector * S::LANES));
                    }
                }
            }
            for piece in self.pieces {
                let left = left.add(piece.left);
                let start = piece.first * PANEL * E::DEPTH;
                for step in 0..piece.steps {
                    let line = start + step * PANEL * E::DEPTH;
                    let factors: [E::Factor<S>; V] =
                        std::array::from_fn(|vector| E::load_factor(simd, right[vector].add(line)));
                    for (position, totals) in totals.iter_mut().enumerate() {
                        let value = E::splat_factor(simd, left.add(position * self.left_stride + step * E::DEPTH));
                        for (total, factor) in totals.iter_mut().zip(factors) {
                            *total = E::multiply_add(simd, *total, value, factor);
                        }
                    }
                }
            }
            for (position, totals) in totals.iter().enumerate() {
                for (vector, total) in totals.iter().enumerate() {
                    simd.store(sums.add(position * self.sums_stride + vector * S::LANES), *total);
                }
            }
        }
    }
}

/// A strip whose maker has promised what [`Strip::run`] asks for.
struct Promised<'a, E>(Strip<'a, E>);

impl<E: Element> Kernel for Promised<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        // SAFETY: its maker's promise.
        unsafe { self.0.vectors(simd) }
    }
}
