//! Scaled dot-product attention.

use candle_core::{D, DType};
use half::bf16;

use super::buffer::{Buffer, Format, Value};
use super::kernel::attention::{self, Inputs, Shape};
use super::kernel::isa::Isa;
use super::misuse;
use super::tensor::Tensor;
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
/// the channels; the result is as `query`. On the host, scores and sums are `f32` and never leave a core's
/// cache; with `bf16` tensors the probabilities are rounded to `bf16` before they weigh the values.
pub(crate) fn attention(query: &Tensor, key: &Tensor, value: &Tensor, heads: usize, mask: Mask) -> Result<Tensor> {
    attend(query, key, value, None, shape(query, key, value, heads, mask)?)
}

/// softmax(q · kᵀ + distances) · v for each head: as [`attention`], but scores are not divided by √d, and that of
/// query i and key j has the value at i - j + keys - 1 of its head's in `distances` (heads, queries + keys - 1)
/// added.
pub(crate) fn relative_attention(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    heads: usize,
    distances: &[f32],
) -> Result<Tensor> {
    let shape = shape(query, key, value, heads, Mask::None)?;
    if distances.len() != heads * (shape.queries + shape.keys).saturating_sub(1) {
        return Err(misuse(format!(
            "attention of {heads} heads, {} queries and {} keys was given {} distances",
            shape.queries,
            shape.keys,
            distances.len()
        )));
    }
    attend(query, key, value, Some(distances), shape)
}

fn attend(query: &Tensor, key: &Tensor, value: &Tensor, distances: Option<&[f32]>, shape: Shape) -> Result<Tensor> {
    match (query.device_values(), key.device_values(), value.device_values()) {
        (Some(query), Some(key), Some(value)) => Ok(Tensor::on_device(on_device(query, key, value, distances, shape)?)),
        _ => on_host(Isa::best(), query, key, value, distances, shape),
    }
}

fn shape(query: &Tensor, key: &Tensor, value: &Tensor, heads: usize, mask: Mask) -> Result<Shape> {
    let ((rows, queries, channels), (_, keys, _)) = (query.dims3()?, key.dims3()?);
    let fitting = heads > 0 && channels > 0 && channels % heads == 0 && keys > 0;
    if !fitting || key.dims() != [rows, keys, channels] || key.dims() != value.dims() {
        return Err(misuse(format!(
            "attention of {heads} heads was given {:?}, {:?} and {:?}",
            query.dims(),
            key.dims(),
            value.dims()
        )));
    }
    Ok(Shape { rows, queries, keys, channels, heads, causal: mask == Mask::Causal })
}

fn on_host(
    isa: Isa,
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    distances: Option<&[f32]>,
    shape: Shape,
) -> Result<Tensor> {
    let (query, key, value) = (query.resolved()?, key.resolved()?, value.resolved()?);
    let (q, k, v) = (query.host()?, key.host()?, value.host()?);
    if k.format() != q.format() || v.format() != q.format() {
        return Err(misuse("attention was given tensors of different formats".to_owned()));
    }
    let output = match q.format() {
        Format::F32 => attention::attention(isa, inputs::<f32>(q, k, v, distances, shape)),
        Format::Bf16 => attention::attention(isa, inputs::<bf16>(q, k, v, distances, shape)),
    };
    Ok(Tensor::on_host(output?, query.dims()))
}

fn inputs<'a, E: Value>(
    query: &'a Buffer,
    key: &'a Buffer,
    value: &'a Buffer,
    distances: Option<&'a [f32]>,
    shape: Shape,
) -> Inputs<'a, E> {
    Inputs { query: query.values(), key: key.values(), value: value.values(), distances, shape }
}

