//! Moving values without changing them.

use half::bf16;

use super::buffer::{Buffer, Format, Value};
use super::kernel::element::Element;
use super::misuse;
use super::shared::{Shared, run_tasks};
use super::tensor::{Place, Tensor};
use crate::Result;

/// (rows, channels, height, width) values on the host → a feature map at `place`.
pub(crate) fn feature_map(values: &[f32], dims: [usize; 4], place: &Place) -> Result<Tensor> {
    let [rows, channels, height, width] = dims;
    let mut last = Vec::with_capacity(values.len());
    for row in values.chunks_exact((channels * height * width).max(1)) {
        for pixel in 0..height * width {
            last.extend((0..channels).map(|channel| row[channel * height * width + pixel]));
        }
    }
    Tensor::new(&last, &[rows, height, width, channels], place)
}

/// A feature map → its (rows, channels, height, width) values on the host.
pub(crate) fn channels_first(x: &Tensor) -> Result<Vec<f32>> {
    let (_, height, width, channels) = x.dims4()?;
    let values = x.to_values()?;
    let mut first = Vec::with_capacity(values.len());
    for row in values.chunks_exact((channels * height * width).max(1)) {
        for channel in 0..channels {
            first.extend((0..height * width).map(|pixel| row[pixel * channels + channel]));
        }
    }
    Ok(first)
}

/// Another device's (rows, height, width, channels) → (rows, channels, height, width).
pub(super) fn first(x: &candle_core::Tensor) -> Result<candle_core::Tensor> {
    Ok(x.permute((0, 3, 1, 2))?.contiguous()?)
}

/// Another device's (rows, channels, height, width) → (rows, height, width, channels).
pub(super) fn last(x: &candle_core::Tensor) -> Result<candle_core::Tensor> {
    Ok(x.permute((0, 2, 3, 1))?.contiguous()?)
}

/// The channels of `left`, then those of `right`, at every pixel or token.
pub(crate) fn concat_channels(left: &Tensor, right: &Tensor) -> Result<Tensor> {
    let misfit = || misuse(format!("maps of {:?} and {:?} cannot be joined", left.dims(), right.dims()));
    let ((of_left, before), (of_right, other)) =
        left.dims().split_last().zip(right.dims().split_last()).ok_or_else(misfit)?;
    if before != other || left.format() != right.format() {
        return Err(misfit());
    }
    let (of_left, of_right) = (*of_left, *of_right);
    let dims: Vec<usize> = before.iter().copied().chain([of_left + of_right]).collect();
    if let (Some(left), Some(right)) = (left.device_values(), right.device_values()) {
        return Ok(Tensor::on_device(candle_core::Tensor::cat(&[left, right], candle_core::D::Minus1)?));
    }
    let (left, right) = (left.resolved()?, right.resolved()?);
    let (left, right) = (left.host()?, right.host()?);
    let mut joined = Buffer::new(left.format(), left.len() + right.len())?;
    match left.format() {
        Format::F32 => concat::<f32>((left.values(), of_left), (right.values(), of_right), joined.values_mut()),
        Format::Bf16 => concat::<bf16>((left.values(), of_left), (right.values(), of_right), joined.values_mut()),
    }?;
    Ok(Tensor::on_host(joined, &dims))
}

fn concat<T: Value>(left: (&[T], usize), right: (&[T], usize), to: &mut [T]) -> Result<()> {
    /// Values of a task.
    const VALUES: usize = 128 * 1024;
    let channels = left.1 + right.1;
    let pixels = to.len() / channels.max(1);
    let part = (VALUES / channels.max(1)).max(1);
    let work = to.len();
    let shared = Shared::new(to);
    run_tasks(pixels.div_ceil(part), work, |task| {
        let range = task * part..pixels.min((task + 1) * part);
        // SAFETY: each task writes its own pixels.
        #[allow(unsafe_code)]
        let to = unsafe { shared.part(range.start * channels..range.end * channels) };
        for (pixel, to) in range.zip(to.chunks_exact_mut(channels)) {
            to[..left.1].copy_from_slice(&left.0[pixel * left.1..(pixel + 1) * left.1]);
            to[left.1..].copy_from_slice(&right.0[pixel * right.1..(pixel + 1) * right.1]);
        }
        Ok(())
    })
}

/// The lines of `table` (lines, width) that `ids` name: (1, ids, width).
pub(crate) fn select(ids: &[u32], table: &Tensor) -> Result<Tensor> {
    let [lines, width] = dims2(table)?;
    if ids.iter().any(|id| *id as usize >= lines) {
        return Err(misuse(format!("ids beyond {lines} lines")));
    }
    if let Some(table) = table.device_values() {
        let chosen = table.index_select(&candle_core::Tensor::new(ids, table.device())?, 0)?;
        return Ok(Tensor::on_device(chosen.unsqueeze(0)?));
    }
    let table = table.host()?;
    let mut chosen = Buffer::new(table.format(), ids.len() * width)?;
    match table.format() {
        Format::F32 => copy_lines::<f32>(ids, width, table, &mut chosen),
        Format::Bf16 => copy_lines::<bf16>(ids, width, table, &mut chosen),
    }
    Ok(Tensor::on_host(chosen, &[1, ids.len(), width]))
}

