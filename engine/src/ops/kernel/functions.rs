//! Elementary functions of vectors, within a few units in the last place of `f32`.

use super::simd::Simd;

/// e^x within two units in the last place; below -87 about 1e-38, above 88 about 1e38.
#[inline(always)]
pub(in crate::ops) fn exp<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    // ln 2 in two parts, the first with trailing zeros, so that n · ln 2 keeps its precision.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // In this order a NaN stays one.
    let x = simd.max(simd.splat(-87.3), simd.min(simd.splat(88.0), x));
    let whole = simd.round(simd.mul(x, simd.splat(std::f32::consts::LOG2_E)));
    let rest = simd.mul_add(whole, simd.splat(-LN_2_HIGH), x);
    let rest = simd.mul_add(whole, simd.splat(-LN_2_LOW), rest);
    // Taylor's series on |rest| <= ln 2 / 2, where the next term is below 1e-8.
    let mut series = simd.splat(1.0 / 5040.0);
    for term in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        series = simd.mul_add(series, rest, simd.splat(term));
    }
    simd.scale_by_power(series, whole)
}

/// x / (1 + e^-x).
#[inline(always)]
pub(in crate::ops) fn silu<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    let one = simd.splat(1.0);
    let power = exp(simd, simd.sub(simd.splat(0.0), x));
    simd.mul(x, simd.reciprocal(simd.add(one, power)))
}

/// x · σ(1.702 x).
#[inline(always)]
pub(in crate::ops) fn quick_gelu<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    let one = simd.splat(1.0);
    let power = exp(simd, simd.mul(x, simd.splat(-1.702)));
    simd.mul(x, simd.reciprocal(simd.add(one, power)))
}

/// x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))): what some models were trained with in GELU's place. As
/// (1 + tanh u) / 2 is σ(2u), no sum cancels.
#[inline(always)]
pub(in crate::ops) fn gelu_tanh<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    /// 2 · √(2/π)
    const SLOPE: f32 = 1.595_769_2;
    let cubic = simd.mul_add(simd.mul(x, x), simd.splat(-SLOPE * 0.044_715), simd.splat(-SLOPE));
    let power = exp(simd, simd.mul(cubic, x));
    simd.mul(x, simd.reciprocal(simd.add(simd.splat(1.0), power)))
}

/// The larger of x and 0; a NaN stays one.
#[inline(always)]
pub(in crate::ops) fn relu<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    simd.max(simd.splat(0.0), x)
}

/// x · Φ(x) = x/2 · erfc(-x/√2), the exact one.
#[inline(always)]
pub(in crate::ops) fn gelu<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    let tail = erfc(simd, simd.mul(simd.abs(x), simd.splat(std::f32::consts::FRAC_1_SQRT_2)));
    let chosen = select_negative(simd, x, tail, simd.sub(simd.splat(2.0), tail));
    simd.mul(simd.mul(simd.splat(0.5), x), chosen)
}

/// `negative` where x < 0, else `positive`; both at most 2.
#[inline(always)]
fn select_negative<S: Simd>(simd: S, x: S::F32, negative: S::F32, positive: S::F32) -> S::F32 {
    // A sign of ±1 makes one of the two weights 0 and the other 1, exactly.
    let sign = simd.copy_sign(simd.splat(0.5), x);
    let weight = simd.sub(simd.splat(0.5), sign);
    simd.mul_add(weight, negative, simd.mul(simd.sub(simd.splat(1.0), weight), positive))
}