fn on_device(
    query: &candle_core::Tensor,
    key: &candle_core::Tensor,
    value: &candle_core::Tensor,
    distances: Option<&[f32]>,
    shape: Shape,
) -> Result<candle_core::Tensor> {
    /// Scores held at once, all rows and heads together: some 2 GiB with what is made of them.
    const SCORES: usize = 128 << 20;
    let Shape { rows, queries, keys, channels, heads, causal } = shape;
    let split = |x: &candle_core::Tensor, tokens: usize| -> Result<candle_core::Tensor> {
        Ok(x.reshape((rows, tokens, heads, shape.width()))?.transpose(1, 2)?.contiguous()?)
    };
    let (q, k, v) = (split(query, queries)?, split(key, keys)?, split(value, keys)?);
    let k = k.t()?;
    let distances = distances.map(|values| candle_core::Tensor::from_slice(values, (heads, ()), q.device()));
    let distances = distances.transpose()?;
    let scale = if distances.is_some() { 1.0 } else { 1.0 / (shape.width() as f64).sqrt() };
    let block = (SCORES / (rows * heads * keys).max(1)).clamp(1, queries.max(1));
    let mut parts = Vec::new();
    for first in (0..queries).step_by(block) {
        let count = block.min(queries - first);
        let mut scores = (q.narrow(2, first, count)?.contiguous()?.matmul(&k)?.to_dtype(DType::F32)? * scale)?;
        if let Some(distances) = &distances {
            let places = (first..first + count).flat_map(|query| (0..keys).map(move |key| query + keys - 1 - key));
            let places = candle_core::Tensor::from_iter(places.map(|place| place as u32), q.device())?;
            scores = scores.broadcast_add(&distances.index_select(&places, 1)?.reshape((heads, count, keys))?)?;
        }
        if causal {
            let hidden = (first..first + count)
                .flat_map(|line| (0..keys).map(move |at| if at > line { f32::NEG_INFINITY } else { 0.0 }));
            let hidden = candle_core::Tensor::from_vec(hidden.collect::<Vec<_>>(), (count, keys), q.device())?;
            scores = scores.broadcast_add(&hidden)?;
        }
        let weights = candle_nn::ops::softmax_last_dim(&scores)?.to_dtype(v.dtype())?;
        parts.push(weights.matmul(&v)?);
    }
    let joined = candle_core::Tensor::cat(&parts, D::Minus2)?;
    Ok(joined.transpose(1, 2)?.reshape((rows, queries, channels))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    #[cfg(target_arch = "x86_64")]
    use crate::ops::kernel::emulated_attention;
    use crate::ops::reference;
    use crate::ops::tensor::Place;

    fn plain(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, mask: Mask) -> Vec<f32> {
        let ((rows, queries, channels), keys) = (q.dims3().unwrap(), k.dims()[1]);
        let (q, k, v) = (reference::values(q), reference::values(k), reference::values(v));
        let width = channels / heads;
        let mut output = vec![0f32; q.len()];
        for (row, head, query) in
            (0..rows).flat_map(|r| (0..heads).flat_map(move |h| (0..queries).map(move |i| (r, h, i))))
        {
            let at = (row * queries + query) * channels + head * width;
            let seen = if mask == Mask::Causal { keys.min(query + 1) } else { keys };
            let line = |key: usize| (row * keys + key) * channels + head * width;
            let scores: Vec<f64> = (0..seen)
                .map(|key| (0..width).map(|i| f64::from(q[at + i]) * f64::from(k[line(key) + i])).sum::<f64>())
                .map(|sum| sum / (width as f64).sqrt())
                .collect();
            let largest = scores.iter().fold(f64::NEG_INFINITY, |most, score| most.max(*score));
            let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
            let total: f64 = weights.iter().sum();
            for i in 0..width {
                let sum: f64 = (0..seen).map(|key| weights[key] / total * f64::from(v[line(key) + i])).sum();
                output[at + i] = sum as f32;
            }
        }
        output
    }

    /// [`reference::tensor_at`] times `factor`.
    fn tensor(dims: [usize; 3], salt: u32, factor: f32, place: &Place) -> Tensor {
        let values: Vec<f32> = reference::numbers(dims.iter().product(), salt).iter().map(|x| x * factor).collect();
        Tensor::new(&values, &dims, place).unwrap()
    }

    fn places() -> [(Place, f32); 2] {
        [(Place::host(), 1e-5), (reference::bf16_place(), 1e-2)]
    }

    /// How attention can be computed on this processor.
    #[derive(Clone, Copy, Debug)]
    enum Way {
        By(Isa),
        /// By tiles as plain Rust emulates them, and what else these instructions do.
        #[cfg(target_arch = "x86_64")]
        EmulatedTiles(Isa),
    }

    fn ways(of: &Tensor) -> Vec<Way> {
        Isa::available().into_iter().map(Way::By).chain(emulated_tiles(of)).collect()
    }

    #[cfg(target_arch = "x86_64")]
    fn emulated_tiles(of: &Tensor) -> Vec<Way> {
        // Tiles are of `bf16`, and go with vectors of sixteen.
        let fit = |isa: &Isa| of.format() == Some(Format::Bf16) && *isa >= Isa::Avx512;
        Isa::available().into_iter().filter(fit).map(Way::EmulatedTiles).collect()
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn emulated_tiles(_of: &Tensor) -> Vec<Way> {
        Vec::new()
    }

    fn by(way: Way, [q, k, v]: [&Tensor; 3], distances: Option<&[f32]>, shape: Shape) -> Vec<f32> {
        let output = match way {
            Way::By(isa) => on_host(isa, q, k, v, distances, shape).unwrap(),
            #[cfg(target_arch = "x86_64")]
            Way::EmulatedTiles(isa) => {
                let (query, key, value) = (q.host().unwrap(), k.host().unwrap(), v.host().unwrap());
                let output = emulated_attention(isa, inputs(query, key, value, distances, shape)).unwrap();
                Tensor::on_host(output, q.dims())
            }
        };
        reference::values(&output)
    }

    /// Compares all ways with the definition.
    fn check([rows, queries, keys]: [usize; 3], channels: usize, heads: usize, factor: f32, mask: Mask) {
        for (place, tolerance) in places() {
            let q = tensor([rows, queries, channels], 1, factor, &place);
            let [k, v] = [2, 3].map(|salt| tensor([rows, keys, channels], salt, 1.0, &place));
            let expected = plain(&q, &k, &v, heads, mask);
            let shape = shape(&q, &k, &v, heads, mask).unwrap();
            for way in ways(&v) {
                reference::assert_close(&by(way, [&q, &k, &v], None, shape), &expected, tolerance);
            }
        }
    }

    #[test]
    fn odd_shapes_equal_the_definition() {
        check([1, 1, 1], 1, 1, 4.0, Mask::None);
        check([2, 5, 3], 6, 2, 4.0, Mask::None);
        check([1, 77, 77], 24, 3, 4.0, Mask::None);
        check([2, 33, 78], 15, 3, 4.0, Mask::None);
        check([1, 300, 20], 16, 8, 4.0, Mask::None);
        check([1, 50, 131], 163, 1, 4.0, Mask::None);
    }

    #[test]
    fn a_causal_query_sees_nothing_after_itself() {
        check([2, 21, 21], 12, 3, 4.0, Mask::Causal);
        check([1, 150, 150], 10, 2, 4.0, Mask::Causal);
        check([1, 9, 40], 4, 1, 4.0, Mask::Causal);
    }

    #[test]
    fn blocks_of_many_keys_equal_the_definition() {
        check([1, 40, 9000], 8, 2, 1.0, Mask::None);
    }

    #[test]
    fn scores_that_grow_far_beyond_the_first_ones_equal_the_definition() {
        for (place, tolerance) in [(Place::host(), 1e-4), (reference::bf16_place(), 1e-2)] {
            // Scores of up to ±150, ever larger ones for half of the queries: many start anew.
            let (q, v) = (tensor([1, 60, 16], 1, 8.0, &place), tensor([1, 700, 16], 3, 1.0, &place));
            let keys = reference::numbers(700 * 16, 2).into_iter().enumerate();
            let keys: Vec<f32> = keys.map(|(at, key)| key * 10.0 + (at / 16) as f32 / 30.0).collect();
            let k = Tensor::new(&keys, &[1, 700, 16], &place).unwrap();
            let expected = plain(&q, &k, &v, 1, Mask::None);
            let shape = shape(&q, &k, &v, 1, Mask::None).unwrap();
            for way in ways(&v) {
                reference::assert_close(&by(way, [&q, &k, &v], None, shape), &expected, tolerance);
            }
        }
    }

    #[test]
    fn a_row_of_a_batch_equals_the_row_alone() {
        for (place, _) in places() {
            // Large enough for several threads, with scores that make some queries start anew.
            let q = tensor([3, 500, 48], 1, 30.0, &place);
            let [k, v] = [2, 3].map(|salt| tensor([3, 300, 48], salt, 10.0, &place));
            let batch = attention(&q, &k, &v, 4, Mask::None).unwrap();
            for row in 0..3 {
                let [q, k, v] = [&q, &k, &v].map(|tensor| reference::row(tensor, row, &place));
                reference::assert_row_is(&batch, row, &attention(&q, &k, &v, 4, Mask::None).unwrap());
            }
        }
    }

    #[test]
    fn a_query_does_not_depend_on_its_neighbours() {
        for (place, _) in places() {
            let q = tensor([1, 70, 24], 1, 60.0, &place);
            let [k, v] = [2, 3].map(|salt| tensor([1, 300, 24], salt, 10.0, &place));
            for way in ways(&v) {
                let run = |q: &Tensor| by(way, [q, &k, &v], None, shape(q, &k, &v, 2, Mask::None).unwrap());
                let all = run(&q);
                for query in [0, 47, 69] {
                    let alone = &reference::values(&q)[query * 24..(query + 1) * 24];
                    let alone = run(&Tensor::new(alone, &[1, 1, 24], &place).unwrap());
                    assert_eq!(alone, all[query * 24..(query + 1) * 24], "{way:?}");
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_stays_visible_and_in_its_row() {
        for (place, _) in places() {
            for (poisoned, poison) in (0..3).flat_map(|at| [(at, f32::NAN), (at, f32::INFINITY)]) {
                let inputs = [1, 2, 3].map(|salt| {
                    let mut values = reference::numbers(2 * 50 * 8, salt);
                    if salt as usize == poisoned + 1 {
                        // Row 1, token 30, head 1.
                        values[(50 + 30) * 8 + 5] = poison;
                    }
                    Tensor::new(&values, &[2, 50, 8], &place).unwrap()
                });
                let [q, k, v] = &inputs;
                for way in ways(v) {
                    let got = by(way, [q, k, v], None, shape(q, k, v, 2, Mask::None).unwrap());
                    assert!(got[..50 * 8].iter().all(|value| value.is_finite()), "{way:?}: another row");
                    assert!(got[50 * 8..].iter().any(|value| !value.is_finite()), "{way:?}: input {poisoned}");
                    assert!(
                        got.chunks(8).all(|token| token[..4].iter().all(|value| value.is_finite())),
                        "{way:?}: head"
                    );
                }
            }
        }
    }

    #[test]
    fn the_path_for_other_devices_agrees() {
        let q = reference::tensor([2, 13, 12], 1);
        let (k, v) = (reference::tensor([2, 13, 12], 2), reference::tensor([2, 13, 12], 3));
        for mask in [Mask::None, Mask::Causal] {
            let here = attention(&q, &k, &v, 3, mask).unwrap();
            let [q, k, v] = [&q, &k, &v].map(reference::elsewhere);
            let there = attention(&q, &k, &v, 3, mask).unwrap();
            reference::assert_close(&reference::values(&there), &reference::values(&here), 1e-5);
        }
    }

    #[test]
    fn distances_are_added_to_scores_that_are_not_scaled() {
        for (rows, queries, keys, channels, heads) in
            [(1, 1, 1, 1, 1), (2, 5, 3, 6, 2), (1, 77, 77, 24, 3), (2, 33, 130, 15, 3), (1, 300, 20, 16, 8)]
        {
            let reach = queries + keys - 1;
            let distances: Vec<f32> = reference::numbers(heads * reach, 7).iter().map(|value| value * 3.0).collect();
            for (place, tolerance) in places() {
                let q = tensor([rows, queries, channels], 1, 1.0, &place);
                let [k, v] = [2, 3].map(|salt| tensor([rows, keys, channels], salt, 1.0, &place));
                let expected = plain_with_distances(&q, &k, &v, heads, &distances);
                let shape = shape(&q, &k, &v, heads, Mask::None).unwrap();
                for way in ways(&v) {
                    reference::assert_close(&by(way, [&q, &k, &v], Some(&distances), shape), &expected, tolerance);
                }
                let got = relative_attention(&q, &k, &v, heads, &distances).unwrap();
                for row in 0..rows {
                    let [q, k, v] = [&q, &k, &v].map(|tensor| reference::row(tensor, row, &place));
                    reference::assert_row_is(&got, row, &relative_attention(&q, &k, &v, heads, &distances).unwrap());
                }
                reference::assert_threads_do_not_show(|| relative_attention(&q, &k, &v, heads, &distances).unwrap());
                let [q, k, v] = [&q, &k, &v].map(reference::elsewhere);
                let there = relative_attention(&q, &k, &v, heads, &distances).unwrap();
                reference::assert_close(&reference::values(&there), &expected, tolerance);
                assert!(relative_attention(&q, &k, &v, heads, &distances[1..]).is_err());
            }
        }
    }

    /// The definition, a query at a time.
    fn plain_with_distances(q: &Tensor, k: &Tensor, v: &Tensor, heads: usize, distances: &[f32]) -> Vec<f32> {
        let ((rows, queries, channels), keys) = (q.dims3().unwrap(), k.dims()[1]);
        let (q, k, v) = (reference::values(q), reference::values(k), reference::values(v));
        let (width, reach) = (channels / heads, queries + keys - 1);
        let mut output = vec![0f32; q.len()];
        for (row, head) in (0..rows).flat_map(|row| (0..heads).map(move |head| (row, head))) {
            for query in 0..queries {
                let at = (row * queries + query) * channels + head * width;
                let line = |key: usize| (row * keys + key) * channels + head * width;
                let score = |key: usize| {
                    let products = (0..width).map(|i| f64::from(q[at + i]) * f64::from(k[line(key) + i]));
                    (products.sum::<f64>() + f64::from(distances[head * reach + query + keys - 1 - key])).exp()
                };
                let weights: Vec<f64> = (0..keys).map(score).collect();
                let total: f64 = weights.iter().sum();
                for i in 0..width {
                    let sum: f64 = (0..keys).map(|key| weights[key] / total * f64::from(v[line(key) + i])).sum();
                    output[at + i] = sum as f32;
                }
            }
        }
        output
    }

    #[test]
    fn mismatched_shapes_are_an_error_and_not_a_panic() {
        let (q, k) = (reference::tensor([1, 4, 6], 1), reference::tensor([1, 4, 8], 2));
        assert!(attention(&q, &k, &k, 2, Mask::None).is_err());
        assert!(attention(&q, &q, &q, 4, Mask::None).is_err());
        assert!(attention(&q, &q, &tensor([1, 4, 6], 1, 1.0, &reference::bf16_place()), 2, Mask::None).is_err());
        assert!(attention(&q, &q, &reference::elsewhere(&q), 2, Mask::None).is_err());
    }
}
