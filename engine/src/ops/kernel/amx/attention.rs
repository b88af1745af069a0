//! The products of attention by tiles: sixteen keys, or sixteen columns of the values, times up to three times sixteen
//! queries. Packed heads and queries in the lanes are tiles as they lie.
//!
//! All tiles are full ones, so that their shapes are set once: setting them empties the unit. Heads are filled up
//! with zeros for that.

use std::ops::Range;

use super::{Hardware, PAIR, SIDE, Shapes, Tiles};
use crate::ops::buffer::Format;
use crate::ops::kernel::attention::Task;
use crate::ops::kernel::attention_group::{Group, Products, block_keys};
use crate::ops::kernel::attention_pack::GROUP;
use crate::ops::kernel::attention_probability::Probability;
use crate::ops::kernel::attention_softmax::Scores;
use crate::ops::kernel::simd::Simd;

/// What keys, their depth and the lines of values must be multiples of.
pub(in super::super) const ATTENTION_TILE: [usize; 3] = [SIDE, SIDE * PAIR, SIDE];

/// The first of up to three tiles of sums: one for each vector of queries.
const SUMS: u8 = 0;
/// The keys' or the values' tile.
const LEFT: u8 = 3;
/// The first of up to three tiles of queries, or of their probabilities.
const RIGHT: u8 = 4;
/// Bytes of a vector of sums, or of a row of any tile.
const ROW: usize = SIDE * size_of::<f32>();

/// The scores of a tile's keys, (keys, lanes), in whole cache lines.
#[repr(align(64))]
struct Room([f32; SIDE * GROUP]);

/// Products by a tile unit.
struct ByTiles<'a, T> {
    unit: &'a mut T,
    /// For one tile's scores, and for the next one's: these are computed while those become probabilities.
    rooms: [Room; 2],
}

impl<E: Probability> Task<'_, E> {
    /// Does the task with a tile unit; `E` must be `bf16`.
    #[inline(always)]
    pub(in super::super) fn run_by_tiles<S: Simd>(self, simd: S, unit: &mut Hardware) {
        self.run_by_any(simd, unit);
    }

    /// As [`Task::run_by_tiles`], with any unit.
    #[inline(always)]
    pub(super) fn run_by_any<S: Simd, T: Tiles>(self, simd: S, unit: &mut T) {
        assert_eq!(E::FORMAT, Format::Bf16, "tiles are of bf16");
        unit.configure(&Shapes::new(SIDE, SIDE));
        self.run_by(simd, &mut ByTiles { unit, rooms: [Room([0.0; SIDE * GROUP]), Room([0.0; SIDE * GROUP])] });
    }
}

impl<T: Tiles, E: Probability> Products<E> for ByTiles<'_, T> {
    #[inline(always)]
    fn scores<S: Simd, const V: usize>(&mut self, group: &mut Group<S, E, V>, keys: Range<usize>, then: Scores) {
        self.score(group, keys.start, 0);
        for (index, key) in keys.clone().step_by(SIDE).enumerate() {
            if key + SIDE < keys.end {
                self.score(group, key + SIDE, index + 1);
            }
            let room = &self.rooms[index % 2].0;
            let (mut at, end) = (key, keys.end.min(key + SIDE));
            while at + 8 <= end {
                group.take(at, keys.start, then, read::<8, S, V>(group.simd, room, at - key));
                at += 8;
            }
            if at + 4 <= end {
                group.take(at, keys.start, then, read::<4, S, V>(group.simd, room, at - key));
                at += 4;
            }
            if at + 2 <= end {
                group.take(at, keys.start, then, read::<2, S, V>(group.simd, room, at - key));
                at += 2;
            }
            if at < end {
                group.take(at, keys.start, then, read::<1, S, V>(group.simd, room, at - key));
            }
        }
    }

    #[inline(always)]
    fn outputs<S: Simd, const V: usize>(&mut self, group: &mut Group<S, E, V>, keys: Range<usize>) {
        let (lanes, lines, stride) = (V * S::LANES, group.head.lines, block_keys::<E>());
        let steps = keys.len().div_ceil(SIDE * PAIR);
        let behind = keys.len().next_multiple_of(PAIR) * lanes..steps * SIDE * PAIR * lanes;
        group.block[behind].fill(E::default());
        let values = &group.head.values[keys.start * lines..][..lines * stride];
        for line in (0..lines).step_by(SIDE) {
            let left = values[line * stride..][..SIDE * stride].as_ptr();
            let sums = group.outputs[line * lanes..][..SIDE * lanes].as_mut_ptr();
            // SAFETY: the lines just cut out, and the block, which holds as many keys as one of the values.
            unsafe {
                if keys.start > 0 {
                    self.load::<V>(sums);
                } else {
                    self.zero::<V>();
                }
                self.multiply::<E, V>(left, stride, group.block.as_ptr(), steps);
                self.store::<V>(sums);
            }
        }
    }
}

