//! Joining and splitting along tokens and channels.

use std::ops::Range;

use half::bf16;

use super::buffer::{Buffer, Format, Value};
use super::misuse;
use super::tensor::Tensor;
use crate::Result;

/// The tokens of all `parts` (rows, tokens, channels), one after the other in each row.
pub(crate) fn cat_tokens(parts: &[&Tensor]) -> Result<Tensor> {
    let Some(first) = parts.first() else { return Err(misuse("no tokens to join".to_owned())) };
    let (rows, _, channels) = first.dims3()?;
    let mut tokens = 0;
    for part in parts {
        let (of_rows, of_tokens, of_channels) = part.dims3()?;
        if (of_rows, of_channels, part.format()) != (rows, channels, first.format()) {
            return Err(misuse(format!("tokens of {:?} and {:?} cannot be joined", first.dims(), part.dims())));
        }
        tokens += of_tokens;
    }
    if first.device_values().is_some() {
        let parts: Vec<_> = parts.iter().filter_map(|part| part.device_values()).collect();
        return Ok(Tensor::on_device(candle_core::Tensor::cat(&parts, 1)?));
    }
    let parts = parts.iter().map(|part| part.resolved()).collect::<Result<Vec<_>>>()?;
    let parts = parts.iter().map(Tensor::host).collect::<Result<Vec<_>>>()?;
    let mut joined = Buffer::new(parts[0].format(), rows * tokens * channels)?;
    match joined.format() {
        Format::F32 => join::<f32>(&parts, rows, &mut joined),
        Format::Bf16 => join::<bf16>(&parts, rows, &mut joined),
    }
    Ok(Tensor::on_host(joined, &[rows, tokens, channels]))
}

fn join<T: Value>(parts: &[&Buffer], rows: usize, joined: &mut Buffer) {
    let mut rest = joined.values_mut::<T>();
    for row in 0..rows {
        for part in parts {
            let each = part.len() / rows;
            let (here, behind) = rest.split_at_mut(each);
            here.copy_from_slice(&part.values()[row * each..(row + 1) * each]);
            rest = behind;
        }
    }
}

/// The first `count` tokens of each row of (rows, tokens, channels), and the others.
pub(crate) fn split_tokens(x: &Tensor, count: usize) -> Result<(Tensor, Tensor)> {
    let (rows, tokens, channels) = x.dims3()?;
    if count > tokens {
        return Err(misuse(format!("{:?} has no {count} tokens to split off", x.dims())));
    }
    let part = |range: Range<usize>| {
        let dims = [rows, range.len(), channels];
        match x.device_values() {
            Some(x) => Ok(Tensor::on_device(x.narrow(1, range.start, range.len())?.contiguous()?)),
            None => columns(x, tokens * channels, range.start * channels..range.end * channels, &dims),
        }
    };
    Ok((part(0..count)?, part(count..tokens)?))
}

/// The channels of (rows, …, channels) in `count` parts of one size.
pub(crate) fn split_channels(x: &Tensor, count: usize) -> Result<Vec<Tensor>> {
    let channels = x.dims().last().copied().unwrap_or(0);
    if count == 0 || channels == 0 || !channels.is_multiple_of(count) {
        return Err(misuse(format!("{:?} cannot be split into {count} parts", x.dims())));
    }
    let each = channels / count;
    let mut dims = x.dims().to_vec();
    dims[x.dims().len() - 1] = each;
    let part = |index: usize| match x.device_values() {
        Some(x) => Ok(Tensor::on_device(x.narrow(candle_core::D::Minus1, index * each, each)?.contiguous()?)),
        None => columns(x, channels, index * each..(index + 1) * each, &dims),
    };
    (0..count).map(part).collect()
}

/// Of each run of `width` values on the host those in `range`.
fn columns(x: &Tensor, width: usize, range: Range<usize>, dims: &[usize]) -> Result<Tensor> {
    let resolved = x.resolved()?;
    let from = resolved.host()?;
    let mut output = Buffer::new(from.format(), dims.iter().product())?;
    match from.format() {
        Format::F32 => pick::<f32>(from, width, range, &mut output),
        Format::Bf16 => pick::<bf16>(from, width, range, &mut output),
    }
    Ok(Tensor::on_host(output, dims))
}

