//! Weights as the tile kernels read them, packed once at load.
//!
//! The outputs are cut into panels of [`PANEL`]. Within a panel the inner positions follow each other,
//! each as the values of its [`PANEL`] outputs; `bf16` positions go in pairs, the two values of an output
//! side by side. So one vector load (or one tile of sixteen lines) is what one multiply-add takes.

use half::bf16;
use rayon::prelude::*;

use super::blocks::Quantisation;
use super::element::Element;
use super::packing::{Column, Shape, pack_panel};
use super::quantised::Quantised;
use crate::Result;
use crate::ops::buffer::{Buffer, Format};
use crate::ops::parameter::Parameter;

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
        let outputs = weight.dims().first().copied().unwrap_or(1).max(1);
        let of_output = weight.dims().iter().product::<usize>() / outputs;
        let shape = Shape { columns, inputs: of_output / taps, taps };
        let column = |column| match order(column) {
            None => Column::Zeros,
            Some(output) => match weight.plain(output * of_output, of_output) {
                Some((bytes, format)) => Column::Stored(bytes, format),
                None => {
                    let mut values = vec![0.0; of_output];
                    weight.read(output * of_output, &mut values);
                    Column::Made(values)
                }
            },
        };
        Self::pack_columns(format, shape, column)
    }

    /// Packs `outputs` columns of `inner` positions; `fill(output, column)` writes one column, whose
    /// values start as zeros.
    pub fn pack(
        format: Format,
        outputs: usize,
        inner: usize,
        fill: impl Fn(usize, &mut [f32]) + Send + Sync,
    ) -> Result<Self> {
        Self::pack_columns(format, Shape { columns: outputs, inputs: inner, taps: 1 }, |column| {
            let mut values = vec![0.0; inner];
            fill(column, &mut values);
            Column::Made(values)
        })
    }

    fn pack_columns<'a>(
        format: Format,
        shape: Shape,
        column: impl Fn(usize) -> Column<'a> + Send + Sync,
    ) -> Result<Self> {
        let inputs = match format {
            Format::F32 => shape.inputs.next_multiple_of(f32::DEPTH),
            Format::Bf16 => shape.inputs.next_multiple_of(bf16::DEPTH),
        };
        let inner = shape.taps * inputs;
        let mut values = Buffer::new(format, shape.columns.div_ceil(PANEL) * inner * PANEL)?;
        match format {
            Format::F32 => pack_panels::<f32>(values.values_mut(), inner, shape, column),
            Format::Bf16 => pack_panels::<bf16>(values.values_mut(), inner, shape, column),
        }?;
        Ok(Self { values: Values::Packed(values), inner, outputs: shape.columns })
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

fn pack_panels<'a, E: Element>(
    to: &mut [E],
    inner: usize,
    shape: Shape,
    column: impl Fn(usize) -> Column<'a> + Send + Sync,
) -> Result<()> {
    let panels = to.par_chunks_mut((inner * PANEL).max(1));
    panels.enumerate().try_for_each(|(panel, to)| {
        let columns: [Column<'a>; PANEL] = std::array::from_fn(|lane| match panel * PANEL + lane {
            place if place < shape.columns => column(place),
            _ => Column::Zeros,
        });
        pack_panel(shape, &columns, to)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::parameter::Stored;

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

    #[test]
    fn a_weight_is_packed_taps_first_whatever_it_is_stored_in() {
        // More inputs than are packed at a time, an odd number of them, and a column of zeros.
        for (outputs, inputs, taps) in [(18, 67, 9), (3, 601, 1), (17, 5, 4), (1, 1, 1)] {
            let dims = [outputs, inputs, taps];
            let values: Vec<f32> = (0..dims.iter().product()).map(|value| (value % 255) as f32 - 99.0).collect();
            let halves = |of: fn(f32) -> [u8; 2]| values.iter().flat_map(|value| of(*value)).collect::<Vec<u8>>();
            let weights = [
                Parameter::from_values(&values, &dims),
                Parameter::new(halves(|value| half::f16::from_f32(value).to_le_bytes()), Stored::F16, &dims),
                Parameter::new(halves(|value| bf16::from_f32(value).to_le_bytes()), Stored::Bf16, &dims),
                Parameter::new(
                    values.iter().flat_map(|value| f64::from(*value).to_le_bytes()).collect::<Vec<u8>>(),
                    Stored::F64,
                    &dims,
                ),
            ];
            for (weight, format) in weights.iter().flat_map(|weight| [(weight, Format::F32), (weight, Format::Bf16)]) {
                let order = |column: usize| column.checked_sub(1);
                let panels = Panels::pack_weight(format, weight, (outputs + 1, taps), order).unwrap();
                let (depth, got): (usize, Vec<f32>) = match format {
                    Format::F32 => (1, panels.values::<f32>().to_vec()),
                    Format::Bf16 => (2, panels.values::<bf16>().iter().map(|value| value.to_f32()).collect()),
                };
                let padded = inputs.next_multiple_of(depth);
                assert_eq!((panels.inner(), panels.outputs()), (taps * padded, outputs + 1));
                for (at, value) in got.into_iter().enumerate() {
                    let (panel, rest) = (at / (taps * padded * PANEL), at % (taps * padded * PANEL));
                    let (factor, lane, part) = (rest / (PANEL * depth), rest / depth % PANEL, rest % depth);
                    let (tap, input) = ((factor * depth + part) / padded, (factor * depth + part) % padded);
                    let output = (panel * PANEL + lane).checked_sub(1).filter(|output| *output < outputs);
                    let expected = match output {
                        Some(output) if input < inputs => values[(output * inputs + input) * taps + tap],
                        _ => 0.0,
                    };
                    assert_eq!(value, expected, "{dims:?}, output {output:?}, input {input}, tap {tap}");
                }
            }
        }
    }
}
