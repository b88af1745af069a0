//! Each operation by itself, at the shapes that Stable Diffusion 1.5 calls it with for 512×512 pixels.

use crate::ops::{Activation, Conv2d, ConvShape, GroupNorm, LayerNorm, Linear, Mask, Parameter, Place, Tensor};
use crate::ops::{UpsampleConv, attention};
use crate::{Device, Precision, Result};

const GROUPS: usize = 32;
const EPSILON: f64 = 1e-5;

/// An operation at one shape, not yet prepared.
#[derive(Clone, Debug)]
pub struct Case {
    /// What it is.
    pub name: &'static str,
    /// Its shape, for people.
    pub shape: String,
    /// Floating-point operations of one run; a multiply-add is two. Norms count as none.
    pub flops: f64,
    /// Numbers read and written once: inputs, weights, output.
    numbers: f64,
    kind: Kind,
}

/// An operation that can be run again and again.
pub type Prepared = Box<dyn FnMut() -> Result<()>>;

/// The operations; maps are square.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Convolution { rows: usize, side: usize, inputs: usize, outputs: usize, norm: bool },
    Upsampling { rows: usize, side: usize, channels: usize },
    Linear { rows: usize, tokens: usize, inputs: usize, outputs: usize, gate: bool },
    Attention { rows: usize, queries: usize, keys: usize, width: usize, heads: usize },
    GroupNorm { rows: usize, side: usize, channels: usize },
    LayerNorm { rows: usize, tokens: usize, channels: usize },
}

/// The cases for `batch` pictures at once; the denoiser sees two rows of each.
pub fn cases(batch: usize) -> Vec<Case> {
    let (unet, vae) = (2 * batch, batch);
    let mut cases = Vec::new();
    let mut add = |name, kind| cases.push(Case::new(name, kind));
    let convolution =
        |rows, side, channels, norm| Kind::Convolution { rows, side, inputs: channels, outputs: channels, norm };
    for (side, channels) in [(64, 320), (32, 640), (16, 1280), (8, 1280)] {
        add("3×3 convolution", convolution(unet, side, channels, false));
    }
    for (side, channels) in [(64, 512), (128, 512), (256, 256), (512, 128)] {
        add("3×3 convolution, VAE", convolution(vae, side, channels, false));
    }
    add("group norm + SiLU + 3×3 convolution", convolution(unet, 64, 320, true));
    add("group norm + SiLU + 3×3 convolution, VAE", convolution(vae, 512, 128, true));
    add("1×1 convolution", Kind::Linear { rows: unet, tokens: 4096, inputs: 960, outputs: 320, gate: false });
    add("2× and 3×3 convolution", Kind::Upsampling { rows: unet, side: 32, channels: 640 });
    add("2× and 3×3 convolution, VAE", Kind::Upsampling { rows: vae, side: 256, channels: 256 });

    let linear = |tokens, inputs, outputs, gate| Kind::Linear { rows: unet, tokens, inputs, outputs, gate };
    for (tokens, channels) in [(4096, 320), (1024, 640), (256, 1280)] {
        add("linear, query", linear(tokens, channels, channels, false));
        add("linear + GEGLU", linear(tokens, channels, 8 * channels, true));
        add("linear, back from GEGLU", linear(tokens, 4 * channels, channels, false));
    }
    let attention = |queries, keys, width| Kind::Attention { rows: unet, queries, keys, width, heads: 8 };
    add("attention", attention(4096, 4096, 320));
    add("attention", attention(1024, 1024, 640));
    add("attention", attention(256, 256, 1280));
    add("attention to the prompt", attention(4096, 77, 320));
    let pixels = Kind::Attention { rows: vae, queries: 4096, keys: 4096, width: 512, heads: 1 };
    add("attention, VAE", pixels);
    add("group norm, statistics", Kind::GroupNorm { rows: unet, side: 64, channels: 320 });
    add("group norm, statistics, VAE", Kind::GroupNorm { rows: vae, side: 512, channels: 128 });
    add("layer norm", Kind::LayerNorm { rows: unet, tokens: 4096, channels: 320 });
    cases
}

