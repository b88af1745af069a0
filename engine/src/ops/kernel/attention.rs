//! Attention on the host: keys and values are packed head by head, then groups of queries go by.

use super::attention_group::{Head, Queries, attend, block_keys, group_queries, scratch_len};
use super::attention_pack::{GROUP, Lines, pack};
use super::attention_probability::Probability;
use super::isa::{Isa, Kernel, dispatch};
use super::simd::Simd;
use crate::Result;
use crate::ops::buffer::Buffer;
use crate::ops::shared::{Shared, run_tasks, wanted_tasks, with_scratch};

pub(in crate::ops) use super::attention_pack::Shape;

/// softmax(q · kᵀ / √d) · v of each head; `query` (rows, queries, channels), `key` and `value` (rows, keys,
/// channels). There must be keys. With `distances` (heads, queries + keys - 1) the scores are not divided by √d;
/// that of query i and key j has the value at i - j + keys - 1 added.
pub(in crate::ops) fn attention<E: Probability>(
    isa: Isa,
    query: &[E],
    key: &[E],
    value: &[E],
    distances: Option<&[f32]>,
    shape: Shape,
) -> Result<Buffer> {
    let Shape { rows, queries, keys, channels, heads, causal } = shape;
    let (width, depth) = (shape.width(), shape.width().next_multiple_of(E::DEPTH));
    assert!(keys > 0 && width > 0 && width * heads == channels, "shape of an attention");
    assert!(query.len() == rows * queries * channels, "queries of an attention");
    assert!(key.len() == rows * keys * channels && value.len() == key.len(), "keys of an attention");
    let reach = queries + keys - 1;
    assert!(distances.is_none_or(|distances| distances.len() == heads * reach), "distances of an attention");
    // With room for the whole vectors that the last queries are part of.
    let distances: Option<Vec<Vec<f32>>> = distances.map(|distances| {
        let padded = |of_head: &[f32]| of_head.iter().copied().chain([0.0; GROUP]).collect();
        distances.chunks(reach).map(padded).collect()
    });
    let scale = if distances.is_some() { 1.0 } else { 1.0 / (width as f32).sqrt() };
    let (packed_keys, packed_values) = pack(key, value, shape)?;
    let (keys_len, values_len) = (keys * depth, keys.next_multiple_of(block_keys::<E>()) * width);
    let mut output = Buffer::new(E::FORMAT, query.len())?;
    let shared = Shared::new(output.values_mut::<E>());
    // How heads and queries are cut never shows: each query's numbers are its own.
    let together = if heads * (keys_len + values_len) * size_of::<E>() <= NEAR { heads } else { 1 };
    let cuts = wanted_tasks(shape.work()).div_ceil((rows * heads / together).max(1));
    let per_task = queries.div_ceil(cuts).next_multiple_of(GROUP);
    let cuts = queries.div_ceil(per_task);
    let (narrow, wide) = scratch_len::<E>(depth, GROUP);
    run_tasks(rows * heads / together * cuts, shape.work(), |task| {
        let (first_head, first) = (task / cuts * together, task % cuts * per_task);
        let count = per_task.min(queries - first);
        let start = (first_head / heads * queries + first) * channels + first_head % heads * width;
        let of_heads = (first_head..first_head + together).map(|head| Head {
            keys: &packed_keys.values()[head * keys_len..][..keys_len],
            values: &packed_values.values()[head * values_len..][..values_len],
            count: keys,
            width,
            depth,
            scale: std::f32::consts::LOG2_E * scale,
            causal,
            distances: distances.as_ref().map(|distances| distances[head % heads].as_slice()),
        });
        let queries =
            Queries { from: query, to: &shared, lines: Lines { start, stride: channels, count, width }, first };
        with_scratch(narrow, |narrow| {
            with_scratch(wide, |wide| dispatch(isa, Task { heads: of_heads, queries, narrow, wide }))
        })?
    })?;
    Ok(output)
}

/// Bytes of packed keys and values that stay in a core's cache while queries go by.
const NEAR: usize = 256 * 1024;

/// Neighbouring queries of neighbouring heads, on one thread.
struct Task<'a, E, H> {
    heads: H,
    /// Those of the first head.
    queries: Queries<'a, E>,
    narrow: &'a mut [E],
    wide: &'a mut [f32],
}

impl<'a, E: Probability, H: Iterator<Item = Head<'a, E>> + Clone> Kernel for Task<'_, E, H> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (all, mut skipped) = (self.queries, 0);
        while skipped < all.lines.count {
            let count = group_queries::<S>(all.lines.count - skipped);
            // All heads of some queries: they lie side by side in memory.
            for (place, head) in self.heads.clone().enumerate() {
                let start = all.lines.start + skipped * all.lines.stride + place * head.width;
                let queries = Queries { lines: Lines { start, count, ..all.lines }, first: all.first + skipped, ..all };
                // SAFETY: each task has its own queries, and no two groups the same.
                unsafe { attend(simd, head, queries, self.narrow, self.wide) }
            }
            skipped += count;
        }
    }
}
