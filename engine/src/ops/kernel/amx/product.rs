//! The sums of panels at all positions of some lines, by tiles.

use std::ops::Range;

use half::bf16;

use super::{LEFT, PAIR, RIGHT, SIDE, SUMS, Shapes, Tiles};
use crate::ops::kernel::panels::PANEL;
use crate::ops::kernel::product::Line;
use crate::ops::kernel::tile::Piece;

/// Steps of a chunk. Its weights (20 KiB for a group) stay in the first-level cache while all positions
/// pass, even where two threads share a core; and it is long enough that loading and storing the sums
/// (about 100 cycles each time, beside 640 of multiplying) is hidden.
pub(in super::super) const CHUNK_STEPS: usize = 10 * SIDE;

/// What the sums of some panels at all positions are computed from, and where they go.
pub(in super::super) struct Product<'a> {
    pub left: *const bf16,
    /// Values from one position's window to the next one's.
    pub left_stride: usize,
    pub lines: &'a [Line],
    /// The first panel.
    pub right: *const bf16,
    /// Values of a panel.
    pub panel: usize,
    pub panels: usize,
    /// (positions, panels, [`PANEL`]).
    pub sums: *mut f32,
}

/// Where a tile of positions starts.
#[derive(Clone, Copy)]
struct Start {
    left: *const u8,
    sums: *mut u8,
}

/// Part of the sums of one or two panels: tiles of one depth in pieces of one chunk.
#[derive(Clone, Copy)]
struct Pass<'a> {
    /// The first panel, counted from the product's first.
    panel: usize,
    /// Whether there is a second one.
    pair: bool,
    pieces: &'a [Piece],
    depth: usize,
    /// Whether to go on from what the sums hold.
    go_on: bool,
}

