//! Matrix products on the host, and what several threads need to share their result.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

use rayon::prelude::*;

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
pub(super) const SMALL: usize = 1 << 20;

/// Runs `count` independent tasks of `work` multiply-adds in all, on several threads where that pays.
/// What they compute cannot depend on which.
pub(super) fn run_tasks(count: usize, work: usize, task: impl Fn(usize) + Send + Sync) {
    if work < SMALL {
        (0..count).for_each(task);
    } else {
        (0..count).into_par_iter().for_each(task);
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
}
