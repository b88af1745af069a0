//! A few queries of one head against all its keys.
//!
//! Queries lie in the lanes and keys go by line after line, so that the softmax never looks across a
//! vector, and any width of a head fills whole vectors. For a block of keys at a time, tiles of scores
//! become probabilities while they are still in registers; then these are multiplied with the values.
//!
//! What a query's scores are taken relative to is its largest score among the first few keys, not the
//! largest so far: floating-point numbers are as exact at 2^60 as at 1, so only where the sum of a block
//! grows beyond that is the block computed again relative to its own largest score and what came before
//! scaled down. Each query does so by its own numbers alone.

use std::ops::Range;

use super::attention_pack::{Lines, into_lanes, out_of_lanes};
use super::attention_probability::Probability;
use super::attention_softmax::Scores;
use super::element::Element;
use super::simd::Simd;
use crate::ops::shared::Shared;

/// Keys of a block, whose probabilities stay in the nearest cache: 256 bytes in a line of packed values.
pub(super) const fn block_keys<E>() -> usize {
    256 / size_of::<E>()
}

/// The largest sum of a block that is let pass.
const HIGH: f32 = (1u64 << 60) as f32;

/// One head of one row, packed.
#[derive(Clone, Copy)]
pub(super) struct Head<'a, E> {
    /// (keys, depth), perhaps with zeros behind the last key.
    pub keys: &'a [E],
    /// (blocks of keys, lines, [`block_keys`]), zeros behind the last key.
    pub values: &'a [E],
    pub count: usize,
    pub width: usize,
    /// The width with the zeros behind it in a key,
    pub depth: usize,
    /// and in the values.
    pub lines: usize,
    /// What makes scores exponents of 2.
    pub scale: f32,
    pub causal: bool,
    /// What is added to a score, by how far the query lies behind the last key; a whole group's behind the last
    /// query.
    pub distances: Option<&'a [f32]>,
}

/// Neighbouring queries of one head, and where their outputs go: to the same places.
#[derive(Clone, Copy)]
pub(super) struct Queries<'a, E> {
    pub from: &'a [E],
    pub to: &'a Shared<'a, E>,
    pub lines: Lines,
    /// The first one's place in its row.
    pub first: usize,
}

/// Queries of the next group where `left` are left: as many as there is room for, or in the end a vector.
pub(super) fn group_queries<S: Simd, E: Element>(left: usize) -> usize {
    let (_, vectors) = E::tile::<S>();
    left.min(if left > (vectors - 1) * S::LANES { vectors * S::LANES } else { S::LANES })
}

/// Values of scratch that a group of `queries` needs: in the head's format, and in `f32`.
pub(super) fn scratch_len<E: Probability>(depth: usize, lines: usize, queries: usize) -> (usize, usize) {
    ((block_keys::<E>() + depth) * queries, lines * queries)
}

/// Who computes a group's two products.
pub(super) trait Products<E: Probability> {
    /// Computes the scores of `keys`, within a block, and has the group [take](Group::take) them.
    fn scores<S: Simd, const V: usize>(&mut self, group: &mut Group<S, E, V>, keys: Range<usize>, then: Scores);
    /// Adds to the outputs the values of `keys`, within a block, as the block's probabilities weigh them.
    fn outputs<S: Simd, const V: usize>(&mut self, group: &mut Group<S, E, V>, keys: Range<usize>);
}

/// # Safety
/// Nobody else may be using the places that the outputs go to.
#[inline(always)]
pub(super) unsafe fn attend<S: Simd, E: Probability>(
    simd: S,
    products: &mut impl Products<E>,
    head: Head<E>,
    queries: Queries<E>,
    (narrow, wide): (&mut [E], &mut [f32]),
) {
    // SAFETY: the caller's promise.
    unsafe {
        match (queries.lines.count.div_ceil(S::LANES), E::tile::<S>().1) {
            (1, _) => Group::<S, E, 1>::new(simd, head, queries, narrow, wide).run(products),
            (_, 2) => Group::<S, E, 2>::new(simd, head, queries, narrow, wide).run(products),
            _ => Group::<S, E, 3>::new(simd, head, queries, narrow, wide).run(products),
        }
    }
}

/// `V` vectors of queries at work.
pub(super) struct Group<'a, S: Simd, E, const V: usize> {
    pub(super) simd: S,
    pub(super) head: Head<'a, E>,
    pub(super) queries: Queries<'a, E>,
    /// (depth / DEPTH, lanes, DEPTH): the queries, zeros behind them, and their outputs in the end.
    pub(super) lanes: &'a mut [E],
    /// (keys / DEPTH, lanes, DEPTH): a block's probabilities.
    pub(super) block: &'a mut [E],
    /// (lines, lanes): what the probabilities so far weigh the values to.
    pub(super) outputs: &'a mut [f32],
    /// What a query's exponents are taken relative to, negative.
    pub(super) below: [S::F32; V],
    /// The sum of its probabilities so far,
    total: [S::F32; V],
    /// and of a block's.
    pub(super) sum: [S::F32; V],
}

impl<'a, S: Simd, E: Probability, const V: usize> Group<'a, S, E, V> {
    pub(super) const LANES: usize = V * S::LANES;

