//! The transforms of Winograd's minimal filtering, F(2×2, 3×3) and F(4×4, 3×3): tiles of 2 or 4 outputs
//! a side are made from patches of 4 or 6 values a side with 16 products in place of 36, or 36 in place
//! of 144.
//!
//! Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015
//! (<https://arxiv.org/abs/1509.09308>), sections 4.1 and 4.3.
//!
//! Of a doubled map (`D`), whose pixels are repeated two by two, a patch begins between two that are alike: a b b c
//! or a b b c c d. One line of its transform is then the difference of two that are alike, which is nothing, and
//! 9 products do in place of 16, or 25 in place of 36. The map itself need not be doubled.

use std::ops::Range;

use super::element::Element;
use super::panels::{PANEL, Panels};
use super::product::{Finish, some};
use super::simd::Simd;
use crate::ops::shared::Shared;

/// The transform of a line of a weight, G w.
#[inline(always)]
fn weight_line<S: Simd, const N: usize>(simd: S, w: [S::F32; 3]) -> [S::F32; N] {
    let mut line = [w[2]; N];
    if N == 4 {
        let half = simd.splat(0.5);
        let (outer, middle) = (simd.mul(simd.add(w[0], w[2]), half), simd.mul(w[1], half));
        line[0] = w[0];
        line[1] = simd.add(outer, middle);
        line[2] = simd.sub(outer, middle);
    } else {
        let minus_sixth = simd.splat(-1.0 / 6.0);
        let (outer, middle) = (simd.mul(simd.add(w[0], w[2]), minus_sixth), simd.mul(w[1], minus_sixth));
        let far_outer = simd.mul_add(w[0], simd.splat(1.0 / 24.0), simd.mul(w[2], simd.splat(1.0 / 6.0)));
        let far_middle = simd.mul(w[1], simd.splat(1.0 / 12.0));
        line[0] = simd.mul(w[0], simd.splat(0.25));
        line[1] = simd.add(outer, middle);
        line[2] = simd.sub(outer, middle);
        line[3] = simd.add(far_outer, far_middle);
        line[4] = simd.sub(far_outer, far_middle);
    }
    line
}

/// The transform of a line of a patch, Bᵀ d.
#[inline(always)]
fn patch_line<S: Simd, const N: usize>(simd: S, d: [S::F32; N]) -> [S::F32; N] {
    let mut line = d;
    if N == 4 {
        line[0] = simd.sub(d[0], d[2]);
        line[1] = simd.add(d[1], d[2]);
        line[2] = simd.sub(d[2], d[1]);
        line[3] = simd.sub(d[1], d[3]);
    } else {
        let (two, four, minus_five) = (simd.splat(2.0), simd.splat(4.0), simd.splat(-5.0));
        let minus_four = simd.splat(-4.0);
        // Even and odd parts, which pairs of lines share.
        let even = simd.mul_add(d[2], minus_four, d[4]);
        let odd = simd.mul_add(d[1], minus_four, d[3]);
        line[1] = simd.add(even, odd);
        line[2] = simd.sub(even, odd);
        let even = simd.sub(d[4], d[2]);
        let odd = simd.mul(two, simd.sub(d[3], d[1]));
        line[3] = simd.add(even, odd);
        line[4] = simd.sub(even, odd);
        line[0] = simd.mul_add(d[0], four, simd.mul_add(d[2], minus_five, d[4]));
        line[5] = simd.mul_add(d[1], four, simd.mul_add(d[3], minus_five, d[5]));
    }
    line
}

/// The transform of a line of products, Aᵀ m; the first `N` - 2 are outputs.
#[inline(always)]
fn output_line<S: Simd, const N: usize>(simd: S, m: [S::F32; N]) -> [S::F32; 4] {
    let mut line = [m[0]; 4];
    if N == 4 {
        line[0] = simd.add(simd.add(m[0], m[1]), m[2]);
        line[1] = simd.sub(simd.sub(m[1], m[2]), m[3]);
    } else {
        let (sum, difference) = (simd.add(m[1], m[2]), simd.sub(m[1], m[2]));
        let (far_sum, far_difference) = (simd.add(m[3], m[4]), simd.sub(m[3], m[4]));
        line[0] = simd.add(simd.add(m[0], sum), far_sum);
        line[1] = simd.mul_add(far_difference, simd.splat(2.0), difference);
        line[2] = simd.mul_add(far_sum, simd.splat(4.0), sum);
        line[3] = simd.add(simd.mul_add(far_difference, simd.splat(8.0), difference), m[5]);
    }
    line
}

/// The line of a doubled map's transformed patches, and the column, that is always zero.
const ALIKE: usize = 2;

/// Places of a transformed patch that are multiplied.
pub(super) const fn places<const N: usize, const D: bool>() -> usize {
    if D { (N - 1) * (N - 1) } else { N * N }
}