impl Case {
    fn new(name: &'static str, kind: Kind) -> Self {
        let (flops, numbers) = kind.work();
        Self { name, shape: kind.shape(), flops: flops as f64, numbers: numbers as f64, kind }
    }

    /// Bytes read and written once in `precision`.
    pub fn bytes(&self, precision: Precision) -> f64 {
        self.numbers * precision.dtype().size_in_bytes() as f64
    }

    /// The operation with its weights and inputs, to be run again and again.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`] or [`crate::Error::Device`].
    pub fn prepare(&self, device: &Device, precision: Precision) -> Result<Prepared> {
        let place = device.place(precision);
        let run = self.kind.prepare(&place)?;
        let device = device.clone();
        Ok(Box::new(move || {
            device.run(&run)?;
            device.synchronize()
        }))
    }
}

type Run = Box<dyn Fn() -> Result<()> + Send + Sync>;

impl Kind {
    /// Floating-point operations, and numbers read and written.
    fn work(self) -> (usize, usize) {
        match self {
            Self::Convolution { rows, side, inputs, outputs, norm } => {
                let (pixels, weights) = (rows * side * side, 9 * inputs * outputs);
                // A norm looks at all of its input before the first of it can be convolved.
                let reads = if norm { 2 } else { 1 };
                (2 * pixels * weights, reads * pixels * inputs + weights + pixels * outputs)
            }
            Self::Upsampling { rows, side, channels } => {
                let pixels = rows * side * side;
                // Of a window's nine pixels only four differ.
                (2 * 4 * pixels * 4 * channels * channels, 5 * pixels * channels + 9 * channels * channels)
            }
            Self::Linear { rows, tokens, inputs, outputs, gate } => {
                let written = if gate { outputs / 2 } else { outputs };
                let numbers = rows * tokens * (inputs + written) + inputs * outputs;
                (2 * rows * tokens * inputs * outputs, numbers)
            }
            Self::Attention { rows, queries, keys, width, .. } => {
                (4 * rows * queries * keys * width, 2 * rows * (queries + keys) * width)
            }
            Self::GroupNorm { rows, side, channels } => (0, rows * side * side * channels),
            Self::LayerNorm { rows, tokens, channels } => (0, 2 * rows * tokens * channels),
        }
    }

    fn shape(self) -> String {
        match self {
            Self::Convolution { rows, side, inputs, outputs, .. } => {
                format!("{rows}×{side}×{side}, {inputs}→{outputs}")
            }
            Self::Upsampling { rows, side, channels } => format!("{rows}×{side}×{side}, {channels}"),
            Self::Linear { rows, tokens, inputs, outputs, .. } => format!("{rows}×{tokens}, {inputs}→{outputs}"),
            Self::Attention { rows, queries, keys, width, heads } => {
                format!("{rows}×{queries}×{keys}, {heads}×{}", width / heads)
            }
            Self::GroupNorm { rows, side, channels } => format!("{rows}×{side}×{side}, {channels}"),
            Self::LayerNorm { rows, tokens, channels } => format!("{rows}×{tokens}, {channels}"),
        }
    }

