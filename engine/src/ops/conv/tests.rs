use super::*;
use crate::ops::norm::GroupNorm;
use crate::ops::reference::{self, parameter, tensor_at};

/// The convolution as another device has it.
fn elsewhere(weight: &Parameter<'_>, bias: Option<&Parameter<'_>>, shape: ConvShape) -> Conv2d {
    Conv2d::new(weight, bias, shape, &Place::host().elsewhere()).unwrap()
}

const HALVING: ConvShape = ConvShape { stride: 2, padding: (1, 1) };
const HALVING_BEHIND: ConvShape = ConvShape { stride: 2, padding: (0, 1) };

/// Maps (rows, height, width, channels), weights (out, in, height, width) and how they meet.
fn cases() -> Vec<([usize; 4], [usize; 4], ConvShape)> {
    let same = ConvShape::same(3);
    vec![
        ([1, 1, 1, 1], [1, 1, 3, 3], same),
        ([2, 5, 3, 5], [7, 5, 3, 3], same),
        ([1, 2, 9, 3], [5, 3, 5, 5], ConvShape::same(5)),
        ([2, 3, 17, 33], [17, 33, 5, 5], ConvShape::same(5)),
        ([1, 9, 7, 5], [4, 5, 5, 5], ConvShape { stride: 2, padding: (2, 2) }),
        ([1, 7, 5, 6], [4, 6, 3, 3], HALVING),
        ([2, 9, 17, 33], [33, 33, 3, 3], HALVING),
        ([2, 6, 8, 3], [3, 3, 3, 3], HALVING_BEHIND),
        ([1, 8, 72, 5], [20, 5, 3, 3], HALVING_BEHIND),
        ([1, 4, 4, 5], [6, 5, 1, 1], ConvShape::same(1)),
        ([2, 3, 7, 320], [5, 320, 1, 1], ConvShape::same(1)),
        ([1, 5, 4, 5], [6, 5, 1, 1], ConvShape { stride: 2, padding: (0, 0) }),
        ([1, 4, 6, 3], [5, 3, 3, 3], ConvShape { stride: 1, padding: (0, 0) }),
        ([1, 4, 6, 3], [5, 3, 1, 3], ConvShape { stride: 1, padding: (1, 1) }),
        ([1, 17, 19, 33], [70, 33, 3, 3], same),
        ([1, 3, 72, 3], [320, 3, 3, 3], same),
        ([1, 7, 9, 320], [20, 320, 3, 3], same),
        ([3, 10, 73, 64], [65, 64, 3, 3], same),
        ([3, 9, 14, 200], [70, 200, 3, 3], same),
        ([2, 1, 7, 320], [321, 320, 3, 3], same),
        ([1, 33, 1, 64], [64, 64, 3, 3], same),
    ]
}

#[test]
fn a_convolution_over_odd_shapes_equals_the_definition() {
    for place in reference::places() {
        for (x, dims, shape) in cases() {
            let (x, weight, bias) = (tensor_at(x, 1, &place), parameter(dims, 2), parameter([dims[0]], 3));
            let conv = Conv2d::new(&weight, Some(&bias), shape, &place).unwrap();
            let got = conv.forward(&x).unwrap();
            let seen = reference::weight_values(&weight, &place);
            let (result, expected) = reference::convolution(&x, (&seen, dims), &bias.values().unwrap(), shape);
            assert_eq!(got.dims(), result);
            reference::assert_close(&reference::values(&got), &expected, reference::tolerance(&place));
        }
    }
}

#[test]
fn what_is_added_arrives_at_every_pixel() {
    for place in reference::places() {
        for (dims, channels, shape) in [
            ([2, 4, 3, 5], 6, ConvShape::same(3)),
            ([2, 9, 17, 33], 35, HALVING),
            ([3, 8, 9, 64], 70, ConvShape::same(3)),
            ([2, 5, 7, 33], 17, ConvShape::same(1)),
        ] {
            let kernel = if shape == ConvShape::same(1) { 1 } else { 3 };
            let weight_dims = [channels, dims[3], kernel, kernel];
            let (x, weight, bias) = (tensor_at(dims, 1, &place), parameter(weight_dims, 2), parameter([channels], 3));
            let conv = Conv2d::new(&weight, Some(&bias), shape, &place).unwrap();
            let seen = reference::weight_values(&weight, &place);
            let (result, base) = reference::convolution(&x, (&seen, weight_dims), &bias.values().unwrap(), shape);
            let [rows, height, width, _] = result[..] else { panic!("a map's dimensions") };
            let (per_row, residual) =
                (tensor_at([rows, channels], 4, &place), tensor_at([rows, height, width, channels], 5, &place));
            let added = reference::values(&per_row);
            let at = |index: usize| added[index / (height * width * channels) * channels + index % channels];
            let expected: Vec<f32> = base.iter().enumerate().map(|(index, value)| value + at(index)).collect();
            let got = conv.forward_add_per_row(&x, &per_row).unwrap();
            reference::assert_close(&reference::values(&got), &expected, reference::tolerance(&place));
            let expected: Vec<f32> =
                base.iter().zip(reference::values(&residual)).map(|(value, added)| value + added).collect();
            let got = conv.forward_add(&x, &residual).unwrap();
            reference::assert_close(&reference::values(&got), &expected, reference::tolerance(&place));
        }
    }
}

