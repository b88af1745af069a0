//! The 3×3 convolution by minimal filtering: where multiplications are what limits, a quarter to four
//! ninths of them do, and of a doubled map a sixth to a quarter.

use std::ops::Range;

use super::kernel::element::Element;
use super::kernel::isa::{Isa, dispatch};
use super::kernel::panels::Panels;
use super::kernel::product::Finish;
use super::kernel::winograd::{Outputs, Segment, Tiles, step};
use super::kernel::winograd_product::{Block, Patches, patches_len, sums_len, weights_len};
use super::shared::{Shared, run_tasks, wanted_tasks, with_scratch};
use super::tensor::Host;
use super::windows::{Area, Copy, Map, slices};
use crate::Result;

/// One use of a 3×3 convolution of stride 1 that keeps the map's size, or that of the doubled map.
pub(super) struct Call<'a, E> {
    pub host: &'a Host,
    pub rows: usize,
    pub map: Map,
    /// (9 · inputs, outputs), as windows have it.
    pub weight: &'a Panels,
    pub finish: &'a Finish<'a, E>,
}

impl<E: Element> Call<'_, E> {
    /// Computes all outputs from patches of `N` a side: 4 for tiles of 2 outputs, 6 for tiles of 4. With `D` they are
    /// those of the map with each pixel repeated, two by two.
    pub fn run<const N: usize, const D: bool>(&self, output: &Shared<'_, E>) -> Result<()> {
        let all = tiles::<N>(self.size::<D>());
        let work = self.rows * patches_len::<N, D>(all.count(), self.inner()) * self.weight.outputs();
        let blocks = self.blocks::<N, D>(all);
        let slices = slices(self.weight.outputs(), wanted_tasks(work).div_ceil(blocks.len().max(1)), self.finish.then);
        run_tasks(blocks.len() * slices.len(), work, |task| {
            self.block::<N, D>(&blocks[task % blocks.len()], slices[task / blocks.len()].clone(), output)
        })
    }

    /// Height and width of a row's outputs.
    fn size<const D: bool>(&self) -> (usize, usize) {
        let scale = if D { 2 } else { 1 };
        (scale * self.map.height, scale * self.map.width)
    }

    /// Inner positions of a tap.
    fn inner(&self) -> usize {
        self.weight.inner() / 9
    }

    /// Cuts the tiles into blocks: parts of a row's map, or the whole maps of several rows.
    fn blocks<const N: usize, const D: bool>(&self, all: Tiles) -> Vec<Vec<Segment>> {
        /// Bytes of a block's transformed patches, which outlive a second-level cache but not a third.
        const PATCHES: usize = 2 << 20;
        /// Tiles of a block: each transformed weight serves so many.
        const TILES: usize = 128;
        /// Tiles of a block side by side.
        const ACROSS: usize = 16;
        let most = (PATCHES / (patches_len::<N, D>(1, self.inner()) * size_of::<E>())).clamp(8, TILES);
        let across = all.across.div_ceil(all.across.div_ceil(ACROSS));
        let down = (most / across).clamp(1, all.down);
        let mut blocks: Vec<Vec<Segment>> = Vec::new();
        let mut count = usize::MAX;
        for row in 0..self.rows {
            for top in (0..all.down).step_by(down) {
                for left in (0..all.across).step_by(across) {
                    let tiles = Tiles { down: down.min(all.down - top), across: across.min(all.across - left) };
                    if count.saturating_add(tiles.count()) > most {
                        blocks.push(Vec::new());
                        count = 0;
                    }
                    let segment = Segment { row, top: top * (N - 2), left: left * (N - 2), tiles, first: count };
                    count += tiles.count();
                    if let Some(block) = blocks.last_mut() {
                        block.push(segment);
                    }
                }
            }
        }
        blocks
    }

    fn block<const N: usize, const D: bool>(
        &self,
        segments: &[Segment],
        panels: Range<usize>,
        output: &Shared<'_, E>,
    ) -> Result<()> {
        let (height, width) = self.size::<D>();
        let (weight, inner) = (self.weight, self.inner());
        let tiles = segments.iter().map(|segment| segment.tiles.count()).sum();
        with_scratch(patches_len::<N, D>(tiles, inner), |patches: &mut [E]| {
            for segment in segments {
                self.patches::<N, D>(*segment, tiles, patches)?;
            }
            with_scratch(weights_len::<E, N, D>(), |weights| {
                with_scratch(sums_len::<N, D>(tiles), |sums| {
                    let outputs = Outputs { height, width, finish: self.finish, values: output };
                    let block = Block::<_, N, D> { patches, tiles, segments, weight, panels, weights, sums, outputs };
                    dispatch(Isa::best(), block);
                })
            })?
        })?
    }

    /// Copies what a segment sees, with its padding and whatever norm is pending, and transforms it.
    fn patches<const N: usize, const D: bool>(&self, segment: Segment, all: usize, to: &mut [E]) -> Result<()> {
        let Segment { row, top, left, tiles, first } = segment;
        let (inner, step) = (self.inner(), step::<N, D>());
        let width = tiles.across * step + 2;
        // Segments begin where tiles do.
        let above = |first: usize| (first / (N - 2) * step) as isize - 1;
        let area = Area { row, top: above(top), left: above(left), width, pixel: inner };
        with_scratch((tiles.down * step + 2) * width * inner, |values: &mut [E]| {
            let (map, from) = (self.map, self.host.buffer.values::<E>());
            dispatch(Isa::best(), Copy { map, area, from, pending: self.host.pending.as_deref(), to: &mut *values });
            let patches = Patches::<_, N, D> { area: &*values, channels: inner, tiles, place: (first, all), to };
            dispatch(Isa::best(), patches);
        })
    }
}

/// The tiles of a row's outputs, (height, width).
pub(super) fn tiles<const N: usize>((height, width): (usize, usize)) -> Tiles {
    Tiles { down: height.div_ceil(N - 2), across: width.div_ceil(N - 2) }
}
