//! A weight as a checkpoint stores it.

use std::borrow::Cow;

use half::bf16;
use rayon::prelude::*;

use super::buffer::{Buffer, Format};
use super::kernel::blocks::{Quantisation, STRETCH};
use super::kernel::convert::{Convert, Plain};
use super::kernel::element::Element;
use super::kernel::isa::{Isa, dispatch};
use super::tensor::{Place, Tensor};
use crate::Result;

/// The formats that weights are stored in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stored {
    F64,
    F32,
    F16,
    Bf16,
    Quantised(Quantisation),
}

impl Stored {
    /// The word that people know it by.
    pub fn word(self) -> &'static str {
        match self {
            Self::F64 => "F64",
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Quantised(format) => format.word(),
        }
    }

    /// Values of a block, and the bytes that it takes; plain numbers are blocks of one.
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::F64 => (1, 8),
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Quantised(format) => (format.values(), format.bytes()),
        }
    }

    /// Bytes of so many values; `None` if they are not whole blocks, or too many.
    pub fn bytes(self, values: usize) -> Option<usize> {
        let (of_block, bytes) = self.block();
        if values.is_multiple_of(of_block) { (values / of_block).checked_mul(bytes) } else { None }
    }
}

/// A weight's bytes, little-endian and in order, usually still in the mapped file.
pub(crate) struct Parameter<'a> {
    bytes: Cow<'a, [u8]>,
    stored: Stored,
    dims: Vec<usize>,
}

impl<'a> Parameter<'a> {
    /// `bytes` must be as many as `dims` ask for.
    pub fn new(bytes: impl Into<Cow<'a, [u8]>>, stored: Stored, dims: &[usize]) -> Self {
        let bytes = bytes.into();
        assert_eq!(Some(bytes.len()), stored.bytes(dims.iter().product()), "bytes of a weight");
        Self { bytes, stored, dims: dims.to_vec() }
    }

    /// A weight of these values.
    pub fn from_values(values: &[f32], dims: &[usize]) -> Self {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        assert_eq!(values.len(), dims.iter().product::<usize>(), "values of a weight");
        Self { bytes: Cow::Owned(bytes), stored: Stored::F32, dims: dims.to_vec() }
    }

    /// The same with bytes of its own.
    pub fn to_owned(&self) -> Parameter<'static> {
        Parameter { bytes: Cow::Owned(self.bytes.to_vec()), stored: self.stored, dims: self.dims.clone() }
    }

    /// The same values in another shape.
    pub fn reshaped(self, dims: &[usize]) -> Self {
        assert_eq!(self.dims.iter().product::<usize>(), dims.iter().product::<usize>(), "values of a weight");
        Self { dims: dims.to_vec(), ..self }
    }

    pub fn dims(&self) -> &[usize] {
        &self.dims
    }

    /// Its blocks' format and bytes, if it is stored in blocks.
    pub fn quantised(&self) -> Option<(Quantisation, &[u8])> {
        match self.stored {
            Stored::Quantised(format) => Some((format, &self.bytes)),
            _ => None,
        }
    }

    /// Its values from `start` on, rounded to nearest.
    pub(in crate::ops) fn read<E: Element>(&self, start: usize, to: &mut [E]) {
        match self.plain(start, to.len()) {
            Some((from, format)) => dispatch(Isa::best(), Convert { from, format, to }),
            None => self.read_in_pieces(start, to),
        }
    }

    /// The bytes of `len` values from `start` on, if they are numbers that vectors are loaded from.
    pub(in crate::ops) fn plain(&self, start: usize, len: usize) -> Option<(&[u8], Plain)> {
        let format = match self.stored {
            Stored::F32 => Plain::F32,
            Stored::F16 => Plain::F16,
            Stored::Bf16 => Plain::Bf16,
            Stored::F64 | Stored::Quantised(_) => return None,
        };
        Some((&self.bytes[start * format.bytes()..(start + len) * format.bytes()], format))
    }

    fn read_in_pieces<E: Element>(&self, start: usize, to: &mut [E]) {
        let mut piece = [0f32; 256];
        for (index, to) in to.chunks_mut(piece.len()).enumerate() {
            let (start, values) = (start + index * piece.len(), &mut piece[..to.len()]);
            match self.stored {
                Stored::Quantised(format) => unpack(format, &self.bytes, start, values),
                _ => {
                    let bytes = self.bytes[start * 8..].as_chunks().0;
                    values.iter_mut().zip(bytes).for_each(|(to, bytes)| *to = f64::from_le_bytes(*bytes) as f32);
                }
            }
            to.iter_mut().zip(values).for_each(|(to, value)| *to = E::from_f32(*value));
        }
    }

    /// All its values.
    pub fn values(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.dims.iter().product()];
        self.read(0, &mut values);
        values
    }

    /// It as a tensor at `place`.
    pub fn tensor(&self, place: &Place) -> Result<Tensor> {
        let Some(format) = place.on_host() else {
            return Ok(Tensor::on_device(self.on_device(place)?));
        };
        let mut buffer = Buffer::new(format, self.dims.iter().product())?;
        match format {
            Format::F32 => self.read_side_by_side::<f32>(buffer.values_mut()),
            Format::Bf16 => self.read_side_by_side::<bf16>(buffer.values_mut()),
        }
        Ok(Tensor::on_host(buffer, &self.dims))
    }

    fn read_side_by_side<E: Element>(&self, to: &mut [E]) {
        const PIECE: usize = 1 << 16;
        to.par_chunks_mut(PIECE).enumerate().for_each(|(index, to)| self.read(index * PIECE, to));
    }

    /// It as a tensor of another device.
    pub(super) fn on_device(&self, place: &Place) -> Result<candle_core::Tensor> {
        let tensor = candle_core::Tensor::from_vec(self.values(), self.dims.as_slice(), &candle_core::Device::Cpu)?;
        Ok(tensor.to_dtype(place.dtype())?.to_device(place.device())?)
    }
}

