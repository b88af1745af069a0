use super::*;
use crate::ops::kernel::blocks::Quantisation;
use crate::ops::norm::GroupNorm;
use crate::ops::parameter::Stored;
use crate::ops::reference::{self, parameter, tensor_at};

const ACTIVATIONS: [Activation; 7] = [
    Activation::Nothing,
    Activation::Silu,
    Activation::Gelu,
    Activation::QuickGelu,
    Activation::GeluTanh,
    Activation::Relu,
    Activation::Gate,
];

/// The definition, with each sum in `f64`.
fn plain(x: &Tensor, weight: &[f32], bias: &[f32], activation: Activation, residual: Option<&Tensor>) -> Vec<f32> {
    let outputs = bias.len();
    let inputs = weight.len() / outputs;
    let residual = residual.map(reference::values);
    let mut result = Vec::new();
    for token in reference::values(x).chunks_exact(inputs) {
        let sum = |output: usize| {
            let weight = &weight[output * inputs..(output + 1) * inputs];
            let products = token.iter().zip(weight).map(|(a, b)| f64::from(*a) * f64::from(*b));
            f64::from(bias[output]) + products.sum::<f64>()
        };
        let of_token: Vec<f64> = (0..outputs).map(sum).collect();
        let of_token: Vec<f64> = match activation {
            Activation::Nothing => of_token,
            Activation::Silu => of_token.into_iter().map(reference::silu).collect(),
            Activation::Gelu => of_token.into_iter().map(reference::gelu).collect(),
            Activation::QuickGelu => of_token.into_iter().map(reference::quick_gelu).collect(),
            Activation::GeluTanh => of_token.into_iter().map(reference::gelu_tanh).collect(),
            Activation::Relu => of_token.into_iter().map(|value| value.max(0.0)).collect(),
            Activation::Gate => {
                let (values, gates) = of_token.split_at(outputs / 2);
                values.iter().zip(gates).map(|(value, gate)| value * reference::gelu(*gate)).collect()
            }
        };
        for value in of_token {
            let added = residual.as_ref().map_or(0.0, |values| f64::from(values[result.len()]));
            result.push((value + added) as f32);
        }
    }
    result
}

/// The layer as another device has it.
fn elsewhere(weight: &Parameter<'_>, bias: Option<&Parameter<'_>>, activation: Activation) -> Linear {
    Linear::with_activation(weight, bias, activation, &Place::host().elsewhere()).unwrap()
}

#[test]
fn a_linear_layer_over_odd_shapes_equals_the_definition() {
    let shapes = [
        (1, 1, 1, 1),
        (2, 7, 5, 3),
        (1, 77, 96, 33),
        (3, 1, 64, 256),
        (1, 300, 40, 130),
        (2, 9, 320, 50),
        (1, 17, 33, 1),
        (1, 3, 3000, 17),
    ];
    for place in reference::places() {
        for (rows, tokens, inputs, outputs) in shapes {
            let (x, residual) =
                (tensor_at([rows, tokens, inputs], 1, &place), tensor_at([rows, tokens, outputs], 4, &place));
            let (weight, bias) = (parameter([outputs, inputs], 2), parameter([outputs], 3));
            let seen = reference::weight_values(&weight, &place);
            let layer = Linear::new(&weight, Some(&bias), &place).unwrap();
            let got = layer.forward_add(&x, &residual).unwrap();
            assert_eq!(got.dims(), [rows, tokens, outputs]);
            let expected = plain(&x, &seen, &bias.values().unwrap(), Activation::Nothing, Some(&residual));
            reference::assert_close(&reference::values(&got), &expected, reference::tolerance(&place));
            let got = Linear::new(&weight, None, &place).unwrap().forward(&x).unwrap();
            let expected = plain(&x, &seen, &vec![0.0; outputs], Activation::Nothing, None);
            reference::assert_close(&reference::values(&got), &expected, reference::tolerance(&place));
        }
    }
}

#[test]
fn every_activation_follows_the_sums_and_the_residual_comes_last() {
    for place in reference::places() {
        for activation in ACTIVATIONS {
            for (tokens, inputs, width) in [(1, 5, 1), (7, 33, 3), (13, 16, 17), (3, 40, 33), (2, 9, 48)] {
                let outputs = if activation == Activation::Gate { 2 * width } else { width };
                let (x, residual) =
                    (tensor_at([2, tokens, inputs], 1, &place), tensor_at([2, tokens, width], 2, &place));
                let (weight, bias) = (parameter([outputs, inputs], 3), parameter([outputs], 4));
                let seen = reference::weight_values(&weight, &place);
                for bias in [None, Some(&bias)] {
                    let layer = Linear::with_activation(&weight, bias, activation, &place).unwrap();
                    let bias = bias.map_or(vec![0.0; outputs], |bias| bias.values().unwrap());
                    let got = layer.forward(&x).unwrap();
                    assert_eq!(got.dims(), [2, tokens, width]);
                    let expected = plain(&x, &seen, &bias, activation, None);
                    reference::assert_close(&reference::values(&got), &expected, reference::tolerance(&place));
                    let got = layer.forward_add(&x, &residual).unwrap();
                    let expected = plain(&x, &seen, &bias, activation, Some(&residual));
                    reference::assert_close(&reference::values(&got), &expected, reference::tolerance(&place));
                }
            }
        }
    }
}

