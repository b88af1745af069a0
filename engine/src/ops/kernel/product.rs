//! Blocks of positions times panels of outputs, and what is done with the sums before they are stored.

use std::borrow::Cow;
use std::ops::Range;

use super::element::Element;
use super::functions::{gelu, gelu_tanh, quick_gelu, relu, silu};
use super::isa::Kernel;
use super::panels::{PANEL, Panels};
use super::quantised::Unpack;
use super::simd::Simd;
use super::tile::{Piece, Strip};
use crate::ops::shared::Shared;
#[cfg(target_arch = "x86_64")]
use {super::amx, super::isa::Isa, crate::ops::buffer::Format};

/// Bytes of packed weights that are worked through before the next positions: half of a small
/// second-level cache.
const CHUNK_BYTES: usize = 256 * 1024;

/// Panels whose sums are kept until they are whole.
const GROUP: usize = 3;

/// Runs are cut at multiples of so many steps: the depth of a whole tile, and a stretch of quantised weights.
const CUT: usize = 32;

/// What follows the sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ops) enum Then {
    Nothing,
    Silu,
    Gelu,
    QuickGelu,
    GeluTanh,
    Relu,
    /// Panels alternate between values and their gates: value · gelu(gate).
    Gate,
}

/// What is done with the sums.
pub(in crate::ops) struct Finish<'a, E> {
    /// Outputs of a position; with gates half as many as the bias has.
    pub outputs: usize,
    /// (outputs): added everywhere.
    pub bias: Option<&'a [f32]>,
    /// (rows, outputs): added to all positions of a row, after `then`.
    pub per_row: Option<&'a [E]>,
    /// (rows, outputs): multiplied with all positions of a row, next.
    pub scale: Option<&'a [E]>,
    /// As the output: added at its place, last.
    pub residual: Option<&'a [E]>,
    pub then: Then,
}

/// Neighbouring positions of one row.
#[derive(Clone, Copy, Debug)]
pub(in crate::ops) struct Line {
    /// Where the first position's window starts in the left factor.
    pub left: usize,
    /// Where its outputs go.
    pub output: usize,
    pub row: usize,
    pub positions: usize,
}

/// Positions times panels, on one thread.
pub(in crate::ops) struct Block<'a, E> {
    pub left: &'a [E],
    pub lines: &'a [Line],
    /// Values from one window to the next one of a line.
    pub left_stride: usize,
    /// Values from one position's outputs to the next one's.
    pub output_stride: usize,
    pub weight: &'a Panels,
    /// Which of the weight's panels.
    pub panels: Range<usize>,
    /// The inner positions, in order.
    pub pieces: &'a [Vec<Piece>],
    pub finish: &'a Finish<'a, E>,
    pub output: &'a Shared<'a, E>,
    /// Room for [`sums_len`] values.
    pub sums: &'a mut [f32],
    /// Room for [`unpacked_len`] values.
    pub unpacked: &'a mut [E],
}

/// Where the weights of a group of panels and a chunk lie.
pub(super) struct Right<'a, E> {
    /// Packed panels,
    pub values: *const E,
    /// each of so many inner positions,
    pub inner: usize,
    /// and which of them is the group's first.
    pub panel: usize,
    /// The chunk, counted as the panels are.
    pub pieces: Cow<'a, [Piece]>,
}

/// Values that the sums of a block take.
pub(in crate::ops) fn sums_len(positions: usize) -> usize {
    positions * GROUP * PANEL
}

/// Values that a block's weights take once they are unpacked.
pub(in crate::ops) fn unpacked_len<E: Element>(weight: &Panels) -> usize {
    if weight.is_quantised() { weight.inner().min(chunk_steps::<E>() * E::DEPTH) * GROUP * PANEL } else { 0 }
}

/// `panels` in as few groups of at most `most` as there can be, of about one size.
pub(super) fn groups(panels: &Range<usize>, most: usize) -> impl Iterator<Item = Range<usize>> + use<> {
    let (end, count) = (panels.end, panels.len().div_ceil(most).max(1));
    let size = panels.len().div_ceil(count).max(1);
    panels.clone().step_by(size).map(move |start| start..end.min(start + size))
}

/// Steps of a chunk, a multiple of [`CUT`].
fn chunk_steps<E: Element>() -> usize {
    #[cfg(target_arch = "x86_64")]
    if Isa::best().multiplies_by_tiles(E::FORMAT) {
        return amx::CHUNK_STEPS;
    }
    CHUNK_BYTES / (GROUP * PANEL * E::DEPTH * size_of::<E>()) / CUT * CUT
}