    fn prepare(self, place: &Place) -> Result<Run> {
        Ok(match self {
            Self::Convolution { rows, side, inputs, outputs, norm } => {
                let (weight, bias) = (weight(&[outputs, inputs, 3, 3]), weight(&[outputs]));
                let conv = Conv2d::new(&weight, Some(&bias), ConvShape::same(3), place)?;
                let x = tensor(&[rows, side, side, inputs], place)?;
                let group_norm = norm.then(|| group_norm(inputs)).transpose()?;
                Box::new(move || match &group_norm {
                    None => conv.forward(&x).map(drop),
                    Some(norm) => conv.forward(&norm.forward_silu(&x)?).map(drop),
                })
            }
            Self::Upsampling { rows, side, channels } => {
                let conv = UpsampleConv::new(&weight(&[channels, channels, 3, 3]), &weight(&[channels]), place)?;
                let x = tensor(&[rows, side, side, channels], place)?;
                Box::new(move || conv.forward(&x, 2 * side, 2 * side).map(drop))
            }
            Self::Linear { rows, tokens, inputs, outputs, gate } => {
                let activation = if gate { Activation::Gate } else { Activation::Nothing };
                let (weight, bias) = (weight(&[outputs, inputs]), weight(&[outputs]));
                let linear = Linear::with_activation(&weight, Some(&bias), activation, place)?;
                let x = tensor(&[rows, tokens, inputs], place)?;
                Box::new(move || linear.forward(&x).map(drop))
            }
            Self::Attention { rows, queries, keys, width, heads } => {
                let query = tensor(&[rows, queries, width], place)?;
                let (key, value) = (tensor(&[rows, keys, width], place)?, tensor(&[rows, keys, width], place)?);
                Box::new(move || attention(&query, &key, &value, heads, Mask::None).map(drop))
            }
            Self::GroupNorm { rows, side, channels } => {
                let (norm, x) = (group_norm(channels)?, tensor(&[rows, side, side, channels], place)?);
                Box::new(move || norm.forward_silu(&x).map(drop))
            }
            Self::LayerNorm { rows, tokens, channels } => {
                let norm = LayerNorm::new(&weight(&[channels]), &weight(&[channels]), EPSILON)?;
                let x = tensor(&[rows, tokens, channels], place)?;
                Box::new(move || norm.forward(&x).map(drop))
            }
        })
    }
}

fn group_norm(channels: usize) -> Result<GroupNorm> {
    GroupNorm::new(&weight(&[channels]), &weight(&[channels]), GROUPS, EPSILON)
}

/// A weight that keeps a signal's size.
fn weight(dims: &[usize]) -> Parameter<'static> {
    let fan_in: usize = dims[1..].iter().product();
    let values: Vec<f32> = numbers(dims).map(|value| value / (fan_in as f32).sqrt()).collect();
    Parameter::from_values(&values, dims)
}

fn tensor(dims: &[usize], place: &Place) -> Result<Tensor> {
    Tensor::new(&numbers(dims).collect::<Vec<_>>(), dims, place)
}

/// Numbers around zero of about unit size, always the same ones.
fn numbers(dims: &[usize]) -> impl Iterator<Item = f32> {
    let next = |state: &mut u32| {
        *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        Some((*state >> 8) as f32 / (1 << 22) as f32 - 2.0)
    };
    (0..dims.iter().product()).scan(0x1234_5678, move |state, _: usize| next(state))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DeviceChoice;

    #[test]
    fn every_kind_of_operation_can_be_run() {
        let device = Device::open(DeviceChoice::Cpu).unwrap();
        let kinds = [
            Kind::Convolution { rows: 1, side: 4, inputs: 32, outputs: 8, norm: true },
            Kind::Upsampling { rows: 2, side: 3, channels: 8 },
            Kind::Linear { rows: 2, tokens: 5, inputs: 8, outputs: 16, gate: true },
            Kind::Attention { rows: 1, queries: 6, keys: 3, width: 8, heads: 2 },
            Kind::GroupNorm { rows: 1, side: 4, channels: 64 },
            Kind::LayerNorm { rows: 1, tokens: 3, channels: 8 },
        ];
        for kind in kinds {
            for precision in [Precision::F32, Precision::Bf16] {
                Case::new("some", kind).prepare(&device, precision).unwrap()().unwrap();
            }
        }
    }

    #[test]
    fn work_is_counted_as_by_hand() {
        let cases = cases(1);
        let first = &cases[0];
        assert_eq!((first.name, first.shape.as_str()), ("3×3 convolution", "2×64×64, 320→320"));
        // 8192 pixels × 9 × 320 × 320 multiply-adds; the map read and written, and the weights.
        assert_eq!(first.flops, 2.0 * 8192.0 * 9.0 * 102_400.0);
        assert_eq!(first.bytes(Precision::Bf16), 2.0 * (2.0 * 8192.0 * 320.0 + 9.0 * 102_400.0));
    }
}
