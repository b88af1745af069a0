use half::bf16;

use super::*;
use crate::ops::conv::ConvShape;
use crate::ops::kernel::isa::{Isa, dispatch};
use crate::ops::kernel::product::{Finish, Then};
use crate::ops::kernel::winograd::step;
use crate::ops::reference::{self, parameter, tensor_at};
use crate::ops::shared::Shared;
use crate::ops::tensor::{Place, Tensor};

/// Maps (rows, height, width, channels) and their outputs: odd sizes, more than one chunk and group.
const CASES: [([usize; 4], usize); 4] =
    [([1, 1, 1, 2], 1), ([2, 4, 5, 6], 17), ([2, 7, 9, 70], 50), ([1, 9, 6, 330], 65)];

/// All rows of `x`, (rows, height, width, inner) with zeros for channels that are not there, as one block; doubled
/// with `D`.
fn filter<E: Element, const N: usize, const D: bool>(
    isa: Isa,
    x: &[E],
    [rows, height, width, inner]: [usize; 4],
    weight: &Panels,
    bias: &[f32],
) -> Vec<E> {
    let scale = if D { 2 } else { 1 };
    let (to_height, to_width, step) = (scale * height, scale * width, step::<N, D>());
    let tiles = Tiles { down: to_height.div_ceil(N - 2), across: to_width.div_ceil(N - 2) };
    let all = rows * tiles.count();
    let mut patches = vec![E::default(); patches_len::<N, D>(all, inner)];
    let segment = |row| Segment { row, top: 0, left: 0, tiles, first: row * tiles.count() };
    let segments: Vec<Segment> = (0..rows).map(segment).collect();
    let area_width = tiles.across * step + 2;
    for Segment { row, first, .. } in &segments {
        let mut area = vec![E::default(); (tiles.down * step + 2) * area_width * inner];
        for (y, x_line) in x[row * height * width * inner..].chunks_exact(width * inner).take(height).enumerate() {
            area[((y + 1) * area_width + 1) * inner..][..width * inner].copy_from_slice(x_line);
        }
        let (channels, place) = (inner, (*first, all));
        dispatch(isa, Patches::<E, N, D> { area: &area, channels, tiles, place, to: &mut patches });
    }
    let outputs = weight.outputs();
    let mut output = vec![E::default(); rows * to_height * to_width * outputs];
    let finish = Finish { outputs, bias: Some(bias), per_row: None, scale: None, residual: None, then: Then::Nothing };
    let (mut weights, mut sums) = (vec![E::default(); weights_len::<E, N, D>()], vec![0.0; sums_len::<N, D>(all)]);
    let values = Shared::new(&mut output);
    let block = Block::<E, N, D> {
        patches: &patches,
        tiles: all,
        segments: &segments,
        weight,
        panels: 0..outputs.div_ceil(PANEL),
        weights: &mut weights,
        sums: &mut sums,
        outputs: Outputs { height: to_height, width: to_width, finish: &finish, values: &values },
    };
    dispatch(isa, block);
    output
}

/// Every case in one format on every instruction set against the definition, over the map and over the doubled one.
fn check<E: Element, const N: usize>() {
    let place = reference::places().into_iter().find(|place| place.on_host() == Some(E::FORMAT)).unwrap();
    for (dims, outputs) in CASES {
        let weight_dims = [outputs, dims[3], 3, 3];
        let (x, weight, bias) = (tensor_at(dims, 1, &place), parameter(weight_dims, 2), parameter([outputs], 3));
        let seen = reference::weight_values(&weight, &place);
        let define =
            |x: &Tensor| reference::convolution(x, (&seen, weight_dims), &bias.values().unwrap(), ConvShape::same(3)).1;
        let (expected, expected_doubled) = (define(&x), define(&doubled(&x, &place)));
        let packed = Panels::pack_weight(E::FORMAT, &weight, (outputs, 9), Some).unwrap();
        let values: Vec<E> = reference::values(&x).into_iter().map(E::from_f32).collect();
        let numbers = |got: Vec<E>| got.into_iter().map(E::to_f32).collect::<Vec<f32>>();
        for isa in Isa::available() {
            let got = filter::<E, N, false>(isa, &values, dims, &packed, &bias.values().unwrap());
            reference::assert_close(&numbers(got), &expected, reference::tolerance(&place));
            let got = filter::<E, N, true>(isa, &values, dims, &packed, &bias.values().unwrap());
            reference::assert_close(&numbers(got), &expected_doubled, reference::tolerance(&place));
        }
    }
}

/// The map with each pixel repeated, two by two.
fn doubled(x: &Tensor, place: &Place) -> Tensor {
    let (rows, height, width, channels) = x.dims4().unwrap();
    let (from, mut to) = (reference::values(x), Vec::new());
    for line in (0..rows * height).flat_map(|line| [line; 2]) {
        for pixel in (0..width).flat_map(|pixel| [pixel; 2]) {
            to.extend_from_slice(&from[(line * width + pixel) * channels..][..channels]);
        }
    }
    Tensor::new(&to, &[rows, 2 * height, 2 * width, channels], place).unwrap()
}

#[test]
fn tiles_of_four_outputs_give_the_definition_in_f32() {
    check::<f32, 6>();
}

#[test]
fn tiles_of_two_outputs_give_the_definition_in_bf16() {
    check::<bf16, 4>();
}
