//! Attention on the host: keys and values are packed head by head, then groups of queries go by.

use std::ops::Range;

use super::attention_group::{Head, Products, Queries, attend, group_queries, scratch_len};
use super::attention_pack::{GROUP, Lines, Packing, pack};
use super::attention_probability::Probability;
use super::attention_vectors::ByVectors;
use super::isa::{Isa, Kernel, dispatch};
use super::simd::Simd;
#[cfg(target_arch = "x86_64")]
use {super::amx, crate::ops::buffer::Format};

use crate::Result;
use crate::ops::buffer::Buffer;
use crate::ops::shared::{Shared, run_tasks, wanted_tasks, with_scratch};

pub(in crate::ops) use super::attention_pack::Shape;

/// What attention is computed from.
#[derive(Clone, Copy)]
pub(in crate::ops) struct Inputs<'a, E> {
    /// (rows, queries, channels)
    pub query: &'a [E],
    /// (rows, keys, channels); there must be keys.
    pub key: &'a [E],
    /// As `key`.
    pub value: &'a [E],
    /// (heads, queries + keys - 1)
    pub distances: Option<&'a [f32]>,
    pub shape: Shape,
}

/// softmax(q · kᵀ / √d) · v of each head. With distances the scores are not divided by √d; that of query i and key j
/// has the value at i - j + keys - 1 added.
pub(in crate::ops) fn attention<E: Probability>(isa: Isa, inputs: Inputs<E>) -> Result<Buffer> {
    #[cfg(target_arch = "x86_64")]
    if isa.multiplies_by_tiles(E::FORMAT) {
        return attention_packed(inputs, amx::ATTENTION_TILE, |task| dispatch(isa, task));
    }
    attention_packed(inputs, [1, E::DEPTH, 1], |task| dispatch(isa, task))
}

/// As [`attention`], each task done by `run`, with keys, depths and lines in multiples of `packing`.
pub(super) fn attention_packed<E: Probability>(
    inputs: Inputs<E>,
    packing: [usize; 3],
    run: impl Fn(Task<E>) + Send + Sync,
) -> Result<Buffer> {
    let Inputs { query, key, value, distances, shape } = inputs;
    let Shape { rows, queries, keys, channels, heads, .. } = shape;
    let width = shape.width();
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
    let packing = Packing::new(shape, packing);
    let (packed_keys, packed_values) = pack(key, value, shape, packing)?;
    let heads_packed = Heads {
        keys: packed_keys.values(),
        values: packed_values.values(),
        distances: distances.as_deref(),
        scale: std::f32::consts::LOG2_E * scale,
        shape,
        packing,
    };
    let mut output = Buffer::new(E::FORMAT, query.len())?;
    let shared = Shared::new(output.values_mut::<E>());
    // How heads and queries are cut never shows: each query's numbers are its own.
    let together = if heads_packed.row_bytes() <= NEAR { heads } else { 1 };
    let cuts = wanted_tasks(shape.work()).div_ceil((rows * heads / together).max(1));
    let per_task = queries.div_ceil(cuts).next_multiple_of(GROUP);
    let cuts = queries.div_ceil(per_task);
    let (narrow, wide) = scratch_len::<E>(packing.depth, packing.lines, GROUP);
    run_tasks(rows * heads / together * cuts, shape.work(), |task| {
        let (first_head, first) = (task / cuts * together, task % cuts * per_task);
        let count = per_task.min(queries - first);
        let start = (first_head / heads * queries + first) * channels + first_head % heads * width;
        let queries =
            Queries { from: query, to: &shared, lines: Lines { start, stride: channels, count, width }, first };
        let numbers = first_head..first_head + together;
        with_scratch(narrow, |narrow| {
            with_scratch(wide, |wide| run(Task { heads: &heads_packed, numbers, queries, narrow, wide }))
        })?
    })?;
    Ok(output)
}

/// Bytes of packed keys and values that stay in a core's cache while queries go by.
const NEAR: usize = 256 * 1024;

/// All heads of all rows, packed.
struct Heads<'a, E> {
    keys: &'a [E],
    values: &'a [E],
    distances: Option<&'a [Vec<f32>]>,
    /// What makes scores exponents of 2.
    scale: f32,
    shape: Shape,
    packing: Packing,
}

impl<'a, E: Probability> Heads<'a, E> {
    /// Bytes of a row's heads.
    fn row_bytes(&self) -> usize {
        let (keys, values) = self.packing.len::<E>();
        self.shape.heads * (keys + values) * size_of::<E>()
    }

    #[inline(always)]
    fn head(&self, number: usize) -> Head<'a, E> {
        let (keys, values) = self.packing.len::<E>();
        Head {
            keys: &self.keys[number * keys..][..keys],
            values: &self.values[number * values..][..values],
            count: self.shape.keys,
            width: self.shape.width(),
            depth: self.packing.depth,
            lines: self.packing.lines,
            scale: self.scale,
            causal: self.shape.causal,
            distances: self.distances.map(|distances| distances[number % self.shape.heads].as_slice()),
        }
    }
}

/// Neighbouring queries of neighbouring heads, on one thread.
pub(super) struct Task<'a, E> {
    heads: &'a Heads<'a, E>,
    /// Which of them.
    numbers: Range<usize>,
    /// Those of the first head.
    queries: Queries<'a, E>,
    narrow: &'a mut [E],
    wide: &'a mut [f32],
}

impl<E: Probability> Task<'_, E> {
    #[inline(always)]
    pub fn run_by<S: Simd>(self, simd: S, products: &mut impl Products<E>) {
        let (all, mut skipped) = (self.queries, 0);
        while skipped < all.lines.count {
            let count = group_queries::<S, E>(all.lines.count - skipped);
            // All heads of some queries: they lie side by side in memory.
            for (place, number) in self.numbers.clone().enumerate() {
                let head = self.heads.head(number);
                let start = all.lines.start + skipped * all.lines.stride + place * head.width;
                let queries = Queries { lines: Lines { start, count, ..all.lines }, first: all.first + skipped, ..all };
                // SAFETY: each task has its own queries, and no two groups the same.
                unsafe { attend(simd, products, head, queries, (&mut *self.narrow, &mut *self.wide)) }
            }
            skipped += count;
        }
    }
}

impl<E: Probability> Kernel for Task<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        #[cfg(target_arch = "x86_64")]
        if E::FORMAT == Format::Bf16 && simd.has_tiles() {
            // SAFETY: `has_tiles` is the proof, and nothing below it comes back here.
            return self.run_by_tiles(simd, &mut unsafe { amx::Hardware::new() });
        }
        self.run_by(simd, &mut ByVectors);
    }
}