#[test]
fn a_gate_is_multiplied_row_by_row_before_the_residual_comes() {
    for place in reference::places() {
        for (tokens, inputs, width) in [(1, 5, 1), (7, 33, 3), (130, 16, 17), (3, 40, 33), (300, 9, 48)] {
            let (x, residual) = (tensor_at([3, tokens, inputs], 1, &place), tensor_at([3, tokens, width], 2, &place));
            let (gate, weight) = (tensor_at([3, width], 5, &place), parameter([width, inputs], 3));
            let layer = Linear::new(&weight, Some(&parameter([width], 4)), &place).unwrap();
            let seen = reference::weight_values(&weight, &place);
            let sums = plain(&x, &seen, &parameter([width], 4).values().unwrap(), Activation::Nothing, None);
            let (gates, residuals) = (reference::values(&gate), reference::values(&residual));
            let of_place = |at: usize| sums[at] * gates[at / (tokens * width) * width + at % width] + residuals[at];
            let expected: Vec<f32> = (0..sums.len()).map(of_place).collect();
            let got = layer.forward_gated(&x, &gate, &residual).unwrap();
            assert_eq!(got.dims(), [3, tokens, width]);
            reference::assert_close(&reference::values(&got), &expected, reference::tolerance(&place));
            for index in 0..3 {
                let [x, gate, residual] = [&x, &gate, &residual].map(|tensor| reference::row(tensor, index, &place));
                reference::assert_row_is(&got, index, &layer.forward_gated(&x, &gate, &residual).unwrap());
            }
            reference::assert_threads_do_not_show(|| layer.forward_gated(&x, &gate, &residual).unwrap());
            for misfit in [tensor_at([3, width + 1], 5, &place), tensor_at([2, width], 5, &place), x.clone()] {
                assert!(layer.forward_gated(&x, &misfit, &residual).is_err());
            }
        }
    }
    let (x, residual) = (reference::tensor([2, 7, 5], 1), reference::tensor([2, 7, 8], 2));
    let (gate, weight) = (reference::tensor([2, 8], 3), parameter([8, 5], 4));
    let here = Linear::new(&weight, None, &Place::host()).unwrap().forward_gated(&x, &gate, &residual).unwrap();
    let [x, gate, residual] = [&x, &gate, &residual].map(reference::elsewhere);
    let there = elsewhere(&weight, None, Activation::Nothing).forward_gated(&x, &gate, &residual).unwrap();
    reference::assert_close(&reference::values(&there), &reference::values(&here), 1e-5);
}

#[test]
fn a_pending_norm_that_is_read_gives_what_the_norm_and_then_the_layer_give() {
    for place in reference::places() {
        for (channels, groups, activation) in
            [(6, 3, Activation::Nothing), (33, 11, Activation::Gate), (64, 4, Activation::Silu)]
        {
            let (scale, shift) = (parameter([channels], 1), parameter([channels], 2));
            let norm = GroupNorm::new(&scale, &shift, groups, 1e-5).unwrap();
            let (weight, bias) = (parameter([34, channels], 3), parameter([34], 4));
            let layer = Linear::with_activation(&weight, Some(&bias), activation, &place).unwrap();
            let x = tensor_at([3, 7, 9, channels], 5, &place);
            for pending in [norm.forward(&x).unwrap(), norm.forward_silu(&x).unwrap()] {
                let tokens = pending.reshape(&[3, 63, channels]).unwrap();
                let (read, after) =
                    (layer.forward(&tokens).unwrap(), layer.forward(&tokens.resolved().unwrap()).unwrap());
                reference::assert_same(&read, &after);
            }
            let normal = reference::group_norm(&x, &scale.values().unwrap(), &shift.values().unwrap(), groups, 1e-5);
            let normal = Tensor::new(&normal, x.dims(), &Place::host()).unwrap();
            let expected =
                plain(&normal, &reference::weight_values(&weight, &place), &bias.values().unwrap(), activation, None);
            let got = layer.forward(&norm.forward(&x).unwrap()).unwrap();
            reference::assert_close(&reference::values(&got), &expected, reference::tolerance(&place));
        }
    }
}

