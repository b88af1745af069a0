//! The 3×3 convolution by minimal filtering: where multiplications are what limits, four to nine
//! sixteenths of them do.

use std::ops::Range;

use half::bf16;

use super::buffer::Format;
use super::kernel::element::Element;
use super::kernel::isa::{Isa, Kernel, dispatch};
use super::kernel::panels::{PANEL, Panels};
use super::kernel::product::Finish;
use super::kernel::simd::Simd;
use super::kernel::winograd::{GROUP, Tiles, Window, multiply, transform_outputs, transform_patches, weight_transform};
use super::parameter::Parameter;
use super::shared::{Shared, run_tasks, wanted_tasks, with_scratch};
use super::tensor::Host;
use super::windows::{Area, Copy, Map, slices};
use crate::Result;

/// The transformed weights of a 3×3 convolution of stride 1 that keeps the map's size.
pub(super) struct Winograd {
    /// One right factor (inputs, outputs) for each place of a patch.
    weights: Vec<Panels>,
    /// A patch's side: 4 for tiles of 2 outputs, 6 for tiles of 4.
    side: usize,
}

impl Winograd {
    /// Transforms a checkpoint's (out, in, 3, 3) weight into factors of `format`: tiles of 4 outputs in
    /// `f32`, of 2 in `bf16`, which could not hold the larger transform's sums.
    pub fn new(weight: &Parameter<'_>, outputs: usize, inputs: usize, format: Format) -> Result<Self> {
        let side = match format {
            Format::F32 => 6,
            Format::Bf16 => 4,
        };
        let inner = match format {
            Format::F32 => inputs.next_multiple_of(f32::DEPTH),
            Format::Bf16 => inputs.next_multiple_of(bf16::DEPTH),
        };
        let weights = Panels::pack_parts(format, side * side, outputs, inner, |output, columns| {
            let mut values = vec![0.0; inputs * 9];
            weight.read(output * inputs * 9, &mut values);
            transform_weight(&values, side, inner, columns);
        })?;
        Ok(Self { weights, side })
    }

    pub fn format(&self) -> Format {
        self.weights[0].format()
    }

    /// One convolution of all rows; `N` is the patch's side that [`Winograd::new`] chose for `E`.
    pub fn run<E: Element, const N: usize>(
        &self,
        host: &Host,
        rows: usize,
        map: Map,
        finish: &Finish<'_, E>,
        output: &Shared<'_, E>,
    ) -> Result<()> {
        assert_eq!(N, self.side, "side of a patch");
        /// Bytes of a block's transformed patches, which outlive a second-level cache but not a third.
        const PATCHES: usize = 2 << 20;
        /// Tiles of a block.
        const TILES: usize = 128;
        let step = N - 2;
        let all = Tiles { down: map.height.div_ceil(step), across: map.width.div_ceil(step) };
        let inner = self.weights[0].inner();
        let work = rows * all.count() * N * N * inner * self.weights[0].outputs();
        let wanted = wanted_tasks(work);
        let fitting = (PATCHES / (N * N * inner * size_of::<E>())).clamp(8, TILES);
        let shared = (rows * all.count()).div_ceil(wanted).max(16);
        let across = all.across.div_ceil(all.across.div_ceil(16));
        let down = (fitting.min(shared) / across).clamp(1, all.down);
        let (blocks_down, blocks_across) = (all.down.div_ceil(down), all.across.div_ceil(across));
        let blocks = rows * blocks_down * blocks_across;
        let slices = slices(&self.weights[0], wanted.div_ceil(blocks.max(1)), finish.then);
        run_tasks(blocks * slices.len(), work, |task| {
            let (slice, block) = (slices[task / blocks].clone(), task % blocks);
            let row = block / (blocks_down * blocks_across);
            let (top, left) = (block / blocks_across % blocks_down * down, block % blocks_across * across);
            let tiles = Tiles { down: down.min(all.down - top), across: across.min(all.across - left) };
            let window = Window {
                row,
                top: top * step,
                left: left * step,
                height: map.height,
                width: map.width,
                outputs: self.weights[0].outputs(),
            };
            self.block::<E, N>(host, map, tiles, window, slice, finish, output)
        })
    }