/// The number of line `y` and column `x` among the [`places`]; `None` where there is nothing to multiply.
#[inline(always)]
const fn place<const N: usize, const D: bool>(y: usize, x: usize) -> Option<usize> {
    match D {
        false => Some(y * N + x),
        true if y == ALIKE || x == ALIKE => None,
        true => Some((y - (y > ALIKE) as usize) * (N - 1) + x - (x > ALIKE) as usize),
    }
}

/// Lines of the map from one tile to the next.
pub(in crate::ops) const fn step<const N: usize, const D: bool>() -> usize {
    if D { (N - 2) / 2 } else { N - 2 }
}

/// The line of the map that line `y` of a patch shows, counted from the one above the tile's own.
const fn seen<const D: bool>(y: usize) -> usize {
    if D { y.div_ceil(2) } else { y }
}

/// The tiles of a block: so many down and across.
#[derive(Clone, Copy, Debug)]
pub(in crate::ops) struct Tiles {
    pub down: usize,
    pub across: usize,
}

impl Tiles {
    pub fn count(self) -> usize {
        self.down * self.across
    }
}

/// Inner positions whose factors are worked through before the next ones: little enough that those of a
/// few panels stay in the first cache.
pub(super) const fn chunk<E: Element>() -> usize {
    if E::DEPTH == 1 { 64 } else { 320 }
}

/// Chunks of `inner` positions.
pub(super) fn chunks<E: Element>(inner: usize) -> impl Iterator<Item = Range<usize>> {
    (0..inner).step_by(chunk::<E>()).map(move |first| first..inner.min(first + chunk::<E>()))
}