fn copy_lines<T: Value>(ids: &[u32], width: usize, table: &Buffer, to: &mut Buffer) {
    for (id, to) in ids.iter().zip(to.values_mut::<T>().chunks_exact_mut(width.max(1))) {
        to.copy_from_slice(&table.values()[*id as usize * width..][..width]);
    }
}

/// [`select`], plus the lines of `positions` from the first one on.
pub(crate) fn embed(ids: &[u32], table: &Tensor, positions: &Tensor) -> Result<Tensor> {
    let ([lines, width], [most, _]) = (dims2(table)?, dims2(positions)?);
    if ids.len() > most || ids.iter().any(|id| *id as usize >= lines) {
        return Err(misuse(format!("ids beyond {lines} lines or {most} positions")));
    }
    if let (Some(table), Some(positions)) = (table.device_values(), positions.device_values()) {
        let chosen = table.index_select(&candle_core::Tensor::new(ids, table.device())?, 0)?;
        return Ok(Tensor::on_device((chosen + positions.narrow(0, 0, ids.len())?)?.unsqueeze(0)?));
    }
    let (table, positions) = (table.host()?, positions.host()?);
    let mut chosen = Buffer::new(table.format(), ids.len() * width)?;
    match table.format() {
        Format::F32 => lookup::<f32>(ids, width, table, positions, &mut chosen),
        Format::Bf16 => lookup::<bf16>(ids, width, table, positions, &mut chosen),
    }
    Ok(Tensor::on_host(chosen, &[1, ids.len(), width]))
}

fn lookup<E: Element>(ids: &[u32], width: usize, table: &Buffer, positions: &Buffer, to: &mut Buffer) {
    let (table, positions) = (table.values::<E>(), positions.values::<E>());
    for ((id, to), position) in
        ids.iter().zip(to.values_mut::<E>().chunks_exact_mut(width)).zip(positions.chunks_exact(width))
    {
        let line = &table[*id as usize * width..][..width];
        for ((to, value), position) in to.iter_mut().zip(line).zip(position) {
            *to = E::from_f32(value.to_f32() + position.to_f32());
        }
    }
}

fn dims2(x: &Tensor) -> Result<[usize; 2]> {
    match x.dims()[..] {
        [a, b] => Ok([a, b]),
        _ => Err(misuse(format!("two dimensions were expected, not {:?}", x.dims()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::reference;

    #[test]
    fn the_two_layouts_are_inverse() {
        let values = reference::numbers(2 * 3 * 4 * 5, 1);
        let map = feature_map(&values, [2, 3, 4, 5], &Place::host()).unwrap();
        assert_eq!(map.dims(), [2, 4, 5, 3]);
        assert_eq!(map.to_values().unwrap()[1], values[20]);
        assert_eq!(channels_first(&map).unwrap(), values);
    }

    #[test]
    fn concatenation_keeps_each_pixel_together() {
        let (left, right) = (reference::tensor([1, 2, 2, 2], 1), reference::tensor([1, 2, 2, 3], 2));
        let both = concat_channels(&left, &right).unwrap();
        assert_eq!(both.dims(), [1, 2, 2, 5]);
        let (left, right, both) = (reference::values(&left), reference::values(&right), reference::values(&both));
        assert_eq!(both[..5], [left[0], left[1], right[0], right[1], right[2]]);
        assert_eq!(both[15..], [left[6], left[7], right[9], right[10], right[11]]);
        let (tokens, others) = (reference::tensor([2, 3, 4], 1), reference::tensor([2, 3, 1], 2));
        assert_eq!(concat_channels(&tokens, &others).unwrap().dims(), [2, 3, 5]);
        assert!(concat_channels(&tokens, &reference::tensor([2, 4, 1], 2)).is_err());
        assert!(concat_channels(&tokens, &reference::tensor_at([2, 3, 1], 2, &reference::bf16_place())).is_err());
        assert!(concat_channels(&reference::tensor([], 1), &others).is_err());
    }

    #[test]
    fn selected_lines_are_those_of_the_ids() {
        for place in reference::places() {
            let table = reference::tensor_at([5, 3], 1, &place);
            let got = select(&[4, 0, 4], &table).unwrap();
            assert_eq!(got.dims(), [1, 3, 3]);
            let values = reference::values(&table);
            assert_eq!(reference::values(&got), [&values[12..], &values[..3], &values[12..]].concat());
            reference::assert_same(&select(&[4, 0, 4], &reference::elsewhere(&table)).unwrap(), &got);
            assert!(select(&[5], &table).is_err());
        }
    }

    #[test]
    fn an_embedding_is_the_line_of_its_id_and_place() {
        let (table, positions) = (reference::tensor([5, 3], 1), reference::tensor([4, 3], 2));
        let got = reference::values(&embed(&[4, 0], &table, &positions).unwrap());
        let (table, positions) = (reference::values(&table), reference::values(&positions));
        assert_eq!(got[0], table[12] + positions[0]);
        assert_eq!(got[5], table[2] + positions[5]);
        assert!(embed(&[5], &reference::tensor([5, 3], 1), &reference::tensor([4, 3], 2)).is_err());
    }
}