impl Product<'_> {
    /// Computes the sums of these `chunks` of the inner positions, going on from what the sums hold or anew.
    ///
    /// # Safety
    /// All windows, panels and sums must be there, and the sums nobody else's.
    pub unsafe fn run<T: Tiles>(&self, unit: &mut T, chunks: &[&[Piece]], go_on: bool) {
        let all_rows = sizes(self.lines.iter().map(|line| line.positions));
        let mut shape = None;
        let mut go_on = go_on;
        for pieces in chunks {
            for depth in sizes(pieces.iter().map(|piece| piece.steps)) {
                for panel in (0..self.panels).step_by(2) {
                    let pass = Pass { panel, pair: panel + 1 < self.panels, pieces, depth, go_on };
                    for rows in all_rows.clone() {
                        if shape != Some((rows, depth)) {
                            unit.configure(&Shapes::new(rows, depth));
                            shape = Some((rows, depth));
                        }
                        // SAFETY: the caller's promise.
                        unsafe { self.pass(unit, rows, pass) };
                    }
                }
                go_on = true;
            }
        }
    }

    /// Adds to the sums of all tiles with `rows` positions.
    ///
    /// # Safety
    /// As [`Product::run`]; the unit must be configured for these rows and this depth.
    unsafe fn pass<T: Tiles>(&self, unit: &mut T, rows: usize, pass: Pass<'_>) {
        let mut ahead = self.ahead(pass);
        let mut starts = self.starts(rows, pass.panel);
        while let Some(first) = starts.next() {
            let second = starts.next();
            ahead.go(unit);
            // SAFETY: the caller's promise.
            unsafe {
                match (second, pass.pair) {
                    (Some(second), true) => self.tiles::<T, 2, 2>(unit, [first, second], pass),
                    (Some(second), false) => self.tiles::<T, 2, 1>(unit, [first, second], pass),
                    (None, true) => self.tiles::<T, 1, 2>(unit, [first, first], pass),
                    (None, false) => self.tiles::<T, 1, 1>(unit, [first, first], pass),
                }
            }
        }
    }

    /// The tiles of `rows` positions that the lines are cut into. Neighbours may be of different lines.
    fn starts(&self, rows: usize, panel: usize) -> impl Iterator<Item = Start> {
        let (left, left_stride) = (self.left, self.left_stride);
        let (sums, sums_stride) = (self.sums.wrapping_add(panel * PANEL), self.panels * PANEL);
        let mut before = 0;
        self.lines.iter().flat_map(move |line| {
            let first = before;
            before += line.positions;
            parts(line.positions, rows).step_by(SIDE).map(move |position| Start {
                left: left.wrapping_add(line.left + position * left_stride).cast(),
                sums: sums.wrapping_add((first + position) * sums_stride).cast(),
            })
        })
    }

    /// The weights that are needed after those of `pass`: other panels', the next chunk's or, as far as
    /// this product knows, the following panels'.
    fn ahead(&self, pass: Pass<'_>) -> Ahead {
        let of_panel = |step: usize| step * PANEL * PAIR;
        let start = of_panel(pass.pieces.first().map_or(0, |piece| piece.first));
        let end = of_panel(pass.pieces.last().map_or(0, |piece| piece.first + piece.steps));
        let next = if pass.panel + 2 < self.panels {
            (pass.panel + 2) * self.panel + start
        } else if end < self.panel {
            end
        } else {
            self.panels * self.panel
        };
        let panels = [next, next + self.panel].map(|at| self.right.wrapping_add(at).cast());
        let steps: usize = pass.pieces.iter().map(|piece| piece.steps).sum();
        let positions: usize = self.lines.iter().map(|line| line.positions).sum();
        Ahead { panels, steps, each: steps.div_ceil((positions / (2 * SIDE)).max(1)) }
    }

    /// Adds to the sums of `M` tiles of positions times `N` panels.
    ///
    /// # Safety
    /// As [`Product::pass`]; the tiles must be of this product.
    #[inline(always)]
    unsafe fn tiles<T: Tiles, const M: usize, const N: usize>(&self, unit: &mut T, starts: [Start; 2], pass: Pass<'_>) {
        /// Bytes of a pair of inner positions of all outputs of a panel.
        const PAIRS: usize = PANEL * PAIR * size_of::<bf16>();
        let left_stride = self.left_stride * size_of::<bf16>();
        let first = self.right.wrapping_add(pass.panel * self.panel);
        let right: [*const u8; 2] = [first.cast(), first.wrapping_add(self.panel).cast()];
        // SAFETY: the caller's promise; every step is within a piece.
        unsafe {
            self.begin::<T, M, N>(unit, starts, pass.go_on);
            for piece in pass.pieces {
                let left = starts.map(|start| start.left.wrapping_add(piece.left * size_of::<bf16>()));
                let right = right.map(|right| right.wrapping_add(piece.first * PAIRS));
                for step in parts(piece.steps, pass.depth).step_by(SIDE) {
                    let left = left.map(|left| left.wrapping_add(step * PAIR * size_of::<bf16>()));
                    let right = right.map(|right| right.wrapping_add(step * PAIRS));
                    unit.load::<RIGHT>(right[0], PAIRS);
                    unit.load::<LEFT>(left[0], left_stride);
                    unit.multiply::<SUMS, LEFT, RIGHT>();
                    if N == 2 {
                        unit.load::<{ RIGHT + 1 }>(right[1], PAIRS);
                        unit.multiply::<{ SUMS + 1 }, LEFT, { RIGHT + 1 }>();
                    }
                    if M == 2 {
                        unit.load::<{ LEFT + 1 }>(left[1], left_stride);
                        unit.multiply::<{ SUMS + 2 }, { LEFT + 1 }, RIGHT>();
                    }
                    if M == 2 && N == 2 {
                        unit.multiply::<{ SUMS + 3 }, { LEFT + 1 }, { RIGHT + 1 }>();
                    }
                }
            }
            self.end::<T, M, N>(unit, starts);
        }
    }

    /// Sums from where they were left, or zeros.
    ///
    /// # Safety
    /// As [`Product::tiles`].
    #[inline(always)]
    unsafe fn begin<T: Tiles, const M: usize, const N: usize>(&self, unit: &mut T, starts: [Start; 2], go_on: bool) {
        if !go_on {
            unit.zero::<SUMS>();
            unit.zero::<{ SUMS + 1 }>();
            unit.zero::<{ SUMS + 2 }>();
            unit.zero::<{ SUMS + 3 }>();
            return;
        }
        let (stride, beside) = self.sums_bytes();
        // SAFETY: the caller's promise.
        unsafe {
            unit.load::<SUMS>(starts[0].sums, stride);
            if N == 2 {
                unit.load::<{ SUMS + 1 }>(starts[0].sums.wrapping_add(beside), stride);
            }
            if M == 2 {
                unit.load::<{ SUMS + 2 }>(starts[1].sums, stride);
            }
            if M == 2 && N == 2 {
                unit.load::<{ SUMS + 3 }>(starts[1].sums.wrapping_add(beside), stride);
            }
        }
    }

    /// # Safety
    /// As [`Product::tiles`].
    #[inline(always)]
    unsafe fn end<T: Tiles, const M: usize, const N: usize>(&self, unit: &mut T, starts: [Start; 2]) {
        let (stride, beside) = self.sums_bytes();
        // SAFETY: the caller's promise.
        unsafe {
            unit.store::<SUMS>(starts[0].sums, stride);
            if N == 2 {
                unit.store::<{ SUMS + 1 }>(starts[0].sums.wrapping_add(beside), stride);
            }
            if M == 2 {
                unit.store::<{ SUMS + 2 }>(starts[1].sums, stride);
            }
            if M == 2 && N == 2 {
                unit.store::<{ SUMS + 3 }>(starts[1].sums.wrapping_add(beside), stride);
            }
        }
    }

    /// Bytes from one position's sums to the next one's, and from one panel's to the other's.
    #[inline(always)]
    fn sums_bytes(&self) -> (usize, usize) {
        (self.panels * PANEL * size_of::<f32>(), PANEL * size_of::<f32>())
    }
}

/// Weights that are fetched into the second-level cache bit by bit: a chunk's own come from memory only
/// once per group, but then each of their pages would be waited for.
struct Ahead {
    /// Both panels' next step.
    panels: [*const u8; 2],
    /// How many steps are left, and how many to fetch at a time.
    steps: usize,
    each: usize,
}

impl Ahead {
    #[inline(always)]
    fn go<T: Tiles>(&mut self, unit: &T) {
        const PAIRS: usize = PANEL * PAIR * size_of::<bf16>();
        let steps = self.each.min(self.steps);
        self.steps -= steps;
        for panel in &mut self.panels {
            for _ in 0..steps {
                unit.prefetch(*panel);
                *panel = panel.wrapping_add(PAIRS);
            }
        }
    }
}

/// The sizes of the parts that `lengths` fall into when cut by [`SIDE`], each once, largest first.
fn sizes(lengths: impl Iterator<Item = usize>) -> impl Iterator<Item = usize> + Clone {
    let found = lengths.fold(0u32, |found, len| found | u32::from(len >= SIDE) << SIDE | 1 << (len % SIDE));
    (1..=SIDE).rev().filter(move |size| found >> size & 1 == 1)
}

/// The stretch of `len` that falls into parts of `size`.
#[inline(always)]
fn parts(len: usize, size: usize) -> Range<usize> {
    let whole = len - len % SIDE;
    if size == SIDE {
        0..whole
    } else if len - whole == size {
        whole..len
    } else {
        0..0
    }
}
