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

/// As [`with_scratch`], for `len` bytes.
pub(super) fn with_bytes<R>(len: usize, work: impl FnOnce(&mut [u8]) -> R) -> Result<R> {
    with_scratch(len.div_ceil(size_of::<f32>()), |room: &mut [f32]| {
        // SAFETY: any `f32` is four bytes, and any four bytes are one.
        #[allow(unsafe_code)]
        let bytes = unsafe { std::slice::from_raw_parts_mut(room.as_mut_ptr().cast::<u8>(), size_of_val(room)) };
        work(&mut bytes[..len])
    })
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use half::bf16;

    use super::*;
    use crate::ops::buffer::Format;
    use crate::ops::misuse;

    fn on<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
    }

    #[test]
    fn every_task_runs_once_whatever_the_work() {
        for (count, work) in [(0, 0), (1, usize::MAX), (7, 0), (7, 3 * SMALL), (1000, 3 * SMALL)] {
            for threads in [1, 2, 3] {
                let runs: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                let task = |task: usize| {
                    runs[task].fetch_add(1, Ordering::Relaxed);
                    Ok(())
                };
                on(threads, || run_tasks(count, work, task)).unwrap();
                assert!(runs.iter().all(|runs| runs.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn the_error_of_a_task_is_the_error_of_all() {
        for work in [0, 3 * SMALL] {
            let task = |task| if task == 5 { Err(misuse("task 5".to_owned())) } else { Ok(()) };
            let error = run_tasks(9, work, task).unwrap_err().to_string();
            assert!(error.contains("task 5"), "{error}");
        }
    }

    #[test]
    fn little_work_is_one_task_and_much_work_some_for_each_thread() {
        assert_eq!((wanted_tasks(0), wanted_tasks(SMALL - 1)), (1, 1));
        for threads in [1, 2, 3] {
            let most = on(threads, || wanted_tasks(usize::MAX));
            assert!(most >= threads && most.is_multiple_of(threads), "{most} tasks for {threads} threads");
        }
    }

    #[test]
    fn room_is_as_large_as_asked_for_and_nobody_elses() {
        let sizes = [5, 5000, 70, 1, 0, 900, 12, 13, 14];
        for len in sizes {
            with_scratch::<f32, _>(len, |outer| {
                outer.fill(1.0);
                with_scratch::<f32, _>(len, |inner| {
                    assert_eq!(inner.len(), len);
                    inner.fill(2.0);
                })
                .unwrap();
                with_scratch::<bf16, _>(len, |inner| inner.fill(bf16::ZERO)).unwrap();
                assert!(outer.len() == len && outer.iter().all(|value| *value == 1.0));
            })
            .unwrap();
        }
    }

    #[test]
    fn a_thread_keeps_its_room_for_the_next_task() {
        let place = || with_scratch::<f32, _>(4321, |room| room.as_ptr().addr()).unwrap();
        assert_eq!(place(), place());
        for len in 1..20 {
            with_scratch::<bf16, _>(len * 1000, |_| ()).unwrap();
        }
        ROOMS.with(|rooms| {
            let rooms = rooms.borrow();
            assert!(rooms.len() <= 6);
            assert!(rooms.iter().any(|room| room.format() == Format::Bf16));
        });
    }

    #[test]
    fn parts_are_written_where_they_lie() {
        let mut values = [0u32; 10];
        let shared = Shared::new(&mut values);
        // SAFETY: the two parts do not overlap.
        #[allow(unsafe_code)]
        unsafe {
            shared.part(2..5).fill(1);
            shared.part(5..10).fill(2);
            shared.part(10..10).fill(3);
        }
        assert_eq!(shared.len(), 10);
        assert_eq!(values, [0, 0, 1, 1, 1, 2, 2, 2, 2, 2]);
    }

    #[test]
    #[should_panic(expected = "past the destination")]
    fn a_part_past_the_end_is_refused() {
        let mut values = [0u32; 10];
        // SAFETY: the only part.
        #[allow(unsafe_code)]
        unsafe {
            Shared::new(&mut values).part(5..11);
        }
    }
}
