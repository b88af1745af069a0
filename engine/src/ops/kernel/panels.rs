//! Weights as the tile kernels read them, packed once at load.
//!
//! The outputs are cut into panels of [`PANEL`]. Within a panel the inner positions follow each other,
//! each as the values of its [`PANEL`] outputs; `bf16` positions go in pairs, the two values of an output
//! side by side. So one vector load (or one tile of sixteen lines) is what one multiply-add takes.

use half::bf16;
use rayon::prelude::*;

use super::blocks::Quantisation;
use super::element::Element;
use super::quantised::Quantised;
use crate::Result;
use crate::ops::buffer::{Buffer, Format};
use crate::ops::parameter::Parameter;
use crate::ops::shared::with_scratch;

/// Outputs of a panel: the lanes of the widest vector, and the columns of a tile.
pub(in crate::ops) const PANEL: usize = 16;

/// A packed right factor (inner, outputs).
pub(in crate::ops) struct Panels {
    values: Values,
    /// Inner positions, a whole number of `DEPTH`s.
    inner: usize,
    /// Outputs that stand for something; the last panel is filled up with zeros.
    outputs: usize,
}

enum Values {
    Packed(Buffer),
    /// Unpacked on the way into a product of this format.
    Quantised(Quantised, Format),
}

impl Panels {
    /// Packs `outputs` columns of `blocks` quantised blocks each for products of `format`; `of(column)` is
    /// a column's bytes, `None` for zeros.
    pub fn pack_quantised<'a>(
        format: Format,
        quantisation: Quantisation,
        outputs: usize,
        blocks: usize,
        of: impl Fn(usize) -> Option<&'a [u8]> + Send + Sync,
    ) -> Self {
        let quantised = Quantised::pack(quantisation, outputs, blocks, of);
        let inner = quantised.inner();
        Self { values: Values::Quantised(quantised, format), inner, outputs }
    }

    /// Packs a checkpoint's weight (outputs, inputs, `taps`) with its inner positions as windows have them: taps,
    /// then inputs, each tap's padded to whole `DEPTH`s. There are so many `columns`; `order` says which output
    /// each of them is, `None` for zeros.
    pub fn pack_weight(
        format: Format,
        weight: &Parameter<'_>,
        (columns, taps): (usize, usize),
        order: impl Fn(usize) -> Option<usize> + Send + Sync,
    ) -> Result<Self> {
        /// Values of a lane at a time: those of a panel stay in the first cache.
        const BLOCK: usize = 288;
        let outputs = weight.dims().first().copied().unwrap_or(1).max(1);
        let inputs = weight.dims().iter().product::<usize>() / (outputs * taps);
        let shape = Shape { columns, inputs, taps, block: BLOCK / taps };
        match format {
            Format::F32 => Self::pack_as::<f32>(shape, |column, start, to| match order(column) {
                Some(output) => weight.read(output * inputs * taps + start, to),
                None => to.fill(0.0),
            }),
            Format::Bf16 => Self::pack_as::<bf16>(shape, |column, start, to| match order(column) {
                Some(output) => weight.read(output * inputs * taps + start, to),
                None => to.fill(bf16::ZERO),
            }),
        }
    }

    /// Packs `outputs` columns of `inner` positions; `fill(output, column)` writes one column, whose
    /// values start as zeros.
    pub fn pack(
        format: Format,
        outputs: usize,
        inner: usize,
        fill: impl Fn(usize, &mut [f32]) + Send + Sync,
    ) -> Result<Self> {
        // Columns are written whole, and not again for each part of them.
        let shape = Shape { columns: outputs, inputs: inner, taps: 1, block: inner };
        match format {
            Format::F32 => Self::pack_as::<f32>(shape, |column, _, to| {
                to.fill(0.0);
                fill(column, to);
            }),
            Format::Bf16 => Self::pack_as::<bf16>(shape, |column, _, to| {
                let mut values = vec![0.0; inner];
                fill(column, &mut values);
                to.iter_mut().zip(values).for_each(|(to, value)| *to = bf16::from_f32(value));
            }),
        }
    }

    /// `read(column, start, to)` reads a part of a column's (inputs, taps).
    fn pack_as<E: Element>(shape: Shape, read: impl Fn(usize, usize, &mut [E]) + Send + Sync) -> Result<Self> {
        let Shape { columns, inputs, taps, .. } = shape;
        let inner = taps * inputs.next_multiple_of(E::DEPTH);
        let panels = columns.div_ceil(PANEL);
        let mut buffer = Buffer::new(E::FORMAT, panels * inner * PANEL)?;
        let values = buffer.values_mut::<E>().par_chunks_mut((inner * PANEL).max(1));
        values.enumerate().try_for_each(|(panel, to)| {
            pack_panel(shape, to, |lane, start, to| match panel * PANEL + lane {
                column if column < columns => read(column, start, to),
                _ => to.fill(E::default()),
            })
        })?;
        Ok(Self { values: Values::Packed(buffer), inner, outputs: columns })
    }

    pub fn format(&self) -> Format {
        match &self.values {
            Values::Packed(values) => values.format(),
            Values::Quantised(_, format) => *format,
        }
    }

    pub fn inner(&self) -> usize {
        self.inner
    }

    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// The packed values: (panels, inner / DEPTH, [`PANEL`], DEPTH); none where weights are quantised.
    pub fn values<E: Element>(&self) -> &[E] {
        match &self.values {
            Values::Packed(values) => values.values(),
            Values::Quantised(..) => &[],
        }
    }

    /// The weights, if they are to be unpacked first.
    pub(super) fn quantised(&self) -> Option<&Quantised> {
        match &self.values {
            Values::Packed(_) => None,
            Values::Quantised(weight, _) => Some(weight),
        }
    }

    /// Whether the weights are to be unpacked first.
    pub fn is_quantised(&self) -> bool {
        self.quantised().is_some()
    }
}

