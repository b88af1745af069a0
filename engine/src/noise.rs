//! The noise of a row: torch's CPU generator, value for value, so that a seed gives diffusers' picture
//! on any device.
//!
//! The generator is the Mersenne Twister of Matsumoto and Nishimura (1998), seeded with the low 32 bits of
//! the seed; normal values come from pairs of uniform ones by Box and Muller (1958). `torch.randn` has two
//! ways to do that (`ATen/native/cpu/DistributionTemplates.h`), and both are here:
//!
//! - 16 values or more: uniforms of 24 bits in f32, turned into normals sixteen at a time. Where 16 does
//!   not divide the count, the last sixteen values are drawn a second time.
//! - fewer: pairs in f64, whose second half waits for the next such call.
//!
//! What is reached: every bit of what torch draws on x86-64 with AVX2 or newer. There torch takes the
//! logarithm, sine and cosine of its vector kernels, the single precision routines of Cephes (Moshier)
//! with fused multiply-adds, written out below in the same order. Torch on other machines calls the C
//! library instead, and itself differs from this by up to 2e-6.
//!
//! Nothing else in the engine makes random numbers.

use std::f64::consts::TAU;

const WORDS: usize = 624;
const SHIFT: usize = 397;
/// How many values torch turns into normals at once.
const BLOCK: usize = 16;

/// A row's source of noise: a stream of normal values that its seed alone decides.
#[derive(Clone)]
pub struct NoiseSource {
    words: [u32; WORDS],
    next: usize,
    /// The second half of the last pair drawn by the scalar way.
    spare: Option<f64>,
}

impl NoiseSource {
    /// What `torch.Generator("cpu").manual_seed(seed)` starts. Seeds that agree in their low 32 bits
    /// give the same noise, as in torch.
    pub fn new(seed: u64) -> Self {
        let mut words = [0; WORDS];
        words[0] = seed as u32;
        for index in 1..WORDS {
            let previous: u32 = words[index - 1];
            words[index] = 1_812_433_253_u32.wrapping_mul(previous ^ (previous >> 30)).wrapping_add(index as u32);
        }
        Self { words, next: WORDS, spare: None }
    }

    /// The next `count` values of the standard normal distribution, as `torch.randn(count)` draws them.
    /// How a stream is cut into calls matters: two calls of 8 are not one call of 16.
    pub fn normal(&mut self, count: usize) -> Vec<f32> {
        if count < BLOCK {
            return (0..count).map(|_| self.scalar_normal() as f32).collect();
        }
        let mut values: Vec<f32> = (0..count).map(|_| self.uniform()).collect();
        values.chunks_exact_mut(BLOCK).for_each(uniform_to_normal);
        if !count.is_multiple_of(BLOCK) {
            let last = &mut values[count - BLOCK..];
            last.fill_with(|| self.uniform());
            uniform_to_normal(last);
        }
        values
    }

    fn scalar_normal(&mut self) -> f64 {
        if let Some(value) = self.spare.take() {
            return value;
        }
        let angle = TAU * self.wide_uniform();
        let radius = (-2.0 * (-self.wide_uniform()).ln_1p()).sqrt();
        self.spare = Some(radius * angle.sin());
        radius * angle.cos()
    }

    /// Uniform in [0, 1), 24 bits.
    fn uniform(&mut self) -> f32 {
        (self.word() & 0x00ff_ffff) as f32 * 2f32.powi(-24)
    }

    /// Uniform in [0, 1), 53 bits.
    fn wide_uniform(&mut self) -> f64 {
        let high = u64::from(self.word());
        let bits = (high << 32) | u64::from(self.word());
        (bits & ((1 << 53) - 1)) as f64 * 2f64.powi(-53)
    }

    /// The next 32 bits of the Mersenne Twister.
    fn word(&mut self) -> u32 {
        if self.next == WORDS {
            self.twist();
        }
        let mut word = self.words[self.next];
        self.next += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c_5680;
        word ^= (word << 15) & 0xefc6_0000;
        word ^ (word >> 18)
    }

    fn twist(&mut self) {
        for index in 0..WORDS {
            let joined = (self.words[index] & 0x8000_0000) | (self.words[(index + 1) % WORDS] & 0x7fff_ffff);
            let odd = if joined & 1 == 1 { 0x9908_b0df } else { 0 };
            self.words[index] = self.words[(index + SHIFT) % WORDS] ^ (joined >> 1) ^ odd;
        }
        self.next = 0;
    }
}

/// Box-Muller over one block: its first half gives the radii, its second the angles.
fn uniform_to_normal(block: &mut [f32]) {
    let (radii, angles) = block.split_at_mut(BLOCK / 2);
    for (first, second) in radii.iter_mut().zip(angles) {
        // Uniforms are in [0, 1); the logarithm wants (0, 1].
        let radius = (-2.0 * log(1.0 - *first)).sqrt();
        let (sine, cosine) = sine_cosine(std::f32::consts::TAU * *second);
        *first = radius * cosine;
        *second = radius * sine;
    }
}

