//! Scaled dot-product attention.

use candle_core::{D, DType, Tensor};
use pulp::Arch;

use super::activation::exp;
use super::matmul::{Matrix, Onto, Shared, Target, product, run_tasks, with_scratch};
use super::norm::lane_sum;
use super::{host, misuse};
use crate::Result;

/// Which keys a query sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mask {
    /// All of them.
    None,
    /// Those up to its own place.
    Causal,
}

/// softmax(q · kᵀ / √d) · v for each head, with d = channels / heads.
///
/// `query` (rows, queries, channels), `key` and `value` (rows, keys, channels), heads side by side in
/// the channels; the result is as `query`. Scores are `f32` and never held for more than a block of
/// queries of one head.
pub(crate) fn attention(query: &Tensor, key: &Tensor, value: &Tensor, heads: usize, mask: Mask) -> Result<Tensor> {
    let (rows, queries, channels) = query.dims3()?;
    let keys = key.dim(1)?;
    if heads == 0 || channels % heads != 0 || key.dims() != [rows, keys, channels] || key.dims() != value.dims() {
        return Err(misuse(format!(
            "attention of {heads} heads was given {:?}, {:?} and {:?}",
            query.dims(),
            key.dims(),
            value.dims()
        )));
    }
    let shape = Shape { rows, queries, keys, channels, heads };
    if query.device().is_cpu() {
        on_host(query, key, value, shape, mask)
    } else {
        on_device(query, key, value, shape, mask)
    }
}

#[derive(Clone, Copy)]
struct Shape {
    rows: usize,
    queries: usize,
    keys: usize,
    channels: usize,
    heads: usize,
}

impl Shape {
    fn head_width(self) -> usize {
        self.channels / self.heads
    }

    fn scale(self) -> f32 {
        1.0 / (self.head_width() as f32).sqrt()
    }

    /// Queries of a block: its scores stay in a core's second-level cache.
    fn block(self) -> usize {
        const SCORES: usize = 128 * 1024;
        (SCORES / self.keys.max(1)).clamp(16, 256).min(self.queries.max(1))
    }
}

fn on_host(query: &Tensor, key: &Tensor, value: &Tensor, shape: Shape, mask: Mask) -> Result<Tensor> {
    let Shape { rows, queries, keys, channels, heads } = shape;
    let (q, k, v) = (host::as_f32(query)?, host::as_f32(key)?, host::as_f32(value)?);
    let (q, k, v) = (host::values(&q)?, host::values(&k)?, host::values(&v)?);
    let (q, k, v): (&[f32], &[f32], &[f32]) = (&q, &k, &v);
    let (width, block) = (shape.head_width(), shape.block());
    let blocks = queries.div_ceil(block);
    let mut output = host::zeros(rows * queries * channels)?;
    let shared = Shared::new(&mut output);
    run_tasks(rows * heads * blocks, 2 * rows * queries * keys * channels, |index| {
        let (row, head, first) = (index / (heads * blocks), index / blocks % heads, index % blocks * block);
        let count = block.min(queries - first);
        let of_head = |values, position: usize, count| {
            let start = position * channels + head * width;
            head_matrix(values, start, count, width, channels)
        };
        let q = of_head(q, row * queries + first, count);
        let (k, v) = (of_head(k, row * keys, keys), of_head(v, row * keys, keys));
        with_scratch(count * keys, |scores| {
            product(Target::new(scores, keys), Onto::Nothing, shape.scale(), q, k.transposed());
            Arch::new().dispatch(|| {
                for (line, scores) in scores.chunks_exact_mut(keys).enumerate() {
                    let seen = if mask == Mask::Causal { keys.min(first + line + 1) } else { keys };
                    softmax(&mut scores[..seen]);
                    scores[seen..].fill(0.0);
                }
            });
            // SAFETY: each task writes its own queries' lines in its own head's columns.
            #[allow(unsafe_code)]
            let target = unsafe { shared.rectangle((row * queries + first) * channels + head * width, channels) };
            product(target, Onto::Nothing, 1.0, Matrix::dense(scores, count, keys), v);
        });
    });
    host::tensor(output, query.dims(), query.dtype())
}

/// One head's (count × width) values among tokens of `channels`.
fn head_matrix(values: &[f32], start: usize, count: usize, width: usize, channels: usize) -> Matrix<'_> {
    Matrix { values: &values[start..], rows: count, cols: width, row_stride: channels, col_stride: 1 }
}

#[inline(always)]
fn softmax(scores: &mut [f32]) {
    let largest = lane_max(scores);
    for score in scores.iter_mut() {
        *score = exp(*score - largest);
    }
    let scale = 1.0 / lane_sum(scores, |score| score);
    for score in scores.iter_mut() {
        *score *= scale;
    }
}

#[inline(always)]
fn lane_max(values: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = if *value > *lane { *value } else { *lane };
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane = lane.max(*value);
    }
    lanes.iter().fold(f32::NEG_INFINITY, |most, lane| most.max(*lane))
}