#[test]
fn a_row_of_a_batch_equals_the_row_alone() {
    for place in reference::places() {
        for (tokens, inputs) in [(1, 100), (9, 33), (77, 100), (256, 64)] {
            for activation in [Activation::Nothing, Activation::Gate] {
                let (weight, bias) = (parameter([190, inputs], 1), parameter([190], 2));
                let layer = Linear::with_activation(&weight, Some(&bias), activation, &place).unwrap();
                let x = tensor_at([5, tokens, inputs], 3, &place);
                reference::assert_rows_stand_alone(&x, &place, |x| layer.forward(x).unwrap());
            }
        }
    }
}

#[test]
fn the_number_of_threads_does_not_show() {
    for place in reference::places() {
        for (tokens, inputs, outputs) in [(300, 64, 330), (7, 640, 1300)] {
            let layer = Linear::new(&parameter([outputs, inputs], 1), None, &place).unwrap();
            let x = tensor_at([2, tokens, inputs], 2, &place);
            reference::assert_threads_do_not_show(|| layer.forward(&x).unwrap());
        }
    }
}

#[test]
fn what_is_no_number_stays_visible_and_in_its_row() {
    for place in reference::places() {
        for activation in ACTIVATIONS {
            let layer = Linear::with_activation(&parameter([34, 33], 1), None, activation, &place).unwrap();
            let x = tensor_at([3, 5, 33], 2, &place);
            reference::assert_damage_stays_in_its_row(&x, &place, |x| layer.forward(x).unwrap());
        }
    }
}

#[test]
fn the_path_for_other_devices_agrees() {
    for activation in ACTIVATIONS {
        for (outputs, inputs) in [(8, 5), (34, 33)] {
            let (weight, bias) = (parameter([outputs, inputs], 1), parameter([outputs], 2));
            for bias in [None, Some(&bias)] {
                let here = Linear::with_activation(&weight, bias, activation, &Place::host()).unwrap();
                let there = elsewhere(&weight, bias, activation);
                let x = reference::tensor([2, 7, inputs], 3);
                let expected = here.forward(&x).unwrap();
                let got = there.forward(&reference::elsewhere(&x)).unwrap();
                assert_eq!(got.dims(), expected.dims());
                reference::assert_close(&reference::values(&got), &reference::values(&expected), 1e-5);
            }
        }
    }
    let (weight, residual) = (parameter([8, 5], 1), reference::tensor([2, 7, 8], 4));
    let (here, there) =
        (Linear::new(&weight, None, &Place::host()).unwrap(), elsewhere(&weight, None, Activation::Nothing));
    let x = reference::tensor([2, 7, 5], 3);
    let expected = here.forward_add(&x, &residual).unwrap();
    let got = there.forward_add(&reference::elsewhere(&x), &reference::elsewhere(&residual)).unwrap();
    reference::assert_close(&reference::values(&got), &reference::values(&expected), 1e-6);
}

#[test]
fn the_path_for_other_devices_agrees_on_quantised_weights() {
    // Lines of 96 values are no whole blocks of 256.
    for (format, inputs) in Quantisation::ALL.into_iter().flat_map(|format| [(format, 512), (format, 96)]) {
        let outputs = 32;
        let bytes = reference::quantised(format, outputs * inputs, 1);
        let weight = Parameter::new(&bytes, Stored::Quantised(format), &[outputs, inputs]);
        let here = Linear::new(&weight, None, &Place::host()).unwrap();
        let there = elsewhere(&weight, None, Activation::Nothing);
        let x = reference::tensor([2, 7, inputs], 3);
        let (expected, got) = (here.forward(&x).unwrap(), there.forward(&reference::elsewhere(&x)).unwrap());
        reference::assert_close(&reference::values(&got), &reference::values(&expected), 1e-5);
    }
}

#[test]
fn any_number_of_dimensions_before_the_width_is_taken() {
    for place in reference::places() {
        let layer = Linear::new(&parameter([7, 5], 1), None, &place).unwrap();
        let x = tensor_at([2, 3, 4, 5], 2, &place);
        let flat = reference::values(&layer.forward(&x.reshape(&[24, 5]).unwrap()).unwrap());
        for dims in [vec![2, 3, 4, 5], vec![24, 1, 5], vec![1, 24, 5]] {
            let got = layer.forward(&x.reshape(&dims).unwrap()).unwrap();
            assert_eq!((&got.dims()[..dims.len() - 1], got.dims()[dims.len() - 1]), (&dims[..dims.len() - 1], 7));
            assert_eq!(reference::values(&got), flat);
        }
        let vector = tensor_at([5], 3, &place);
        assert_eq!(layer.forward(&vector).unwrap().dims(), [7]);
        assert_eq!(layer.forward(&tensor_at([0, 3, 5], 3, &place)).unwrap().dims(), [0, 3, 7]);
    }
}

