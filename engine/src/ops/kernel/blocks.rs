//! Quantised weights: blocks of values that share scales, and how they become numbers again.
//!
//! Reference: <https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c> (`dequantize_row_*`).
//!
//! Every value is scale · quant + offset, where scale and offset are exact in `f32` and so is their
//! product with a quant: whoever computes it, rounding once, gets the same bits.

use candle_core::quantized::GgmlDType;

/// A format of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Quantisation {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
}

/// Values that are unpacked at a time: a whole block, or an eighth of a large one.
pub(in crate::ops) const STRETCH: usize = 32;

/// One stretch of `L` blocks side by side.
pub(in crate::ops) type Lines<const L: usize> = [[f32; L]; STRETCH];

impl Quantisation {
    /// The word that people know it by.
    pub fn word(self) -> &'static str {
        match self {
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
        }
    }

    /// All of them.
    #[cfg(test)]
    pub const ALL: [Self; 8] =
        [Self::Q4_0, Self::Q4_1, Self::Q5_0, Self::Q5_1, Self::Q8_0, Self::Q4K, Self::Q5K, Self::Q6K];

    /// Values of a block.
    pub fn values(self) -> usize {
        match self {
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// Bytes of a block.
    pub fn bytes(self) -> usize {
        match self {
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    /// The same on other devices.
    pub(in crate::ops) fn on_device(self) -> GgmlDType {
        match self {
            Self::Q4_0 => GgmlDType::Q4_0,
            Self::Q4_1 => GgmlDType::Q4_1,
            Self::Q5_0 => GgmlDType::Q5_0,
            Self::Q5_1 => GgmlDType::Q5_1,
            Self::Q8_0 => GgmlDType::Q8_0,
            Self::Q4K => GgmlDType::Q4K,
            Self::Q5K => GgmlDType::Q5K,
            Self::Q6K => GgmlDType::Q6K,
        }
    }

    /// The stretch number `part` of `L` blocks; `blocks` holds the first byte of each, then the second of
    /// each, and so on.
    #[inline(always)]
    pub(in crate::ops) fn unpack<const L: usize>(self, blocks: &[[u8; L]], part: usize, to: &mut Lines<L>) {
        let blocks = &blocks[..self.bytes()];
        match self {
            Self::Q4_0 => {
                nibbles(&blocks[2..], to);
                centred(to, 8.0, half(blocks, 0));
            }
            Self::Q4_1 => {
                nibbles(&blocks[4..], to);
                scaled(to, half(blocks, 0), half(blocks, 2));
            }
            Self::Q5_0 => {
                nibbles(&blocks[6..], to);
                fifth_bits_in_a_row(&blocks[2..], to);
                centred(to, 16.0, half(blocks, 0));
            }
            Self::Q5_1 => {
                nibbles(&blocks[8..], to);
                fifth_bits_in_a_row(&blocks[4..], to);
                scaled(to, half(blocks, 0), half(blocks, 2));
            }
            Self::Q8_0 => {
                let scale = half(blocks, 0);
                for (line, bytes) in to.iter_mut().zip(&blocks[2..]) {
                    *line = each(|lane| f32::from(bytes[lane].cast_signed()) * scale[lane]);
                }
            }
            Self::Q4K => {
                half_bytes(&blocks[16 + part / 2 * STRETCH..], part % 2 == 1, to);
                let (scale, offset) = scale_and_offset(blocks, part);
                scaled(to, scale, offset);
            }
            Self::Q5K => {
                half_bytes(&blocks[48 + part / 2 * STRETCH..], part % 2 == 1, to);
                for (line, bytes) in to.iter_mut().zip(&blocks[16..]) {
                    let bytes = alone(bytes);
                    *line = each(|lane| line[lane] + 16.0 * small(bytes[lane], part, 1));
                }
                let (scale, offset) = scale_and_offset(blocks, part);
                scaled(to, scale, offset);
            }
            Self::Q6K => six_bits(blocks, part, to),
        }
    }
}

/// A value for each lane. A loop over a whole array becomes vectors, which iterators over several do not.
#[inline(always)]
fn each<const L: usize>(value: impl Fn(usize) -> f32) -> [f32; L] {
    let mut values = [0.0; L];
    for (lane, to) in values.iter_mut().enumerate() {
        *to = value(lane);
    }
    values
}

/// The same line, but one that the compiler cannot take together with others: it would rather gather and scatter
/// single values of several lines than compute whole ones.
#[inline(always)]
fn alone<T>(line: T) -> T {
    std::hint::black_box(line)
}

/// Some bits of a byte. Wider than they need be, so that vectors of them are converted at once.
#[inline(always)]
fn small(byte: u8, shift: usize, mask: i32) -> f32 {
    (i32::from(byte) >> shift & mask) as f32
}

/// A number in half precision at byte `at` of each block.
#[inline(always)]
fn half<const L: usize>(blocks: &[[u8; L]], at: usize) -> [f32; L] {
    let (low, high) = (&blocks[at], &blocks[at + 1]);
    each(|lane| from_half(u32::from(low[lane]) | u32::from(high[lane]) << 8))
}

/// By shifts and one product alone, so that vectors of them are converted at once.
#[inline(always)]
fn from_half(bits: u32) -> f32 {
    /// What moves the exponent of `f16` to that of `f32`.
    const REBASE: f32 = f32::from_bits((127 + 127 - 15) << 23);
    let magnitude = (f32::from_bits((bits & 0x7fff) << 13) * REBASE).to_bits();
    let no_number = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(magnitude | no_number | (bits & 0x8000) << 16)
}

/// The low halves of sixteen bytes, then the high ones.
#[inline(always)]
fn nibbles<const L: usize>(blocks: &[[u8; L]], to: &mut Lines<L>) {
    let (low, high) = to.split_at_mut(STRETCH / 2);
    for ((low, high), bytes) in low.iter_mut().zip(high).zip(blocks) {
        let bytes = alone(bytes);
        *low = each(|lane| small(bytes[lane], 0, 15));
        *high = each(|lane| small(bytes[lane], 4, 15));
    }
}

/// Adds the fifth bits: one of each value, in order.
#[inline(always)]
fn fifth_bits_in_a_row<const L: usize>(blocks: &[[u8; L]], to: &mut Lines<L>) {
    for (lines, bytes) in to.chunks_exact_mut(8).zip(blocks) {
        for (bit, line) in lines.iter_mut().enumerate() {
            let bytes = alone(bytes);
            *line = each(|lane| line[lane] + 16.0 * small(bytes[lane], bit, 1));
        }
    }
}

/// The low or the high halves of bytes.
#[inline(always)]
fn half_bytes<const L: usize>(blocks: &[[u8; L]], high: bool, to: &mut Lines<L>) {
    let shift = if high { 4 } else { 0 };
    for (line, bytes) in to.iter_mut().zip(blocks) {
        let bytes = alone(bytes);
        *line = each(|lane| small(bytes[lane], shift, 15));
    }
}

/// Scale and offset of a stretch of `Q4K` or `Q5K`: six bits each, twelve bytes for eight stretches.
#[inline(always)]
fn scale_and_offset<const L: usize>(blocks: &[[u8; L]], part: usize) -> ([f32; L], [f32; L]) {
    let (scale, least, packed) = (half(blocks, 0), half(blocks, 2), &blocks[4..16]);
    let six = |low: &[u8; L], high: &[u8; L], shift: usize| -> [f32; L] {
        each(|lane| f32::from(low[lane] >> shift & 15 | high[lane] >> 6 << 4))
    };
    let (scales, offsets) = if part < 4 {
        let low = |bytes: &[u8; L]| -> [f32; L] { each(|lane| f32::from(bytes[lane] & 63)) };
        (low(&packed[part]), low(&packed[part + 4]))
    } else {
        (six(&packed[part + 4], &packed[part - 4], 0), six(&packed[part + 4], &packed[part], 4))
    };
    let product = |a: [f32; L], b: [f32; L], sign: f32| -> [f32; L] { each(|lane| sign * a[lane] * b[lane]) };
    (product(scale, scales, 1.0), product(least, offsets, -1.0))
}

/// A stretch of `Q6K`: four bits here, two there, a scale for each sixteen values.
#[inline(always)]
fn six_bits<const L: usize>(blocks: &[[u8; L]], part: usize, to: &mut Lines<L>) {
    let (large, quarter) = (part / 4, part % 4);
    half_bytes(&blocks[large * 64 + quarter % 2 * STRETCH..], quarter >= 2, to);
    for (line, bytes) in to.iter_mut().zip(&blocks[128 + large * STRETCH..]) {
        let bytes = alone(bytes);
        *line = each(|lane| line[lane] + (16.0 * small(bytes[lane], 2 * quarter, 3) - 32.0));
    }
    let scale: [f32; L] = half(blocks, 208);
    for (index, lines) in to.chunks_exact_mut(STRETCH / 2).enumerate() {
        let scales = &blocks[192 + large * 8 + 2 * quarter + index];
        let scale: [f32; L] = each(|lane| scale[lane] * f32::from(scales[lane].cast_signed()));
        for line in lines {
            let line = alone(line);
            *line = each(|lane| line[lane] * scale[lane]);
        }
    }
}

/// scale · (quant - centre)
#[inline(always)]
fn centred<const L: usize>(to: &mut Lines<L>, centre: f32, scale: [f32; L]) {
    for line in to {
        let line = alone(line);
        *line = each(|lane| (line[lane] - centre) * scale[lane]);
    }
}

/// scale · quant + offset
#[inline(always)]
fn scaled<const L: usize>(to: &mut Lines<L>, scale: [f32; L], offset: [f32; L]) {
    for line in to {
        let line = alone(line);
        *line = each(|lane| line[lane] * scale[lane] + offset[lane]);
    }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::k_quants::{
        BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, GgmlType,
    };
    use half::f16;

    use super::*;
    use crate::ops::reference;

    /// What candle makes of the blocks.
    fn by_candle<B: GgmlType>(bytes: &[u8]) -> Vec<f32> {
        let mut blocks = vec![B::zeros(); bytes.len() / size_of::<B>()];
        // SAFETY: candle's blocks are plain bytes in ggml's order, and there are as many as `bytes` fills.
        #[allow(unsafe_code)]
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), blocks.as_mut_ptr().cast(), bytes.len());
        }
        let mut values = vec![0.0; blocks.len() * B::BLCK_SIZE];
        B::to_float(&blocks, &mut values);
        values
    }

    #[test]
    fn every_format_is_unpacked_as_by_candle_bit_for_bit() {
        const BLOCKS: usize = 16;
        for format in Quantisation::ALL {
            let bytes = reference::quantised(format, BLOCKS * format.values(), 1);
            let expected = match format {
                Quantisation::Q4_0 => by_candle::<BlockQ4_0>(&bytes),
                Quantisation::Q4_1 => by_candle::<BlockQ4_1>(&bytes),
                Quantisation::Q5_0 => by_candle::<BlockQ5_0>(&bytes),
                Quantisation::Q5_1 => by_candle::<BlockQ5_1>(&bytes),
                Quantisation::Q8_0 => by_candle::<BlockQ8_0>(&bytes),
                Quantisation::Q4K => by_candle::<BlockQ4K>(&bytes),
                Quantisation::Q5K => by_candle::<BlockQ5K>(&bytes),
                Quantisation::Q6K => by_candle::<BlockQ6K>(&bytes),
            };
            let mut side_by_side = vec![[0; BLOCKS]; format.bytes()];
            for (lane, block) in bytes.chunks_exact(format.bytes()).enumerate() {
                side_by_side.iter_mut().zip(block).for_each(|(bytes, byte)| bytes[lane] = *byte);
            }
            let mut lines = [[0.0; BLOCKS]; STRETCH];
            for part in 0..format.values() / STRETCH {
                format.unpack(&side_by_side, part, &mut lines);
                for (at, line) in lines.iter().enumerate() {
                    for (lane, value) in line.iter().enumerate() {
                        let expected = expected[lane * format.values() + part * STRETCH + at];
                        // Zero has two signs, which a sum does not show.
                        assert!(*value == expected, "{format:?}: {value} instead of {expected}");
                    }
                }
            }
        }
    }

    #[test]
    fn every_number_in_half_precision_is_read() {
        for bits in 0..=u16::MAX {
            let (got, expected) = (from_half(u32::from(bits)), f16::from_bits(bits).to_f32());
            assert!(got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan(), "{bits:x}: {got}");
        }
    }
}