    /// Checks what the tiles will touch.
    #[inline(always)]
    fn new(simd: S, head: Head<'a, E>, queries: Queries<'a, E>, narrow: &'a mut [E], wide: &'a mut [f32]) -> Self {
        let Head { keys, values, count, width, depth, lines, .. } = head;
        assert!(depth >= width && depth.is_multiple_of(E::DEPTH) && keys.len() >= count * depth, "packed keys");
        let blocks = count.next_multiple_of(block_keys::<E>());
        assert!(lines >= width && values.len() == blocks * lines, "packed values");
        let behind = queries.first + Self::LANES + count - 1;
        assert!(head.distances.is_none_or(|distances| behind <= distances.len()), "distances of keys");
        assert!(queries.lines.width == width && queries.lines.count <= Self::LANES, "queries of a group");
        let (lanes, block) = narrow.split_at_mut(depth * Self::LANES);
        let (block, outputs) = (&mut block[..block_keys::<E>() * Self::LANES], &mut wide[..lines * Self::LANES]);
        let zeros = [simd.splat(0.0); V];
        Self { simd, head, queries, lanes, block, outputs, below: zeros, total: zeros, sum: zeros }
    }

    /// # Safety
    /// As [`attend`].
    #[inline(always)]
    unsafe fn run(&mut self, products: &mut impl Products<E>) {
        let Lines { count: queries, .. } = self.queries.lines;
        // Nobody sees the keys behind the last query.
        let most = if self.head.causal { self.queries.first + queries } else { usize::MAX };
        let count = self.head.count.min(most);
        into_lanes(self.queries.from, self.queries.lines, self.lanes, Self::LANES);
        for start in (0..count).step_by(block_keys::<E>()) {
            let end = count.min(start + block_keys::<E>());
            self.probabilities(products, start..end);
            for (total, sum) in self.total.iter_mut().zip(self.sum) {
                *total = self.simd.add(*total, sum);
            }
            products.outputs(self, start..end);
        }
        self.divide();
        // SAFETY: the caller's promise.
        unsafe { out_of_lanes(self.lanes, Self::LANES, self.queries.to, self.queries.lines) }
    }

    /// Makes `block` and `sum` those of `keys`.
    #[inline(always)]
    fn probabilities(&mut self, products: &mut impl Products<E>, keys: Range<usize>) {
        let simd = self.simd;
        let mut then = if keys.start == 0 { Scores::Start } else { Scores::Weigh };
        let mut sums = self.sum;
        loop {
            self.sum = [simd.splat(if then == Scores::Measure { f32::NEG_INFINITY } else { 0.0 }); V];
            products.scores(self, keys.clone(), then);
            let highest = self.sum[1..].iter().fold(self.sum[0], |a, b| simd.max(a, *b));
            then = match then {
                Scores::Start | Scores::Weigh if simd.largest(highest) > HIGH => Scores::Measure,
                Scores::Measure => Scores::WeighAgain,
                _ => break,
            };
            match then {
                Scores::Measure => sums = self.sum,
                _ => self.raise(sums, keys.start > 0),
            }
        }
    }

    /// Has the queries whose `sums` were too large start from the largest scores in `sum`, and scales down
    /// what they have so far.
    #[inline(always)]
    fn raise(&mut self, sums: [S::F32; V], go_on: bool) {
        let simd = self.simd;
        for vector in 0..V {
            let [mut sum, mut largest, mut below] = [[0f32; 16]; 3];
            // SAFETY: no vector has more than 16 lanes.
            let [factor] = unsafe {
                simd.store(sum.as_mut_ptr(), sums[vector]);
                simd.store(largest.as_mut_ptr(), simd.mul(self.sum[vector], simd.splat(self.head.scale)));
                simd.store(below.as_mut_ptr(), self.below[vector]);
                let old = below;
                for lane in 0..S::LANES {
                    below[lane] = if sum[lane] > HIGH { -largest[lane] } else { below[lane] };
                }
                self.below[vector] = simd.load(below.as_ptr());
                // For the others this is 2^0, exactly 1.
                f32::power(simd, [simd.sub(self.below[vector], simd.load(old.as_ptr()))])
            };
            self.total[vector] = simd.mul(self.total[vector], factor);
            if go_on {
                for outputs in self.outputs.chunks_exact_mut(Self::LANES) {
                    let outputs = outputs[vector * S::LANES..][..S::LANES].as_mut_ptr();
                    // SAFETY: a whole vector.
                    unsafe { simd.store(outputs, simd.mul(simd.load(outputs), factor)) }
                }
            }
        }
    }

    /// Makes `lanes` the outputs.
    #[inline(always)]
    fn divide(&mut self) {
        let (simd, width) = (self.simd, self.head.width);
        for vector in 0..V {
            let share = simd.reciprocal(self.total[vector]);
            for line in (0..width).step_by(E::DEPTH) {
                // SAFETY: `new` saw to both; the line behind an odd width repeats the last one.
                unsafe {
                    let output = |line: usize| {
                        let at = line.min(width - 1) * Self::LANES + vector * S::LANES;
                        simd.mul(simd.load(self.outputs.as_ptr().add(at)), share)
                    };
                    let (first, second) = (output(line), output(line + E::DEPTH - 1));
                    let to = self.lanes.as_mut_ptr().add(line * Self::LANES + vector * S::LANES * E::DEPTH);
                    E::store_line(simd, to, first, second);
                }
            }
        }
    }
}