#[test]
fn a_pending_norm_that_is_read_gives_what_the_norm_and_then_the_convolution_give() {
    for place in reference::places() {
        for (dims, groups, outputs, shape) in [
            ([2, 5, 3, 6], 3, 7, ConvShape::same(3)),
            ([2, 7, 17, 33], 11, 5, HALVING),
            ([1, 9, 9, 64], 8, 70, ConvShape::same(3)),
            ([2, 3, 7, 320], 32, 3, ConvShape::same(3)),
        ] {
            let (scale, shift) = (parameter([dims[3]], 1), parameter([dims[3]], 2));
            let norm = GroupNorm::new(&scale, &shift, groups, 1e-5).unwrap();
            let weight_dims = [outputs, dims[3], 3, 3];
            let (weight, bias) = (parameter(weight_dims, 3), parameter([outputs], 4));
            let conv = Conv2d::new(&weight, Some(&bias), shape, &place).unwrap();
            let x = tensor_at(dims, 5, &place);
            let normal = reference::group_norm(&x, &scale.values().unwrap(), &shift.values().unwrap(), groups, 1e-5);
            let silu: Vec<f32> = normal.iter().map(|value| reference::silu(f64::from(*value)) as f32).collect();
            let seen = reference::weight_values(&weight, &place);
            for (pending, expected) in [(norm.forward(&x).unwrap(), normal), (norm.forward_silu(&x).unwrap(), silu)] {
                let got = conv.forward(&pending).unwrap();
                reference::assert_same(&got, &conv.forward(&pending.resolved().unwrap()).unwrap());
                let expected = Tensor::new(&expected, &dims, &Place::host()).unwrap();
                let (_, expected) =
                    reference::convolution(&expected, (&seen, weight_dims), &bias.values().unwrap(), shape);
                reference::assert_close(&reference::values(&got), &expected, reference::tolerance(&place));
            }
        }
    }
}

#[test]
fn a_residual_may_have_a_pending_norm_of_its_own() {
    for place in reference::places() {
        let norm = GroupNorm::new(&parameter([33], 1), &parameter([33], 2), 3, 1e-5).unwrap();
        let conv = Conv2d::new(&parameter([33, 5, 3, 3], 3), None, ConvShape::same(3), &place).unwrap();
        let x = tensor_at([2, 7, 9, 5], 4, &place);
        let residual = norm.forward_silu(&tensor_at([2, 7, 9, 33], 5, &place)).unwrap();
        let expected = conv.forward_add(&x, &residual.resolved().unwrap()).unwrap();
        reference::assert_same(&conv.forward_add(&x, &residual).unwrap(), &expected);
    }
}

#[test]
fn a_row_of_a_batch_equals_the_row_alone() {
    for place in reference::places() {
        for (side, channels, shape) in [
            (3, 5, ConvShape::same(3)),
            (4, 96, ConvShape::same(3)),
            (16, 64, ConvShape::same(3)),
            (9, 33, HALVING),
            (7, 33, ConvShape::same(1)),
        ] {
            let kernel = if shape == ConvShape::same(1) { 1 } else { 3 };
            let conv = Conv2d::new(&parameter([96, channels, kernel, kernel], 1), None, shape, &place).unwrap();
            let x = tensor_at([4, side, side + 1, channels], 2, &place);
            reference::assert_rows_stand_alone(&x, &place, |x| conv.forward(x).unwrap());
            let norm = GroupNorm::new(&parameter([channels], 3), &parameter([channels], 4), 1, 1e-5).unwrap();
            reference::assert_rows_stand_alone(&x, &place, |x| conv.forward(&norm.forward_silu(x).unwrap()).unwrap());
        }
    }
}

#[test]
fn the_number_of_threads_does_not_show() {
    for place in reference::places() {
        for (dims, outputs, shape) in [
            ([2, 20, 23, 64], 96, ConvShape::same(3)),
            ([1, 3, 5, 320], 330, ConvShape::same(3)),
            ([1, 33, 35, 32], 64, HALVING),
        ] {
            let conv = Conv2d::new(&parameter([outputs, dims[3], 3, 3], 1), None, shape, &place).unwrap();
            let x = tensor_at(dims, 2, &place);
            reference::assert_threads_do_not_show(|| conv.forward(&x).unwrap());
        }
    }
}