    #[allow(clippy::too_many_arguments)]
    fn block<E: Element, const N: usize>(
        &self,
        host: &Host,
        map: Map,
        tiles: Tiles,
        window: Window,
        panels: Range<usize>,
        finish: &Finish<'_, E>,
        output: &Shared<'_, E>,
    ) -> Result<()> {
        let inner = self.weights[0].inner();
        let width = tiles.across * (N - 2) + 2;
        let area =
            Area { row: window.row, top: window.top as isize - 1, left: window.left as isize - 1, width, pixel: inner };
        let area_len = (tiles.down * (N - 2) + 2) * width * inner;
        with_scratch(area_len, |values: &mut [E]| {
            let pending = host.pending.as_deref();
            let from = host.buffer.values::<E>();
            dispatch(Isa::best(), Copy { map, area, from, pending, to: &mut *values });
            with_scratch(N * N * tiles.count() * inner, |patches: &mut [E]| {
                with_scratch(N * N * tiles.count() * GROUP * PANEL, |sums| {
                    let (weights, area) = (self.weights.as_slice(), &*values);
                    let block = Block::<_, N> { area, patches, sums, weights, tiles, window, panels, finish, output };
                    dispatch(Isa::best(), block);
                })
            })?
        })?
    }
}

/// One output's weight (inputs, 3 · 3) → G w Gᵀ as (side · side, inner), whose inputs may be fewer.
fn transform_weight(values: &[f32], side: usize, inner: usize, to: &mut [f32]) {
    let transform = weight_transform(side);
    let inputs = values.len() / 9;
    // Inputs side by side, so that each sum runs over whole vectors.
    let mut taps = vec![0f32; 9 * inputs];
    for (input, values) in values.as_chunks::<9>().0.iter().enumerate() {
        for (tap, value) in values.iter().enumerate() {
            taps[tap * inputs + input] = *value;
        }
    }
    let mut lines = vec![0f32; 3 * inputs];
    for (y, down) in transform.iter().enumerate() {
        for (column, line) in lines.chunks_exact_mut(inputs).enumerate() {
            let tap = |row: usize| &taps[(3 * row + column) * inputs..][..inputs];
            combine(*down, [tap(0), tap(1), tap(2)], line);
        }
        for (x, across) in transform.iter().enumerate() {
            let line = |column: usize| &lines[column * inputs..][..inputs];
            combine(*across, [line(0), line(1), line(2)], &mut to[(y * side + x) * inner..][..inputs]);
        }
    }
}

/// The sum of three vectors times their factors.
fn combine(factors: [f64; 3], [a, b, c]: [&[f32]; 3], to: &mut [f32]) {
    let [first, second, third] = factors.map(|factor| factor as f32);
    for (((to, a), b), c) in to.iter_mut().zip(a).zip(b).zip(c) {
        *to = first * a + second * b + third * c;
    }
}

/// A block of tiles times panels, on one thread.
struct Block<'a, E, const N: usize> {
    area: &'a [E],
    patches: &'a mut [E],
    sums: &'a mut [f32],
    weights: &'a [Panels],
    tiles: Tiles,
    window: Window,
    panels: Range<usize>,
    finish: &'a Finish<'a, E>,
    output: &'a Shared<'a, E>,
}

impl<E: Element, const N: usize> Kernel for Block<'_, E, N> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { area, patches, sums, weights, tiles, window, panels, finish, output } = self;
        transform_patches::<S, E, N>(simd, area, weights[0].inner(), tiles, patches);
        let mut start = panels.start;
        while start < panels.end {
            let group = (start, GROUP.min(panels.end - start));
            multiply(simd, patches, tiles.count(), weights, group, sums);
            transform_outputs::<S, E, N>(simd, sums, tiles, group, window, finish, output);
            start += GROUP;
        }
    }
}
