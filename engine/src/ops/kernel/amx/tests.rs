use super::emulated::Emulated;
use super::*;
use crate::Result;
use crate::ops::buffer::Buffer;
use crate::ops::kernel::attention::{Inputs, Shape, Task, attention, attention_packed};
use crate::ops::kernel::blocks::Quantisation;
use crate::ops::kernel::isa::{Isa, Kernel, dispatch};
use crate::ops::kernel::panels::Panels;
use crate::ops::kernel::product::{Finish, Line, Then, chunks, sums_len, unpacked_len};
use crate::ops::kernel::tile::Piece;
use crate::ops::parameter::{Parameter, Stored};
use crate::ops::reference::{assert_close, numbers, quantised};
use crate::ops::shared::Shared;

/// A product over windows that lie in a buffer like those of a convolution.
struct Case {
    /// Positions of each line.
    lines: Vec<usize>,
    /// Where the runs of a window start, and their length.
    runs: Vec<(usize, usize)>,
    left_stride: usize,
    /// Values from one line to the next.
    line_stride: usize,
    outputs: usize,
    /// Steps of a chunk.
    chunk: usize,
}

/// The left factor, whose every value outside of the windows would spoil what it is multiplied with.
fn left(case: &Case) -> Vec<bf16> {
    let reach = case.runs.iter().map(|(start, len)| start + len).max().unwrap();
    let len = case
        .lines
        .iter()
        .enumerate()
        .filter(|(_, positions)| **positions > 0)
        .map(|(line, positions)| line * case.line_stride + (positions - 1) * case.left_stride + reach);
    let mut values = vec![bf16::NAN; len.max().unwrap_or(0)];
    let numbers = numbers(values.len(), 1);
    for (line, positions) in case.lines.iter().enumerate() {
        for position in 0..*positions {
            let window = line * case.line_stride + position * case.left_stride;
            for (start, len) in &case.runs {
                for at in window + start..window + start + len {
                    values[at] = bf16::from_f32(numbers[at]);
                }
            }
        }
    }
    values
}

fn weight(case: &Case) -> Panels {
    let inner = case.runs.iter().map(|(_, len)| len).sum();
    let values = numbers(case.outputs * inner, 2);
    Panels::pack(Format::Bf16, case.outputs, inner, |output, column| {
        column.copy_from_slice(&values[output * inner..(output + 1) * inner]);
        Ok(())
    })
    .unwrap()
}

fn lines(case: &Case) -> Vec<Line> {
    let mut before = 0;
    let line = |(index, positions): (usize, &usize)| {
        let line =
            Line { left: index * case.line_stride, output: before * case.outputs, row: 0, positions: *positions };
        before += positions;
        line
    };
    case.lines.iter().enumerate().map(line).collect()
}

/// As `chunks`, with chunks of this case's size.
fn pieces(case: &Case) -> Vec<Vec<Piece>> {
    let mut chunks = vec![Vec::new()];
    let (mut first, mut room) = (0, case.chunk);
    for (start, len) in &case.runs {
        let mut done = 0;
        while done < len / PAIR {
            if room == 0 {
                chunks.push(Vec::new());
                room = case.chunk;
            }
            let steps = room.min(len / PAIR - done);
            chunks.last_mut().unwrap().push(Piece { left: start + done * PAIR, first, steps });
            (first, done, room) = (first + steps, done + steps, room - steps);
        }
    }
    chunks
}

/// (positions, outputs), summed by `unit`, `group` panels at a time.
fn sums(case: &Case, unit: &mut impl Tiles, group: usize) -> Vec<f32> {
    let (left, weight, lines) = (left(case), weight(case), lines(case));
    let positions: usize = case.lines.iter().sum();
    let panel = weight.inner() * PANEL;
    let mut result = vec![0.0; positions * case.outputs];
    for start in (0..case.outputs.div_ceil(PANEL)).step_by(group) {
        let panels = group.min(case.outputs.div_ceil(PANEL) - start);
        // Whatever the room held before must not show.
        let mut sums = vec![f32::NAN; positions * panels * PANEL];
        let product = Product {
            left: left.as_ptr(),
            left_stride: case.left_stride,
            lines: &lines,
            right: weight.values::<bf16>()[start * panel..].as_ptr(),
            panel,
            panels,
            sums: sums.as_mut_ptr(),
        };
        let pieces = pieces(case);
        let chunks: Vec<&[Piece]> = pieces.iter().map(Vec::as_slice).collect();
        // SAFETY: the factors reach as far as the case says.
        unsafe { product.run(unit, &chunks, false) };
        for (position, sums) in sums.chunks_exact(panels * PANEL).enumerate() {
            let columns = start * PANEL..case.outputs.min((start + panels) * PANEL);
            let count = columns.len();
            result[position * case.outputs..][columns].copy_from_slice(&sums[..count]);
        }
    }
    result
}

