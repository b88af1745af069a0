use std::panic::{AssertUnwindSafe, catch_unwind};

use half::bf16;

use super::*;
use crate::ops::buffer::Format;
use crate::ops::kernel::isa::{Isa, dispatch};
use crate::ops::reference;

/// What no block may touch.
const UNTOUCHED: f32 = 7.0;

/// A product's shape and what is done with its sums.
#[derive(Clone, Debug)]
struct Case {
    /// Where the runs of inner positions start in a window, and how many values they have.
    runs: Vec<(usize, usize)>,
    left_stride: usize,
    /// Positions of each line; each line is of another row.
    lines: Vec<usize>,
    outputs: usize,
    then: Then,
    bias: bool,
    per_row: bool,
    scale: bool,
    residual: bool,
}

impl Case {
    fn new(runs: &[(usize, usize)], lines: &[usize], outputs: usize) -> Self {
        let (runs, lines) = (runs.to_vec(), lines.to_vec());
        let (bias, then) = (true, Then::Nothing);
        Self { runs, left_stride: 6, lines, outputs, then, bias, per_row: false, scale: false, residual: false }
    }

    fn inner(&self) -> usize {
        self.runs.iter().map(|(_, len)| len).sum()
    }

    /// Values of the left factor from one line to the next.
    fn line_len(&self) -> usize {
        let reach = self.runs.iter().map(|(start, len)| start + len).max().unwrap();
        self.lines.iter().max().unwrap() * self.left_stride + reach
    }

    /// Outputs do not lie side by side.
    fn output_stride(&self) -> usize {
        self.outputs + 3
    }

    /// Weights and biases of a position.
    fn columns(&self) -> usize {
        if self.then == Then::Gate { 2 * self.outputs } else { self.outputs }
    }
}

/// A case's numbers.
struct Data<E> {
    left: Vec<E>,
    /// (columns, inner), as the panels have them.
    weight: Vec<f32>,
    panels: Panels,
    lines: Vec<Line>,
    pieces: Vec<Vec<Piece>>,
    bias: Option<Vec<f32>>,
    per_row: Option<Vec<E>>,
    scale: Option<Vec<E>>,
    residual: Option<Vec<E>>,
    output_len: usize,
    sums_len: usize,
}

fn numbers<E: Element>(count: usize, salt: u32) -> Vec<E> {
    reference::numbers(count, salt).into_iter().map(E::from_f32).collect()
}

impl<E: Element> Data<E> {
    fn of(case: &Case) -> Self {
        let (inner, outputs) = (case.inner(), case.outputs);
        let weight: Vec<f32> = numbers::<E>(case.columns() * inner, 2).into_iter().map(E::to_f32).collect();
        let gated = case.then == Then::Gate;
        let packed = if gated { 2 * outputs.next_multiple_of(PANEL) } else { outputs };
        let panels = Panels::pack(E::FORMAT, packed, inner, |column, to| {
            let (panel, lane) = (column / PANEL, column % PANEL);
            let output = if gated { panel / 2 * PANEL + lane } else { column };
            let gate = if gated { panel % 2 * outputs } else { 0 };
            if output < outputs {
                to[..inner].copy_from_slice(&weight[(gate + output) * inner..][..inner]);
            }
            Ok(())
        });
        let mut lines = Vec::new();
        let mut output = 1;
        for (row, positions) in case.lines.iter().enumerate() {
            lines.push(Line { left: row * case.line_len(), output, row, positions: *positions });
            output += positions * case.output_stride();
        }
        Self {
            left: numbers(case.lines.len() * case.line_len(), 1),
            weight,
            panels: panels.unwrap(),
            lines,
            pieces: chunks::<E>(case.runs.iter().copied()),
            bias: case.bias.then(|| reference::numbers(case.columns(), 3)),
            per_row: case.per_row.then(|| numbers(case.lines.len() * outputs, 4)),
            scale: case.scale.then(|| numbers(case.lines.len() * outputs, 6)),
            residual: case.residual.then(|| numbers(output, 5)),
            output_len: output,
            sums_len: sums_len(case.lines.iter().sum()),
        }
    }

    /// The whole output after the block of these lines and panels.
    fn compute(&self, isa: Isa, case: &Case, lines: &[Line], panels: Range<usize>) -> Vec<f32> {
        let mut output = vec![E::from_f32(UNTOUCHED); self.output_len];
        let finish = Finish {
            outputs: case.outputs,
            bias: self.bias.as_deref(),
            per_row: self.per_row.as_deref(),
            scale: self.scale.as_deref(),
            residual: self.residual.as_deref(),
            then: case.then,
        };
        // Whatever the sums held before.
        let mut sums = vec![f32::NAN; self.sums_len];
        let block = Block {
            left: &self.left,
            lines,
            left_stride: case.left_stride,
            output_stride: case.output_stride(),
            weight: &self.panels,
            panels,
            pieces: &self.pieces,
            finish: &finish,
            output: &Shared::new(&mut output),
            sums: &mut sums,
            unpacked: &mut [],
        };
        dispatch(isa, block);
        output.into_iter().map(E::to_f32).collect()
    }

