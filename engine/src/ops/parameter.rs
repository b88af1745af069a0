//! A weight as a checkpoint stores it.

use std::borrow::Cow;
use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::buffer::{Buffer, Format};
use super::kernel::blocks::{Quantisation, STRETCH};
use super::kernel::convert::{Convert, Plain};
use super::kernel::element::Element;
use super::kernel::isa::{Isa, dispatch};
use super::misuse;
use super::shared::with_bytes;
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

/// Where bytes are read from when they are asked for.
pub(crate) trait Source: Sync {
    /// Fills `to` with the bytes from `start` on.
    ///
    /// # Errors
    /// [`crate::Error::Checkpoint`] if there are none.
    fn read(&self, start: usize, to: &mut [u8]) -> Result<()>;
}

/// A weight's bytes, little-endian and in order.
enum Bytes<'a> {
    Here(Cow<'a, [u8]>),
    /// Still in a file, from this place on.
    In(&'a dyn Source, usize),
}

/// A weight, usually still in its file.
pub(crate) struct Parameter<'a> {
    bytes: Bytes<'a>,
    stored: Stored,
    dims: Vec<usize>,
}

impl<'a> Parameter<'a> {
    /// `bytes` must be as many as `dims` ask for.
    pub fn new(bytes: impl Into<Cow<'a, [u8]>>, stored: Stored, dims: &[usize]) -> Self {
        let bytes = bytes.into();
        assert_eq!(Some(bytes.len()), stored.bytes(dims.iter().product()), "bytes of a weight");
        Self { bytes: Bytes::Here(bytes), stored, dims: dims.to_vec() }
    }

    /// A weight whose `range` of bytes lies in `source`; they must be as many as `dims` ask for.
    pub fn within(source: &'a dyn Source, range: Range<usize>, stored: Stored, dims: &[usize]) -> Self {
        assert_eq!(Some(range.len()), stored.bytes(dims.iter().product()), "bytes of a weight");
        Self { bytes: Bytes::In(source, range.start), stored, dims: dims.to_vec() }
    }

    /// A weight of these values.
    pub fn from_values(values: &[f32], dims: &[usize]) -> Self {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self::new(bytes, Stored::F32, dims)
    }