/// A weight to pack.
#[derive(Clone, Copy)]
struct Shape {
    columns: usize,
    inputs: usize,
    taps: usize,
    /// Inputs at a time.
    block: usize,
}

/// Packs one panel; `read(lane, start, to)` reads a part of a lane's (inputs, taps).
fn pack_panel<E: Element>(shape: Shape, to: &mut [E], read: impl Fn(usize, usize, &mut [E])) -> Result<()> {
    let Shape { inputs, taps, block, .. } = shape;
    let of_block = block.max(1).next_multiple_of(E::DEPTH);
    let of_tap = inputs.next_multiple_of(E::DEPTH) * PANEL;
    with_scratch(of_block * taps, |values: &mut [E]| {
        for first in (0..inputs).step_by(of_block) {
            let count = of_block.min(inputs - first);
            let padded = count.next_multiple_of(E::DEPTH);
            for lane in 0..PANEL {
                read(lane, first * taps, &mut values[..count * taps]);
                values[count * taps..padded * taps].fill(E::default());
                let (values, to) = (&values[..padded * taps], &mut to[first * PANEL + lane * E::DEPTH..]);
                // The usual ones, each compiled for itself.
                match (taps, E::DEPTH) {
                    (1, 1) => interleave(values.as_chunks::<1>().0, of_tap, to),
                    (1, 2) => interleave(values.as_chunks::<2>().0, of_tap, to),
                    (9, 1) => interleave(values.as_chunks::<9>().0, of_tap, to),
                    (9, 2) => interleave(values.as_chunks::<18>().0, of_tap, to),
                    _ => interleave(values.chunks_exact(taps * E::DEPTH), of_tap, to),
                }
            }
        }
    })
}

/// Lays a lane's factors of values (`DEPTH` inputs, taps) into packed positions, each tap's `of_tap` apart.
#[inline(always)]
fn interleave<E: Element>(factors: impl IntoIterator<Item: AsRef<[E]>>, of_tap: usize, to: &mut [E]) {
    for (step, factor) in factors.into_iter().enumerate() {
        let factor = factor.as_ref();
        let taps = factor.len() / E::DEPTH;
        for tap in 0..taps {
            let to = &mut to[tap * of_tap + step * PANEL * E::DEPTH..][..E::DEPTH];
            for (part, to) in to.iter_mut().enumerate() {
                *to = factor[part * taps + tap];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panel_holds_its_outputs_side_by_side_and_pairs_of_positions() {
        let (outputs, inner) = (18, 3);
        let fill = |output: usize, column: &mut [f32]| {
            (0..inner).for_each(|at| column[at] = (output * 10 + at) as f32);
        };
        let single = Panels::pack(Format::F32, outputs, inner, fill).unwrap();
        assert_eq!(single.values::<f32>()[..2], [0.0, 10.0]);
        assert_eq!(single.values::<f32>()[PANEL], 1.0);
        assert_eq!(single.values::<f32>()[3 * PANEL..3 * PANEL + 3], [160.0, 170.0, 0.0]);
        let pairs = Panels::pack(Format::Bf16, outputs, inner, fill).unwrap();
        assert_eq!((pairs.inner(), pairs.outputs()), (4, 18));
        let values: Vec<f32> = pairs.values::<bf16>().iter().map(|value| value.to_f32()).collect();
        assert_eq!(values[..4], [0.0, 1.0, 10.0, 11.0]);
        // The fourth position does not exist.
        assert_eq!(values[2 * PANEL..2 * PANEL + 4], [2.0, 0.0, 12.0, 0.0]);
    }
}