    fn all_panels(&self) -> Range<usize> {
        0..self.panels.outputs().div_ceil(PANEL)
    }

    /// The definition, with each sum in `f64`.
    fn plain(&self, case: &Case) -> Vec<f32> {
        let inner = case.inner();
        let mut output = vec![UNTOUCHED; self.output_len];
        for line in &self.lines {
            for position in 0..line.positions {
                let window = &self.left[line.left + position * case.left_stride..];
                let values: Vec<f64> = case
                    .runs
                    .iter()
                    .flat_map(|(start, len)| &window[*start..start + len])
                    .map(|value| f64::from(value.to_f32()))
                    .collect();
                let sum = |column: usize| {
                    let weight = &self.weight[column * inner..(column + 1) * inner];
                    let sum: f64 = values.iter().zip(weight).map(|(value, weight)| value * f64::from(*weight)).sum();
                    sum + self.bias.as_ref().map_or(0.0, |bias| f64::from(bias[column]))
                };
                for at in 0..case.outputs {
                    let mut value = match case.then {
                        Then::Nothing => sum(at),
                        Then::Silu => reference::silu(sum(at)),
                        Then::Gelu => reference::gelu(sum(at)),
                        Then::QuickGelu => reference::quick_gelu(sum(at)),
                        Then::GeluTanh => reference::gelu_tanh(sum(at)),
                        Then::Relu => sum(at).max(0.0),
                        Then::Gate => sum(at) * reference::gelu(sum(case.outputs + at)),
                    };
                    let target = line.output + position * case.output_stride() + at;
                    let of_row = self.per_row.as_ref().map(|values| values[line.row * case.outputs + at]);
                    let there = self.residual.as_ref().map(|values| values[target]);
                    let factor =
                        self.scale.as_ref().map_or(1.0, |values| values[line.row * case.outputs + at].to_f32().into());
                    value = (value + of_row.map_or(0.0, |added| f64::from(added.to_f32()))) * factor;
                    value += there.map_or(0.0, |added| f64::from(added.to_f32()));
                    output[target] = value as f32;
                }
            }
        }
        output
    }
}

#[track_caller]
fn assert_equals_the_definition<E: Element>(case: &Case) {
    let data = Data::<E>::of(case);
    let (expected, tolerance) = (data.plain(case), if E::FORMAT == Format::Bf16 { 1e-2 } else { 2e-5 });
    for isa in Isa::available() {
        let got = data.compute(isa, case, &data.lines, data.all_panels());
        let untouched = |at: &usize| expected[*at] == UNTOUCHED;
        assert!((0..got.len()).filter(untouched).all(|at| got[at] == UNTOUCHED), "{isa} wrote elsewhere: {case:?}");
        let scale = expected.iter().fold(1f32, |most, value| most.max(value.abs()));
        for (index, (got, expected)) in got.iter().zip(&expected).enumerate() {
            let near = (got - expected).abs() <= tolerance * scale;
            assert!(near, "{isa} {:?}: value {index} is {got}, not {expected}: {case:?}", E::FORMAT);
        }
    }
}

#[track_caller]
fn assert_in_both_formats(case: &Case) {
    assert_equals_the_definition::<f32>(case);
    assert_equals_the_definition::<bf16>(case);
}

/// Several runs with gaps between them.
const RUNS: [(usize, usize); 3] = [(0, 6), (10, 4), (31, 14)];

#[test]
fn any_number_of_positions_and_outputs_equals_the_definition() {
    for positions in 1..=20 {
        for outputs in [1, 15, 16, 17, 33, 48, 50, 100] {
            assert_in_both_formats(&Case::new(&RUNS, &[positions], outputs));
        }
    }
}

#[test]
fn several_lines_of_other_rows_and_lengths_equal_the_definition() {
    for lines in [vec![1, 1], vec![3, 9, 2], vec![7, 0, 5], vec![8, 16, 4, 1]] {
        for outputs in [5, 70] {
            assert_in_both_formats(&Case { per_row: true, ..Case::new(&RUNS, &lines, outputs) });
        }
    }
}

#[test]
fn inner_positions_of_several_chunks_and_runs_equal_the_definition() {
    for runs in [
        vec![(0, 2)],
        vec![(0, 1366)],
        vec![(0, 5000)],
        vec![(0, 1400), (1500, 2), (1600, 4000)],
        vec![(3, 2730), (9, 40)],
    ] {
        let chunks = (chunks::<f32>(runs.clone()), chunks::<bf16>(runs.clone()));
        let inner: usize = runs.iter().map(|(_, len)| len).sum();
        assert_eq!(chunks.0.len() > 1, inner > 1365);
        assert!(chunks.1.len() > 1 || inner <= 2730);
        for (positions, outputs) in [(1, 17), (11, 50)] {
            assert_in_both_formats(&Case::new(&runs, &[positions], outputs));
        }
    }
}