/// The complementary error function for x >= 0 as t · P(t) · exp(-x²) with t = 1 / (1 + 0.35 x), where
/// P is a least-squares fit over 0 <= x <= 6 whose own absolute error is below 4e-9.
#[inline(always)]
fn erfc<S: Simd>(simd: S, x: S::F32) -> S::F32 {
    const FIT: [f32; 7] =
        [-0.192_573_05, 0.744_897_5, -0.622_766_1, 0.619_837_1, 0.032_038_96, 0.222_365_33, 0.196_200_22];
    let t = simd.reciprocal(simd.mul_add(x, simd.splat(0.35), simd.splat(1.0)));
    let mut fit = simd.splat(FIT[0]);
    for term in &FIT[1..] {
        fit = simd.mul_add(fit, t, simd.splat(*term));
    }
    let negative_square = simd.mul(x, simd.sub(simd.splat(0.0), x));
    simd.mul(simd.mul(t, fit), exp(simd, negative_square))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::kernel::isa::{Isa, Kernel, dispatch};
    use crate::ops::reference;

    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Function {
        Exp,
        Silu,
        Gelu,
        QuickGelu,
        GeluTanh,
        Relu,
    }

    const ALL: [Function; 6] =
        [Function::Exp, Function::Silu, Function::Gelu, Function::QuickGelu, Function::GeluTanh, Function::Relu];

    /// A function of each of some numbers.
    struct Each<'a>(Function, &'a [f32]);

    impl Kernel for Each<'_> {
        type Output = Vec<f32>;

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> Vec<f32> {
            let Self(function, from) = self;
            let mut to = vec![0.0; from.len()];
            for (from, to) in from.chunks(S::LANES).zip(to.chunks_mut(S::LANES)) {
                // SAFETY: both have as many values as `from`, at most a vector's.
                unsafe {
                    let x = simd.load_some(from.as_ptr(), from.len());
                    let value = match function {
                        Function::Exp => exp(simd, x),
                        Function::Silu => silu(simd, x),
                        Function::Gelu => gelu(simd, x),
                        Function::QuickGelu => quick_gelu(simd, x),
                        Function::GeluTanh => gelu_tanh(simd, x),
                        Function::Relu => relu(simd, x),
                    };
                    simd.store_some(to.as_mut_ptr(), value, from.len());
                }
            }
            to
        }
    }

    /// Fails unless the distance from `exact` is at most `most` of it where it is `relative`, else `most`.
    #[track_caller]
    fn assert_near(function: Function, xs: &[f32], exact: impl Fn(f64) -> f64, most: f64, relative: bool) {
        for isa in Isa::available() {
            for (x, got) in xs.iter().zip(dispatch(isa, Each(function, xs))) {
                let exact = exact(f64::from(*x));
                let most = if relative { most * exact } else { most };
                assert!((f64::from(got) - exact).abs() <= most, "{isa}: {function:?}({x}) = {got}, not {exact}");
            }
        }
    }

    /// Numbers from `first` to `last` hundredths.
    fn hundredths(first: i32, last: i32) -> Vec<f32> {
        (first..=last).map(|step| step as f32 / 100.0).collect()
    }

    #[test]
    fn powers_are_within_two_units_in_the_last_place() {
        assert_near(Function::Exp, &hundredths(-8700, 8800), f64::exp, 2.4e-7, true);
    }

    #[test]
    fn the_power_of_zero_is_exact() {
        assert_near(Function::Exp, &[0.0, -0.0], f64::exp, 0.0, true);
    }

    #[test]
    fn powers_beyond_f32_are_as_small_or_large_as_it_has_them() {
        for isa in Isa::available() {
            let far = [-1e4, f32::NEG_INFINITY, f32::MIN, 1e4, f32::INFINITY, f32::MAX];
            let got = dispatch(isa, Each(Function::Exp, &far));
            assert!(got[..3].iter().all(|value| (0.0..2e-38).contains(value)), "{isa}: {got:?}");
            assert!(got[3..].iter().all(|value| *value > 1e38), "{isa}: {got:?}");
        }
    }

    #[test]
    fn gelu_is_the_exact_one_and_not_its_tanh_approximation() {
        assert_near(Function::Gelu, &hundredths(-600, 600), reference::gelu, 4e-7, false);
        // Beyond, it is the identity or zero.
        let beyond = [-1e4, -100.0, -20.0, -7.0, 7.0, 20.0, 100.0, 1e4];
        assert_near(Function::Gelu, &beyond, |x| x.max(0.0), 1e-6, false);
    }

    #[test]
    fn the_tanh_approximation_is_itself_and_not_the_exact_gelu() {
        assert_near(Function::GeluTanh, &hundredths(-600, 600), reference::gelu_tanh, 1e-6, false);
        let beyond = [-1e4, -100.0, -20.0, -7.0, 7.0, 20.0, 100.0, 1e4];
        assert_near(Function::GeluTanh, &beyond, |x| x.max(0.0), 1e-6, false);
        assert_near(Function::GeluTanh, &[1e10, 1e30], |x| x, 1e-7, true);
        let apart = |x: &f32| (reference::gelu_tanh(f64::from(*x)) - reference::gelu(f64::from(*x))).abs();
        assert!(hundredths(0, 400).iter().map(apart).fold(0.0, f64::max) > 4e-4);
    }

    #[test]
    fn a_relu_is_exact() {
        assert_near(Function::Relu, &hundredths(-300, 300), |x| x.max(0.0), 0.0, false);
    }

    #[test]
    fn silu_and_quick_gelu_follow_their_definitions() {
        let xs = [hundredths(-2000, 2000), vec![-1e4, -100.0, -88.5, 88.5, 100.0]].concat();
        assert_near(Function::Silu, &xs, reference::silu, 2e-6, false);
        assert_near(Function::QuickGelu, &xs, reference::quick_gelu, 2e-6, false);
        assert_near(Function::Silu, &[1e4, 1e30], |x| x, 1e-7, true);
        assert_near(Function::QuickGelu, &[1e4, 1e30], |x| x, 1e-7, true);
    }

    #[test]
    fn small_numbers_keep_their_relative_precision() {
        let small: Vec<f32> = (1..40).flat_map(|power| [2f32.powi(-power), -(2f32.powi(-power))]).collect();
        for (function, exact) in [
            (Function::Silu, reference::silu as fn(f64) -> f64),
            (Function::Gelu, reference::gelu),
            (Function::QuickGelu, reference::quick_gelu),
            (Function::GeluTanh, reference::gelu_tanh),
        ] {
            for isa in Isa::available() {
                for (x, got) in small.iter().zip(dispatch(isa, Each(function, &small))) {
                    let exact = exact(f64::from(*x));
                    assert!(
                        (f64::from(got) - exact).abs() <= 1e-6 * exact.abs(),
                        "{isa}: {function:?}({x}) = {got}, not {exact}"
                    );
                }
            }
        }
    }

    #[test]
    fn what_is_no_number_stays_visible_and_zero_stays_zero() {
        for isa in Isa::available() {
            for function in ALL {
                let got = dispatch(isa, Each(function, &[f32::NAN, -f32::NAN, 1.0]));
                assert!(got[0].is_nan() && got[1].is_nan() && got[2].is_finite(), "{isa}: {function:?} {got:?}");
            }
            for function in ALL.into_iter().filter(|function| ![Function::Exp, Function::Relu].contains(function)) {
                let got = dispatch(isa, Each(function, &[f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0]));
                assert!(!got[0].is_finite() && !got[1].is_finite(), "{isa}: {function:?} {got:?}");
                assert_eq!(got[2..], [0.0, 0.0], "{isa}: {function:?}");
            }
        }
    }
}
