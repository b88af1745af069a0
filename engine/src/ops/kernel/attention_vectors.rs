//! The products of attention by vectors: a few keys, or a few columns of the values, times the queries in the
//! lanes. What a product yields stays in registers until it is a probability.

use std::ops::Range;

use super::attention_group::{Group, Products, block_keys};
use super::attention_probability::Probability;
use super::attention_softmax::Scores;
use super::simd::Simd;

/// Products from registers.
pub(super) struct ByVectors;

impl<E: Probability> Products<E> for ByVectors {
    #[inline(always)]
    fn scores<S: Simd, const V: usize>(&mut self, group: &mut Group<S, E, V>, keys: Range<usize>, then: Scores) {
        let (start, end) = (keys.start, keys.end);
        let mut key = start;
        if E::tile::<S>().0 == 8 {
            while key + 8 <= end {
                score_tile::<8, S, E, V>(group, key, start, then);
                key += 8;
            }
        } else if E::tile::<S>().0 == 6 {
            while key + 6 <= end {
                score_tile::<6, S, E, V>(group, key, start, then);
                key += 6;
            }
        }
        while key + 4 <= end {
            score_tile::<4, S, E, V>(group, key, start, then);
            key += 4;
        }
        if key + 2 <= end {
            score_tile::<2, S, E, V>(group, key, start, then);
            key += 2;
        }
        if key < end {
            score_tile::<1, S, E, V>(group, key, start, then);
        }
    }

    #[inline(always)]
    fn outputs<S: Simd, const V: usize>(&mut self, group: &mut Group<S, E, V>, keys: Range<usize>) {
        let (width, mut line) = (group.head.width, 0);
        if E::tile::<S>().0 == 8 {
            while line + 8 <= width {
                output_tile::<8, S, E, V>(group, line, &keys);
                line += 8;
            }
        } else if E::tile::<S>().0 == 6 {
            while line + 6 <= width {
                output_tile::<6, S, E, V>(group, line, &keys);
                line += 6;
            }
        }
        while line + 4 <= width {
            output_tile::<4, S, E, V>(group, line, &keys);
            line += 4;
        }
        if line + 2 <= width {
            output_tile::<2, S, E, V>(group, line, &keys);
            line += 2;
        }
        if line < width {
            output_tile::<1, S, E, V>(group, line, &keys);
        }
    }
}

#[inline(always)]
fn score_tile<const M: usize, S: Simd, E: Probability, const V: usize>(
    group: &mut Group<S, E, V>,
    key: usize,
    start: usize,
    then: Scores,
) {
    let (simd, head) = (group.simd, group.head);
    debug_assert!(key + M <= head.count);
    // SAFETY: `new` saw to the keys and the lanes.
    let scores = unsafe {
        let keys = head.keys.as_ptr().add(key * head.depth);
        let zeros = [[simd.splat(0.0); V]; M];
        products::<S, E, M, V>(simd, zeros, keys, head.depth, group.lanes.as_ptr(), head.depth / E::DEPTH)
    };
    group.take(key, start, then, scores);
}

#[inline(always)]
fn output_tile<const M: usize, S: Simd, E: Probability, const V: usize>(
    group: &mut Group<S, E, V>,
    line: usize,
    keys: &Range<usize>,
) {
    let (simd, head, lanes) = (group.simd, group.head, V * S::LANES);
    debug_assert!(line + M <= head.lines && keys.end <= head.count);
    let mut totals = [[simd.splat(0.0); V]; M];
    // SAFETY: `new` saw to the values, the block and the outputs.
    unsafe {
        let outputs = group.outputs.as_mut_ptr().add(line * lanes);
        let at = |line: usize, vector: usize| outputs.add(line * lanes + vector * S::LANES);
        if keys.start > 0 {
            for (line, totals) in totals.iter_mut().enumerate() {
                for (vector, total) in totals.iter_mut().enumerate() {
                    *total = simd.load(at(line, vector));
                }
            }
        }
        let stride = block_keys::<E>();
        let values = head.values.as_ptr().add(keys.start * head.lines + line * stride);
        let totals =
            products::<S, E, M, V>(simd, totals, values, stride, group.block.as_ptr(), keys.len().div_ceil(E::DEPTH));
        for (line, totals) in totals.iter().enumerate() {
            for (vector, total) in totals.iter().enumerate() {
                simd.store(at(line, vector), *total);
            }
        }
    }
}

/// `totals` + left (`M` lines, `stride` apart) · right (`steps`, `V` vectors).
/// # Safety
/// Both must be there.
#[inline(always)]
unsafe fn products<S: Simd, E: Probability, const M: usize, const V: usize>(
    simd: S,
    mut totals: [[S::F32; V]; M],
    left: *const E,
    stride: usize,
    right: *const E,
    steps: usize,
) -> [[S::F32; V]; M] {
    // SAFETY: the caller's promise.
    unsafe {
        for step in 0..steps {
            let right = right.add(step * V * S::LANES * E::DEPTH);
            let factors: [E::Factor<S>; V] =
                std::array::from_fn(|vector| E::load_factor(simd, right.add(vector * S::LANES * E::DEPTH)));
            for (line, totals) in totals.iter_mut().enumerate() {
                let value = E::splat_factor(simd, left.add(line * stride + step * E::DEPTH));
                for (total, factor) in totals.iter_mut().zip(factors) {
                    *total = E::multiply_add(simd, *total, value, factor);
                }
            }
        }
    }
    totals
}
