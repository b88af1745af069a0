//! Convolution on the host without its matrix of windows: the part of the map that a block of outputs
//! sees is copied once, with its padding and whatever norm is pending, and windows are read from it
//! where they lie (implicit GEMM).

use std::ops::Range;

use super::buffer::Format;
use super::kernel::element::Element;
use super::kernel::functions::silu;
use super::kernel::isa::{Isa, Kernel, dispatch};
use super::kernel::panels::{PANEL, Panels};
use super::kernel::product::{Block, Finish, Line, Then, chunks, sums_len};
use super::kernel::simd::Simd;
use super::shared::{Shared, run_tasks, wanted_tasks, with_scratch};
use super::tensor::{Host, Pending};
use crate::Result;
use half::bf16;

/// A feature map's dimensions, channels last.
#[derive(Clone, Copy, Debug)]
pub(super) struct Map {
    pub height: usize,
    pub width: usize,
    pub channels: usize,
}

/// How windows lie on a map.
#[derive(Clone, Copy, Debug)]
pub(super) struct Windows {
    /// Height and width.
    pub kernel: (usize, usize),
    pub stride: usize,
    /// How far the first window starts above and left of the map.
    pub before: (usize, usize),
    /// Windows down and across.
    pub outputs: (usize, usize),
}

impl Windows {
    /// Each position by itself; the number of outputs is the map's.
    pub fn pointwise() -> Self {
        Self { kernel: (1, 1), stride: 1, before: (0, 0), outputs: (0, 0) }
    }
}

/// Where outputs go: value offsets of a row, a line and a position, and of the very first one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Placing {
    pub first: usize,
    pub row: usize,
    pub line: usize,
    pub position: usize,
}

impl Placing {
    /// One line per row, position after position.
    pub fn dense(positions: usize, outputs: usize) -> Self {
        Self { first: 0, row: positions * outputs, line: positions * outputs, position: outputs }
    }
}

/// One use of a convolution.
pub(super) struct Call<'a, E> {
    pub host: &'a Host,
    pub rows: usize,
    pub map: Map,
    pub windows: Windows,
    pub weight: &'a Panels,
    pub finish: &'a Finish<'a, E>,
    pub placing: Placing,
}

/// The panels of `outputs` in at most `wanted` parts of about one size; gates stay with their values.
pub(super) fn slices(outputs: usize, wanted: usize, then: Then) -> Vec<Range<usize>> {
    let panels = outputs.div_ceil(PANEL);
    // Alone, a panel would leave half of the registers unused.
    let count = wanted.clamp(1, panels.div_ceil(2).max(1));
    let unit = match then {
        Then::Gate => 2,
        // Whole groups, as the kernel sums them, where there are enough for like parts.
        _ if panels >= 6 * count => 3,
        _ => 1,
    };
    let size = panels.div_ceil(unit).div_ceil(count) * unit;
    (0..panels).step_by(size.max(1)).map(|start| start..panels.min(start + size)).collect()
}

/// A rectangle of outputs, given as lines (counted over all rows) and columns.
#[derive(Clone, Debug)]
struct Tile {
    lines: Range<usize>,
    columns: Range<usize>,
}

