//! The 3×3 convolution by minimal filtering: where multiplications are what limits, a quarter to four
//! ninths of them do.

use std::ops::Range;

use half::bf16;

use super::buffer::Format;
use super::kernel::element::Element;
use super::kernel::isa::{Isa, dispatch};
use super::kernel::panels::Panels;
use super::kernel::product::Finish;
use super::kernel::winograd::{Outputs, Segment, Tiles};
use super::kernel::winograd_product::{Block, Factors, Patches, sums_len, weights_len};
use super::parameter::Parameter;
use super::shared::{Shared, run_tasks, wanted_tasks, with_scratch};
use super::tensor::Host;
use super::windows::{Area, Copy, Map, slices};
use crate::Result;

/// Transforms a checkpoint's (out, in, 3, 3) weight into `bf16` factors for tiles of 2 outputs a side, one
/// for each place of a patch of 4.
pub(super) fn transformed(weight: &Parameter<'_>, outputs: usize, inputs: usize) -> Result<Vec<Panels>> {
    let inner = inputs.next_multiple_of(bf16::DEPTH);
    Panels::pack_parts(Format::Bf16, 16, outputs, inner, |output, columns| {
        let mut values = vec![0.0; inputs * 9];
        weight.read(output * inputs * 9, &mut values);
        transform_weight(&values, inner, columns);
    })
}

/// One output's weight (inputs, 3 · 3) → G w Gᵀ as (4 · 4, inner), whose inputs may be fewer.
fn transform_weight(values: &[f32], inner: usize, to: &mut [f32]) {
    const TRANSFORM: [[f32; 3]; 4] = [[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]];
    let inputs = values.len() / 9;
    // Inputs side by side, so that each sum runs over whole vectors.
    let mut taps = vec![0f32; 9 * inputs];
    for (input, values) in values.as_chunks::<9>().0.iter().enumerate() {
        for (tap, value) in values.iter().enumerate() {
            taps[tap * inputs + input] = *value;
        }
    }
    let mut lines = vec![0f32; 3 * inputs];
    for (y, down) in TRANSFORM.into_iter().enumerate() {
        for (column, line) in lines.chunks_exact_mut(inputs).enumerate() {
            let tap = |row: usize| &taps[(3 * row + column) * inputs..][..inputs];
            combine(down, [tap(0), tap(1), tap(2)], line);
        }
        for (x, across) in TRANSFORM.into_iter().enumerate() {
            let line = |column: usize| &lines[column * inputs..][..inputs];
            combine(across, [line(0), line(1), line(2)], &mut to[(y * 4 + x) * inner..][..inputs]);
        }
    }
}

/// The sum of three vectors times their factors.
fn combine([first, second, third]: [f32; 3], [a, b, c]: [&[f32]; 3], to: &mut [f32]) {
    for (((to, a), b), c) in to.iter_mut().zip(a).zip(b).zip(c) {
        *to = first * a + second * b + third * c;
    }
}

/// One use of a 3×3 convolution of stride 1 that keeps the map's size.
pub(super) struct Call<'a, E> {
    pub host: &'a Host,
    pub rows: usize,
    pub map: Map,
    pub factors: Factors<'a>,
    pub finish: &'a Finish<'a, E>,
}

impl<E: Element> Call<'_, E> {
    /// Computes all outputs from patches of `N` a side: 4 for tiles of 2 outputs, 6 for tiles of 4.
    pub fn run<const N: usize>(&self, output: &Shared<'_, E>) -> Result<()> {
        let all = tiles::<N>(self.map);
        let work = self.rows * all.count() * N * N * self.factors.inner() * self.factors.outputs();
        let blocks = self.blocks::<N>(all);
        let slices = slices(self.factors.outputs(), wanted_tasks(work).div_ceil(blocks.len().max(1)), self.finish.then);
        run_tasks(blocks.len() * slices.len(), work, |task| {
            self.block::<N>(&blocks[task % blocks.len()], slices[task / blocks.len()].clone(), output)
        })
    }

    /// Cuts the tiles into blocks: parts of a row's map, or the whole maps of several rows.
    fn blocks<const N: usize>(&self, all: Tiles) -> Vec<Vec<Segment>> {
        /// Bytes of a block's transformed patches, which outlive a second-level cache but not a third.
        const PATCHES: usize = 2 << 20;
        /// Tiles of a block: each transformed weight serves so many.
        const TILES: usize = 128;
        /// Tiles of a block side by side.
        const ACROSS: usize = 16;
        let most = (PATCHES / (N * N * self.factors.inner() * size_of::<E>())).clamp(8, TILES);
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

    fn block<const N: usize>(&self, segments: &[Segment], panels: Range<usize>, output: &Shared<'_, E>) -> Result<()> {
        let Map { height, width, .. } = self.map;
        let (factors, inner) = (self.factors, self.factors.inner());
        let tiles = segments.iter().map(|segment| segment.tiles.count()).sum();
        with_scratch(N * N * tiles * inner, |patches: &mut [E]| {
            for segment in segments {
                self.patches::<N>(*segment, tiles, patches)?;
            }
            with_scratch(weights_len::<E, N>(factors), |weights| {
                with_scratch(sums_len::<N>(tiles), |sums| {
                    let outputs = Outputs { height, width, finish: self.finish, values: output };
                    let block = Block::<_, N> { patches, tiles, segments, factors, panels, weights, sums, outputs };
                    dispatch(Isa::best(), block);
                })
            })?
        })?
    }

    /// Copies what a segment sees, with its padding and whatever norm is pending, and transforms it.
    fn patches<const N: usize>(&self, segment: Segment, all: usize, to: &mut [E]) -> Result<()> {
        let Segment { row, top, left, tiles, first } = segment;
        let inner = self.factors.inner();
        let width = tiles.across * (N - 2) + 2;
        let area = Area { row, top: top as isize - 1, left: left as isize - 1, width, pixel: inner };
        with_scratch((tiles.down * (N - 2) + 2) * width * inner, |values: &mut [E]| {
            let (map, from) = (self.map, self.host.buffer.values::<E>());
            dispatch(Isa::best(), Copy { map, area, from, pending: self.host.pending.as_deref(), to: &mut *values });
            let patches = Patches::<_, N> { area: &*values, channels: inner, tiles, place: (first, all), to };
            dispatch(Isa::best(), patches);
        })
    }
}

/// The tiles of a row's map.
pub(super) fn tiles<const N: usize>(map: Map) -> Tiles {
    Tiles { down: map.height.div_ceil(N - 2), across: map.width.div_ceil(N - 2) }
}
