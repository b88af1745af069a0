//! Products by tiles of `bf16` (Intel AMX), sixteen positions times sixteen outputs each; those of attention are in
//! `attention`.
//!
//! Four tiles hold sums (32 positions × 32 outputs), two the left factor and two the weights, so that a tile
//! loaded is used twice. Packed weights are tiles as they lie; the left factor's rows are read from the
//! positions' windows, as far apart as those are.
//!
//! The order of a sum depends on its inner positions alone: in each chunk first the whole tiles of 32, then
//! what they leave over. Where a line ends must not show, because that may depend on the batch: so the
//! positions that fill no tile get a tile with fewer rows, which computes each row as a full one does, and
//! never the vector kernel, whose order is another.

use std::ops::Range;

use half::bf16;

mod attention;
#[cfg(test)]
mod emulated;
mod hardware;
mod product;
#[cfg(test)]
mod tests;

pub(super) use attention::ATTENTION_TILE;
pub(super) use hardware::{Hardware, is_available};
pub(super) use product::CHUNK_STEPS;
#[cfg(test)]
pub(in crate::ops) use tests::emulated_attention;

use super::element::Element;
use super::panels::PANEL;
use super::product::{Block, Right};
use super::simd::Simd;
use super::tile::Piece;
use crate::ops::buffer::Format;
use product::Product;

/// Positions of a tile at most, and pairs of inner positions.
const SIDE: usize = 16;
/// Inner positions that a pair of them covers.
const PAIR: usize = <bf16 as Element>::DEPTH;
/// Panels of a block that are summed at a time: two tiles side by side.
const GROUP: usize = 2;

/// The shapes of the tiles, laid out as the processor reads them.
#[derive(Clone)]
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Shapes {
    /// Tiles for `rows` positions and `depth` pairs of inner positions, each at most [`SIDE`].
    fn new(rows: usize, depth: usize) -> Self {
        const FULL_ROW: u16 = (PANEL * size_of::<f32>()) as u16;
        debug_assert!((1..=SIDE).contains(&rows) && (1..=SIDE).contains(&depth));
        let mut shapes = Self { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        let left_row = (depth * PAIR * size_of::<bf16>()) as u16;
        for (first, count, rows, row_bytes) in
            [(SUMS, 4, rows, FULL_ROW), (LEFT, 2, rows, left_row), (RIGHT, 2, depth, FULL_ROW)]
        {
            let tiles = usize::from(first)..usize::from(first) + count;
            shapes.rows[tiles.clone()].fill(rows as u8);
            shapes.row_bytes[tiles].fill(row_bytes);
        }
        shapes
    }
}

/// The first of four tiles of sums: two positions' tiles times two panels.
const SUMS: u8 = 0;
/// The first of two tiles of positions.
const LEFT: u8 = 4;
/// The first of two tiles of weights.
const RIGHT: u8 = 6;

/// A tile unit: eight tiles of up to 16 rows of 64 bytes. All shapes come from [`Shapes`].
trait Tiles {
    /// Sets the shapes of all tiles, and their values to zero.
    fn configure(&mut self, shapes: &Shapes);
    /// Makes `TILE` zero.
    fn zero<const TILE: u8>(&mut self);
    /// Loads `TILE` from rows that are `stride` bytes apart.
    /// # Safety
    /// All its rows must be readable.
    unsafe fn load<const TILE: u8>(&mut self, from: *const u8, stride: usize);
    /// # Safety
    /// All rows of the tile must be writable.
    unsafe fn store<const TILE: u8>(&self, to: *mut u8, stride: usize);
    /// `TO` += `A` · `B`, of pairs of `bf16`, in `f32`.
    fn multiply<const TO: u8, const A: u8, const B: u8>(&mut self);
    /// Has what lies there brought nearer; any address will do.
    fn prefetch(&self, at: *const u8);
}

impl<E: Element> Block<'_, E> {
    /// Computes the block with a tile unit; `E` must be `bf16`.
    #[inline(always)]
    pub(super) fn run_by_tiles<S: Simd>(self, simd: S, unit: &mut Hardware) {
        self.run_by(simd, unit);
    }

    /// As [`Block::run_by_tiles`], with any unit.
    #[inline(always)]
    fn run_by<S: Simd, T: Tiles>(mut self, simd: S, unit: &mut T) {
        assert_eq!(E::FORMAT, Format::Bf16, "tiles are of bf16");
        self.check();
        for start in self.panels.clone().step_by(GROUP) {
            let group = start..self.panels.end.min(start + GROUP);
            if self.weight.is_quantised() {
                // Chunk by chunk, each unpacked before it is used.
                for (index, pieces) in self.pieces.iter().enumerate() {
                    let right = self.right(simd, &group, pieces);
                    self.multiply(unit, &group, &right, &[&*right.pieces], index > 0);
                }
            } else {
                let right = self.right(simd, &group, &[]);
                let chunks: Vec<&[Piece]> = self.pieces.iter().map(Vec::as_slice).collect();
                self.multiply(unit, &group, &right, &chunks, false);
            }
            self.store(simd, &group);
        }
    }

    /// The sums of the panels `group` over these chunks.
    #[inline(always)]
    fn multiply<T: Tiles>(
        &mut self,
        unit: &mut T,
        group: &Range<usize>,
        right: &Right<'_, E>,
        chunks: &[&[Piece]],
        go_on: bool,
    ) {
        let panel = right.inner * PANEL;
        let product = Product {
            left: self.left.as_ptr().cast(),
            left_stride: self.left_stride,
            lines: self.lines,
            right: right.values.wrapping_add(right.panel * panel).cast(),
            panel,
            panels: group.len(),
            sums: self.sums.as_mut_ptr(),
        };
        // SAFETY: `check` saw to the left factor, the weights and the room for the sums.
        unsafe {
            product.run(unit, chunks, go_on);
        }
    }
}
