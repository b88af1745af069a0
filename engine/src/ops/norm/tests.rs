use super::*;
use crate::ops::reference::{self, parameter, tensor_at};
use crate::ops::tensor::Place;

const EPSILON: f64 = 1e-5;

fn group_norm(channels: usize, groups: usize) -> GroupNorm {
    GroupNorm::new(&parameter([channels], 8), &parameter([channels], 9), groups, EPSILON).unwrap()
}

/// [`reference::numbers`] times 3 around `centre`.
fn around(centre: f32, dims: [usize; 4], place: &Place) -> Tensor {
    let values: Vec<f32> =
        reference::numbers(dims.iter().product(), 1).iter().map(|value| value * 3.0 + centre).collect();
    Tensor::new(&values, &dims, place).unwrap()
}

const CASES: [([usize; 4], usize); 10] = [
    ([1, 1, 1, 2], 1),
    ([2, 3, 5, 6], 3),
    ([1, 17, 9, 8], 8),
    ([3, 4, 4, 12], 1),
    ([1, 20, 21, 32], 16),
    ([2, 7, 9, 33], 11),
    ([2, 1, 72, 5], 5),
    ([1, 8, 7, 320], 32),
    ([2, 65, 1, 3], 1),
    ([1, 72, 73, 70], 10),
];

#[test]
fn a_group_norm_over_odd_shapes_equals_the_definition() {
    for place in reference::places() {
        for (dims, groups) in CASES {
            let (x, norm) = (around(20.0, dims, &place), group_norm(dims[3], groups));
            let expected = reference::group_norm(&x, &norm.weight, &norm.bias, groups, EPSILON);
            let got = norm.forward(&x).unwrap();
            assert_eq!(got.dims(), dims);
            reference::assert_close(&reference::values(&got), &expected, reference::tolerance(&place));
            let silu: Vec<f32> = expected.iter().map(|value| reference::silu(f64::from(*value)) as f32).collect();
            let got = norm.forward_silu(&x).unwrap();
            reference::assert_close(&reference::values(&got), &silu, reference::tolerance(&place));
        }
    }
}

#[test]
fn a_mean_far_from_zero_costs_no_digits_of_the_variance() {
    // What f32 leaves of the values' differences is exact here: the definition sees the same numbers.
    for centre in [1e3, -3e4, 1e6] {
        let (x, norm) = (around(centre, [2, 33, 9, 10], &Place::host()), group_norm(10, 2));
        let expected = reference::group_norm(&x, &norm.weight, &norm.bias, 2, EPSILON);
        let mut moments = vec![Moments::default(); 2 * 10];
        join_moments(x.host().unwrap(), Parts::of_lines(33, 9), 10, &mut moments).unwrap();
        let pending = norm.pending(&moments, 10, false);
        for (index, value) in reference::values(&x).iter().enumerate() {
            let (row, channel) = (index / (33 * 9 * 10), index % 10);
            let (scale, shift) = (pending.scale[row * 10 + channel], pending.shift[row * 10 + channel]);
            let got = f64::from(*value) * f64::from(scale) + f64::from(shift);
            // The shift itself is as large as the centre, in f32.
            let most = 3e-5 + f64::from(centre.abs()) * 2e-7;
            assert!((got - f64::from(expected[index])).abs() < most, "value {index} is {got}, not {}", expected[index]);
        }
    }
}

#[test]
fn of_values_far_from_zero_only_the_rounding_of_the_shift_is_lost() {
    // Each channel is a group of its own: four values near each other, around 70 to 115.
    const CHANNELS: usize = 64;
    let value = |pixel: usize, channel: usize| {
        let (centre, stride) = (70.0 + channel as f32 * 0.7, (channel % 5 + 1) as f32 * 0.004);
        centre + pixel as f32 * stride + channel as f32 * 0.001
    };
    let values: Vec<f32> = (0..4 * CHANNELS).map(|index| value(index / CHANNELS, index % CHANNELS)).collect();
    let x = Tensor::new(&values, &[1, 2, 2, CHANNELS], &Place::host()).unwrap();
    let plain = |value| Parameter::from_values(&[value; CHANNELS], &[CHANNELS]);
    let norm = GroupNorm::new(&plain(1.0), &plain(0.0), CHANNELS, EPSILON).unwrap();
    let got = reference::values(&norm.forward(&x).unwrap());
    for channel in 0..CHANNELS {
        let pixels = [0, 1, 2, 3].map(|pixel| f64::from(values[pixel * CHANNELS + channel]));
        let mean = pixels.iter().sum::<f64>() / 4.0;
        let variance = pixels.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / 4.0;
        let factor = 1.0 / (variance + EPSILON).sqrt();
        for (pixel, value) in pixels.iter().enumerate() {
            let (expected, got) = ((value - mean) * factor, f64::from(got[pixel * CHANNELS + channel]));
            let most = mean * factor * 2f64.powi(-24) + expected.abs() * 2f64.powi(-22);
            assert!((got - expected).abs() <= most, "channel {channel}: {got}, not {expected}, by at most {most}");
        }
    }
}

#[test]
fn equal_values_become_the_bias() {
    for place in reference::places() {
        let norm = group_norm(6, 2);
        let x = Tensor::new(&[4.0; 2 * 9 * 7 * 6], &[2, 9, 7, 6], &place).unwrap();
        let got = reference::values(&norm.forward(&x).unwrap());
        let expected: Vec<f32> = (0..got.len()).map(|index| norm.bias[index % 6]).collect();
        // Nothing but epsilon divides: the shift is some 300 times the mean.
        reference::assert_close(&got, &expected, reference::tolerance(&place).max(2e-4));
    }
}

