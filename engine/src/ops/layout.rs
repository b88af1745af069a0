//! Moving values without changing them.

use std::ops::Range;

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

/// Lines `range` of a feature map.
pub(crate) fn lines(x: &Tensor, range: Range<usize>) -> Result<Tensor> {
    let (rows, height, width, channels) = x.dims4()?;
    if range.start > range.end || range.end > height {
        return Err(misuse(format!("lines {range:?} of {:?}", x.dims())));
    }
    if let Some(x) = x.device_values() {
        return Ok(Tensor::on_device(x.narrow(1, range.start, range.len())?.contiguous()?));
    }
    if range == (0..height) {
        return Ok(x.clone());
    }
    let x = x.resolved()?;
    let from = x.host()?;
    let mut to = Buffer::new(from.format(), rows * range.len() * width * channels)?;
    let line = width * channels;
    match from.format() {
        Format::F32 => copy_rows::<f32>((from, height * line), (&mut to, range.len() * line), range.start * line, 0),
        Format::Bf16 => copy_rows::<bf16>((from, height * line), (&mut to, range.len() * line), range.start * line, 0),
    }
    Ok(Tensor::on_host(to, &[rows, range.len(), width, channels]))
}

/// Feature maps of one width and as many channels, one below the other.
pub(crate) fn stack_lines(parts: &[&Tensor]) -> Result<Tensor> {
    let Some(first) = parts.first() else { return Err(misuse("no maps to stack".to_owned())) };
    let (rows, _, width, channels) = first.dims4()?;
    let mut height = 0;
    for part in parts {
        let (part_rows, lines, part_width, part_channels) = part.dims4()?;
        if (part_rows, part_width, part_channels) != (rows, width, channels) || part.format() != first.format() {
            return Err(misuse(format!("maps of {:?} and {:?} cannot be stacked", first.dims(), part.dims())));
        }
        height += lines;
    }
    if parts.len() == 1 {
        return Ok((*first).clone());
    }
    if first.device_values().is_some() {
        let parts: Vec<_> = parts.iter().filter_map(|part| part.device_values()).collect();
        return Ok(Tensor::on_device(candle_core::Tensor::cat(&parts, 1)?));
    }
    let parts = parts.iter().map(|part| part.resolved()).collect::<Result<Vec<_>>>()?;
    let parts = parts.iter().map(Tensor::host).collect::<Result<Vec<_>>>()?;
    let (row, mut at) = (height * width * channels, 0);
    let mut to = Buffer::new(parts[0].format(), rows * row)?;
    for part in parts {
        let len = part.len() / rows.max(1);
        match part.format() {
            Format::F32 => copy_rows::<f32>((part, len), (&mut to, row), 0, at),
            Format::Bf16 => copy_rows::<bf16>((part, len), (&mut to, row), 0, at),
        }
        at += len;
    }
    Ok(Tensor::on_host(to, &[rows, height, width, channels]))
}

/// Copies from each row of one buffer (so long, from `skip` on) to each row of the other (so long, from `at` on)
/// as much as both have.
fn copy_rows<T: Value>((from, from_row): (&Buffer, usize), (to, to_row): (&mut Buffer, usize), skip: usize, at: usize) {
    let len = (from_row - skip).min(to_row - at);
    let from = from.values::<T>().chunks_exact(from_row.max(1));
    for (from, to) in from.zip(to.values_mut::<T>().chunks_exact_mut(to_row.max(1))) {
        to[at..at + len].copy_from_slice(&from[skip..skip + len]);
    }
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
    use crate::ops::norm::GroupNorm;
    use crate::ops::reference::{self, parameter};

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
    fn a_map_that_is_cut_into_lines_stacks_up_again() {
        for place in reference::places() {
            let norm = GroupNorm::new(&parameter([3], 1), &parameter([3], 2), 1, 1e-5).unwrap();
            let x = norm.forward(&reference::tensor_at([2, 7, 5, 3], 1, &place)).unwrap();
            for x in [x.clone(), reference::elsewhere(&x)] {
                let parts = [lines(&x, 0..2).unwrap(), lines(&x, 2..3).unwrap(), lines(&x, 3..7).unwrap()];
                assert_eq!(parts[2].dims(), [2, 4, 5, 3]);
                assert_eq!(reference::values(&parts[1])[..15], reference::values(&x)[30..45]);
                assert_eq!(reference::values(&parts[1])[15..], reference::values(&x)[135..150]);
                reference::assert_same(&stack_lines(&parts.each_ref()).unwrap(), &x);
                reference::assert_same(&lines(&x, 0..7).unwrap(), &x);
                reference::assert_same(&stack_lines(&[&x]).unwrap(), &x);
                assert!(lines(&x, 3..8).is_err());
                assert!(stack_lines(&[]).is_err());
                assert!(stack_lines(&[&x, &reference::tensor([2, 7, 4, 3], 1)]).is_err());
                assert!(stack_lines(&[&x, &reference::tensor([1, 7, 5, 3], 1)]).is_err());
            }
            assert!(stack_lines(&[&x, &reference::elsewhere(&x)]).is_err());
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