/// left (rows × inner) · right (inner × cols) with each sum in `f64`.
fn product(left: &[f32], right: &[f32], rows: usize, inner: usize, cols: usize) -> Vec<f32> {
    let mut target = Vec::with_capacity(rows * cols);
    for i in 0..rows {
        for j in 0..cols {
            let sum: f64 = (0..inner).map(|k| f64::from(left[i * inner + k]) * f64::from(right[k * cols + j])).sum();
            target.push(sum as f32);
        }
    }
    target
}

/// (positions, outputs), plainly.
fn expected(case: &Case) -> Vec<f32> {
    let left = left(case);
    let inner: usize = case.runs.iter().map(|(_, len)| len).sum();
    let mut gathered = Vec::new();
    for (line, positions) in case.lines.iter().enumerate() {
        for position in 0..*positions {
            let window = line * case.line_stride + position * case.left_stride;
            for (start, len) in &case.runs {
                gathered.extend(left[window + start..window + start + len].iter().map(|value| value.to_f32()));
            }
        }
    }
    let values = numbers(case.outputs * inner, 2);
    let right: Vec<f32> = (0..inner * case.outputs)
        .map(|at| bf16::from_f32(values[at % case.outputs * inner + at / case.outputs]).to_f32())
        .collect();
    product(&gathered, &right, case.lines.iter().sum(), inner, case.outputs)
}

/// A dense product in one line.
fn dense(positions: usize, inner: usize, outputs: usize, chunk: usize) -> Case {
    let runs = vec![(0, inner)];
    Case { lines: vec![positions], runs, left_stride: inner, line_stride: 0, outputs, chunk }
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (positions, inner, outputs) in [
        (1, 2, 1),
        (1, 320, 17),
        (2, 40, 32),
        (16, 32, 16),
        (17, 34, 33),
        (31, 30, 48),
        (32, 64, 32),
        (33, 66, 47),
        (77, 96, 80),
        (100, 126, 31),
    ] {
        cases.push(dense(positions, inner, outputs, 1000));
        cases.push(dense(positions, inner, outputs, 16));
        cases.push(dense(positions, inner, outputs, 21));
    }
    // 3×3 windows, lines of which see each other's pixels; lines of different length, and empty ones.
    for (lines, channels, stride, chunk) in [
        (vec![8; 3], 32, 1, 160),
        (vec![16; 5], 20, 1, 48),
        (vec![20, 0, 20, 4], 4, 2, 160),
        (vec![7, 16, 33, 1, 25], 38, 1, 32),
    ] {
        let pixels = 3 + (lines.iter().max().unwrap() - 1) * stride;
        let line_stride = pixels * channels;
        let runs = (0..3).map(|line| (line * line_stride, 3 * channels)).collect();
        cases.push(Case { lines, runs, left_stride: stride * channels, line_stride, outputs: 35, chunk });
    }
    // Gaps in the windows and behind them.
    let runs = vec![(1, 6), (9, 40), (60, 32)];
    cases.push(Case { lines: vec![19, 12], runs, left_stride: 101, line_stride: 2500, outputs: 40, chunk: 30 });
    cases
}

#[test]
fn sums_by_tiles_are_those_of_the_plain_product() {
    for case in cases() {
        let magnitude = case.runs.iter().map(|(_, len)| len).sum::<usize>() as f32;
        let expected = expected(&case);
        for group in 1..=4 {
            assert_close(&sums(&case, &mut Emulated::new(), group), &expected, 2e-7 * magnitude.sqrt());
        }
    }
}

/// The positions that a sum has for company, and its place among them, depend on the batch.
#[test]
fn a_position_has_the_same_bits_in_any_company() {
    let (inner, outputs) = (88, 40);
    let together = sums(&dense(77, inner, outputs, 30), &mut Emulated::new(), GROUP);
    for (lines, line_stride) in [(vec![1; 77], 1), (vec![11; 7], 11), (vec![32, 32, 13], 32), (vec![38, 38, 1], 38)] {
        let line_stride = line_stride * inner;
        let apart = Case { lines, line_stride, ..dense(0, inner, outputs, 30) };
        let apart = sums(&apart, &mut Emulated::new(), GROUP);
        assert!(together.iter().zip(&apart).all(|(a, b)| a.to_bits() == b.to_bits()));
    }
}

