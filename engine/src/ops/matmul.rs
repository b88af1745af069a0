//! Matrix products on the host: one product, and many tiles of one layer in parallel.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

use rayon::prelude::*;

use super::host;
use crate::Result;

/// A matrix of `rows` × `cols` values over a slice, with a stride for each direction.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    pub values: &'a [f32],
    pub rows: usize,
    pub cols: usize,
    pub row_stride: usize,
    pub col_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Row after row without gaps between them.
    pub fn dense(values: &'a [f32], rows: usize, cols: usize) -> Self {
        Self { values, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// The same values seen with rows and columns exchanged.
    pub fn transposed(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    fn fits(&self) -> bool {
        self.rows == 0
            || self.cols == 0
            || (self.rows - 1) * self.row_stride + (self.cols - 1) * self.col_stride < self.values.len()
    }
}

/// What a product does with what its destination holds.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Onto {
    Nothing,
    Destination,
}

/// Where a product goes: row `i` starts at `i * stride`.
pub(super) struct Target<'a> {
    start: *mut f32,
    len: usize,
    stride: usize,
    values: PhantomData<&'a mut [f32]>,
}

impl<'a> Target<'a> {
    /// A target that nobody else sees.
    pub fn new(values: &'a mut [f32], stride: usize) -> Self {
        Self { start: values.as_mut_ptr(), len: values.len(), stride, values: PhantomData }
    }
}

/// `target = [target +] scale · left · right` on this thread alone. The order of each sum depends on
/// the three dimensions only.
pub(super) fn product(target: Target<'_>, onto: Onto, scale: f32, left: Matrix<'_>, right: Matrix<'_>) {
    let (rows, cols, inner) = (left.rows, right.cols, left.cols);
    assert_eq!(inner, right.rows, "inner dimensions of a product");
    if rows == 0 || cols == 0 {
        return;
    }
    assert!(left.fits() && right.fits(), "a factor reaches past its values");
    assert!(cols <= target.stride && (rows - 1) * target.stride + cols <= target.len, "the target is too short");
    // The kernels store columns, so the transposed product is computed: right' · left'.
    // SAFETY: the asserts above keep every index of the three matrices inside its slice; `target` is
    // exclusive in the rectangle that is written.
    #[allow(unsafe_code)]
    unsafe {
        gemm::gemm(
            cols,
            rows,
            inner,
            target.start,
            target.stride as isize,
            1,
            onto == Onto::Destination,
            right.values.as_ptr(),
            right.row_stride as isize,
            right.col_stride as isize,
            left.values.as_ptr(),
            left.row_stride as isize,
            left.col_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// A destination that several threads write at once, each its own rectangle.
pub(super) struct Shared<'a> {
    start: *mut f32,
    len: usize,
    values: PhantomData<&'a mut [f32]>,
}

// SAFETY: `Shared` stands for an exclusive borrow of plain numbers; its methods make their callers
// answer for not overlapping.
#[allow(unsafe_code)]
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    /// Shares `values` out.
    pub fn new(values: &'a mut [f32]) -> Self {
        Self { start: values.as_mut_ptr(), len: values.len(), values: PhantomData }
    }

    /// One contiguous part.
    ///
    /// # Safety
    /// The parts and rectangles in use at the same time must not overlap.
    #[allow(unsafe_code, clippy::mut_from_ref)]
    pub unsafe fn part(&self, range: Range<usize>) -> &mut [f32] {
        assert!(range.start <= range.end && range.end <= self.len, "a part reaches past the destination");
        // SAFETY: within bounds by the assert; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }

    /// A rectangle whose first value is at `start` and whose rows are `stride` apart.
    ///
    /// # Safety
    /// The parts and rectangles in use at the same time must not overlap.
    #[allow(unsafe_code)]
    pub unsafe fn rectangle(&self, start: usize, stride: usize) -> Target<'_> {
        assert!(start <= self.len, "a rectangle starts past the destination");
        // SAFETY: within the allocation by the assert.
        let first = unsafe { self.start.add(start) };
        Target { start: first, len: self.len - start, stride, values: PhantomData }
    }
}

thread_local! {
    /// Room that a thread keeps between operations, so that tiles need no allocation.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Lends this thread's scratch room of at least `len` values, whatever they hold.
pub(super) fn with_scratch<R>(len: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    SCRATCH.with(|scratch| {
        let mut room = scratch.take();
        if room.len() < len {
            room.resize(len, 0.0);
        }
        let result = work(&mut room[..len]);
        scratch.replace(room);
        result
    })
}

/// Multiply-adds below which another thread costs more than it brings.
const SMALL: usize = 1 << 20;

/// Runs `count` independent tasks of `work` multiply-adds in all, on several threads where that pays.
/// What they compute cannot depend on which.
pub(super) fn run_tasks(count: usize, work: usize, task: impl Fn(usize) + Send + Sync) {
    if work < SMALL {
        (0..count).for_each(task);
    } else {
        (0..count).into_par_iter().for_each(task);
    }
}

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
    fn a_product_over_odd_shapes_equals_the_plain_one() {
        for (rows, cols, inner) in [(1, 1, 1), (3, 5, 7), (1, 40, 33), (17, 1, 65), (33, 31, 129), (70, 90, 300)] {
            let left = reference::numbers(rows * inner, 1);
            let right = reference::numbers(inner * cols, 2);
            let mut target = vec![1.0; rows * cols];
            let (left_matrix, right_matrix) = (Matrix::dense(&left, rows, inner), Matrix::dense(&right, inner, cols));
            product(Target::new(&mut target, cols), Onto::Destination, 0.5, left_matrix, right_matrix);
            let plain: Vec<f32> =
                reference::product(&left, &right, rows, inner, cols).iter().map(|sum| 1.0 + 0.5 * sum).collect();
            reference::assert_close(&target, &plain, 1e-5);
        }
    }

    #[test]
    fn a_transposed_factor_is_read_by_its_strides() {
        let (rows, cols, inner) = (5, 6, 9);
        let left = reference::numbers(rows * inner, 3);
        let right = reference::numbers(cols * inner, 4);
        let mut target = vec![0.0; rows * cols];
        let right_matrix = Matrix::dense(&right, cols, inner).transposed();
        let left_matrix = Matrix::dense(&left, rows, inner);
        product(Target::new(&mut target, cols), Onto::Nothing, 1.0, left_matrix, right_matrix);
        for i in 0..rows {
            for j in 0..cols {
                let sum: f32 = (0..inner).map(|k| left[i * inner + k] * right[j * inner + k]).sum();
                assert!((target[i * cols + j] - sum).abs() < 1e-5);
            }
        }
    }

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
