use super::*;
use crate::ops::kernel::isa::{Isa, Kernel, dispatch};

/// Numbers at the edges of `f32`, of `bf16` and of rounding from one to the other.
fn odd_values() -> Vec<f32> {
    let halves =
        [0x3f80_8000, 0x3f81_8000, 0x3f80_8001, 0x3f80_7fff, 0xbf80_8000, 0xbf81_8000, 0x7f7f_8000, 0x007f_8000];
    let ordinary = [1.0, -1.0, 0.1, -3.7, 1e-30, -1e30, 123_456.79, 2.5, 1.0 / 3.0, -65504.0];
    let ends = [f32::MAX, f32::MIN, f32::MIN_POSITIVE, f32::EPSILON, f32::INFINITY, f32::NEG_INFINITY];
    let small = [0.0, -0.0, f32::from_bits(1), -f32::from_bits(1), f32::from_bits(0x007f_ffff)];
    let nans = [f32::NAN, -f32::NAN, f32::from_bits(0x7f80_0001), f32::from_bits(0xffff_ffff)];
    let halves = halves.map(f32::from_bits);
    [&ordinary[..], &ends, &small, &nans, &halves].concat()
}

/// Each odd value with each other one.
fn pairs() -> Vec<(f32, f32)> {
    let values = odd_values();
    values.iter().flat_map(|a| values.iter().map(|b| (*a, *b))).collect()
}

/// What a method makes of each pair (and of 1.5 · the first, where it takes three).
#[derive(Clone, Copy, Debug, PartialEq)]
enum Method {
    Add,
    Sub,
    Mul,
    MulAdd,
    Max,
    Min,
    Abs,
    CopySign,
    Splat,
}

struct Each(Method, Vec<(f32, f32)>);

impl Kernel for Each {
    type Output = Vec<f32>;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Vec<f32> {
        let mut results = Vec::new();
        for pairs in self.1.chunks(S::LANES) {
            let (mut a, mut b): (Vec<f32>, Vec<f32>) = pairs.iter().copied().unzip();
            a.resize(S::LANES, 0.0);
            b.resize(S::LANES, 0.0);
            let mut to = vec![0.0; S::LANES];
            // SAFETY: each has a vector's values.
            unsafe {
                let (a, b) = (simd.load(a.as_ptr()), simd.load(b.as_ptr()));
                let value = match self.0 {
                    Method::Add => simd.add(a, b),
                    Method::Sub => simd.sub(a, b),
                    Method::Mul => simd.mul(a, b),
                    Method::MulAdd => simd.mul_add(a, b, simd.splat(1.5)),
                    Method::Max => simd.max(a, b),
                    Method::Min => simd.min(a, b),
                    Method::Abs => simd.abs(a),
                    Method::CopySign => simd.copy_sign(a, b),
                    Method::Splat => simd.splat(pairs[0].0),
                };
                simd.store(to.as_mut_ptr(), value);
            }
            results.extend_from_slice(&to[..pairs.len()]);
        }
        results
    }
}

/// The same number, or both none.
fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
}

#[test]
fn arithmetic_is_that_of_plain_numbers_to_the_bit() {
    let plain = |method, a: f32, b: f32| match method {
        Method::Add => a + b,
        Method::Sub => a - b,
        Method::Mul => a * b,
        Method::MulAdd => a.mul_add(b, 1.5),
        Method::Max => {
            if a > b {
                a
            } else {
                b
            }
        }
        Method::Min => {
            if a < b {
                a
            } else {
                b
            }
        }
        Method::Abs => a.abs(),
        Method::CopySign => a.copysign(b),
        Method::Splat => a,
    };
    let methods = [
        Method::Add,
        Method::Sub,
        Method::Mul,
        Method::MulAdd,
        Method::Max,
        Method::Min,
        Method::Abs,
        Method::CopySign,
    ];
    for (isa, method) in Isa::available().into_iter().flat_map(|isa| methods.map(|method| (isa, method))) {
        for ((a, b), got) in pairs().into_iter().zip(dispatch(isa, Each(method, pairs()))) {
            // Plain Rust may round twice.
            let twice = isa == Isa::Portable && method == Method::MulAdd && same(got, a * b + 1.5);
            assert!(same(got, plain(method, a, b)) || twice, "{isa}: {method:?}({a}, {b}) = {got}");
        }
    }
    for (isa, value) in Isa::available().into_iter().flat_map(|isa| odd_values().into_iter().map(move |v| (isa, v))) {
        let got = dispatch(isa, Each(Method::Splat, vec![(value, 0.0); 16]));
        assert!(got.iter().all(|got| got.to_bits() == value.to_bits()), "{isa}: {value}");
    }
}

/// Parts of vectors in both formats: what lies in memory afterwards, between values that stay.
struct Moves(Vec<f32>);

