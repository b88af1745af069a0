//! Moving heads in and out of the layouts that attention computes in. Plain code on purpose: with the
//! widest vectors compilers make scatters of these loops, which take several times as long.

use super::attention_group::block_keys;
use super::element::Element;
use crate::Result;
use crate::ops::buffer::Buffer;
use crate::ops::shared::{Shared, run_tasks};

/// Queries of a group with the widest vectors; several groups of the narrower ones.
pub(super) const GROUP: usize = 48;

/// Columns of the values that are packed at a time.
const COLUMNS: usize = 32;

/// What is attended to.
#[derive(Clone, Copy, Debug)]
pub(in crate::ops) struct Shape {
    pub rows: usize,
    pub queries: usize,
    pub keys: usize,
    pub channels: usize,
    pub heads: usize,
    /// Whether a query sees only the keys up to its own place.
    pub causal: bool,
}

impl Shape {
    /// Channels of a head.
    pub fn width(self) -> usize {
        self.channels / self.heads
    }

    /// Multiply-adds of both products.
    pub fn work(self) -> usize {
        2 * self.rows * self.queries * self.keys * self.channels
    }
}

/// What a head's parts are filled up to with zeros.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packing {
    /// Keys of a head.
    pub keys: usize,
    /// Its width in a key,
    pub depth: usize,
    /// and in the values.
    pub lines: usize,
}

impl Packing {
    /// Keys and widths in multiples of these.
    pub fn new(shape: Shape, [keys, depth, lines]: [usize; 3]) -> Self {
        Self {
            keys: shape.keys.next_multiple_of(keys),
            depth: shape.width().next_multiple_of(depth),
            lines: shape.width().next_multiple_of(lines),
        }
    }

    /// Values of a head's packed keys, and of its packed values.
    pub fn len<E>(self) -> (usize, usize) {
        (self.keys * self.depth, self.keys.next_multiple_of(block_keys::<E>()) * self.lines)
    }
}

/// The keys as (rows, heads, keys, depth) and the values as (rows, heads, blocks of keys, lines, keys of a
/// block), zeros where there is nothing.
pub(super) fn pack<E: Element>(key: &[E], value: &[E], shape: Shape, packing: Packing) -> Result<(Buffer, Buffer)> {
    let Shape { rows, keys, channels, heads, .. } = shape;
    let (width, block) = (shape.width(), block_keys::<E>());
    let Packing { depth, lines, .. } = packing;
    let blocks = keys.div_ceil(block);
    let (keys_len, values_len) = packing.len::<E>();
    let mut packed_keys = Buffer::new(E::FORMAT, rows * heads * keys_len)?;
    let mut packed_values = Buffer::new(E::FORMAT, rows * heads * values_len)?;
    let shared_keys = Shared::new(packed_keys.values_mut::<E>());
    let shared_values = Shared::new(packed_values.values_mut::<E>());
    // Moving a value takes about as long as a few multiply-adds.
    run_tasks(rows * heads * blocks, 8 * rows * keys * channels, |task| {
        let (head, first) = (task / blocks, task % blocks * block);
        let count = block.min(keys - first);
        let start = (head / heads * keys + first) * channels + head % heads * width;
        let of_keys = head * keys_len + first * depth..head * keys_len + packing.keys.min(first + block) * depth;
        let of_values = task * block * lines..(task + 1) * block * lines;
        // SAFETY: each task writes its own block of its own head.
        let (to_keys, to_values) = unsafe { (shared_keys.part(of_keys), shared_values.part(of_values)) };
        for (at, to) in to_keys.chunks_exact_mut(depth).enumerate() {
            let from = if at < count { &key[start + at * channels..][..width] } else { &[] };
            to[..from.len()].copy_from_slice(from);
            to[from.len()..].fill(E::default());
        }
        let (to_values, behind) = to_values.split_at_mut(width * block);
        behind.fill(E::default());
        // A cache line of each key at a time, so that the lines written to stay near.
        for (first, to_values) in to_values.chunks_mut(COLUMNS * block).enumerate() {
            let columns = to_values.len() / block;
            for at in 0..block {
                let to = to_values[at..].iter_mut().step_by(block);
                if at < count {
                    let from = &value[start + at * channels + first * COLUMNS..][..columns];
                    to.zip(from).for_each(|(to, from)| *to = *from);
                } else {
                    to.for_each(|to| *to = E::default());
                }
            }
        }
        Ok(())
    })?;
    Ok((packed_keys, packed_values))
}