/// The values of blocks from number `start` on.
fn unpack(format: Quantisation, bytes: &[u8], start: usize, to: &mut [f32]) {
    let mut lines = [[0.0]; STRETCH];
    let (mut at, mut to) = (start, to);
    while !to.is_empty() {
        let (block, place) = (at / format.values(), at % format.values());
        let blocks = bytes[block * format.bytes()..][..format.bytes()].as_chunks::<1>().0;
        format.unpack(blocks, place / STRETCH, &mut lines);
        let values = &lines.as_flattened()[place % STRETCH..];
        let count = values.len().min(to.len());
        let (here, behind) = to.split_at_mut(count);
        here.copy_from_slice(&values[..count]);
        (at, to) = (at + count, behind);
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;
    use crate::ops::reference;

    #[test]
    fn every_stored_format_is_read() {
        let values = [1.0f32, -2.5, 0.125];
        let read = |bytes: Vec<u8>, stored| Parameter::new(&bytes, stored, &[3]).values();
        assert_eq!(read(values.iter().flat_map(|v| f64::from(*v).to_le_bytes()).collect(), Stored::F64), values);
        assert_eq!(read(values.iter().flat_map(|v| v.to_le_bytes()).collect(), Stored::F32), values);
        assert_eq!(read(values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(), Stored::F16), values);
        assert_eq!(read(values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(), Stored::Bf16), values);
    }

    #[test]
    fn a_part_of_blocks_is_read_from_its_place() {
        for format in Quantisation::ALL {
            let bytes = reference::quantised(format, 768, 1);
            let parameter = Parameter::new(&bytes, Stored::Quantised(format), &[3, 256]);
            let all = parameter.values();
            for (start, len) in [(0, 768), (256, 256), (31, 2), (5, 700), (767, 1), (64, 0)] {
                let mut part = vec![f32::NAN; len];
                parameter.read(start, &mut part);
                assert_eq!(part, all[start..start + len]);
            }
        }
    }

    #[test]
    fn a_part_is_read_from_its_place_on_every_instruction_set() {
        let values: Vec<f32> = (0..200).map(|value| value as f32 / 7.0 - 9.0).collect();
        let halves = |of: fn(f32) -> [u8; 2]| values.iter().flat_map(|value| of(*value)).collect::<Vec<u8>>();
        let stored = [
            (Plain::F32, values.iter().flat_map(|value| value.to_le_bytes()).collect(), values.clone()),
            (
                Plain::F16,
                halves(|value| f16::from_f32(value).to_le_bytes()),
                values.iter().map(|value| f16::from_f32(*value).to_f32()).collect(),
            ),
            (
                Plain::Bf16,
                halves(|value| bf16::from_f32(value).to_le_bytes()),
                values.iter().map(|value| bf16::from_f32(*value).to_f32()).collect(),
            ),
        ];
        for (format, bytes, expected) in stored {
            let each = bytes.len() / values.len();
            // Bytes of a file lie anywhere.
            let bytes = [&[0], bytes.as_slice()].concat();
            for (isa, (start, len)) in Isa::available()
                .into_iter()
                .flat_map(|isa| [(7, 131), (0, 200), (199, 1), (3, 0)].map(|part| (isa, part)))
            {
                let from = &bytes[1 + start * each..][..len * each];
                let (mut single, mut narrow) = (vec![0f32; len], vec![bf16::ZERO; len]);
                dispatch(isa, Convert { from, format, to: &mut single });
                dispatch(isa, Convert { from, format, to: &mut narrow });
                assert_eq!(single, expected[start..start + len]);
                let rounded: Vec<bf16> = single.iter().copied().map(bf16::from_f32).collect();
                assert_eq!(narrow, rounded);
            }
        }
    }

    #[test]
    fn a_tensor_holds_all_values_in_its_place_s_format() {
        let values: Vec<f32> = (0..70_000).map(|value| (value % 251) as f32).collect();
        let parameter = Parameter::from_values(&values, &[70, 1000]);
        for place in reference::places() {
            assert_eq!(parameter.tensor(&place).unwrap().to_values().unwrap(), values);
        }
    }
}
