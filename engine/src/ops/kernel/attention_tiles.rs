//! The innermost loops of attention: a few keys, or a few columns of the values, times the queries in the
//! lanes. What a product yields stays in registers until it is a probability.

use super::attention_group::{Group, Scores, block_keys};
use super::attention_probability::Probability;
use super::simd::Simd;

impl<S: Simd, E: Probability, const V: usize> Group<'_, S, E, V> {
    /// The scores of the keys from `start` to `end`, and what becomes of them.
    #[inline(always)]
    pub(super) fn scores(&mut self, start: usize, end: usize, then: Scores) {
        let mut key = start;
        if S::TILE.0 == 8 {
            while key + 8 <= end {
                self.score_tile::<8>(key, start, then);
                key += 8;
            }
        } else {
            while key + 6 <= end {
                self.score_tile::<6>(key, start, then);
                key += 6;
            }
        }
        while key + 4 <= end {
            self.score_tile::<4>(key, start, then);
            key += 4;
        }
        if key + 2 <= end {
            self.score_tile::<2>(key, start, then);
            key += 2;
        }
        if key < end {
            self.score_tile::<1>(key, start, then);
        }
    }

    #[inline(always)]
    fn score_tile<const M: usize>(&mut self, key: usize, start: usize, then: Scores) {
        let (simd, head) = (self.simd, self.head);
        debug_assert!(key + M <= head.count && key + M - start <= block_keys::<E>());
        // SAFETY: `new` saw to the keys and the lanes.
        let mut scores = unsafe {
            let keys = head.keys.as_ptr().add(key * head.depth);
            let zeros = [[simd.splat(0.0); V]; M];
            products::<S, E, M, V>(simd, zeros, keys, head.depth, self.lanes.as_ptr(), head.depth / E::DEPTH)
        };
        if let Some(distances) = head.distances {
            self.add_distances(key, distances, &mut scores);
        }
        if head.causal && key + M > self.queries.first + 1 {
            self.hide(key, &mut scores);
        }
        if then == Scores::Measure || then == Scores::Start && key == start {
            let mut largest = if then == Scores::Measure { self.sum } else { scores[0] };
            for scores in &scores {
                for (largest, score) in largest.iter_mut().zip(scores) {
                    *largest = simd.max(*largest, *score);
                }
            }
            if then == Scores::Measure {
                self.sum = largest;
                return;
            }
            for (below, largest) in self.below.iter_mut().zip(largest) {
                *below = simd.mul(largest, simd.splat(-head.scale));
            }
        }
        // SAFETY: `new` saw to the room of a block.
        unsafe {
            let to = self.block.as_mut_ptr().add((key - start) * Self::LANES);
            let mut sum = self.sum;
            // One by one, with constant places: only so do the scores stay in registers.
            self.weigh(&scores, 0, &mut sum, to);
            self.weigh(&scores, 1, &mut sum, to);
            self.weigh(&scores, 2, &mut sum, to);
            self.weigh(&scores, 3, &mut sum, to);
            self.weigh(&scores, 4, &mut sum, to);
            self.weigh(&scores, 5, &mut sum, to);
            self.weigh(&scores, 6, &mut sum, to);
            self.weigh(&scores, 7, &mut sum, to);
            self.sum = sum;
        }
    }

    /// Makes the `DEPTH` lines of scores from `line` on probabilities, if there are any.
    /// # Safety
    /// `to` must be the tile's place in the block.
    #[inline(always)]
    unsafe fn weigh<const M: usize>(&self, scores: &[[S::F32; V]; M], line: usize, sum: &mut [S::F32; V], to: *mut E) {
        if line >= M || !line.is_multiple_of(E::DEPTH) {
            return;
        }
        let (simd, scale) = (self.simd, self.simd.splat(self.head.scale));
        // Where a pair lacks its second key.
        let mut pair = [[simd.splat(0.0); V]; 2];
        for at in 0..E::DEPTH.min(M - line) {
            let mut exponents = scores[line + at];
            for (exponent, below) in exponents.iter_mut().zip(self.below) {
                *exponent = simd.mul_add(*exponent, scale, below);
            }
            pair[at] = E::power(simd, exponents);
            for (sum, probability) in sum.iter_mut().zip(pair[at]) {
                *sum = simd.add(*sum, probability);
            }
        }
        for (vector, (first, second)) in pair[0].into_iter().zip(pair[1]).enumerate() {
            // SAFETY: the caller's promise.
            unsafe {
                let to = to.add(line * Self::LANES + vector * S::LANES * E::DEPTH);
                E::store_line(simd, to, first, second);
            }
        }
    }

    /// Adds to the scores of the keys from `key` on what their distances from the queries give.
    #[inline(always)]
    fn add_distances<const M: usize>(&self, key: usize, distances: &[f32], scores: &mut [[S::F32; V]; M]) {
        for (line, scores) in scores.iter_mut().enumerate() {
            // The queries of a vector are ever farther from one key.
            let start = self.queries.first + self.head.count - 1 - (key + line);
            for (vector, score) in scores.iter_mut().enumerate() {
                // SAFETY: `new` saw to the distances of all queries of the group from the first key, and others are
                // nearer.
                unsafe {
                    let of_vector = distances.as_ptr().add(start + vector * S::LANES);
                    *score = self.simd.add(*score, self.simd.load(of_vector));
                }
            }
        }
    }

    /// Lowers the scores of keys that come after their queries.
    #[inline(always)]
    fn hide<const M: usize>(&self, key: usize, scores: &mut [[S::F32; V]; M]) {
        const PLACES: [f32; 16] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];
        /// Beyond any score, but finite.
        const FAR: f32 = 1e30;
        let simd = self.simd;
        // SAFETY: no vector has more than 16 lanes.
        let places = unsafe { simd.load(PLACES.as_ptr()) };
        for (line, scores) in scores.iter_mut().enumerate() {
            for (vector, score) in scores.iter_mut().enumerate() {
                let ahead = (self.queries.first + vector * S::LANES) as f32 - (key + line) as f32 + 0.5;
                let most = simd.mul(simd.add(places, simd.splat(ahead)), simd.splat(FAR));
                // In this order a NaN stays one.
                *score = simd.min(most, *score);
            }
        }
    }

    /// Adds the values of the keys from `start` to `end` as the block's probabilities weigh them.
    #[inline(always)]
    pub(super) fn multiply(&mut self, start: usize, end: usize) {
        let (width, mut line) = (self.head.width, 0);
        if S::TILE.0 == 8 {
            while line + 8 <= width {
                self.output_tile::<8>(line, start, end);
                line += 8;
            }
        } else {
            while line + 6 <= width {
                self.output_tile::<6>(line, start, end);
                line += 6;
            }
        }
        while line + 4 <= width {
            self.output_tile::<4>(line, start, end);
            line += 4;
        }
        if line + 2 <= width {
            self.output_tile::<2>(line, start, end);
            line += 2;
        }
        if line < width {
            self.output_tile::<1>(line, start, end);
        }
    }

    #[inline(always)]
    fn output_tile<const M: usize>(&mut self, line: usize, start: usize, end: usize) {
        debug_assert!(line + M <= self.head.width && end <= self.head.count);
        let simd = self.simd;
        let mut totals = [[simd.splat(0.0); V]; M];
        // SAFETY: `new` saw to the values, the block and the outputs.
        unsafe {
            let outputs = self.outputs.as_mut_ptr().add(line * Self::LANES);
            let at = |line: usize, vector: usize| outputs.add(line * Self::LANES + vector * S::LANES);
            if start > 0 {
                for (line, totals) in totals.iter_mut().enumerate() {
                    for (vector, total) in totals.iter_mut().enumerate() {
                        *total = simd.load(at(line, vector));
                    }
                }
            }
            let stride = block_keys::<E>();
            let values = self.head.values.as_ptr().add(start * self.head.width + line * stride);
            let steps = (end - start).div_ceil(E::DEPTH);
            let totals = products::<S, E, M, V>(simd, totals, values, stride, self.block.as_ptr(), steps);
            for (line, totals) in totals.iter().enumerate() {
                for (vector, total) in totals.iter().enumerate() {
                    simd.store(at(line, vector), *total);
                }
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