fn pick<T: Value>(from: &Buffer, width: usize, range: Range<usize>, to: &mut Buffer) {
    if range.is_empty() {
        return;
    }
    let lines = to.values_mut::<T>().chunks_exact_mut(range.len());
    for (to, from) in lines.zip(from.values::<T>().chunks_exact(width)) {
        to.copy_from_slice(&from[range.clone()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::norm::GroupNorm;
    use crate::ops::reference::{self, parameter, tensor_at};

    #[test]
    fn joined_tokens_follow_each_other_in_each_row() {
        for place in reference::places() {
            let (a, b) = (tensor_at([2, 1, 3], 1, &place), tensor_at([2, 2, 3], 2, &place));
            let joined = cat_tokens(&[&a, &b, &a]).unwrap();
            assert_eq!(joined.dims(), [2, 4, 3]);
            let (a_values, b_values) = (reference::values(&a), reference::values(&b));
            let row =
                |row: usize| [&a_values[row * 3..][..3], &b_values[row * 6..][..6], &a_values[row * 3..][..3]].concat();
            assert_eq!(reference::values(&joined), [row(0), row(1)].concat());
            let [a, b] = [&a, &b].map(reference::elsewhere);
            reference::assert_same(&cat_tokens(&[&a, &b, &a]).unwrap(), &joined);
        }
    }

    #[test]
    fn what_was_joined_is_split_again() {
        for place in reference::places() {
            for (first, second) in [(1, 1), (77, 13), (0, 5), (5, 0), (3, 1000)] {
                let (a, b) = (tensor_at([3, first, 7], 1, &place), tensor_at([3, second, 7], 2, &place));
                let joined = cat_tokens(&[&a, &b]).unwrap();
                let (left, right) = split_tokens(&joined, first).unwrap();
                reference::assert_same(&left, &a);
                reference::assert_same(&right, &b);
                let (left, right) = split_tokens(&reference::elsewhere(&joined), first).unwrap();
                reference::assert_same(&left, &a);
                reference::assert_same(&right, &b);
            }
        }
    }

    #[test]
    fn channels_are_split_at_every_token() {
        for place in reference::places() {
            for (dims, count) in [(vec![2, 12], 3), (vec![2, 5, 12], 4), (vec![2, 3, 2, 12], 1), (vec![2, 12], 12)] {
                let x = Tensor::new(&reference::numbers(dims.iter().product(), 1), &dims, &place).unwrap();
                let parts = split_channels(&x, count).unwrap();
                let there = split_channels(&reference::elsewhere(&x), count).unwrap();
                let (values, each) = (reference::values(&x), 12 / count);
                assert_eq!(parts.len(), count);
                for (index, (part, there)) in parts.iter().zip(&there).enumerate() {
                    assert_eq!(part.dims()[..dims.len() - 1], dims[..dims.len() - 1]);
                    let expected: Vec<f32> =
                        values.chunks(12).flat_map(|token| token[index * each..(index + 1) * each].to_vec()).collect();
                    assert_eq!(reference::values(part), expected);
                    reference::assert_same(there, part);
                }
            }
        }
    }

    #[test]
    fn a_pending_norm_is_applied_first() {
        for place in reference::places() {
            let norm = GroupNorm::new(&parameter([6], 5), &parameter([6], 6), 3, 1e-5).unwrap();
            let pending = norm.forward(&tensor_at([2, 2, 4, 6], 1, &place)).unwrap().reshape(&[2, 8, 6]).unwrap();
            let done = pending.resolved().unwrap();
            let same = |a: &Tensor, b: &Tensor| reference::assert_same(a, b);
            same(&cat_tokens(&[&pending, &done]).unwrap(), &cat_tokens(&[&done, &done]).unwrap());
            same(&split_tokens(&pending, 3).unwrap().1, &split_tokens(&done, 3).unwrap().1);
            same(&split_channels(&pending, 2).unwrap()[1], &split_channels(&done, 2).unwrap()[1]);
        }
    }

    #[test]
    fn what_does_not_fit_is_an_error_and_not_a_panic() {
        let x = reference::tensor([2, 3, 4], 1);
        assert!(cat_tokens(&[]).is_err());
        let others = [reference::tensor([1, 3, 4], 1), reference::tensor([2, 3, 5], 1), reference::elsewhere(&x)];
        for other in others.iter().chain([&tensor_at([2, 3, 4], 1, &reference::bf16_place())]) {
            assert!(cat_tokens(&[&x, other]).is_err());
            assert!(cat_tokens(&[other, &x]).is_err());
        }
        assert!(cat_tokens(&[&reference::tensor([2, 3], 1)]).is_err());
        assert!(split_tokens(&x, 4).is_err() && split_tokens(&reference::tensor([2, 3], 1), 1).is_err());
        assert!(split_channels(&x, 0).is_err() && split_channels(&x, 3).is_err());
        assert!(split_channels(&reference::tensor([], 1), 1).is_err());
    }
}
