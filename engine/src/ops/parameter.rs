//! A weight as a checkpoint stores it.

use std::borrow::Cow;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::kernel::blocks::{Quantisation, STRETCH};
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

    /// Its values from `start` on.
    pub fn read(&self, start: usize, to: &mut [f32]) {
        if let Stored::Quantised(format) = self.stored {
            return unpack(format, &self.bytes, start, to);
        }
        let (_, each) = self.stored.block();
        let bytes = &self.bytes[start * each..(start + to.len()) * each];
        match self.stored {
            Stored::Quantised(_) => {}
            Stored::F64 => convert(bytes, to, |bytes: [u8; 8]| f64::from_le_bytes(bytes) as f32),
            Stored::F32 => convert(bytes, to, f32::from_le_bytes),
            Stored::Bf16 => convert(bytes, to, |bytes: [u8; 2]| bf16::from_le_bytes(bytes).to_f32()),
            Stored::F16 => {
                // In blocks: the conversion has instructions of its own for slices.
                let mut block = [f16::ZERO; 64];
                for (bytes, to) in bytes.chunks(128).zip(to.chunks_mut(64)) {
                    let block = &mut block[..to.len()];
                    for (half, bytes) in block.iter_mut().zip(bytes.as_chunks::<2>().0) {
                        *half = f16::from_le_bytes(*bytes);
                    }
                    block.convert_to_f32_slice(to);
                }
            }
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
        Tensor::new(&self.values(), &self.dims, place)
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

fn convert<const N: usize>(bytes: &[u8], to: &mut [f32], of: impl Fn([u8; N]) -> f32) {
    for (to, bytes) in to.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *to = of(*bytes);
    }
}

#[cfg(test)]
mod tests {
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
    fn a_part_is_read_from_its_place() {
        let values: Vec<f32> = (0..200).map(|value| value as f32).collect();
        let bytes: Vec<u8> = values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect();
        let mut part = [0.0; 131];
        Parameter::new(&bytes, Stored::F16, &[200]).read(7, &mut part);
        assert_eq!(part, values[7..138]);
    }
}