impl<E: Element> Call<'_, E> {
    /// Computes all outputs.
    pub fn run(mut self, output: &Shared<'_, E>) -> Result<()> {
        if self.windows.outputs == (0, 0) {
            self.windows.outputs = (self.map.height, self.map.width);
        }
        let (down, across) = self.windows.outputs;
        let work = self.rows * down * across * self.weight.inner() * self.weight.outputs();
        let wanted = wanted_tasks(work);
        let tiles = self.tiles(wanted);
        let slices = slices(self.weight.outputs(), wanted.div_ceil(tiles.len().max(1)), self.finish.then);
        run_tasks(tiles.len() * slices.len(), work, |task| {
            // Neighbouring tasks share their weights.
            self.compute(&tiles[task % tiles.len()], slices[task / tiles.len()].clone(), output)
        })
    }

    /// Values of a pixel in a patch: whole `DEPTH`s.
    fn pixel(&self) -> usize {
        self.map.channels.next_multiple_of(E::DEPTH)
    }

    /// Cuts the outputs into rectangles whose patch stays in a core's second-level cache.
    fn tiles(&self, wanted: usize) -> Vec<Tile> {
        /// Bytes of a patch.
        const PATCH: usize = 384 * 1024;
        /// Positions whose sums are kept.
        const POSITIONS: usize = 512;
        /// Columns of a tile, more or less.
        const COLUMNS: usize = 64;
        let (down, across) = self.windows.outputs;
        let width = across.div_ceil(across.div_ceil(COLUMNS).max(1)).next_multiple_of(8).min(across.max(1));
        let line_bytes = (width * self.windows.stride + self.windows.kernel.1) * self.pixel() * size_of::<E>();
        let patch_lines = PATCH / line_bytes.max(1);
        let fitting = patch_lines.saturating_sub(self.windows.kernel.0 - 1) / self.windows.stride;
        let shared = (self.rows * down).div_ceil(wanted);
        let height = fitting.min(POSITIONS / width).min(shared).max(1);
        let total = self.rows * down;
        let mut tiles = Vec::new();
        for left in (0..across).step_by(width) {
            for top in (0..total).step_by(height) {
                tiles.push(Tile { lines: top..total.min(top + height), columns: left..across.min(left + width) });
            }
        }
        tiles
    }

    fn compute(&self, tile: &Tile, panels: Range<usize>, output: &Shared<'_, E>) -> Result<()> {
        let Windows { kernel, stride, before, outputs: (down, _) } = self.windows;
        let (pixel, columns) = (self.pixel(), tile.columns.len());
        let patch_width = (columns - 1) * stride + kernel.1;
        // Lines of one row see one part of the map; another row has its own.
        let parts = split(&tile.lines, down);
        let part_lines = |part: &Range<usize>| (part.len() - 1) * stride + kernel.0;
        let patch_lines: usize = parts.iter().map(part_lines).sum();
        with_scratch(patch_lines * patch_width * pixel, |patch: &mut [E]| {
            let mut lines = Vec::with_capacity(tile.lines.len());
            let mut start = 0;
            for part in &parts {
                let (row, first) = (part.start / down, part.start % down);
                let area = Area {
                    row,
                    top: (first * stride) as isize - before.0 as isize,
                    left: (tile.columns.start * stride) as isize - before.1 as isize,
                    width: patch_width,
                    pixel,
                };
                let end = start + part_lines(part) * patch_width * pixel;
                self.copy(area, &mut patch[start..end]);
                for line in 0..part.len() {
                    lines.push(Line {
                        left: start + line * stride * patch_width * pixel,
                        output: self.placing.first
                            + row * self.placing.row
                            + (first + line) * self.placing.line
                            + tile.columns.start * self.placing.position,
                        row,
                        positions: columns,
                    });
                }
                start = end;
            }
            let runs = (0..kernel.0).map(|line| (line * patch_width * pixel, kernel.1 * pixel));
            let pieces = chunks::<E>(runs);
            with_scratch(sums_len(lines.len() * columns), |sums| {
                let block = Block {
                    left: &*patch,
                    lines: &lines,
                    left_stride: stride * pixel,
                    output_stride: self.placing.position,
                    weight: self.weight,
                    panels,
                    pieces: &pieces,
                    finish: self.finish,
                    output,
                    sums,
                    unpacked: &mut [],
                };
                dispatch(Isa::best(), block);
            })
        })?
    }

    /// Copies what an area of the padded map holds.
    fn copy(&self, area: Area, to: &mut [E]) {
        let pending = self.host.pending.as_deref();
        match self.host.buffer.format() {
            Format::F32 => {
                let from = self.host.buffer.values::<f32>();
                dispatch(Isa::best(), Copy { map: self.map, area, from, pending, to });
            }
            Format::Bf16 => {
                let from = self.host.buffer.values::<bf16>();
                dispatch(Isa::best(), Copy { map: self.map, area, from, pending, to });
            }
        }
    }
}

/// Line numbers counted over all rows, cut where a row ends.
fn split(lines: &Range<usize>, down: usize) -> Vec<Range<usize>> {
    let mut parts = Vec::new();
    let mut start = lines.start;
    while start < lines.end {
        let end = lines.end.min((start / down + 1) * down);
        parts.push(start..end);
        start = end;
    }
    parts
}