/// Cuts runs of inner positions (where they start in a window, and how many values) into chunks whose
/// weights stay in a core's cache while all positions of a block pass.
pub(in crate::ops) fn chunks<E: Element>(runs: impl IntoIterator<Item = (usize, usize)>) -> Vec<Vec<Piece>> {
    let most = chunk_steps::<E>();
    let (mut chunks, mut chunk, mut room, mut first) = (Vec::new(), Vec::new(), most, 0);
    for (left, len) in runs {
        debug_assert!(len.is_multiple_of(E::DEPTH));
        let (mut left, mut steps) = (left, len / E::DEPTH);
        while steps > 0 {
            let taken = if steps <= room { steps } else { room / CUT * CUT };
            if taken > 0 {
                chunk.push(Piece { left, first, steps: taken });
            }
            (left, first, steps, room) = (left + taken * E::DEPTH, first + taken, steps - taken, room - taken);
            if steps > 0 || room == 0 {
                chunks.push(std::mem::take(&mut chunk));
                room = most;
            }
        }
    }
    if !chunk.is_empty() {
        chunks.push(chunk);
    }
    chunks
}

impl<'a, E: Element> Block<'a, E> {
    /// Panics unless every place that the block will touch is there.
    pub(super) fn check(&self) {
        let reach = self.pieces.iter().flatten().map(|piece| piece.left + piece.steps * E::DEPTH).max().unwrap_or(0);
        let steps: usize = self.pieces.iter().flatten().map(|piece| piece.steps).sum();
        assert_eq!(steps * E::DEPTH, self.weight.inner(), "inner positions of a product");
        assert!(self.panels.end * PANEL < self.weight.outputs() + PANEL, "panels of a product");
        let outputs = self.finish.outputs;
        for line in self.lines.iter().filter(|line| line.positions > 0) {
            let last = line.positions - 1;
            assert!(line.left + last * self.left_stride + reach <= self.left.len(), "the left factor is too short");
            assert!(line.output + last * self.output_stride + outputs <= self.output.len(), "the output is too short");
            self.finish.check(line.row, self.output.len());
        }
        let columns = if self.finish.then == Then::Gate { 2 * outputs.next_multiple_of(PANEL) } else { outputs };
        assert_eq!(self.weight.outputs(), columns, "outputs of a product");
        let positions: usize = self.lines.iter().map(|line| line.positions).sum();
        assert!(sums_len(positions) <= self.sums.len(), "room for the sums");
        assert!(unpacked_len::<E>(self.weight) <= self.unpacked.len(), "room for unpacked weights");
    }

    /// The weights of the panels `group` at the inner positions of a chunk, unpacked if need be.
    #[inline(always)]
    pub(super) fn right<S: Simd>(&mut self, simd: S, group: &Range<usize>, chunk: &'a [Piece]) -> Right<'a, E> {
        let Some(weight) = self.weight.quantised() else {
            let (values, inner) = (self.weight.values::<E>().as_ptr(), self.weight.inner());
            return Right { values, inner, panel: group.start, pieces: Cow::Borrowed(chunk) };
        };
        let first = chunk.first().map_or(0, |piece| piece.first);
        let steps: usize = chunk.iter().map(|piece| piece.steps).sum();
        let (inner, start) = (steps * E::DEPTH, first * E::DEPTH);
        let to = &mut self.unpacked[..group.len() * inner * PANEL];
        simd.call(Unpack { weight, panels: group.clone(), inner: start..start + inner, to });
        let pieces = chunk.iter().map(|piece| Piece { first: piece.first - first, ..*piece }).collect();
        Right { values: self.unpacked.as_ptr(), inner, panel: 0, pieces }
    }

    /// The sums of the panels `group` at all positions.
    #[inline(always)]
    fn sum<S: Simd>(&mut self, simd: S, group: &Range<usize>) {
        let per_panel = PANEL / S::LANES;
        let count = group.len() * per_panel;
        let width = count.div_ceil(count.div_ceil(E::tile::<S>().1));
        let sums_stride = group.len() * PANEL;
        for (chunk, pieces) in self.pieces.iter().enumerate() {
            let right = self.right(simd, group, pieces);
            for vector in (0..count).step_by(width) {
                let mut at = 0;
                for line in self.lines {
                    let strip = Strip {
                        left: self.left.as_ptr().wrapping_add(line.left),
                        left_stride: self.left_stride,
                        positions: line.positions,
                        right: right.values,
                        inner: right.inner,
                        vector: right.panel * per_panel + vector,
                        vectors: width.min(count - vector),
                        pieces: &right.pieces,
                        sums: self.sums.as_mut_ptr().wrapping_add(at * sums_stride + vector * S::LANES),
                        sums_stride,
                        go_on: chunk > 0,
                    };
                    // SAFETY: `check` saw to the left factor, the weights and the room for the sums.
                    unsafe {
                        strip.run(simd);
                    }
                    at += line.positions;
                }
            }
        }
    }

    /// Finishes and stores the sums of the panels `group` at all positions.
    #[inline(always)]
    pub(super) fn store<S: Simd>(&self, simd: S, group: &Range<usize>) {
        let sums_stride = group.len() * PANEL;
        let gated = self.finish.then == Then::Gate;
        let panels = if gated { group.start / 2..group.end / 2 } else { group.clone() };
        let outputs = self.finish.outputs;
        let mut at = 0;
        for line in self.lines {
            for position in 0..line.positions {
                let target = line.output + position * self.output_stride;
                for (index, panel) in panels.clone().enumerate() {
                    for lane in (0..PANEL).step_by(S::LANES) {
                        let output = panel * PANEL + lane;
                        if output >= outputs {
                            break;
                        }
                        let column = if gated { 2 * index * PANEL } else { index * PANEL } + lane;
                        let sums = self.sums.as_ptr().wrapping_add((at + position) * sums_stride + column);
                        let place = Place { output, count: S::LANES.min(outputs - output), row: line.row, target };
                        // SAFETY: `check` saw to every place.
                        unsafe {
                            self.finish_vector(simd, sums, place);
                        }
                    }
                }
            }
            at += line.positions;
        }
    }

    /// # Safety
    /// `sums` and `place` must be of this block.
    #[inline(always)]
    unsafe fn finish_vector<S: Simd>(&self, simd: S, sums: *const f32, place: Place) {
        let Place { output, count, row, target } = place;
        let outputs = self.finish.outputs;
        // SAFETY: the caller's promise.
        unsafe {
            let mut value = simd.load(sums);
            if self.finish.then == Then::Gate {
                let mut gate = simd.load(sums.add(PANEL));
                // Values and gates lie in one bias as in the checkpoint: first all values.
                if let Some(bias) = self.finish.bias {
                    value = simd.add(value, some(simd, bias.as_ptr().add(output), count));
                    gate = simd.add(gate, some(simd, bias.as_ptr().add(outputs + output), count));
                }
                value = simd.mul(value, gelu(simd, gate));
            }
            self.finish.store(simd, value, self.output.at(target + output), (row, output, target, count));
        }
    }
}

impl<E: Element> Finish<'_, E> {
    /// Panics unless what is added is there for `row` of an output of `len` values.
    pub fn check(&self, row: usize, len: usize) {
        let outputs = self.outputs;
        let biases = if self.then == Then::Gate { 2 * outputs } else { outputs };
        assert!(self.bias.is_none_or(|bias| bias.len() == biases), "size of a bias");
        assert!(self.per_row.is_none_or(|values| (row + 1) * outputs <= values.len()), "rows of what is added");
        assert!(self.scale.is_none_or(|values| (row + 1) * outputs <= values.len()), "rows of a scale");
        assert!(self.residual.is_none_or(|values| values.len() == len), "size of a residual");
    }