#[test]
fn the_processor_computes_as_the_emulated_unit_does() {
    if !Isa::available().contains(&Isa::Amx) {
        return;
    }
    for case in cases() {
        // SAFETY: just asked, and dropped at once.
        let got = sums(&case, &mut unsafe { Hardware::new() }, GROUP);
        let expected = sums(&case, &mut Emulated::new(), GROUP);
        assert!(got.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()));
    }
}

/// Bits of a `f32` or, in the upper half, of a `bf16`: ordinary, so small that products of two are denormal or
/// just not, or anything at all.
fn any_bits(state: &mut u64, kind: u64) -> u32 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    let (bits, roll) = ((*state >> 32) as u32, *state >> 24 & 0xff);
    let exponent = match (kind, roll) {
        (0, _) => 120 + bits % 16,
        (1, _) => 52 + bits % 16,
        (_, 0) => 255,
        (_, 1..=9) => 0,
        (_, 10..=40) => bits & 0xff,
        (_, 41..=140) => 60 + bits % 8,
        _ => 124 + bits % 8,
    };
    bits & 0x807f_ffff | exponent << 23
}

/// One instruction, with tiles of any shape and bits of any kind.
fn multiplied(unit: &mut impl Tiles, rows: usize, depth: usize, seed: u64) -> [[f32; SIDE]; SIDE] {
    let (kind, mut state) = (seed % 3, seed);
    let mut pairs = |_| {
        std::array::from_fn::<u32, SIDE, _>(|_| {
            any_bits(&mut state, kind) & 0xffff_0000 | any_bits(&mut state, kind) >> 16
        })
    };
    let (left, right): ([_; SIDE], [_; SIDE]) = (std::array::from_fn(&mut pairs), std::array::from_fn(&mut pairs));
    // Sums as products are: of the small ones, around the least normal number.
    let mut sums = std::array::from_fn(|_| {
        std::array::from_fn(|_| {
            let bits = any_bits(&mut state, kind);
            f32::from_bits(if kind == 1 { bits & 0x807f_ffff | (bits >> 8 & 3) << 23 } else { bits })
        })
    });
    unit.configure(&Shapes::new(rows, depth));
    // SAFETY: sixteen rows of 64 bytes each, which are more than any shape needs.
    unsafe {
        unit.load::<SUMS>(sums.as_ptr().cast(), 64);
        unit.load::<LEFT>(left.as_ptr().cast(), 64);
        unit.load::<RIGHT>(right.as_ptr().cast(), 64);
        unit.multiply::<SUMS, LEFT, RIGHT>();
        unit.store::<SUMS>(sums.as_mut_ptr().cast(), 64);
    }
    sums
}

#[test]
fn the_processor_makes_of_any_bits_what_the_emulated_unit_does() {
    if !Isa::available().contains(&Isa::Amx) {
        return;
    }
    for seed in 0..768 {
        let (rows, depth) = (1 + seed / 3 % 16, 1 + seed / 48 % 16);
        // SAFETY: just asked, and dropped at once.
        let got = multiplied(&mut unsafe { Hardware::new() }, rows, depth, seed as u64);
        let expected = multiplied(&mut Emulated::new(), rows, depth, seed as u64);
        for (got, expected) in got.as_flattened().iter().zip(expected.as_flattened()) {
            let same = got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan();
            assert!(same, "{rows} rows, {depth} pairs, seed {seed}: {got:e} is not {expected:e}");
        }
    }
}

/// [`attention`](crate::ops::kernel::attention::attention) by a unit in plain Rust; `isa` must have vectors of sixteen.
pub(in crate::ops) fn emulated_attention(isa: Isa, inputs: Inputs<bf16>) -> Result<Buffer> {
    struct Emulating<'a>(Task<'a, bf16>);
    impl Kernel for Emulating<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            self.0.run_by_any(simd, &mut Emulated::new());
        }
    }
    attention_packed(inputs, ATTENTION_TILE, |task| dispatch(isa, Emulating(task)))
}