fn on_device(query: &Tensor, key: &Tensor, value: &Tensor, shape: Shape, mask: Mask) -> Result<Tensor> {
    /// Scores held at once, all rows and heads together.
    const SCORES: usize = 256 << 20;
    let Shape { rows, queries, keys, channels, heads } = shape;
    let split = |x: &Tensor, tokens: usize| -> Result<Tensor> {
        Ok(x.reshape((rows, tokens, heads, shape.head_width()))?.transpose(1, 2)?.contiguous()?)
    };
    let (q, k, v) = (split(query, queries)?, split(key, keys)?, split(value, keys)?);
    let k = k.transpose(2, 3)?.contiguous()?;
    let block = (SCORES / (rows * heads * keys).max(1)).clamp(1, queries.max(1));
    let mut parts = Vec::new();
    for first in (0..queries).step_by(block) {
        let count = block.min(queries - first);
        let mut scores =
            (q.narrow(2, first, count)?.contiguous()?.matmul(&k)?.to_dtype(DType::F32)? * f64::from(shape.scale()))?;
        if mask == Mask::Causal {
            let hidden = (first..first + count)
                .flat_map(|line| (0..keys).map(move |at| if at > line { f32::NEG_INFINITY } else { 0.0 }));
            scores = scores.broadcast_add(&Tensor::from_vec(hidden.collect::<Vec<_>>(), (count, keys), q.device())?)?;
        }
        let weights = candle_nn::ops::softmax_last_dim(&scores)?.to_dtype(v.dtype())?;
        parts.push(weights.matmul(&v)?);
    }
    let joined = Tensor::cat(&parts, D::Minus2)?;
    Ok(joined.transpose(1, 2)?.reshape((rows, queries, channels))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::reference;

    fn plain(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, mask: Mask) -> Vec<f32> {
        let ((rows, queries, channels), keys) = (q.dims3().unwrap(), k.dim(1).unwrap());
        let (q, k, v) = (reference::values(q), reference::values(k), reference::values(v));
        let width = channels / heads;
        let mut output = vec![0f32; q.len()];
        for (row, head, query) in
            (0..rows).flat_map(|r| (0..heads).flat_map(move |h| (0..queries).map(move |i| (r, h, i))))
        {
            let q = &q[(row * queries + query) * channels + head * width..][..width];
            let seen = if mask == Mask::Causal { query + 1 } else { keys };
            let line = |values: &'_ [f32], key: usize| {
                values[(row * keys + key) * channels + head * width..][..width].to_vec()
            };
            let scores: Vec<f64> = (0..seen)
                .map(|key| {
                    line(&k, key).iter().zip(q).map(|(k, q)| f64::from(k * q)).sum::<f64>() / (width as f64).sqrt()
                })
                .collect();
            let total: f64 = scores.iter().map(|score| score.exp()).sum();
            for at in 0..width {
                let sum: f64 = (0..seen).map(|key| scores[key].exp() / total * f64::from(line(&v, key)[at])).sum();
                output[(row * queries + query) * channels + head * width + at] = sum as f32;
            }
        }
        output
    }

    #[test]
    fn attention_over_odd_shapes_equals_the_definition() {
        for (rows, queries, keys, channels, heads) in
            [(1, 1, 1, 1, 1), (2, 5, 3, 6, 2), (1, 77, 77, 24, 3), (2, 33, 77, 20, 1), (1, 300, 20, 16, 8)]
        {
            let q = (reference::tensor([rows, queries, channels], 1) * 4.0).unwrap();
            let (k, v) = (reference::tensor([rows, keys, channels], 2), reference::tensor([rows, keys, channels], 3));
            let got = attention(&q, &k, &v, heads, Mask::None).unwrap();
            reference::assert_close(&reference::values(&got), &plain(&q, &k, &v, heads, Mask::None), 1e-5);
        }
    }

    #[test]
    fn a_causal_query_sees_nothing_after_itself() {
        let [q, k, v] = [1, 2, 3].map(|salt| reference::tensor([2, 21, 12], salt));
        let got = attention(&q, &k, &v, 3, Mask::Causal).unwrap();
        reference::assert_close(&reference::values(&got), &plain(&q, &k, &v, 3, Mask::Causal), 1e-5);
    }

    #[test]
    fn blocks_of_many_keys_equal_the_definition() {
        let (q, k) = (reference::tensor([1, 40, 8], 1), reference::tensor([1, 9000, 8], 2));
        let v = reference::tensor([1, 9000, 8], 3);
        let got = attention(&q, &k, &v, 2, Mask::None).unwrap();
        reference::assert_close(&reference::values(&got), &plain(&q, &k, &v, 2, Mask::None), 1e-5);
    }

    #[test]
    fn a_row_of_a_batch_equals_the_row_alone() {
        let q = reference::tensor([3, 50, 48], 1);
        let (k, v) = (reference::tensor([3, 77, 48], 2), reference::tensor([3, 77, 48], 3));
        let batch = attention(&q, &k, &v, 4, Mask::None).unwrap();
        for row in 0..3 {
            let [q, k, v] = [&q, &k, &v].map(|tensor| tensor.narrow(0, row, 1).unwrap());
            reference::assert_row_is(&batch, row, &attention(&q, &k, &v, 4, Mask::None).unwrap());
        }
    }

    #[test]
    fn the_path_for_other_devices_agrees() {
        let q = reference::tensor([2, 13, 12], 1);
        let (k, v) = (reference::tensor([2, 13, 12], 2), reference::tensor([2, 13, 12], 3));
        let shape = Shape { rows: 2, queries: 13, keys: 13, channels: 12, heads: 3 };
        for mask in [Mask::None, Mask::Causal] {
            let (here, there) = (attention(&q, &k, &v, 3, mask).unwrap(), on_device(&q, &k, &v, shape, mask).unwrap());
            reference::assert_close(&reference::values(&there), &reference::values(&here), 1e-5);
        }
    }

    #[test]
    fn mismatched_shapes_are_an_error_and_not_a_panic() {
        let (q, k) = (reference::tensor([1, 4, 6], 1), reference::tensor([1, 4, 8], 2));
        assert!(attention(&q, &k, &k, 2, Mask::None).is_err());
        assert!(attention(&q, &q, &q, 4, Mask::None).is_err());
    }
}