impl Kernel for Moves {
    type Output = Vec<(Vec<f32>, Vec<bf16>, Vec<f32>)>;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Self::Output {
        let mut results = Vec::new();
        for (start, count) in (0..self.0.len()).flat_map(|start| (0..=S::LANES).map(move |count| (start, count))) {
            let Some(from) = self.0.get(start..start + count) else { continue };
            let (mut copied, mut rounded) = (vec![9.0; count + 2], vec![bf16::ONE; count + 2]);
            let mut widened = vec![9.0; S::LANES];
            // SAFETY: `from` has `count` values, the others one more on either side.
            unsafe {
                let value = simd.load_some(from.as_ptr(), count);
                simd.store_some(copied.as_mut_ptr().add(1), value, count);
                simd.store_some_bf16(rounded.as_mut_ptr().add(1), value, count);
                simd.store(widened.as_mut_ptr(), simd.load_some_bf16(rounded.as_ptr().add(1), count));
            }
            results.push((copied, rounded, widened));
        }
        results
    }
}

#[test]
fn parts_of_vectors_are_read_and_written_and_nothing_beside_them() {
    let values = odd_values();
    for isa in Isa::available() {
        for (copied, rounded, widened) in dispatch(isa, Moves(values.clone())) {
            let count = copied.len() - 2;
            assert!(copied[0] == 9.0 && copied[count + 1] == 9.0, "{isa}");
            assert!(rounded[0] == bf16::ONE && rounded[count + 1] == bf16::ONE, "{isa}");
            assert!(widened[count..].iter().all(|value| value.to_bits() == 0), "{isa}: zeros behind the part");
            for (at, copied) in copied[1..=count].iter().enumerate() {
                let (narrow, wide) = (rounded[1 + at], widened[at]);
                assert!(same(wide, f32::from_bits(u32::from(narrow.to_bits()) << 16)), "{isa}: {narrow} widened");
                let expected = bf16::from_f32(*copied);
                // The instruction takes numbers below the smallest normal one as zero.
                let flushed = copied.is_subnormal() && narrow == bf16::ZERO;
                let equal = narrow.to_bits() == expected.to_bits() || (narrow.is_nan() && expected.is_nan());
                assert!(equal || flushed, "{isa}: {copied:e} became {narrow:e}, not {expected:e}");
            }
        }
        let got: Vec<u32> = dispatch(isa, Moves(values.clone()))
            .iter()
            .filter(|(copied, ..)| copied.len() == 3)
            .map(|(copied, ..)| copied[1].to_bits())
            .collect();
        assert!(got.into_iter().eq(values.iter().map(|value| value.to_bits())), "{isa}");
    }
}

/// Reciprocals, a · 2^n, sums and largest lanes of vectors of the values.
struct Rest(Vec<f32>);

struct Vector {
    values: Vec<f32>,
    reciprocal: Vec<f32>,
    scaled: Vec<(f32, Vec<f32>)>,
    sum: f32,
    largest: f32,
}

impl Kernel for Rest {
    type Output = Vec<Vector>;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Vec<Vector> {
        let mut results = Vec::new();
        for values in self.0.chunks_exact(S::LANES) {
            // SAFETY: each has a vector's values.
            let vector = unsafe { simd.load(values.as_ptr()) };
            let store = |value| {
                let mut to = vec![0.0; S::LANES];
                // SAFETY: as above.
                unsafe { simd.store(to.as_mut_ptr(), value) };
                to
            };
            let powers = [-126.0, -125.0, -24.0, -1.0, 0.0, 1.0, 13.0, 127.0];
            results.push(Vector {
                values: values.to_vec(),
                reciprocal: store(simd.reciprocal(vector)),
                scaled: powers.map(|power| (power, store(simd.scale_by_power(vector, simd.splat(power))))).to_vec(),
                sum: simd.sum(vector),
                largest: simd.largest(vector),
            });
        }
        results
    }
}

#[test]
fn reciprocals_powers_sums_and_the_largest_follow_their_definitions() {
    let mut values = crate::ops::reference::numbers(160, 1);
    values.iter_mut().step_by(3).for_each(|value| *value *= 1e6);
    values.iter_mut().step_by(5).for_each(|value| *value *= 1e-6);
    for isa in Isa::available() {
        for vector in dispatch(isa, Rest(values.clone())) {
            for (value, got) in vector.values.iter().zip(&vector.reciprocal).filter(|(value, _)| **value > 0.0) {
                let exact = 1.0 / f64::from(*value);
                assert!((f64::from(*got) - exact).abs() <= 2.4e-7 * exact, "{isa}: 1 / {value} = {got}");
            }
            for (power, scaled) in &vector.scaled {
                let expected = vector.values.iter().map(|value| (f64::from(*value) * f64::from(*power).exp2()) as f32);
                assert!(expected.eq(scaled.iter().copied()), "{isa}: times 2^{power}");
            }
            let exact: f64 = vector.values.iter().copied().map(f64::from).sum();
            let size: f64 = vector.values.iter().map(|value| f64::from(value.abs())).sum();
            assert!((f64::from(vector.sum) - exact).abs() <= 1e-6 * size, "{isa}: {} and not {exact}", vector.sum);
            assert_eq!(vector.largest, vector.values.iter().copied().fold(f32::MIN, f32::max), "{isa}");
        }
        let rest = dispatch(isa, Rest(vec![f32::NAN; 16]));
        assert!(rest[0].sum.is_nan() && rest[0].reciprocal[0].is_nan() && rest[0].scaled[0].1[0].is_nan(), "{isa}");
    }
}