/// Some queries of one head, one after the other.
#[derive(Clone, Copy)]
pub(super) struct Lines {
    /// Where the first one starts.
    pub start: usize,
    /// From one to the next.
    pub stride: usize,
    pub count: usize,
    pub width: usize,
}

/// Puts the lines of `from` into the lanes of `to` (at least width / DEPTH, lanes, DEPTH), zeros where there is
/// nothing.
#[inline(never)]
pub(super) fn into_lanes<E: Element>(from: &[E], lines: Lines, to: &mut [E], lanes: usize) {
    let Lines { start, stride, count, width } = lines;
    if count < lanes || to.len() > width * lanes {
        to.fill(E::default());
    }
    // All lines side by side: each is somewhere else in memory, and so they are waited for together.
    for (at, to) in to.chunks_exact_mut(lanes * E::DEPTH).enumerate().take(width.div_ceil(E::DEPTH)) {
        let depth = E::DEPTH.min(width - at * E::DEPTH);
        let from = &from[start + at * E::DEPTH..][..(count - 1) * stride + depth];
        if depth == 2 {
            for (lane, to) in to.as_chunks_mut::<2>().0.iter_mut().take(count).enumerate() {
                *to = [from[lane * stride], from[lane * stride + 1]];
            }
        } else {
            for (lane, to) in to.iter_mut().step_by(E::DEPTH).take(count).enumerate() {
                *to = from[lane * stride];
            }
        }
    }
}

/// Puts the lanes of `from`, as [`into_lanes`] made them, back into lines of `to`.
///
/// # Safety
/// Nobody else may be using the lines.
#[inline(never)]
pub(super) unsafe fn out_of_lanes<E: Element>(from: &[E], lanes: usize, to: &Shared<E>, lines: Lines) {
    let Lines { start, stride, count, width } = lines;
    let line = lanes * E::DEPTH;
    assert!(count <= GROUP, "queries of a group");
    // All lines side by side and first on the stack: what leaves for memory goes in few and large pieces, which
    // are waited for together.
    let mut room = [[E::default(); COLUMNS]; GROUP];
    for (from, first) in from.chunks(line * COLUMNS / E::DEPTH).zip((0..width).step_by(COLUMNS)) {
        for (lane, room) in room.iter_mut().enumerate().take(count) {
            for (from, room) in from.chunks_exact(line).zip(room.chunks_exact_mut(E::DEPTH)) {
                room.copy_from_slice(&from[lane * E::DEPTH..][..E::DEPTH]);
            }
        }
        let columns = COLUMNS.min(width - first);
        for (lane, room) in room.iter().enumerate().take(count) {
            let start = start + lane * stride + first;
            // SAFETY: the caller's promise.
            unsafe { to.part(start..start + columns) }.copy_from_slice(&room[..columns]);
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn lines_come_back_out_of_the_lanes() {
        let lines = Lines { start: 2, stride: 7, count: 3, width: 5 };
        let from: Vec<bf16> = (0..21).map(|value| bf16::from_f32(value as f32)).collect();
        let mut lanes = vec![bf16::ONE; 6 * 4];
        into_lanes(&from, lines, &mut lanes, 4);
        let values: Vec<f32> = lanes.iter().map(|value| value.to_f32()).collect();
        assert_eq!(values[..8], [2.0, 3.0, 9.0, 10.0, 16.0, 17.0, 0.0, 0.0]);
        assert_eq!(values[16..], [6.0, 0.0, 13.0, 0.0, 20.0, 0.0, 0.0, 0.0]);
        let mut to = vec![bf16::ZERO; 21];
        // SAFETY: nobody else knows of `to`.
        unsafe { out_of_lanes(&lanes, 4, &Shared::new(&mut to), lines) }
        assert!((0..21).all(|at| to[at] == if (at + 5) % 7 < 5 && at >= 2 { from[at] } else { bf16::ZERO }));
    }
}
