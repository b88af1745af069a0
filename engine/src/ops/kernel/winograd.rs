//! The transforms of Winograd's minimal filtering, F(2×2, 3×3) and F(4×4, 3×3): tiles of 2 or 4 outputs
//! a side are made from patches of 4 or 6 values a side with 16 products in place of 36, or 36 in place
//! of 144.
//!
//! Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015
//! (<https://arxiv.org/abs/1509.09308>), sections 4.1 and 4.3.

use super::element::Element;
use super::panels::{PANEL, Panels};
use super::product::Finish;
use super::simd::Simd;
use super::tile::{Piece, Strip};
use crate::ops::shared::Shared;

/// Panels of outputs whose sums are kept until they are transformed.
pub(in crate::ops) const GROUP: usize = 3;

/// Of a tile of 2 outputs (`N` = 4) or 4 (`N` = 6): the weights' transform G, by line.
pub(in crate::ops) fn weight_transform(n: usize) -> &'static [[f64; 3]] {
    const SMALL: [[f64; 3]; 4] = [[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]];
    const SIXTH: f64 = 1.0 / 6.0;
    const LARGE: [[f64; 3]; 6] = [
        [0.25, 0.0, 0.0],
        [-SIXTH, -SIXTH, -SIXTH],
        [-SIXTH, SIXTH, -SIXTH],
        [SIXTH / 4.0, SIXTH / 2.0, SIXTH],
        [SIXTH / 4.0, -SIXTH / 2.0, SIXTH],
        [0.0, 0.0, 1.0],
    ];
    if n == 4 { &SMALL } else { &LARGE }
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

