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
    /// Packs a checkpoint's weight (outputs, inputs), stored in blocks of `quantisation` along its inputs, for
    /// products of `format`. There are so many `columns`; `order` says which output each of them is, `None` for
    /// zeros.
    pub fn pack_quantised(
        format: Format,
        quantisation: Quantisation,
        weight: &Parameter<'_>,
        columns: usize,
        order: impl Fn(usize) -> Option<usize> + Send + Sync,
    ) -> Result<Self> {
        let inputs = weight.dims().last().copied().unwrap_or(0);
        let quantised = Quantised::pack(quantisation, inputs, columns, |panel, pack| {
            weight.with_rows(outputs_of(panel, columns, &order), inputs, pack)
        })?;
        let inner = quantised.inner();
        Ok(Self { values: Values::Quantised(quantised, format), inner, outputs: columns })
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
        let Some(plain) = weight.plain() else {
            return Self::pack_made(format, shape, order, |output, to| weight.read(output * of_output, to));
        };
        Self::pack_columns(format, shape, |panel, pack| {
            weight.with_rows(outputs_of(panel, columns, &order), of_output, |rows| {
                pack(&rows.map(|row| row.map_or(Column::Zeros, |bytes| Column::Stored(bytes, plain))))
            })
        })
    }

    /// Packs `outputs` columns of `inner` positions; `fill(output, column)` writes one column, whose
    /// values start as zeros.
    pub fn pack(
        format: Format,
        outputs: usize,
        inner: usize,
        fill: impl Fn(usize, &mut [f32]) -> Result<()> + Send + Sync,
    ) -> Result<Self> {
        Self::pack_made(format, Shape { columns: outputs, inputs: inner, taps: 1 }, Some, fill)
    }

    fn pack_made(
        format: Format,
        shape: Shape,
        order: impl Fn(usize) -> Option<usize> + Send + Sync,
        fill: impl Fn(usize, &mut [f32]) -> Result<()> + Send + Sync,
    ) -> Result<Self> {
        Self::pack_columns(format, shape, |panel, pack| {
            let mut columns = [const { Column::Zeros }; PANEL];
            for (column, output) in columns.iter_mut().zip(outputs_of(panel, shape.columns, &order)) {
                let Some(output) = output else { continue };
                let mut values = vec![0.0; shape.inputs * shape.taps];
                fill(output, &mut values)?;
                *column = Column::Made(values);
            }
            pack(&columns)
        })
    }

    /// Packs panel after panel; `lend(panel, pack)` calls `pack` with the panel's columns.
    fn pack_columns(
        format: Format,
        shape: Shape,
        lend: impl Fn(usize, &mut dyn FnMut(&[Column<'_>; PANEL]) -> Result<()>) -> Result<()> + Send + Sync,
    ) -> Result<Self> {
        let inputs = match format {
            Format::F32 => shape.inputs.next_multiple_of(f32::DEPTH),
            Format::Bf16 => shape.inputs.next_multiple_of(bf16::DEPTH),
        };
        let inner = shape.taps * inputs;
        let mut values = Buffer::new(format, shape.columns.div_ceil(PANEL) * inner * PANEL)?;
        match format {
            Format::F32 => pack_panels::<f32>(values.values_mut(), inner, shape, lend),
            Format::Bf16 => pack_panels::<bf16>(values.values_mut(), inner, shape, lend),
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

fn pack_panels<E: Element>(
    to: &mut [E],
    inner: usize,
    shape: Shape,
    lend: impl Fn(usize, &mut dyn FnMut(&[Column<'_>; PANEL]) -> Result<()>) -> Result<()> + Send + Sync,
) -> Result<()> {
    let panels = to.par_chunks_mut((inner * PANEL).max(1));
    panels.enumerate().try_for_each(|(panel, to)| lend(panel, &mut |columns| pack_panel(shape, columns, to)))
}

/// The outputs of a panel's columns, of which there are so many in all.
fn outputs_of(panel: usize, columns: usize, order: impl Fn(usize) -> Option<usize>) -> [Option<usize>; PANEL] {
    std::array::from_fn(|lane| Some(panel * PANEL + lane).filter(|column| *column < columns).and_then(&order))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::parameter::Stored;
    use crate::ops::parameter::tests::behind;

    #[test]
    fn a_panel_holds_its_outputs_side_by_side_and_pairs_of_positions() {
        let (outputs, inner) = (18, 3);
        let fill = |output: usize, column: &mut [f32]| {
            (0..inner).for_each(|at| column[at] = (output * 10 + at) as f32);
            Ok(())
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
            let file = behind(3, &halves(|value| bf16::from_f32(value).to_le_bytes()));
            let in_file = Parameter::within(&file, 3..file.0.len(), Stored::Bf16, &dims);
            let weights = weights.iter().chain([&in_file]);
            for (weight, format) in weights.flat_map(|weight| [(weight, Format::F32), (weight, Format::Bf16)]) {
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

    #[test]
    fn a_weight_whose_file_ends_too_early_is_an_error() {
        let file = behind(0, &[0; 2 * 64 * 32 - 1]);
        let weight = Parameter::within(&file, 0..2 * 64 * 32, Stored::F16, &[64, 32]);
        assert!(Panels::pack_weight(Format::Bf16, &weight, (64, 1), Some).is_err());
        let blocks = Parameter::within(&file, 0..64 * 34, Stored::Quantised(Quantisation::Q8_0), &[64, 32]);
        assert!(Panels::pack_quantised(Format::F32, Quantisation::Q8_0, &blocks, 64, Some).is_ok());
        let blocks = Parameter::within(&file, 2000..2000 + 64 * 34, Stored::Quantised(Quantisation::Q8_0), &[64, 32]);
        assert!(Panels::pack_quantised(Format::F32, Quantisation::Q8_0, &blocks, 64, Some).is_err());
    }
}