/// Natural logarithm of a normal number in (0, 1], Cephes' `logf`: the mantissa is brought near 1, a
/// polynomial gives its logarithm, and the exponent adds its multiple of ln 2, split in two for precision.
fn log(value: f32) -> f32 {
    const POLYNOMIAL: [f32; 9] = [
        7.037_683_6e-2,
        -1.151_461e-1,
        1.167_699_84e-1,
        -1.242_014_1e-1,
        1.424_932_3e-1,
        -1.666_805_7e-1,
        2.000_071_4e-1,
        -2.499_999_4e-1,
        3.333_333e-1,
    ];
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    const LN_2_HIGH: f32 = 0.693_359_4;

    let bits = value.to_bits();
    let mut exponent = (bits >> 23) as f32 - 126.0;
    let mantissa = f32::from_bits((bits & 0x007f_ffff) | 0x3f00_0000); // in [0.5, 1)
    let mut x = mantissa - 1.0;
    if mantissa < std::f32::consts::FRAC_1_SQRT_2 {
        exponent -= 1.0;
        x += mantissa;
    }
    let square = x * x;
    let polynomial = POLYNOMIAL.into_iter().reduce(|sum, term| sum.mul_add(x, term)).unwrap_or_default() * x;
    let correction = (-square).mul_add(0.5, polynomial.mul_add(square, exponent * LN_2_LOW));
    exponent.mul_add(LN_2_HIGH, x + correction)
}

/// Sine and cosine of an angle in [0, 2π], Cephes' `sinf` and `cosf`: the angle is reduced to within π/4
/// of a multiple of π/2 (subtracted in three parts for precision), where polynomials serve.
fn sine_cosine(angle: f32) -> (f32, f32) {
    const QUARTERS: [f32; 3] = [0.785_156_25, 2.418_756_5e-4, 3.774_895e-8]; // π/4 in three parts

    let octant = ((angle * (4.0 / std::f32::consts::PI)) as i32 + 1) & !1;
    let x = QUARTERS.into_iter().fold(angle, |rest, part| (octant as f32).mul_add(-part, rest));
    let square = x * x;

    let polynomial = 2.443_315_7e-5_f32.mul_add(square, -1.388_731_6e-3).mul_add(square, 4.166_664_6e-2);
    let near_cosine = (polynomial * square).mul_add(square, -(square * 0.5)) + 1.0;
    let polynomial = (-1.951_529_6e-4_f32).mul_add(square, 8.332_161e-3).mul_add(square, -1.666_665_5e-1);
    let near_sine = (polynomial * square).mul_add(x, x);

    match octant & 6 {
        0 => (near_sine, near_cosine),
        2 => (near_cosine, -near_sine),
        4 => (-near_sine, -near_cosine),
        _ => (-near_cosine, near_sine),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::SafeTensors;

    #[derive(serde::Deserialize)]
    struct Case {
        seed: u64,
        counts: Vec<usize>,
    }

    fn goldens() -> Vec<(Case, Vec<f32>)> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/goldens/noise.safetensors");
        let bytes = std::fs::read(path).expect("the goldens are committed");
        let (_, header) = SafeTensors::read_metadata(&bytes).expect("a safetensors file");
        let cases = &header.metadata().as_ref().expect("metadata")["cases"];
        let cases: Vec<Case> = serde_json::from_str(cases).expect("a list of cases");
        let tensors = SafeTensors::deserialize(&bytes).expect("a safetensors file");
        let values = |index: usize| {
            let tensor = tensors.tensor(&index.to_string()).expect("a tensor per case");
            tensor.data().chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().expect("four"))).collect()
        };
        cases.into_iter().enumerate().map(|(index, case)| (case, values(index))).collect()
    }

    fn draw(case: &Case) -> Vec<f32> {
        let mut source = NoiseSource::new(case.seed);
        case.counts.iter().flat_map(|&count| source.normal(count)).collect()
    }

    #[test]
    fn noise_is_torchs_bit_for_bit_for_calls_of_sixteen_or_more() {
        let goldens = goldens();
        let long: Vec<_> = goldens.iter().filter(|(case, _)| case.counts.iter().all(|&count| count >= BLOCK)).collect();
        assert!(long.len() > 30, "the goldens hold many long calls");
        for (case, expected) in long {
            let drawn = draw(case);
            assert_eq!(drawn.len(), expected.len());
            for (index, (drawn, expected)) in drawn.iter().zip(expected).enumerate() {
                assert_eq!(drawn.to_bits(), expected.to_bits(), "seed {} value {index}", case.seed);
            }
        }
    }

    #[test]
    fn noise_is_torchs_for_short_and_mixed_calls() {
        // The scalar way takes the C library's f64 functions, whose last bit may differ by machine.
        for (case, expected) in goldens() {
            let drawn = draw(&case);
            assert_eq!(drawn.len(), expected.len());
            for (index, (drawn, expected)) in drawn.iter().zip(&expected).enumerate() {
                let error = (drawn - expected).abs();
                assert!(error <= 1e-7 * expected.abs(), "seed {} value {index}: {drawn} is not {expected}", case.seed);
            }
        }
    }

    #[test]
    fn seeds_that_agree_in_their_low_32_bits_give_the_same_noise() {
        assert_eq!(NoiseSource::new(7).normal(40), NoiseSource::new(7 + (1 << 32)).normal(40));
        assert_ne!(NoiseSource::new(7).normal(40), NoiseSource::new(8).normal(40));
    }

    #[test]
    fn a_cloned_source_goes_on_as_its_original_does() {
        let mut source = NoiseSource::new(11);
        source.normal(5);
        let mut twin = source.clone();
        assert_eq!(source.normal(3), twin.normal(3));
        assert_eq!(source.normal(700), twin.normal(700));
    }

    #[test]
    fn no_values_can_be_asked_for() {
        assert!(NoiseSource::new(0).normal(0).is_empty());
    }
}