    /// Finishes and stores `count` sums of outputs from `output` on, at a position of `row` whose outputs
    /// start at `target`.
    ///
    /// # Safety
    /// The place must be of what [`Finish::check`] saw, and `to` writable for `count` values.
    #[inline(always)]
    pub unsafe fn store<S: Simd>(
        &self,
        simd: S,
        value: S::F32,
        to: *mut E,
        (row, output, target, count): (usize, usize, usize, usize),
    ) {
        let mut value = value;
        // SAFETY: the caller's promise.
        unsafe {
            // A gate's bias went in before the gate.
            if let (Some(bias), true) = (self.bias, self.then != Then::Gate) {
                value = simd.add(value, some(simd, bias.as_ptr().add(output), count));
            }
            value = match self.then {
                Then::Nothing | Then::Gate => value,
                Then::Silu => silu(simd, value),
                Then::Gelu => gelu(simd, value),
                Then::QuickGelu => quick_gelu(simd, value),
                Then::GeluTanh => gelu_tanh(simd, value),
                Then::Relu => relu(simd, value),
            };
            if let Some(values) = self.per_row {
                value = simd.add(value, some(simd, values.as_ptr().add(row * self.outputs + output), count));
            }
            if let Some(values) = self.scale {
                value = simd.mul(value, some(simd, values.as_ptr().add(row * self.outputs + output), count));
            }
            if let Some(values) = self.residual {
                value = simd.add(value, some(simd, values.as_ptr().add(target + output), count));
            }
            if count == S::LANES {
                E::store(simd, to, value);
            } else {
                E::store_some(simd, to, value, count);
            }
        }
    }
}

/// A vector of outputs of one position.
#[derive(Clone, Copy)]
struct Place {
    output: usize,
    count: usize,
    row: usize,
    target: usize,
}

/// # Safety
/// `from` must be readable for `count` values, at most a vector's.
#[inline(always)]
pub(super) unsafe fn some<S: Simd, E: Element>(simd: S, from: *const E, count: usize) -> S::F32 {
    // SAFETY: the caller's promise.
    unsafe { if count == S::LANES { E::load(simd, from) } else { E::load_some(simd, from, count) } }
}

impl<E: Element> Kernel for Block<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        #[cfg(target_arch = "x86_64")]
        if E::FORMAT == Format::Bf16 && simd.has_tiles() {
            // SAFETY: `has_tiles` is the proof, and nothing below it comes back here.
            return self.run_by_tiles(simd, &mut unsafe { amx::Hardware::new() });
        }
        self.check();
        let group = if self.finish.then == Then::Gate { 2 } else { GROUP };
        for group in groups(&self.panels, group) {
            self.sum(simd, &group);
            self.store(simd, &group);
        }
    }
}

#[cfg(test)]
mod tests;