/// A transformed patch's values: (N · N, tiles, channels) from an area of (down · (N - 2) + 2) lines of
/// (across · (N - 2) + 2) pixels.
#[inline(always)]
pub(in crate::ops) fn transform_patches<S: Simd, O: Element, const N: usize>(
    simd: S,
    area: &[O],
    channels: usize,
    tiles: Tiles,
    to: &mut [O],
) {
    let step = N - 2;
    let width = tiles.across * step + 2;
    assert_eq!(area.len(), (tiles.down * step + 2) * width * channels, "size of an area");
    assert_eq!(to.len(), N * N * tiles.count() * channels, "size of transformed patches");
    for tile in 0..tiles.count() {
        let corner = (tile / tiles.across * step * width + tile % tiles.across * step) * channels;
        for channel in (0..channels).step_by(S::LANES) {
            let count = S::LANES.min(channels - channel);
            let mut lines = [[simd.splat(0.0); N]; N];
            for (y, line) in lines.iter_mut().enumerate() {
                let values: [S::F32; N] = std::array::from_fn(|x| {
                    let from = corner + (y * width + x) * channels + channel;
                    // SAFETY: the last patch's last pixel is the area's last one.
                    unsafe { some(simd, area.as_ptr().add(from), count) }
                });
                *line = patch_line(simd, values);
            }
            for x in 0..N {
                let column = patch_line(simd, column(&lines, x));
                for (y, value) in column.into_iter().enumerate() {
                    let at = ((y * N + x) * tiles.count() + tile) * channels + channel;
                    // SAFETY: within (N · N, tiles, channels).
                    unsafe {
                        let to = to.as_mut_ptr().add(at);
                        if count == S::LANES {
                            O::store(simd, to, value)
                        } else {
                            O::store_some(simd, to, value, count)
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

/// # Safety
/// `from` must be readable for `count` values, at most a vector's.
#[inline(always)]
unsafe fn some<S: Simd, E: Element>(simd: S, from: *const E, count: usize) -> S::F32 {
    // SAFETY: the caller's promise.
    unsafe { if count == S::LANES { E::load(simd, from) } else { E::load_some(simd, from, count) } }
}

/// The products of all tiles with `count` panels from `panel` on: (N · N, tiles, count · PANEL) sums.
#[inline(always)]
pub(in crate::ops) fn multiply<S: Simd, O: Element>(
    simd: S,
    patches: &[O],
    tiles: usize,
    weights: &[Panels],
    (panel, count): (usize, usize),
    sums: &mut [f32],
) {
    let inner = weights[0].inner();
    assert_eq!(patches.len(), weights.len() * tiles * inner, "size of transformed patches");
    assert!(sums.len() >= weights.len() * tiles * count * PANEL, "room for the sums");
    let pieces = [Piece { left: 0, first: 0, steps: inner / O::DEPTH }];
    let per_panel = PANEL / S::LANES;
    let width = (count * per_panel).div_ceil((count * per_panel).div_ceil(S::TILE.1));
    for (place, weight) in weights.iter().enumerate() {
        assert!(weight.inner() == inner && (panel + count) * PANEL < weight.outputs() + PANEL, "panels of a product");
        for vector in (0..count * per_panel).step_by(width) {
            let strip = Strip {
                left: patches[place * tiles * inner..].as_ptr(),
                left_stride: inner,
                positions: tiles,
                right: weight.values::<O>().as_ptr(),
                inner,
                vector: panel * per_panel + vector,
                vectors: width.min(count * per_panel - vector),
                pieces: &pieces,
                sums: sums[place * tiles * count * PANEL + vector * S::LANES..].as_mut_ptr(),
                sums_stride: count * PANEL,
                go_on: false,
            };
            // SAFETY: the asserts above saw to the patches, the weights and the room for the sums.
            unsafe {
                strip.run(simd);
            }
        }
    }
}

/// Where a block's outputs go.
#[derive(Clone, Copy, Debug)]
pub(in crate::ops) struct Window {
    pub row: usize,
    /// The first tile's first output.
    pub top: usize,
    pub left: usize,
    /// The whole map.
    pub height: usize,
    pub width: usize,
    pub outputs: usize,
}

/// Transforms the sums of a group of panels into outputs, finishes and stores them.
#[inline(always)]
pub(in crate::ops) fn transform_outputs<S: Simd, E: Element, const N: usize>(
    simd: S,
    sums: &[f32],
    tiles: Tiles,
    (panel, count): (usize, usize),
    window: Window,
    finish: &Finish<'_, E>,
    output: &Shared<'_, E>,
) {
    let step = N - 2;
    let Window { row, top, left, height, width, outputs } = window;
    assert!((row + 1) * height * width * outputs <= output.len(), "the output is too short");
    assert!(sums.len() >= N * N * tiles.count() * count * PANEL, "room for the sums");
    assert_eq!(finish.outputs, outputs, "outputs of a product");
    finish.check(row, output.len());
    for tile in 0..tiles.count() {
        let (y, x) = (top + tile / tiles.across * step, left + tile % tiles.across * step);
        for vector in 0..count * PANEL / S::LANES {
            let first = panel * PANEL + vector * S::LANES;
            if first >= outputs {
                break;
            }
            let lanes = S::LANES.min(outputs - first);
            let mut lines = [[simd.splat(0.0); 4]; N];
            for (place, line) in lines.iter_mut().enumerate() {
                let values: [S::F32; N] = std::array::from_fn(|at| {
                    let from = ((place * N + at) * tiles.count() + tile) * count * PANEL + vector * S::LANES;
                    // SAFETY: within (N · N, tiles, count · PANEL).
                    unsafe { simd.load(sums.as_ptr().add(from)) }
                });
                *line = output_line(simd, values);
            }
            for across in 0..step.min(width - x) {
                let column = output_line(simd, column(&lines, across));
                for (down, value) in column.into_iter().enumerate().take(step.min(height - y)) {
                    let target = ((row * height + y + down) * width + x + across) * outputs;
                    // SAFETY: within this row's map, and `check` saw to what is added.
                    unsafe {
                        finish.store(simd, value, output.at(target + first), (row, first, target, lanes));
                    }
                }
            }
        }
    }
}
