//! One panel of a checkpoint's weight: read, rounded and laid out in a single pass over file and memory.

use super::convert::Plain;
use super::element::Element;
use super::isa::{Isa, Kernel, dispatch};
use super::panels::PANEL;
use super::simd::Simd;
use crate::Result;
use crate::ops::shared::with_scratch;

/// A weight to pack: columns of (inputs, taps).
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub columns: usize,
    pub inputs: usize,
    pub taps: usize,
}

/// One output's weights, (inputs, taps).
pub(super) enum Column<'a> {
    Zeros,
    /// As a file has them.
    Stored(&'a [u8], Plain),
    Made(Vec<f32>),
}

impl Column<'_> {
    /// The bytes from value `start` on and their format; `None` for zeros.
    fn from(&self, start: usize) -> Option<(&[u8], Plain)> {
        match self {
            Self::Zeros => None,
            Self::Stored(bytes, format) => Some((&bytes[start * format.bytes()..], *format)),
            Self::Made(values) => {
                let values = &values[start..];
                // SAFETY: any `f32` is four bytes.
                let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) };
                Some((bytes, Plain::F32))
            }
        }
    }
}

/// Packs [`PANEL`] columns: (taps, inputs padded to whole `DEPTH`s, [`PANEL`]).
pub(super) fn pack_panel<E: Element>(shape: Shape, columns: &[Column<'_>; PANEL], to: &mut [E]) -> Result<()> {
    /// Values of a column at a time: the panel's stay in the first cache.
    const BLOCK: usize = 288;
    let Shape { inputs, taps, .. } = shape;
    let of_block = (BLOCK / taps).max(1).next_multiple_of(E::DEPTH);
    let of_tap = inputs.next_multiple_of(E::DEPTH) * PANEL;
    // One position more for what lies behind the last one.
    with_scratch((of_block * taps + 1) * PANEL, |positions: &mut [f32]| {
        for first in (0..inputs).step_by(of_block) {
            let count = of_block.min(inputs - first);
            let block = Block {
                lanes: std::array::from_fn(|lane| columns[lane].from(first * taps)),
                count,
                taps,
                positions: positions.as_chunks_mut().0,
                to: &mut to[first * PANEL..],
                of_tap,
            };
            dispatch(Isa::best(), block);
        }
    })
}

/// Some inputs of all of a panel's columns.
struct Block<'a, E> {
    /// Each column's bytes from the first input on.
    lanes: [Option<(&'a [u8], Plain)>; PANEL],
    count: usize,
    taps: usize,
    /// Room for all taps of all inputs, padded, and one more.
    positions: &'a mut [[f32; PANEL]],
    /// The first tap's first input; the next tap's is `of_tap` values further.
    to: &'a mut [E],
    of_tap: usize,
}

impl<E: Element> Kernel for Block<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { lanes, count, taps, positions, to, of_tap } = self;
        let (values, padded) = (count * taps, count.next_multiple_of(E::DEPTH));
        assert!(positions.len() > taps * padded, "room for positions");
        let (mut input, mut tap) = (0, 0);
        for start in (0..values).step_by(S::LANES) {
            // Behind the last one is room for what is not there.
            let mut places = [taps * padded; 16];
            for place in places.iter_mut().take(S::LANES.min(values - start)) {
                *place = tap * padded + input;
                tap += 1;
                if tap == taps {
                    (input, tap) = (input + 1, 0);
                }
            }
            for first in (0..PANEL).step_by(S::LANES) {
                let mut rows = [simd.splat(0.0); 16];
                for (row, lane) in rows.iter_mut().zip(&lanes[first..]).take(S::LANES) {
                    *row = load(simd, *lane, start, values);
                }
                let mut to = [std::ptr::null_mut(); 16];
                for (to, place) in to.iter_mut().zip(places) {
                    *to = positions[place][first..].as_mut_ptr();
                }
                // SAFETY: each has a vector's values of its own position left.
                unsafe { simd.store_columns(&rows, &to) }
            }
        }
        for tap in 0..taps {
            let positions = &mut positions[tap * padded..][..padded];
            positions[count..].fill([0.0; PANEL]);
            E::lay_out(positions, &mut to[tap * of_tap..][..padded * PANEL]);
        }
    }
}

/// The vector of a lane's values from `start` on, with zeros behind the last of all `values`.
#[inline(always)]
fn load<S: Simd>(simd: S, lane: Option<(&[u8], Plain)>, start: usize, values: usize) -> S::F32 {
    let Some((bytes, format)) = lane else { return simd.splat(0.0) };
    format.load_first(simd, &bytes[start * format.bytes()..values * format.bytes()])
}
