//! The products between minimal filtering's transforms: at each place of a patch, all tiles of a block
//! times the weight's panels.

use std::ops::Range;

use super::element::Element;
use super::isa::Kernel;
use super::panels::{PANEL, Panels};
use super::product::groups;
use super::simd::Simd;
use super::tile::{Piece, Strip};
use super::winograd::{
    Outputs, Segment, Tiles, chunk, chunks, places, transform_outputs, transform_patches, transform_weights,
    weights_stride,
};

/// Panels of outputs whose transformed weights and sums are kept until they are transformed.
const GROUP: usize = 3;

/// Transforms a segment's patches.
pub(in crate::ops) struct Patches<'a, E, const N: usize, const D: bool> {
    pub area: &'a [E],
    pub channels: usize,
    pub tiles: Tiles,
    /// The segment's first tile in the block, and the block's tiles.
    pub place: (usize, usize),
    pub to: &'a mut [E],
}

impl<E: Element, const N: usize, const D: bool> Kernel for Patches<'_, E, N, D> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        transform_patches::<S, E, N, D>(simd, self.area, self.channels, self.tiles, self.place, self.to);
    }
}

/// A block of tiles times panels, on one thread.
pub(in crate::ops) struct Block<'a, E, const N: usize, const D: bool> {
    /// Transformed, of all tiles.
    pub patches: &'a [E],
    pub tiles: usize,
    pub segments: &'a [Segment],
    /// The convolution's weight, (9 · inputs, outputs). Its transform would be up to 4 times as large; made
    /// on the way, it costs some hundredths more time, and the weight is in memory as it came.
    pub weight: &'a Panels,
    pub panels: Range<usize>,
    /// Room for [`weights_len`] values.
    pub weights: &'a mut [E],
    /// Room for [`sums_len`] values.
    pub sums: &'a mut [f32],
    pub outputs: Outputs<'a, E>,
}

/// Values that a block's sums take.
pub(in crate::ops) const fn sums_len<const N: usize, const D: bool>(tiles: usize) -> usize {
    places::<N, D>() * tiles * GROUP * PANEL
}

/// Values that a block's transformed patches take.
pub(in crate::ops) const fn patches_len<const N: usize, const D: bool>(tiles: usize, inner: usize) -> usize {
    places::<N, D>() * tiles * inner
}

/// Values that a block's transformed weights take.
pub(in crate::ops) const fn weights_len<E: Element, const N: usize, const D: bool>() -> usize {
    places::<N, D>() * weights_stride(GROUP, chunk::<E>())
}

impl<E: Element, const N: usize, const D: bool> Kernel for Block<'_, E, N, D> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        assert_eq!(self.weight.outputs(), self.outputs.finish.outputs, "outputs of a product");
        for group in groups(&self.panels, GROUP) {
            for chunk in chunks::<E>(self.weight.inner() / 9) {
                self.multiply(simd, &group, &chunk);
            }
            for segment in self.segments {
                transform_outputs::<S, E, N, D>(simd, self.sums, self.tiles, *segment, &group, &self.outputs);
            }
        }
    }
}

impl<E: Element, const N: usize, const D: bool> Block<'_, E, N, D> {
    /// Adds the products of the inner positions `chunk` to the sums of `group`: (places, tiles, panels ·
    /// PANEL). The first chunk starts them.
    #[inline(always)]
    fn multiply<S: Simd>(&mut self, simd: S, group: &Range<usize>, chunk: &Range<usize>) {
        let (tiles, inner, per_panel) = (self.tiles, self.weight.inner() / 9, PANEL / S::LANES);
        let (vectors, columns) = (group.len() * per_panel, group.len() * PANEL);
        assert_eq!(self.patches.len(), patches_len::<N, D>(tiles, inner), "size of transformed patches");
        assert!(self.sums.len() >= places::<N, D>() * tiles * columns, "room for the sums");
        transform_weights::<S, E, N, D>(simd, self.weight, group, chunk, self.weights);
        let width = vectors.div_ceil(vectors.div_ceil(E::tile::<S>().1));
        for place in 0..places::<N, D>() {
            let right = &self.weights[place * weights_stride(group.len(), chunk.len())..];
            let pieces = [Piece { left: 0, first: 0, steps: chunk.len() / E::DEPTH }];
            for vector in (0..vectors).step_by(width) {
                let strip = Strip {
                    left: self.patches[(place * inner + chunk.start) * tiles..].as_ptr(),
                    left_stride: chunk.len(),
                    positions: tiles,
                    right: right.as_ptr(),
                    inner: chunk.len(),
                    vector,
                    vectors: width.min(vectors - vector),
                    pieces: &pieces,
                    sums: self.sums[place * tiles * columns + vector * S::LANES..].as_mut_ptr(),
                    sums_stride: columns,
                    go_on: chunk.start > 0,
                };
                // SAFETY: the asserts saw to the patches and the room for the sums.
                unsafe {
                    strip.run(simd);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