#[test]
fn attention_on_the_processor_is_that_of_the_emulated_unit() {
    if !Isa::available().contains(&Isa::Amx) {
        return;
    }
    for (queries, keys, heads, width) in [(1, 1, 1, 1), (70, 33, 3, 40), (100, 300, 2, 80), (48, 77, 1, 160)] {
        let shape = Shape { rows: 1, queries, keys, channels: heads * width, heads, causal: false };
        let values = |count: usize, salt: u32| -> Vec<bf16> {
            numbers(count * heads * width, salt).into_iter().map(bf16::from_f32).collect()
        };
        let (query, key, value) = (values(queries, 1), values(keys, 2), values(keys, 3));
        let inputs = Inputs { query: &query, key: &key, value: &value, distances: None, shape };
        let got = attention(Isa::Amx, inputs).unwrap();
        let expected = emulated_attention(Isa::Amx, inputs).unwrap();
        assert!(got.values::<bf16>() == expected.values::<bf16>(), "{shape:?}");
    }
}

#[test]
fn whether_there_are_tiles_does_not_change() {
    assert_eq!(is_available(), is_available());
}

/// A block, forced onto the emulated unit.
struct ByTiles<'a>(Block<'a, bf16>);

impl Kernel for ByTiles<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        self.0.run_by(simd, &mut Emulated::new());
    }
}

/// (positions, outputs) of a whole block with all that can follow the sums.
fn block(case: &Case, then: Then, isa: Isa, by_tiles: bool) -> Vec<f32> {
    block_of(case, &weight(case), then, isa, by_tiles)
}

fn block_of(case: &Case, weight: &Panels, then: Then, isa: Isa, by_tiles: bool) -> Vec<f32> {
    let (left, lines) = (left(case), lines(case));
    let positions: usize = case.lines.iter().sum();
    let outputs = if then == Then::Gate { case.outputs / 2 } else { case.outputs };
    let lines: Vec<Line> =
        lines.iter().map(|line| Line { output: line.output / case.outputs * outputs, ..*line }).collect();
    let bias = numbers(case.outputs, 3);
    let residual: Vec<bf16> = numbers(positions * outputs, 4).into_iter().map(bf16::from_f32).collect();
    let finish = Finish { outputs, bias: Some(&bias), per_row: None, scale: None, residual: Some(&residual), then };
    let mut output = vec![bf16::ZERO; positions * outputs];
    let (mut sums, mut unpacked) = (vec![0.0; sums_len(positions)], vec![bf16::NAN; unpacked_len::<bf16>(weight)]);
    let block = Block {
        left: &left,
        lines: &lines,
        left_stride: case.left_stride,
        output_stride: outputs,
        weight,
        panels: 0..weight.outputs().div_ceil(PANEL),
        pieces: &chunks::<bf16>(case.runs.iter().copied()),
        finish: &finish,
        output: &Shared::new(&mut output),
        sums: &mut sums,
        unpacked: &mut unpacked,
    };
    if by_tiles {
        dispatch(isa, ByTiles(block))
    } else {
        dispatch(isa, block)
    }
    output.iter().map(|value| value.to_f32()).collect()
}

#[test]
fn a_block_by_tiles_is_the_block_by_vectors() {
    for (positions, inner, outputs, then) in [
        (50, 40, 36, Then::Nothing),
        (33, 2100, 64, Then::Silu),
        (20, 100, 96, Then::Gate),
        (5, 64, 48, Then::QuickGelu),
    ] {
        let case = dense(positions, inner, outputs, 0);
        let expected = block(&case, then, Isa::Portable, false);
        for isa in Isa::available() {
            // Both round to `bf16` at the end, where a last bit may fall either way.
            assert_close(&block(&case, then, isa, true), &expected, 1.0 / 128.0);
        }
    }
}

#[test]
fn a_block_of_quantised_weights_is_the_block_of_their_numbers_bit_for_bit() {
    for (format, inner) in [(Quantisation::Q4_0, 96), (Quantisation::Q8_0, 3232), (Quantisation::Q6K, 1024)] {
        let case = dense(50, inner, 68, 0);
        let bytes = quantised(format, 68 * inner, 1);
        let numbers = Parameter::new(&bytes, Stored::Quantised(format), &[68, inner]);
        let dense = Panels::pack(Format::Bf16, 68, inner, |output, to| numbers.read(output * inner, to)).unwrap();
        let packed = Panels::pack_quantised(Format::Bf16, format, &numbers, 68, Some).unwrap();
        for isa in Isa::available() {
            for by_tiles in [false, true] {
                let expected = block_of(&case, &dense, Then::Nothing, isa, by_tiles);
                assert_eq!(block_of(&case, &packed, Then::Nothing, isa, by_tiles), expected, "{isa} {format:?}");
            }
        }
    }
}