#[test]
fn all_that_may_follow_the_sums_equals_the_definition() {
    for then in [Then::Nothing, Then::Silu, Then::Gelu, Then::QuickGelu, Then::GeluTanh, Then::Relu, Then::Gate] {
        for outputs in [1, 5, 16, 17, 33, 40, 64] {
            for added in 0..16 {
                let [bias, per_row, residual, scale] = [1, 2, 4, 8].map(|flag| added & flag > 0);
                let case = Case { then, bias, per_row, residual, scale, ..Case::new(&RUNS, &[5, 2], outputs) };
                assert_in_both_formats(&case);
            }
        }
    }
}

/// Whatever is cut, the bits stay the same.
fn assert_cuts_do_not_show<E: Element>(case: &Case) {
    let data = Data::<E>::of(case);
    for isa in Isa::available() {
        let whole = data.compute(isa, case, &data.lines, data.all_panels());
        let written = |value: f32| value != UNTOUCHED;
        let compare = |part: Vec<f32>, what: &str| {
            let same =
                part.iter().zip(&whole).all(|(part, whole)| !written(*part) || part.to_bits() == whole.to_bits());
            assert!(same && part.iter().any(|value| written(*value)), "{isa} {:?}: {what}: {case:?}", E::FORMAT);
        };
        for line in &data.lines {
            for position in 0..line.positions {
                let (left, output) = (position * case.left_stride, position * case.output_stride());
                let alone = Line { left: line.left + left, output: line.output + output, positions: 1, ..*line };
                compare(data.compute(isa, case, &[alone], data.all_panels()), "a position alone");
            }
        }
        let step = if case.then == Then::Gate { 2 } else { 1 };
        for first in data.all_panels().step_by(step) {
            compare(data.compute(isa, case, &data.lines, first..first + step), "a panel alone");
        }
    }
}

#[test]
fn how_the_work_is_cut_does_not_show() {
    for (runs, lines, outputs) in [(RUNS.to_vec(), vec![13, 6], 70), (vec![(0, 3000), (3100, 8)], vec![11], 50)] {
        for then in [Then::Nothing, Then::Silu, Then::Gate] {
            let case = Case { then, residual: true, ..Case::new(&runs, &lines, outputs) };
            assert_cuts_do_not_show::<f32>(&case);
            assert_cuts_do_not_show::<bf16>(&case);
        }
    }
}

#[test]
fn chunks_take_each_inner_position_once_and_in_order() {
    for runs in [vec![(0, 2)], vec![(4, 1364), (2000, 2), (1, 2732)], vec![(0, 10_000)]] {
        let pieces: Vec<Piece> = chunks::<bf16>(runs.clone()).into_iter().flatten().collect();
        let mut first = 0;
        for piece in &pieces {
            assert_eq!(piece.first, first);
            first += piece.steps;
        }
        let reached: Vec<usize> = pieces.iter().flat_map(|piece| piece.left..piece.left + 2 * piece.steps).collect();
        assert!(reached.into_iter().eq(runs.iter().flat_map(|(start, len)| *start..start + len)), "{runs:?}");
    }
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_read_or_written() {
    let case = Case { per_row: true, scale: true, residual: true, ..Case::new(&RUNS, &[5, 2], 40) };
    type Change = fn(&mut Data<bf16>);
    let misfits: [(&str, Change); 10] = [
        // The second line reads from 75 on, its second position 6 later, as far as 45.
        ("left", |data| data.left.truncate(75 + 6 + 45 - 1)),
        ("a line", |data| data.lines[1].left = data.left.len() - 6 - 45 + 1),
        ("output", |data| data.lines[1].output += 4),
        ("sums", |data| data.sums_len -= 1),
        ("bias", |data| data.bias = Some(vec![0.0; 39])),
        ("rows", |data| data.lines[1].row = 2),
        ("scale", |data| data.scale = Some(vec![bf16::ZERO; 79])),
        ("residual", |data| data.residual = Some(vec![bf16::ZERO; 1])),
        ("inner", |data| data.pieces[0].truncate(2)),
        ("inner", |data| data.pieces.clear()),
    ];
    for (what, change) in misfits {
        let mut data = Data::<bf16>::of(&case);
        change(&mut data);
        let run = || data.compute(Isa::best(), &case, &data.lines, data.all_panels());
        assert!(catch_unwind(AssertUnwindSafe(run)).is_err(), "{what}");
    }
    let data = Data::<bf16>::of(&case);
    let run = || data.compute(Isa::best(), &case, &data.lines, 0..4);
    assert!(catch_unwind(AssertUnwindSafe(run)).is_err(), "panels");
}

#[test]
fn groups_cover_all_panels_and_are_of_about_one_size() {
    for (start, len) in (0..3).flat_map(|start| (0..30).map(move |len| (start, len))) {
        for most in [1, 2, 3] {
            let groups: Vec<_> = groups(&(start..start + len), most).collect();
            assert!(groups.iter().cloned().flatten().eq(start..start + len), "{len} panels");
            assert_eq!(groups.len(), len.div_ceil(most));
            assert!(groups.iter().all(|group| group.len() <= most));
        }
        // Four panels are two and two: one alone would leave registers unused.
        let lone = groups(&(start..start + len), 3).filter(|group| group.len() == 1).count();
        assert!(lone == 0 || len % 3 == 1 && len != 4, "{len} panels");
    }
}
