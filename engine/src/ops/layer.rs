//! A layer that maps each position of each row by itself (linear, and convolution by its windows), cut
//! into tiles that threads work through.

use std::ops::Range;

use rayon::prelude::*;

use super::host;
use super::matmul::{Matrix, Onto, SMALL, Shared, product, run_tasks, with_scratch};
use crate::Result;

/// A checkpoint's weight (outputs, inputs, taps) as the right factor of [`layer`]: (taps · inputs,
/// outputs), so that neighbouring outputs lie side by side.
pub(super) fn pack(weight: &[f32], outputs: usize, inputs: usize, taps: usize) -> Result<Vec<f32>> {
    /// Inputs of a task: their values of one output fill some whole cache lines.
    const BLOCK: usize = 16;
    assert_eq!(weight.len(), outputs * inputs * taps, "size of a weight");
    let mut packed = host::zeros(weight.len())?;
    let shared = Shared::new(&mut packed);
    (0..inputs.div_ceil(BLOCK)).into_par_iter().for_each(|block| {
        let first = block * BLOCK;
        let last = inputs.min(first + BLOCK);
        for tap in 0..taps {
            // SAFETY: the lines of this tap's and this task's inputs belong to no other task.
            #[allow(unsafe_code)]
            let lines = unsafe { shared.part((tap * inputs + first) * outputs..(tap * inputs + last) * outputs) };
            for output in 0..outputs {
                let from = (output * inputs + first) * taps + tap;
                for line in 0..last - first {
                    lines[line * outputs + output] = weight[from + line * taps];
                }
            }
        }
    });
    Ok(packed)
}

/// The dimensions of a layer that maps each position of each row by itself.
#[derive(Clone, Copy)]
pub(super) struct LayerShape {
    pub rows: usize,
    pub positions: usize,
    pub inner: usize,
    pub outputs: usize,
}

/// Fills the (positions, inner) values of a row's range of positions.
pub(super) type Gather<'a> = dyn Fn(usize, Range<usize>, &mut [f32]) + Sync + 'a;

/// Where a tile's left factor comes from.
pub(super) enum Input<'a> {
    /// (rows, positions, inner) values as they lie.
    Dense(&'a [f32]),
    /// Made tile by tile.
    Gather(&'a Gather<'a>),
}

/// What is added to each output beside the product.
#[derive(Clone, Copy)]
pub(super) struct Addends<'a> {
    /// One value per output.
    pub bias: Option<&'a [f32]>,
    /// (rows, outputs): one value per row and output.
    pub per_row: Option<&'a [f32]>,
    /// (rows, positions, outputs).
    pub full: Option<&'a [f32]>,
}

/// The tile of a layer: positions × outputs, from the shape of one row alone.
fn tile(shape: LayerShape) -> (usize, usize) {
    /// Values of the left factor that stay in a core's second-level cache.
    const LEFT_VALUES: usize = 128 * 1024;
    /// Tasks of a row that keep a few cores busy.
    const TASKS: usize = 4;
    let LayerShape { positions, inner, outputs, .. } = shape;
    let fitting = (LEFT_VALUES / inner.max(1)).clamp(32, 256);
    let work = positions * inner * outputs;
    if work < SMALL {
        return (positions.min(fitting), outputs);
    }
    let tile_positions = positions.div_ceil(TASKS).next_multiple_of(16).clamp(32, fitting).min(positions);
    let tasks = positions.div_ceil(tile_positions);
    if tasks >= TASKS {
        return (tile_positions, outputs);
    }
    let parts = (TASKS / tasks).min(outputs / 64).max(1);
    (tile_positions, outputs.div_ceil(parts).next_multiple_of(16).min(outputs))
}