/// A rectangle of a row's padded map.
#[derive(Clone, Copy)]
pub(super) struct Area {
    pub row: usize,
    /// Its first line and column on the map; negative in the padding.
    pub top: isize,
    pub left: isize,
    pub width: usize,
    /// Values of a pixel where it goes to.
    pub pixel: usize,
}

/// Copies an area, changing format and applying a pending norm on the way.
pub(super) struct Copy<'a, F, E> {
    pub map: Map,
    pub area: Area,
    pub from: &'a [F],
    pub pending: Option<&'a Pending>,
    /// Whole lines of the area.
    pub to: &'a mut [E],
}

impl<F: Element, E: Element> Kernel for Copy<'_, F, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Map { height, width, channels } = self.map;
        let Area { row, top, left, width: area_width, pixel } = self.area;
        // Columns of the area that lie on the map.
        let on_map = |start: isize, len: usize| {
            let first = (-left).clamp(0, area_width as isize) as usize;
            let last = (len as isize - start).clamp(first as isize, area_width as isize) as usize;
            (first, last)
        };
        let (first, last) = on_map(left, width);
        for (line, to) in self.to.chunks_exact_mut(area_width * pixel).enumerate() {
            let y = top + line as isize;
            if y < 0 || y >= height as isize || first == last {
                to.fill(E::default());
                continue;
            }
            let start = ((row * height + y as usize) * width + (left + first as isize) as usize) * channels;
            let from = &self.from[start..start + (last - first) * channels];
            to[..first * pixel].fill(E::default());
            to[last * pixel..].fill(E::default());
            let to = &mut to[first * pixel..last * pixel];
            match self.pending {
                None if pixel == channels => convert(simd, from, to),
                None => {
                    for (from, to) in from.chunks_exact(channels).zip(to.chunks_exact_mut(pixel)) {
                        convert(simd, from, &mut to[..channels]);
                        to[channels..].fill(E::default());
                    }
                }
                Some(pending) => {
                    let of_row = row * channels..(row + 1) * channels;
                    let (scale, shift) = (&pending.scale[of_row.clone()], &pending.shift[of_row]);
                    for (from, to) in from.chunks_exact(channels).zip(to.chunks_exact_mut(pixel)) {
                        normalise(simd, from, &mut to[..channels], scale, shift, pending.silu);
                        to[channels..].fill(E::default());
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn convert<S: Simd, F: Element, E: Element>(simd: S, from: &[F], to: &mut [E]) {
    debug_assert_eq!(from.len(), to.len());
    let len = from.len();
    for at in (0..len).step_by(S::LANES) {
        let count = S::LANES.min(len - at);
        // SAFETY: `at` and `count` stay within both.
        #[allow(unsafe_code)]
        unsafe {
            let (from, to) = (from.as_ptr().add(at), to.as_mut_ptr().add(at));
            if count == S::LANES {
                E::store(simd, to, F::load(simd, from));
            } else {
                E::store_some(simd, to, F::load_some(simd, from, count), count);
            }
        }
    }
}

/// One pixel: from · scale + shift, then SiLU if asked for.
#[inline(always)]
pub(super) fn normalise<S: Simd, F: Element, E: Element>(
    simd: S,
    from: &[F],
    to: &mut [E],
    scale: &[f32],
    shift: &[f32],
    then_silu: bool,
) {
    let len = from.len();
    assert!(to.len() == len && scale.len() == len && shift.len() == len, "channels of a norm");
    for at in (0..len).step_by(S::LANES) {
        let count = S::LANES.min(len - at);
        // SAFETY: `at` and `count` stay within all four.
        #[allow(unsafe_code)]
        unsafe {
            let (from, to) = (from.as_ptr().add(at), to.as_mut_ptr().add(at));
            let (scale, shift) = (scale.as_ptr().add(at), shift.as_ptr().add(at));
            let finish = |value| if then_silu { silu(simd, value) } else { value };
            if count == S::LANES {
                let value = simd.mul_add(F::load(simd, from), simd.load(scale), simd.load(shift));
                E::store(simd, to, finish(value));
            } else {
                let value = F::load_some(simd, from, count);
                let value = simd.mul_add(value, simd.load_some(scale, count), simd.load_some(shift, count));
                E::store_some(simd, to, finish(value), count);
            }
        }
    }
}

#[cfg(test)]
mod tests;
