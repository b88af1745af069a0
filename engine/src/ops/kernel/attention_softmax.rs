//! What becomes of scores: probabilities, and their sums.

use super::attention_group::{Group, block_keys};
use super::attention_probability::Probability;
use super::simd::Simd;

/// What becomes of a block of scores.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Scores {
    /// Probabilities, relative to the largest of the first few keys.
    Start,
    /// Probabilities.
    Weigh,
    /// `sum` becomes their largest.
    Measure,
    /// Probabilities; their sums are fine.
    WeighAgain,
}

impl<S: Simd, E: Probability, const V: usize> Group<'_, S, E, V> {
    /// Takes the scores of `M` keys from `key` on, of a block of keys that starts at `start`.
    #[inline(always)]
    pub(super) fn take<const M: usize>(
        &mut self,
        key: usize,
        start: usize,
        then: Scores,
        mut scores: [[S::F32; V]; M],
    ) {
        let (simd, head) = (self.simd, self.head);
        debug_assert!(key + M <= head.count && key + M - start <= block_keys::<E>());
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
}