/// sums + the dot products of `a`'s first pair with each of `b`'s pairs.
struct Dot<'a>(f32, [bf16; 2], &'a [bf16]);

impl Kernel for Dot<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Vec<f32> {
        let mut results = Vec::new();
        for pairs in self.2.chunks_exact(2 * S::LANES) {
            let mut to = vec![0.0; S::LANES];
            // SAFETY: each has the values of a vector or a pair.
            unsafe {
                let (a, b) = (simd.splat_pair(self.1.as_ptr()), simd.load_pairs(pairs.as_ptr()));
                simd.store(to.as_mut_ptr(), simd.dot(simd.splat(self.0), a, b));
            }
            results.extend(to);
        }
        results
    }
}

#[test]
fn a_dot_product_adds_both_products_of_each_pair() {
    let odd = odd_values()
        .into_iter()
        .map(bf16::from_f32)
        .filter(|value| value.to_f32().is_normal() && value.to_f32().abs() < 1e6);
    let mut b: Vec<bf16> = odd.flat_map(|value| [value, bf16::from_f32(-0.7), bf16::from_f32(1.3), value]).collect();
    b.resize(b.len().next_multiple_of(32), bf16::ONE);
    for (isa, sum) in Isa::available().into_iter().flat_map(|isa| [0.0, 1.0, -1234.5].map(|sum| (isa, sum))) {
        for a in [[1.0, 0.0], [0.0, 1.0], [3.0, -5.0], [0.01, 100.0]].map(|a| a.map(bf16::from_f32)) {
            for (pair, got) in b.chunks_exact(2).zip(dispatch(isa, Dot(sum, a, &b))) {
                let products = [0, 1].map(|at| f64::from(a[at].to_f32()) * f64::from(pair[at].to_f32()));
                let exact = f64::from(sum) + products[0] + products[1];
                let size = f64::from(sum.abs()) + products[0].abs() + products[1].abs();
                let most = 2e-7 * size + f64::from(f32::MIN_POSITIVE);
                assert!((f64::from(got) - exact).abs() <= most, "{isa}: {sum} + {a:?} · {pair:?} = {got}");
            }
        }
    }
}

#[test]
fn what_is_no_number_shows_in_its_own_lane_of_a_dot_product_alone() {
    for (isa, at) in Isa::available().into_iter().flat_map(|isa| (0..32).map(move |at| (isa, at))) {
        for damage in [bf16::NAN, bf16::INFINITY, bf16::NEG_INFINITY] {
            let mut b = [bf16::ONE; 32];
            b[at] = damage;
            let got = dispatch(isa, Dot(1.0, [bf16::from_f32(2.0), bf16::from_f32(3.0)], &b));
            for (lane, got) in got.iter().enumerate() {
                assert_eq!(got.is_finite(), lane != at / 2, "{isa}: lane {lane} is {got}");
                assert!(lane == at / 2 || *got == 6.0, "{isa}: lane {lane} is {got}");
            }
        }
    }
}

struct Columns(Vec<f32>);

impl Kernel for Columns {
    type Output = Vec<f32>;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Vec<f32> {
        let mut stored = vec![0.0; S::LANES * S::LANES];
        let (mut rows, mut to) = ([simd.splat(0.0); 16], [std::ptr::null_mut(); 16]);
        for (index, values) in self.0.chunks_exact(S::LANES).enumerate().take(S::LANES) {
            // SAFETY: a vector's values.
            rows[index] = unsafe { simd.load(values.as_ptr()) };
            to[index] = stored[index * S::LANES..].as_mut_ptr();
        }
        // SAFETY: there is room for a vector's values at each.
        unsafe { simd.store_columns(&rows, &to) };
        stored
    }
}

#[test]
fn rows_are_stored_as_columns() {
    let values: Vec<f32> = (0..256).map(|value| value as f32).collect();
    for isa in Isa::available() {
        let stored = dispatch(isa, Columns(values.clone()));
        let lanes = stored.len().isqrt();
        for (at, value) in stored.into_iter().enumerate() {
            assert_eq!(value, values[at % lanes * lanes + at / lanes], "{isa}");
        }
    }
}