/// Transforms the patches of `tiles` from an area of (down · [`step`] + 2) lines of (across · [`step`] + 2)
/// pixels. They become the tiles from `first` on of `all` in `to`: ([`places`], chunks, tiles, channels of the
/// chunk).
#[inline(always)]
pub(in crate::ops) fn transform_patches<S: Simd, E: Element, const N: usize, const D: bool>(
    simd: S,
    area: &[E],
    channels: usize,
    tiles: Tiles,
    (first, all): (usize, usize),
    to: &mut [E],
) {
    let step = step::<N, D>();
    let width = tiles.across * step + 2;
    assert_eq!(area.len(), (tiles.down * step + 2) * width * channels, "size of an area");
    assert_eq!(to.len(), places::<N, D>() * all * channels, "size of transformed patches");
    assert!(first + tiles.count() <= all, "tiles of a block");
    for tile in 0..tiles.count() {
        let corner = (tile / tiles.across * step * width + tile % tiles.across * step) * channels;
        for chunk in chunks::<E>(channels) {
            for channel in chunk.clone().step_by(S::LANES) {
                let count = S::LANES.min(channels - channel);
                let mut lines = [[simd.splat(0.0); N]; N];
                for (y, line) in lines.iter_mut().enumerate() {
                    let values: [S::F32; N] = std::array::from_fn(|x| {
                        let from = corner + (seen::<D>(y) * width + seen::<D>(x)) * channels + channel;
                        // SAFETY: the last patch's last pixel is the area's last one.
                        unsafe { some(simd, area.as_ptr().add(from), count) }
                    });
                    *line = patch_line(simd, values);
                }
                let within = chunk.start * all + (first + tile) * chunk.len() + channel - chunk.start;
                for x in 0..N {
                    let column = patch_line(simd, column(&lines, x));
                    for (y, value) in column.into_iter().enumerate() {
                        let Some(place) = place::<N, D>(y, x) else { continue };
                        // SAFETY: within (places, chunks, tiles, channels of the chunk).
                        unsafe {
                            let to = to.as_mut_ptr().add(place * all * channels + within);
                            if count == S::LANES {
                                E::store(simd, to, value)
                            } else {
                                E::store_some(simd, to, value, count)
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Values from one place's transformed weights to the next one's. A line of the cache more than there are,
/// so that the places do not all meet in one set of it.
pub(super) const fn weights_stride(panels: usize, steps: usize) -> usize {
    panels * steps * PANEL + PANEL
}

/// Transforms the weights of the panels `group` at the inner positions `chunk` of a packed 3×3 weight,
/// (9 · inner, outputs): ([`places`], panels, positions, [`PANEL`]), packed as the weight is.
#[inline(always)]
pub(super) fn transform_weights<S: Simd, E: Element, const N: usize, const D: bool>(
    simd: S,
    weight: &Panels,
    group: &Range<usize>,
    chunk: &Range<usize>,
    to: &mut [E],
) {
    let (values, inner) = (weight.values::<E>(), weight.inner() / 9);
    let (panels, steps) = (group.len(), chunk.len());
    assert!(weight.inner() == 9 * inner && chunk.end <= inner, "inner positions of a weight");
    assert!(chunk.start.is_multiple_of(E::DEPTH) && steps.is_multiple_of(E::DEPTH), "whole factors of a weight");
    assert!(group.end * 9 * inner * PANEL <= values.len(), "panels of a weight");
    let stride = weights_stride(panels, steps);
    assert!(to.len() >= places::<N, D>() * stride, "room for transformed weights");
    for (index, panel) in group.clone().enumerate() {
        for position in chunk.clone().step_by(E::DEPTH) {
            for lane in (0..PANEL).step_by(S::LANES) {
                let from = (panel * 9 * inner + position) * PANEL + lane * E::DEPTH;
                let at = (index * steps + position - chunk.start) * PANEL + lane * E::DEPTH;
                let mut down = [[[simd.splat(0.0); N]; 3]; 2];
                for (part, down) in down.iter_mut().enumerate().take(E::DEPTH) {
                    for (x, column) in down.iter_mut().enumerate() {
                        // SAFETY: within (panels, 9, inner, PANEL).
                        let tap = |y: usize| unsafe {
                            E::load_position(simd, values.as_ptr().add(from + (3 * y + x) * inner * PANEL), part)
                        };
                        *column = weight_line::<S, N>(simd, [tap(0), tap(1), tap(2)]);
                    }
                }
                for y in 0..N {
                    let mut lines = [[simd.splat(0.0); N]; 2];
                    for (line, [left, middle, right]) in lines.iter_mut().zip(&down).take(E::DEPTH) {
                        *line = weight_line::<S, N>(simd, [left[y], middle[y], right[y]]);
                    }
                    let [first, second] = lines;
                    for (x, (first, second)) in first.into_iter().zip(second).enumerate() {
                        let Some(place) = place::<N, D>(y, x) else { continue };
                        // SAFETY: within (places, panels, positions, PANEL).
                        unsafe {
                            let to = to.as_mut_ptr().add(place * stride + at);
                            E::store_positions(simd, to, [first, second]);
                        }
                    }
                }
            }
        }
    }
}

/// One column of `lines`.
#[inline(always)]
fn column<V: Copy, const W: usize, const N: usize>(lines: &[[V; W]; N], at: usize) -> [V; N] {
    std::array::from_fn(|line| lines[line][at])
}

/// A rectangle of one row's tiles in a block.
#[derive(Clone, Copy, Debug)]
pub(in crate::ops) struct Segment {
    pub row: usize,
    /// The first tile's first output.
    pub top: usize,
    pub left: usize,
    pub tiles: Tiles,
    /// Its first tile, counted over the block.
    pub first: usize,
}

/// Where outputs go, and what is done to them before.
pub(in crate::ops) struct Outputs<'a, E> {
    /// Of a row's outputs.
    pub height: usize,
    pub width: usize,
    pub finish: &'a Finish<'a, E>,
    /// All rows' maps.
    pub values: &'a Shared<'a, E>,
}

/// Transforms the sums ([`places`], `all` tiles, panels · PANEL) of a group of panels into a segment's outputs,
/// finishes and stores them.
#[inline(always)]
pub(super) fn transform_outputs<S: Simd, E: Element, const N: usize, const D: bool>(
    simd: S,
    sums: &[f32],
    all: usize,
    segment: Segment,
    group: &Range<usize>,
    outputs: &Outputs<'_, E>,
) {
    let step = N - 2;
    let Segment { row, top, left, tiles, first } = segment;
    let &Outputs { height, width, finish, values: output } = outputs;
    let channels = finish.outputs;
    let columns = group.len() * PANEL;
    assert!((row + 1) * height * width * channels <= output.len(), "the output is too short");
    assert!(sums.len() >= places::<N, D>() * all * columns && first + tiles.count() <= all, "room for the sums");
    finish.check(row, output.len());
    for tile in 0..tiles.count() {
        let (y, x) = (top + tile / tiles.across * step, left + tile % tiles.across * step);
        for vector in 0..columns / S::LANES {
            let channel = group.start * PANEL + vector * S::LANES;
            if channel >= channels {
                break;
            }
            let lanes = S::LANES.min(channels - channel);
            let mut lines = [[simd.splat(0.0); 4]; N];
            for (at, line) in lines.iter_mut().enumerate() {
                let values: [S::F32; N] = std::array::from_fn(|x| {
                    let Some(place) = place::<N, D>(at, x) else { return simd.splat(0.0) };
                    let from = (place * all + first + tile) * columns + vector * S::LANES;
                    // SAFETY: within (places, tiles, panels · PANEL).
                    unsafe { simd.load(sums.as_ptr().add(from)) }
                });
                *line = output_line(simd, values);
            }
            for across in 0..step.min(width - x) {
                let column = output_line(simd, column(&lines, across));
                for (down, value) in column.into_iter().enumerate().take(step.min(height - y)) {
                    let target = ((row * height + y + down) * width + x + across) * channels;
                    // SAFETY: within this row's map, and `check` saw to what is added.
                    unsafe {
                        finish.store(simd, value, output.at(target + channel), (row, channel, target, lanes));
                    }
                }
            }
        }
    }
}