/// `output` (rows, positions, outputs) = input · `weight` (inner, outputs) + addends, tile by tile.
pub(super) fn layer(output: &mut [f32], shape: LayerShape, input: Input<'_>, weight: &[f32], addends: Addends<'_>) {
    let LayerShape { rows, positions, inner, outputs } = shape;
    assert_eq!(output.len(), rows * positions * outputs, "size of a layer's output");
    assert_eq!(weight.len(), inner * outputs, "size of a layer's weight");
    if output.is_empty() {
        return;
    }
    let (tile_positions, tile_outputs) = tile(shape);
    let (tiles_down, tiles_across) = (positions.div_ceil(tile_positions), outputs.div_ceil(tile_outputs));
    let output = Shared::new(output);
    run_tasks(rows * tiles_down * tiles_across, rows * positions * inner * outputs, |index| {
        let row = index / (tiles_down * tiles_across);
        let first = index / tiles_across % tiles_down * tile_positions;
        let range = first..positions.min(first + tile_positions);
        let left = index % tiles_across * tile_outputs;
        let across = left..outputs.min(left + tile_outputs);
        for position in range.clone() {
            let start = (row * positions + position) * outputs;
            // SAFETY: tiles are disjoint rectangles, and this is a line of this tile.
            #[allow(unsafe_code)]
            let line = unsafe { output.part(start + across.start..start + across.end) };
            addends.write(line, shape, row, position, across.clone());
        }
        let weight = Matrix {
            values: &weight[across.start..],
            rows: inner,
            cols: across.len(),
            row_stride: outputs,
            col_stride: 1,
        };
        let multiply = |left: &[f32]| {
            // SAFETY: tiles are disjoint rectangles.
            #[allow(unsafe_code)]
            let target = unsafe { output.rectangle((row * positions + range.start) * outputs + across.start, outputs) };
            product(target, Onto::Destination, 1.0, Matrix::dense(left, range.len(), inner), weight);
        };
        match input {
            Input::Dense(values) => {
                let start = (row * positions + range.start) * inner;
                multiply(&values[start..start + range.len() * inner]);
            }
            Input::Gather(fill) => with_scratch(range.len() * inner, |room| {
                fill(row, range.clone(), room);
                multiply(room);
            }),
        }
    });
}

impl Addends<'_> {
    /// Fills the outputs `across` of one position with the sum of the addends.
    fn write(&self, line: &mut [f32], shape: LayerShape, row: usize, position: usize, across: Range<usize>) {
        let outputs = shape.outputs;
        match self.full {
            Some(full) => {
                let start = (row * shape.positions + position) * outputs;
                line.copy_from_slice(&full[start + across.start..start + across.end]);
            }
            None => line.fill(0.0),
        }
        let per_row = self.per_row.map(|values| &values[row * outputs..(row + 1) * outputs]);
        for addend in [self.bias, per_row].into_iter().flatten() {
            for (value, add) in line.iter_mut().zip(&addend[across.clone()]) {
                *value += add;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::reference;

    #[test]
    fn a_packed_weight_has_its_outputs_side_by_side() {
        for (outputs, inputs, taps) in [(1, 1, 1), (3, 5, 1), (7, 33, 9), (40, 16, 25)] {
            let weight = reference::numbers(outputs * inputs * taps, 5);
            let packed = pack(&weight, outputs, inputs, taps).unwrap();
            for (output, input, tap) in
                (0..outputs).flat_map(|o| (0..inputs).flat_map(move |i| (0..taps).map(move |t| (o, i, t))))
            {
                let value = weight[(output * inputs + input) * taps + tap];
                assert_eq!(packed[(tap * inputs + input) * outputs + output], value);
            }
        }
    }

    #[test]
    fn a_tile_never_depends_on_the_number_of_rows() {
        for positions in [1, 4, 16, 77, 256, 4096] {
            for (inner, outputs) in [(9, 4), (576, 64), (1728, 192), (2880, 320)] {
                let one = tile(LayerShape { rows: 1, positions, inner, outputs });
                let many = tile(LayerShape { rows: 64, positions, inner, outputs });
                assert_eq!(one, many);
                assert!(one.0 >= 1 && one.1 >= 1 && one.0 <= positions.max(1) && one.1 <= outputs);
            }
        }
    }
}