#[test]
fn what_is_no_number_stays_visible_and_in_its_row() {
    for place in reference::places() {
        for (dims, outputs, shape) in [
            ([3, 5, 7, 5], 3, ConvShape::same(3)),
            ([3, 6, 9, 64], 70, ConvShape::same(3)),
            ([3, 7, 7, 33], 5, HALVING),
        ] {
            let conv = Conv2d::new(&parameter([outputs, dims[3], 3, 3], 1), None, shape, &place).unwrap();
            let x = tensor_at(dims, 2, &place);
            reference::assert_damage_stays_in_its_row(&x, &place, |x| conv.forward(x).unwrap());
        }
    }
}

#[test]
fn the_path_for_other_devices_agrees() {
    for shape in [ConvShape::same(3), HALVING, HALVING_BEHIND] {
        let (weight, bias) = (parameter([6, 5, 3, 3], 1), parameter([6], 2));
        let here = Conv2d::new(&weight, Some(&bias), shape, &Place::host()).unwrap();
        let there = elsewhere(&weight, Some(&bias), shape);
        let (x, per_row) = (reference::tensor([2, 6, 8, 5], 3), reference::tensor([2, 6], 4));
        let expected = here.forward_add_per_row(&x, &per_row).unwrap();
        let got = there.forward_add_per_row(&reference::elsewhere(&x), &reference::elsewhere(&per_row)).unwrap();
        assert_eq!(got.dims(), expected.dims());
        reference::assert_close(&reference::values(&got), &reference::values(&expected), 1e-5);
        let (_, height, width, _) = expected.dims4().unwrap();
        let residual = reference::tensor([2, height, width, 6], 5);
        let expected = here.forward_add(&x, &residual).unwrap();
        let got = there.forward_add(&reference::elsewhere(&x), &reference::elsewhere(&residual)).unwrap();
        reference::assert_close(&reference::values(&got), &reference::values(&expected), 1e-5);
    }
}

#[test]
fn pieces_for_other_devices_are_the_whole() {
    for (dims, weight, shape) in cases() {
        let (x, weight) = (reference::elsewhere(&reference::tensor(dims, 1)), parameter(weight, 2));
        let weight = weight.on_device(&Place::host()).unwrap();
        let piece = |in_hand| {
            let y = in_pieces(x.device_values().unwrap(), &weight, shape, in_hand).unwrap();
            Tensor::on_device(y)
        };
        let whole = piece(usize::MAX);
        let line = whole.dims()[2] * weight.dims()[1..].iter().product::<usize>();
        // Single lines, some lines, single rows, some rows.
        for in_hand in [1, 2 * line, 5 * line, whole.dims()[1] * line, 2 * whole.dims()[1] * line] {
            assert_eq!(piece(in_hand).dims(), whole.dims());
            reference::assert_close(&reference::values(&piece(in_hand)), &reference::values(&whole), 1e-5);
        }
    }
}

#[test]
fn a_batch_without_rows_gives_none() {
    for place in reference::places() {
        for channels in [3, 64] {
            let weight = parameter([channels, channels, 3, 3], 1);
            let conv = Conv2d::new(&weight, None, ConvShape::same(3), &place).unwrap();
            let x = tensor_at([0, 4, 5, channels], 2, &place);
            assert_eq!(conv.forward(&x).unwrap().dims(), [0, 4, 5, channels]);
        }
    }
}

#[test]
fn wrong_shapes_are_errors_and_not_panics() {
    for place in reference::places() {
        let unpadded = ConvShape { stride: 1, padding: (0, 0) };
        let conv = Conv2d::new(&parameter([1, 1, 3, 3], 1), None, unpadded, &place).unwrap();
        assert!(conv.forward(&tensor_at([1, 2, 5, 1], 2, &place)).is_err(), "a map smaller than the window");
        for channels in [3, 64] {
            let conv = Conv2d::new(&parameter([6, channels, 3, 3], 1), None, ConvShape::same(3), &place).unwrap();
            assert!(conv.forward(&tensor_at([1, 4, 5, channels + 1], 2, &place)).is_err());
            assert!(conv.forward(&tensor_at([1, 20, channels], 2, &place)).is_err());
            assert!(conv.forward(&tensor_at([], 2, &place)).is_err());
            let x = tensor_at([2, 4, 5, channels], 2, &place);
            for per_row in [tensor_at([1, 6], 3, &place), tensor_at([2, 5], 3, &place)] {
                assert!(conv.forward_add_per_row(&x, &per_row).is_err());
            }
            for residual in [tensor_at([2, 4, 5, 5], 3, &place), tensor_at([2, 5, 4, 6], 3, &place)] {
                assert!(conv.forward_add(&x, &residual).is_err());
            }
            assert!(conv.forward_add(&x, &tensor_at([], 3, &place)).is_err());
            assert!(conv.forward(&reference::elsewhere(&x)).is_err());
        }
        assert!(Conv2d::new(&parameter([6, 5], 1), None, ConvShape::same(1), &place).is_err());
    }
    let there = elsewhere(&parameter([6, 5, 3, 3], 1), None, ConvShape::same(3));
    assert!(there.forward(&reference::tensor([2, 4, 5, 5], 2)).is_err());
}
