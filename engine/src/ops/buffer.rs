//! Host memory for activations and packed weights: aligned for the widest vectors, in huge pages where
//! the system has them, and given from one operation to the next. A picture asks for the same few
//! sizes thousands of times; fresh pages would cost more than many of the operations.

use std::sync::{Mutex, PoisonError};

use half::bf16;
use memmap2::MmapMut;

use crate::{Error, Result};

/// The number format of host values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    F32,
    Bf16,
}

impl Format {
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

/// A type of host values.
pub(super) trait Value: Copy + Send + Sync + 'static {
    const FORMAT: Format;
}

impl Value for f32 {
    const FORMAT: Format = Format::F32;
}

impl Value for bf16 {
    const FORMAT: Format = Format::Bf16;
}

/// `len` values of one format; the memory goes back to the pool when dropped.
pub(super) struct Buffer {
    /// Taken out by `drop` alone.
    room: Option<MmapMut>,
    format: Format,
    len: usize,
}

impl Buffer {
    /// Room for `len` values, whatever it holds; whoever asks for it writes all of it.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] where the system refuses.
    pub fn new(format: Format, len: usize) -> Result<Self> {
        let bytes = len.checked_mul(format.bytes()).ok_or_else(|| refused(usize::MAX))?;
        Ok(Self { room: Some(pool().take(bytes)?), format, len })
    }

    /// A buffer of these values.
    pub fn from_f32(values: &[f32], format: Format) -> Result<Self> {
        let mut buffer = Self::new(format, values.len())?;
        match format {
            Format::F32 => buffer.values_mut::<f32>().copy_from_slice(values),
            Format::Bf16 => {
                for (to, from) in buffer.values_mut::<bf16>().iter_mut().zip(values) {
                    *to = bf16::from_f32(*from);
                }
            }
        }
        Ok(buffer)
    }

    pub fn format(&self) -> Format {
        self.format
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// Its values; it must be of `T`'s format.
    pub fn values<T: Value>(&self) -> &[T] {
        assert_eq!(self.format, T::FORMAT, "format of a buffer");
        let start = self.room.as_ref().map_or(std::ptr::null(), |room| room.as_ptr());
        // SAFETY: the room is page-aligned, holds at least `len` values of this format, and any bits are
        // a number.
        #[allow(unsafe_code)]
        unsafe {
            std::slice::from_raw_parts(start.cast(), self.len)
        }
    }

    /// Its values, to be written; it must be of `T`'s format.
    pub fn values_mut<T: Value>(&mut self) -> &mut [T] {
        assert_eq!(self.format, T::FORMAT, "format of a buffer");
        let start = self.room.as_mut().map_or(std::ptr::null_mut(), |room| room.as_mut_ptr());
        // SAFETY: as in `values`, and the borrow is exclusive.
        #[allow(unsafe_code)]
        unsafe {
            std::slice::from_raw_parts_mut(start.cast(), self.len)
        }
    }

    /// Its values as `f32`, copied.
    pub fn to_f32(&self) -> Vec<f32> {
        match self.format {
            Format::F32 => self.values::<f32>().to_vec(),
            Format::Bf16 => self.values::<bf16>().iter().map(|value| value.to_f32()).collect(),
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(room) = self.room.take() {
            pool().give(room);
        }
    }
}

fn refused(bytes: usize) -> Error {
    Error::OutOfMemory(format!("{bytes} bytes on the host"))
}

/// Rooms that nobody uses, and what is out.
struct Pool {
    state: Mutex<PoolState>,
}

struct PoolState {
    /// Smallest first.
    free: Vec<MmapMut>,
    free_bytes: usize,
    used_bytes: usize,
    most_used: usize,
}

fn pool() -> &'static Pool {
    static POOL: Pool =
        Pool { state: Mutex::new(PoolState { free: Vec::new(), free_bytes: 0, used_bytes: 0, most_used: 0 }) };
    &POOL
}

/// Gives the memory that nobody uses back to the system.
pub(crate) fn release_memory() {
    let mut state = pool().lock();
    state.free.clear();
    state.free_bytes = 0;
    state.most_used = state.used_bytes;
}

impl Pool {
    fn lock(&self) -> std::sync::MutexGuard<'_, PoolState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, bytes: usize) -> Result<MmapMut> {
        let bytes = rounded(bytes);
        let mut state = self.lock();
        let place = state.free.partition_point(|room| room.len() < bytes);
        let room = match state.free.get(place) {
            // Not more than half of it is wasted.
            Some(room) if room.len() <= bytes * 2 => {
                let room = state.free.remove(place);
                state.free_bytes -= room.len();
                room
            }
            _ => {
                // Rooms of other sizes make way: all together never exceed what was once in use.
                let most = state.most_used.max(state.used_bytes + bytes);
                while state.used_bytes + state.free_bytes + bytes > most {
                    let Some(room) = state.free.pop() else { break };
                    state.free_bytes -= room.len();
                }
                map(bytes)?
            }
        };
        state.used_bytes += room.len();
        state.most_used = state.most_used.max(state.used_bytes);
        Ok(room)
    }

    fn give(&self, room: MmapMut) {
        let mut state = self.lock();
        state.used_bytes -= room.len();
        state.free_bytes += room.len();
        let place = state.free.partition_point(|free| free.len() < room.len());
        state.free.insert(place, room);
    }
}

/// Sizes in steps of an eighth, so that rooms of like sizes stand in for each other.
fn rounded(bytes: usize) -> usize {
    const SMALLEST: usize = 4096;
    let step = (bytes.next_power_of_two() / 8).max(SMALLEST);
    bytes.max(1).next_multiple_of(step)
}

fn map(bytes: usize) -> Result<MmapMut> {
    let room = MmapMut::map_anon(bytes).map_err(|_| refused(bytes))?;
    #[cfg(target_os = "linux")]
    {
        const HUGE_PAGE: usize = 2 << 20;
        if bytes >= HUGE_PAGE {
            // A wish: many systems grant huge pages only to those who ask.
            let _ = room.advise(memmap2::Advice::HugePage);
        }
    }
    Ok(room)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_come_back_in_both_formats() {
        let values = [1.0, -2.5, 0.125];
        for format in [Format::F32, Format::Bf16] {
            let buffer = Buffer::from_f32(&values, format).unwrap();
            assert_eq!((buffer.len(), buffer.format()), (3, format));
            assert_eq!(buffer.to_f32(), values);
        }
    }

    #[test]
    fn memory_that_is_given_back_is_given_out_again() {
        // A size that no other test uses.
        let len = 7_654_321;
        let buffer = Buffer::new(Format::F32, len).unwrap();
        let start = buffer.values::<f32>().as_ptr();
        drop(buffer);
        let again = Buffer::new(Format::F32, len - 1000).unwrap();
        assert_eq!(again.values::<f32>().as_ptr(), start);
    }

    #[test]
    fn more_than_the_machine_has_is_an_error_and_not_a_panic() {
        assert!(matches!(Buffer::new(Format::F32, usize::MAX / 2), Err(Error::OutOfMemory(_))));
        assert!(matches!(Buffer::new(Format::F32, 1 << 55), Err(Error::OutOfMemory(_))));
    }

    #[test]
    fn sizes_are_rounded_by_an_eighth_at_most() {
        for bytes in [1, 4096, 5000, 1 << 20, (1 << 20) + 1, 123_456_789] {
            let rounded = rounded(bytes);
            assert!(rounded >= bytes && rounded - bytes <= (bytes / 4).max(4096), "{bytes} → {rounded}");
        }
    }
}