/// `M` lines of a room from `line` on.
#[inline(always)]
fn read<const M: usize, S: Simd, const V: usize>(simd: S, room: &[f32], line: usize) -> [[S::F32; V]; M] {
    let lines = &room[line * V * S::LANES..][..M * V * S::LANES];
    // SAFETY: within the lines.
    std::array::from_fn(|line| {
        std::array::from_fn(|vector| unsafe { simd.load(lines.as_ptr().add((line * V + vector) * S::LANES)) })
    })
}

impl<T: Tiles> ByTiles<'_, T> {
    /// Computes the scores of the sixteen keys from `key` on into a room.
    #[inline(always)]
    fn score<S: Simd, E: Probability, const V: usize>(&mut self, group: &Group<S, E, V>, key: usize, room: usize) {
        assert_eq!(S::LANES, SIDE, "a vector of queries is a tile's row");
        let (keys, depth) = (group.head.keys, group.head.depth);
        let keys = keys[key * depth..][..SIDE * depth].as_ptr();
        // SAFETY: the keys just cut out; `Group::new` saw to the queries, and a room has one for each vector.
        unsafe {
            self.zero::<V>();
            self.multiply::<E, V>(keys, depth, group.lanes.as_ptr(), depth / (SIDE * PAIR));
            let to = self.rooms[room % 2].0.as_mut_ptr();
            self.store::<V>(to);
        }
    }

    /// Adds to the sums left (sixteen lines, `stride` values apart) · right (`steps` of sixteen pairs, `V` vectors).
    ///
    /// # Safety
    /// Both must be there.
    #[inline(always)]
    unsafe fn multiply<E, const V: usize>(&mut self, left: *const E, stride: usize, right: *const E, steps: usize) {
        let (left, right) = (left.cast::<u8>(), right.cast::<u8>());
        let (left_stride, right_stride) = (stride * size_of::<E>(), V * ROW);
        // SAFETY: the caller's promise.
        unsafe {
            for step in 0..steps {
                let right = right.add(step * SIDE * right_stride);
                self.unit.load::<LEFT>(left.add(step * ROW), left_stride);
                self.unit.load::<RIGHT>(right, right_stride);
                self.unit.multiply::<SUMS, LEFT, RIGHT>();
                if V > 1 {
                    self.unit.load::<{ RIGHT + 1 }>(right.add(ROW), right_stride);
                    self.unit.multiply::<{ SUMS + 1 }, LEFT, { RIGHT + 1 }>();
                }
                if V > 2 {
                    self.unit.load::<{ RIGHT + 2 }>(right.add(2 * ROW), right_stride);
                    self.unit.multiply::<{ SUMS + 2 }, LEFT, { RIGHT + 2 }>();
                }
            }
        }
    }

    #[inline(always)]
    fn zero<const V: usize>(&mut self) {
        self.unit.zero::<SUMS>();
        if V > 1 {
            self.unit.zero::<{ SUMS + 1 }>();
        }
        if V > 2 {
            self.unit.zero::<{ SUMS + 2 }>();
        }
    }

    /// # Safety
    /// `from` must be sixteen lines of `V` vectors.
    #[inline(always)]
    unsafe fn load<const V: usize>(&mut self, from: *const f32) {
        let from = from.cast::<u8>();
        // SAFETY: the caller's promise.
        unsafe {
            self.unit.load::<SUMS>(from, V * ROW);
            if V > 1 {
                self.unit.load::<{ SUMS + 1 }>(from.add(ROW), V * ROW);
            }
            if V > 2 {
                self.unit.load::<{ SUMS + 2 }>(from.add(2 * ROW), V * ROW);
            }
        }
    }

    /// # Safety
    /// As [`ByTiles::load`].
    #[inline(always)]
    unsafe fn store<const V: usize>(&self, to: *mut f32) {
        let to = to.cast::<u8>();
        // SAFETY: the caller's promise.
        unsafe {
            self.unit.store::<SUMS>(to, V * ROW);
            if V > 1 {
                self.unit.store::<{ SUMS + 1 }>(to.add(ROW), V * ROW);
            }
            if V > 2 {
                self.unit.store::<{ SUMS + 2 }>(to.add(2 * ROW), V * ROW);
            }
        }
    }
}