#[test]
fn wrong_shapes_are_errors_and_not_panics() {
    for place in reference::places() {
        let layer = Linear::new(&parameter([4, 3], 1), None, &place).unwrap();
        let error = layer.forward(&tensor_at([1, 2, 5], 2, &place)).unwrap_err().to_string();
        assert!(error.contains("3 inputs"), "{error}");
        assert!(layer.forward(&tensor_at([], 2, &place)).is_err());
        let x = tensor_at([1, 2, 3], 2, &place);
        for residual in [tensor_at([1, 2, 3], 3, &place), tensor_at([1, 3, 4], 3, &place)] {
            assert!(layer.forward_add(&x, &residual).is_err());
        }
        assert!(layer.forward_add(&x, &tensor_at([2, 4], 3, &place)).is_err());
        assert!(layer.forward(&reference::elsewhere(&x)).is_err());
        assert!(Linear::new(&parameter([4, 3, 1], 1), None, &place).is_err());
        assert!(Linear::with_activation(&parameter([5, 3], 1), None, Activation::Gate, &place).is_err());
    }
    let there = elsewhere(&parameter([4, 3], 1), None, Activation::Nothing);
    let x = reference::tensor([1, 2, 3], 2);
    assert!(there.forward(&x).is_err());
    assert!(there.forward_add(&reference::elsewhere(&x), &reference::tensor([1, 2, 4], 3)).is_err());
}

/// Layers of blocks and of the numbers in them: `(quantised, dense)`.
fn pair(format: Quantisation, dims: [usize; 2], bias: bool, then: Activation, place: &Place) -> (Linear, Linear) {
    let bytes = reference::quantised(format, dims[0] * dims[1], 7);
    let quantised = Parameter::new(&bytes, Stored::Quantised(format), &dims);
    let dense = Parameter::from_values(&quantised.values().unwrap(), &dims);
    let bias = bias.then(|| parameter([dims[0]], 3));
    let layer = |weight| Linear::with_activation(weight, bias.as_ref(), then, place).unwrap();
    (layer(&quantised), layer(&dense))
}

#[test]
fn a_quantised_layer_is_the_layer_of_its_numbers_bit_for_bit() {
    for place in reference::places() {
        for format in Quantisation::ALL {
            for (tokens, blocks, outputs) in [(1, 1, 1), (1, 3, 130), (7, 2, 33), (8, 9, 16), (41, 4, 50), (530, 1, 34)]
            {
                for (bias, then) in [(false, Activation::Nothing), (true, Activation::Silu), (true, Activation::Gate)] {
                    let outputs = if then == Activation::Gate { 2 * outputs } else { outputs };
                    let inputs = blocks * format.values();
                    let (quantised, dense) = pair(format, [outputs, inputs], bias, then, &place);
                    let x = tensor_at([2, tokens, inputs], 1, &place);
                    let expected = dense.forward(&x).unwrap();
                    reference::assert_same(&quantised.forward(&x).unwrap(), &expected);
                    let residual = tensor_at([2, tokens, *expected.dims().last().unwrap()], 5, &place);
                    let expected = dense.forward_add(&x, &residual).unwrap();
                    reference::assert_same(&quantised.forward_add(&x, &residual).unwrap(), &expected);
                }
            }
        }
    }
}

#[test]
fn a_quantised_layer_keeps_rows_and_threads_apart_and_reads_pending_norms() {
    for place in reference::places() {
        let (layer, dense) = pair(Quantisation::Q4_0, [330, 96], true, Activation::Gate, &place);
        let x = tensor_at([3, 70, 96], 2, &place);
        reference::assert_rows_stand_alone(&x, &place, |x| layer.forward(x).unwrap());
        reference::assert_threads_do_not_show(|| layer.forward(&x).unwrap());
        reference::assert_damage_stays_in_its_row(&x, &place, |x| layer.forward(x).unwrap());
        let norm = GroupNorm::new(&parameter([96], 1), &parameter([96], 2), 3, 1e-5).unwrap();
        let pending = norm.forward_silu(&x.reshape(&[3, 7, 10, 96]).unwrap()).unwrap();
        reference::assert_same(
            &layer.forward(&pending).unwrap(),
            &dense.forward(&pending.resolved().unwrap()).unwrap(),
        );
    }
}