#[test]
fn a_norm_of_a_norm_applies_the_first_one() {
    for place in reference::places() {
        let (first, second) = (group_norm(33, 3), group_norm(33, 11));
        let pending = first.forward_silu(&tensor_at([2, 7, 9, 33], 1, &place)).unwrap();
        let after = second.forward(&pending.resolved().unwrap()).unwrap();
        reference::assert_same(&second.forward(&pending).unwrap(), &after);
    }
}

#[test]
fn what_is_pending_is_applied_once_and_the_original_stays() {
    for place in reference::places() {
        let (x, norm) = (tensor_at([2, 5, 7, 33], 1, &place), group_norm(33, 3));
        let before = reference::values(&x);
        let pending = norm.forward_silu(&x).unwrap();
        let once = pending.resolved().unwrap();
        reference::assert_same(&once.resolved().unwrap(), &once);
        reference::assert_same(&pending.clone(), &once);
        assert_eq!(reference::values(&x), before);
    }
}

#[test]
fn neither_company_nor_threads_nor_damage_in_another_row_show() {
    for place in reference::places() {
        for (dims, groups) in [([3, 13, 11, 32], 4), ([3, 1, 3, 5], 1), ([3, 40, 41, 33], 11)] {
            let (x, norm) = (tensor_at(dims, 1, &place), group_norm(dims[3], groups));
            let run = |x: &Tensor| norm.forward_silu(x).unwrap().resolved().unwrap();
            reference::assert_rows_stand_alone(&x, &place, run);
            reference::assert_threads_do_not_show(|| run(&x));
            reference::assert_damage_stays_in_its_row(&x, &place, run);
        }
    }
}

#[test]
fn damage_shows_in_its_whole_group_wherever_it_lies() {
    for damage in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for place in [0, 6, 70 * 6 + 1, 5 * 11 * 6 + 2] {
            let norm = group_norm(6, 2);
            let mut values = reference::numbers(9 * 11 * 6, 1);
            values[place] = damage;
            let x = Tensor::new(&values, &[1, 9, 11, 6], &Place::host()).unwrap();
            let got = reference::values(&norm.forward(&x).unwrap());
            for (index, value) in got.iter().enumerate() {
                assert_eq!(
                    value.is_finite(),
                    index % 6 / 3 != place % 6 / 3,
                    "value {index} after {damage} at {place}"
                );
            }
        }
    }
}

#[test]
fn squares_beyond_f32_show_instead_of_passing_for_an_endless_variance() {
    let values: Vec<f32> = (0..9 * 11 * 6).map(|index| if index / 6 % 2 == 0 { 1e25 } else { -1e25 }).collect();
    let x = Tensor::new(&values, &[1, 9, 11, 6], &Place::host()).unwrap();
    assert!(reference::values(&group_norm(6, 2).forward(&x).unwrap()).iter().all(|value| value.is_nan()));
}

#[test]
fn the_path_for_other_devices_agrees() {
    let (norm, x) = (group_norm(12, 3), reference::tensor([2, 5, 4, 12], 1));
    let there = reference::elsewhere(&x);
    for (here, there) in [(norm.forward(&x), norm.forward(&there)), (norm.forward_silu(&x), norm.forward_silu(&there))]
    {
        reference::assert_close(&reference::values(&there.unwrap()), &reference::values(&here.unwrap()), 1e-5);
    }
}

#[test]
fn parts_cover_each_pixel_once() {
    for pixels in [1, 63, 64, 65, 511, 513, 4096, 40_000] {
        let parts = Parts::of(pixels);
        let covered: Vec<usize> = (0..parts.count).flat_map(|index| parts.range(index)).collect();
        assert!(covered.into_iter().eq(0..pixels), "{pixels} pixels");
    }
    for (height, width) in [(1, 1), (9, 13), (64, 64), (3, 5000), (1024, 1024)] {
        let parts = Parts::of_lines(height, width);
        let covered: Vec<usize> = (0..parts.count).flat_map(|index| parts.range(index)).collect();
        assert!(covered.into_iter().eq(0..height * width), "{height} × {width}");
        assert_eq!(parts.size % width, 0);
    }
}

#[test]
fn wrong_shapes_are_errors_and_not_panics() {
    let of = |weight, bias, groups| GroupNorm::new(&parameter([weight], 1), &parameter([bias], 2), groups, EPSILON);
    let error = of(6, 6, 4).err().unwrap().to_string();
    assert!(error.contains("6 channels cannot be cut into 4 groups"), "{error}");
    assert!(of(6, 6, 0).is_err());
    assert!(of(6, 5, 3).is_err());
    let norm = group_norm(6, 3);
    for place in reference::places() {
        assert!(norm.forward(&tensor_at([2, 3, 4, 7], 1, &place)).is_err());
        assert!(norm.forward(&tensor_at([2, 3, 6], 1, &place)).is_err());
        assert!(norm.forward_silu(&tensor_at([], 1, &place)).is_err());
        assert!(reference::values(&norm.forward(&tensor_at([0, 3, 4, 6], 1, &place)).unwrap()).is_empty());
    }
}