    /// The same with bytes of its own.
    pub fn to_owned(&self) -> Result<Parameter<'static>> {
        Ok(Parameter::new(self.bytes()?.into_owned(), self.stored, &self.dims))
    }

    /// The same values in another shape.
    pub fn reshaped(self, dims: &[usize]) -> Self {
        assert_eq!(self.dims.iter().product::<usize>(), dims.iter().product::<usize>(), "values of a weight");
        Self { dims: dims.to_vec(), ..self }
    }

    pub fn dims(&self) -> &[usize] {
        &self.dims
    }

    /// The format of its blocks, if it is stored in blocks.
    pub fn quantised(&self) -> Option<Quantisation> {
        match self.stored {
            Stored::Quantised(format) => Some(format),
            _ => None,
        }
    }

    /// The format of its numbers, if it is stored in such as vectors are loaded from.
    pub(in crate::ops) fn plain(&self) -> Option<Plain> {
        match self.stored {
            Stored::F32 => Some(Plain::F32),
            Stored::F16 => Some(Plain::F16),
            Stored::Bf16 => Some(Plain::Bf16),
            Stored::F64 | Stored::Quantised(_) => None,
        }
    }

    /// All its bytes.
    pub fn bytes(&self) -> Result<Cow<'_, [u8]>> {
        let (source, start) = match &self.bytes {
            Bytes::Here(bytes) => return Ok(Cow::Borrowed(bytes)),
            Bytes::In(source, start) => (source, *start),
        };
        let mut bytes = vec![0; self.stored.bytes(self.dims.iter().product()).unwrap_or(0)];
        source.read(start, &mut bytes)?;
        Ok(Cow::Owned(bytes))
    }

    /// Lends `work` some of its bytes.
    fn with_bytes<R>(&self, range: Range<usize>, work: impl FnOnce(&[u8]) -> R) -> Result<R> {
        match &self.bytes {
            Bytes::Here(bytes) => Ok(work(&bytes[range])),
            Bytes::In(source, start) => with_bytes(range.len(), |room| {
                source.read(start + range.start, room)?;
                Ok(work(room))
            })?,
        }
    }

    /// Lends `work` the bytes of some `rows`, each of `values` values, which must be whole blocks.
    pub(in crate::ops) fn with_rows<R, const N: usize>(
        &self,
        rows: [Option<usize>; N],
        values: usize,
        work: impl FnOnce([Option<&[u8]>; N]) -> Result<R>,
    ) -> Result<R> {
        let Some(each) = self.stored.bytes(values) else {
            return Err(misuse(format!("rows of {values} values are not whole blocks of {}", self.stored.word())));
        };
        match &self.bytes {
            Bytes::Here(bytes) => work(rows.map(|row| row.map(|row| &bytes[row * each..][..each]))),
            Bytes::In(source, start) => with_bytes(N * each, |room| {
                // Rows that follow each other are read at once.
                let mut lane = 0;
                while lane < N {
                    let end = (lane + 1..N).find(|next| rows[*next] != rows[lane].map(|row| row + next - lane));
                    let end = end.unwrap_or(N);
                    if let Some(row) = rows[lane] {
                        source.read(start + row * each, &mut room[lane * each..end * each])?;
                    }
                    lane = end;
                }
                let room = &*room;
                work(std::array::from_fn(|lane| rows[lane].map(|_| &room[lane * each..][..each])))
            })?,
        }
    }

    /// Its values from `start` on, rounded to nearest.
    pub(in crate::ops) fn read<E: Element>(&self, start: usize, to: &mut [E]) -> Result<()> {
        /// Values at a time: those of a file stay in a core's cache.
        const PIECE: usize = 1 << 16;
        let (of_block, each) = self.stored.block();
        for (index, to) in to.chunks_mut(PIECE).enumerate() {
            let start = start + index * PIECE;
            let first = start / of_block;
            let blocks = first * each..(start + to.len()).div_ceil(of_block) * each;
            self.with_bytes(blocks, |bytes| self.convert(bytes, start - first * of_block, to))?;
        }
        Ok(())
    }

    /// The values from `start` on of whole blocks.
    fn convert<E: Element>(&self, bytes: &[u8], start: usize, to: &mut [E]) {
        if let Some(format) = self.plain() {
            return dispatch(Isa::best(), Convert { from: bytes, format, to });
        }
        let mut piece = [0f32; 256];
        for (index, to) in to.chunks_mut(piece.len()).enumerate() {
            let (start, values) = (start + index * piece.len(), &mut piece[..to.len()]);
            match self.stored {
                Stored::Quantised(format) => unpack(format, bytes, start, values),
                _ => {
                    let bytes = bytes[start * 8..].as_chunks().0;
                    values.iter_mut().zip(bytes).for_each(|(to, bytes)| *to = f64::from_le_bytes(*bytes) as f32);
                }
            }
            to.iter_mut().zip(values).for_each(|(to, value)| *to = E::from_f32(*value));
        }
    }

    /// All its values.
    pub fn values(&self) -> Result<Vec<f32>> {
        let mut values = vec![0.0; self.dims.iter().product()];
        self.read(0, &mut values)?;
        Ok(values)
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
        }?;
        Ok(Tensor::on_host(buffer, &self.dims))
    }

    fn read_side_by_side<E: Element>(&self, to: &mut [E]) -> Result<()> {
        const PIECE: usize = 1 << 16;
        to.par_chunks_mut(PIECE).enumerate().try_for_each(|(index, to)| self.read(index * PIECE, to))
    }

    /// It as a tensor of another device.
    pub(super) fn on_device(&self, place: &Place) -> Result<candle_core::Tensor> {
        let tensor = candle_core::Tensor::from_vec(self.values()?, self.dims.as_slice(), &candle_core::Device::Cpu)?;
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
pub(super) mod tests {
    use half::f16;

    use super::*;
    use crate::ops::reference;

    /// A file that ends where its bytes do.
    pub struct Held(pub Vec<u8>);

    impl Source for Held {
        fn read(&self, start: usize, to: &mut [u8]) -> Result<()> {
            let bytes = self.0.get(start..start + to.len()).ok_or_else(|| misuse("the file ends before".to_owned()))?;
            to.copy_from_slice(bytes);
            Ok(())
        }
    }

    /// The bytes behind some others.
    pub fn behind(others: usize, bytes: &[u8]) -> Held {
        Held([vec![7; others].as_slice(), bytes].concat())
    }

    #[test]
    fn every_stored_format_is_read() {
        let values = [1.0f32, -2.5, 0.125];
        let read = |bytes: Vec<u8>, stored| Parameter::new(&bytes, stored, &[3]).values().unwrap();
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
            let all = parameter.values().unwrap();
            for (start, len) in [(0, 768), (256, 256), (31, 2), (5, 700), (767, 1), (64, 0)] {
                let mut part = vec![f32::NAN; len];
                parameter.read(start, &mut part).unwrap();
                assert_eq!(part, all[start..start + len]);
            }
        }
    }

    #[test]
    fn a_weight_in_a_file_is_the_weight_of_its_bytes() {
        for stored in [Stored::F64, Stored::F32, Stored::F16, Stored::Bf16, Stored::Quantised(Quantisation::Q4K)] {
            let bytes = match stored {
                Stored::Quantised(format) => reference::quantised(format, 768, 1),
                _ => (0..stored.bytes(768).unwrap()).map(|byte| (byte % 61) as u8).collect(),
            };
            let file = behind(5, &bytes);
            let (there, here) = (
                Parameter::within(&file, 5..5 + bytes.len(), stored, &[3, 256]),
                Parameter::new(&bytes, stored, &[3, 256]),
            );
            assert_eq!(there.values().unwrap(), here.values().unwrap());
            assert_eq!(there.bytes().unwrap(), bytes);
            assert_eq!(there.to_owned().unwrap().values().unwrap(), here.values().unwrap());
            let (mut some, mut expected) = ([0f32; 300], [0f32; 300]);
            there.read(301, &mut some).unwrap();
            here.read(301, &mut expected).unwrap();
            assert_eq!(some, expected);
            for rows in [[Some(0), Some(1), Some(2), None], [Some(2), None, None, Some(1)], [None; 4], [Some(1); 4]] {
                let copied = |rows: [Option<&[u8]>; 4]| Ok(rows.map(|row| row.map(<[u8]>::to_vec)));
                let expected = here.with_rows(rows, 256, copied).unwrap();
                assert_eq!(there.with_rows(rows, 256, copied).unwrap(), expected, "{stored:?} {rows:?}");
            }
        }
    }

    #[test]
    fn a_file_that_ends_before_its_weight_does_is_an_error_whatever_is_read() {
        for stored in [Stored::F64, Stored::F16, Stored::Quantised(Quantisation::Q8_0)] {
            let file = behind(5, &vec![0; stored.bytes(1024).unwrap() - 1]);
            let weight = Parameter::within(&file, 5..6 + file.0.len() - 5, stored, &[2, 512]);
            assert!(weight.values().is_err() && weight.bytes().is_err() && weight.to_owned().is_err());
            assert!(weight.read(1000, &mut [0f32; 24]).is_err() && weight.read(0, &mut [0f32; 512]).is_ok());
            assert!(weight.with_rows([Some(1), None], 512, |_| Ok(())).is_err());
            assert!(reference::places().iter().all(|place| weight.tensor(place).is_err()));
        }
        let ragged = Parameter::new(vec![0; 34], Stored::Quantised(Quantisation::Q8_0), &[2, 16]);
        assert!(ragged.with_rows([Some(0)], 16, |_| Ok(())).unwrap_err().to_string().contains("whole blocks of Q8_0"));
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
