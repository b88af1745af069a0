//! What several threads need to work on one operation: its output shared out, room for each thread,
//! and tasks.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::Range;

use rayon::prelude::*;

use super::buffer::{Buffer, Value};
use crate::Result;

/// A destination that several threads write at once, each its own part.
pub(super) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    values: PhantomData<&'a mut [T]>,
}

// SAFETY: `Shared` stands for an exclusive borrow of plain numbers; its methods make their callers
// answer for not overlapping.
#[allow(unsafe_code)]
unsafe impl<T: Copy + Send + Sync> Sync for Shared<'_, T> {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl<T: Copy + Send + Sync> Send for Shared<'_, T> {}

impl<'a, T: Copy + Send + Sync> Shared<'a, T> {
    /// Shares `values` out.
    pub fn new(values: &'a mut [T]) -> Self {
        Self { start: values.as_mut_ptr(), len: values.len(), values: PhantomData }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// One contiguous part.
    ///
    /// # Safety
    /// The parts in use at the same time must not overlap.
    #[inline(always)]
    #[allow(unsafe_code, clippy::mut_from_ref)]
    pub unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "a part reaches past the destination");
        // SAFETY: within bounds by the assert; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }

    /// Where the value at `index` lies; `index` may be the length.
    #[inline(always)]
    pub fn at(&self, index: usize) -> *mut T {
        debug_assert!(index <= self.len, "a place past the destination");
        self.start.wrapping_add(index)
    }
}

thread_local! {
    /// Room that a thread keeps between tasks, so that it stays in its core's cache.
    static ROOMS: RefCell<Vec<Buffer>> = const { RefCell::new(Vec::new()) };
}

/// Lends `work` room for `len` values of this thread's, whatever they hold.
pub(super) fn with_scratch<T: Value, R>(len: usize, work: impl FnOnce(&mut [T]) -> R) -> Result<R> {
    let kept = ROOMS.with(|rooms| {
        let mut rooms = rooms.borrow_mut();
        let fitting = rooms.iter().position(|room| room.format() == T::FORMAT && room.len() >= len);
        fitting.map(|place| rooms.swap_remove(place))
    });
    let mut room = match kept {
        Some(room) => room,
        None => Buffer::new(T::FORMAT, len)?,
    };
    let result = work(&mut room.values_mut::<T>()[..len]);
    ROOMS.with(|rooms| {
        /// Sizes that a thread remembers.
        const ROOMS: usize = 6;
        let mut rooms = rooms.borrow_mut();
        if rooms.len() == ROOMS {
            // The smallest is the cheapest to get anew.
            let smallest = (0..ROOMS).min_by_key(|place| rooms[*place].len()).unwrap_or(0);
            rooms.swap_remove(smallest);
        }
        rooms.push(room);
    });
    Ok(result)
}

/// Multiply-adds below which another thread costs more than it brings.
const SMALL: usize = 1 << 20;

/// How many parts `work` multiply-adds are best cut into, so that threads end together.
pub(super) fn wanted_tasks(work: usize) -> usize {
    const PER_THREAD: usize = 4;
    (work / SMALL).clamp(1, PER_THREAD * rayon::current_num_threads())
}

/// Runs `count` independent tasks of `work` multiply-adds in all, on several threads where that pays.
/// What they compute cannot depend on which.
pub(super) fn run_tasks(count: usize, work: usize, task: impl Fn(usize) -> Result<()> + Send + Sync) -> Result<()> {
    if count <= 1 || work < 2 * SMALL {
        (0..count).try_for_each(task)
    } else {
        (0..count).into_par_iter().with_max_len(1).try_for_each(task)
    }
}
