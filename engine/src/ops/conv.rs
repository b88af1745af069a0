//! The two-dimensional convolution.

use candle_core::{DType, Device};
use half::bf16;

use super::buffer::{Buffer, Format};
use super::kernel::element::Element;
use super::kernel::isa::Isa;
use super::kernel::panels::Panels;
use super::kernel::product::{Finish, Then};
use super::parameter::Parameter;
use super::shared::Shared;
use super::tensor::{Host, Place, Tensor, Values};
use super::windows::{Call, Map, Placing, Windows};
use super::winograd;
use super::{layout, misuse};
use crate::Result;

/// How a convolution's window walks over the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ConvShape {
    /// Pixels between two windows.
    pub stride: usize,
    /// Zeros around the map, before (top, left) and after (bottom, right).
    pub padding: (usize, usize),
}

impl ConvShape {
    /// Stride 1 and the padding that keeps the size for an odd `kernel`.
    pub fn same(kernel: usize) -> Self {
        Self { stride: 1, padding: ((kernel - 1) / 2, (kernel - 1) / 2) }
    }
}

/// A convolution over feature maps (rows, height, width, channels).
pub(crate) struct Conv2d {
    weight: Weight,
    shape: ConvShape,
    kernel: (usize, usize),
    inputs: usize,
    outputs: usize,
}

enum Weight {
    Host {
        weight: Panels,
        bias: Option<Vec<f32>>,
    },
    /// (out, in, kernel height, kernel width) as in the checkpoint, and (out).
    Device {
        weight: candle_core::Tensor,
        bias: Option<candle_core::Tensor>,
    },
}

/// What a convolution adds to its result.
#[derive(Clone, Copy)]
pub(super) enum Added<'a> {
    Nothing,
    PerRow(&'a Tensor),
    Residual(&'a Tensor),
}

impl Conv2d {
    /// A convolution from a checkpoint's (out, in, kernel height, kernel width) weight and (out) bias.
    pub fn new(weight: &Parameter<'_>, bias: Option<&Parameter<'_>>, shape: ConvShape, place: &Place) -> Result<Self> {
        let [outputs, inputs, kernel_height, kernel_width] = weight.dims()[..] else {
            return Err(misuse(format!("a convolution was given a weight of {:?}", weight.dims())));
        };
        let kernel = (kernel_height, kernel_width);
        let packed = match place.on_host() {
            None => Weight::Device {
                weight: weight.on_device(place)?,
                bias: bias.map(|bias| bias.on_device(place)).transpose()?,
            },
            Some(format) => Weight::Host {
                weight: Panels::pack_weight(format, weight, (outputs, kernel_height * kernel_width), Some)?,
                bias: bias.map(Parameter::values).transpose()?,
            },
        };
        Ok(Self { weight: packed, shape, kernel, inputs, outputs })
    }

    /// (rows, height, width, in) → (rows, height', width', out).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, Added::Nothing)
    }

    /// As [`Conv2d::forward`], plus `per_row` (rows, out) at every pixel.
    pub fn forward_add_per_row(&self, x: &Tensor, per_row: &Tensor) -> Result<Tensor> {
        self.run(x, Added::PerRow(per_row))
    }

    /// As [`Conv2d::forward`], plus `residual` of the result's shape.
    pub fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        self.run(x, Added::Residual(residual))
    }

    fn run(&self, x: &Tensor, added: Added<'_>) -> Result<Tensor> {
        let (rows, height, width, inputs) = x.dims4()?;
        let around = self.shape.padding.0 + self.shape.padding.1;
        if inputs != self.inputs || height + around < self.kernel.0 || width + around < self.kernel.1 {
            return Err(misuse(format!(
                "a convolution of {:?} windows over {} channels was given {:?}",
                self.kernel,
                self.inputs,
                x.dims()
            )));
        }
        let down = (height + around - self.kernel.0) / self.shape.stride + 1;
        let across = (width + around - self.kernel.1) / self.shape.stride + 1;
        let dims = [rows, down, across, self.outputs];
        added.check(&dims)?;
        match (&self.weight, &x.values) {
            (Weight::Device { weight, bias }, Values::Device(x)) => {
                Ok(Tensor::on_device(on_device(x, (weight, bias.as_ref()), self.shape, added, IN_HAND)?))
            }
            (Weight::Host { weight, bias }, Values::Host(host)) => {
                let before = self.shape.padding.0;
                let windows = Windows {
                    kernel: self.kernel,
                    stride: self.shape.stride,
                    before: (before, before),
                    outputs: (down, across),
                };
                let call = HostCall { x, bias: bias.as_deref(), added, outputs: self.outputs };
                let format = host.buffer.format();
                if format != weight.format() || added.format().is_some_and(|added| added != format) {
                    return Err(misuse(
                        "a convolution, its input and what is added are of different formats".to_owned(),
                    ));
                }
                let output = match (format, self.filters(format, (height, width))) {
                    (Format::F32, true) => call.filter::<f32, 6, false>(weight),
                    (Format::Bf16, true) => call.filter::<bf16, 4, false>(weight),
                    (Format::F32, false) => call.run::<f32>(weight, windows),
                    (Format::Bf16, false) => call.run::<bf16>(weight, windows),
                }?;
                Ok(Tensor::on_host(output, &dims))
            }
            _ => Err(misuse("a convolution and its input are on different devices".to_owned())),
        }
    }

    /// The convolution of `x` with each pixel repeated, two by two, if minimal filtering computes it: (rows, height,
    /// width, in) → (rows, 2 · height, 2 · width, out).
    pub(super) fn forward_doubled(&self, x: &Tensor) -> Result<Option<Tensor>> {
        let (rows, height, width, inputs) = x.dims4()?;
        let (Weight::Host { weight, bias }, Values::Host(host)) = (&self.weight, &x.values) else { return Ok(None) };
        let format = host.buffer.format();
        if inputs != self.inputs || format != weight.format() || !self.filters(format, (2 * height, 2 * width)) {
            return Ok(None);
        }
        let call = HostCall { x, bias: bias.as_deref(), added: Added::Nothing, outputs: self.outputs };
        let output = match format {
            Format::F32 => call.filter::<f32, 6, true>(weight),
            Format::Bf16 => call.filter::<bf16, 4, true>(weight),
        }?;
        Ok(Some(Tensor::on_host(output, &[rows, 2 * height, 2 * width, self.outputs])))
    }

    /// Whether minimal filtering computes outputs of this height and width, and is worth it. A row's own tiles
    /// decide: what is computed in company must be what is computed alone.
    fn filters(&self, format: Format, size: (usize, usize)) -> bool {
        let enough = match format {
            Format::F32 => winograd::tiles::<6>(size).count() >= 4,
            Format::Bf16 => winograd::tiles::<4>(size).count() >= 16,
        };
        let fits = self.kernel == (3, 3) && self.shape == ConvShape::same(3);
        enough && fits && may_filter(format, self.inputs, self.outputs)
    }
}

/// Whether minimal filtering of large maps is worth it.
pub(super) fn may_filter(format: Format, inputs: usize, outputs: usize) -> bool {
    /// Below so many weights of a tap there is more to transform than to multiply.
    const FEW: usize = 1 << 12;
    // By matrix tiles, multiplications are all but free.
    inputs * outputs >= FEW && !Isa::best().multiplies_by_tiles(format)
}

impl Added<'_> {
    /// The format of what is added; `None` for nothing or on another device.
    fn format(self) -> Option<Format> {
        match self {
            Self::Nothing => None,
            Self::PerRow(values) | Self::Residual(values) => values.format(),
        }
    }

    /// What is added must fit the result's dimensions.
    pub fn check(self, dims: &[usize; 4]) -> Result<()> {
        let (got, fits) = match self {
            Self::Nothing => return Ok(()),
            Self::PerRow(values) => (values.dims(), values.dims() == [dims[0], dims[3]]),
            Self::Residual(values) => (values.dims(), values.dims() == dims),
        };
        if fits { Ok(()) } else { Err(misuse(format!("{got:?} cannot be added to a map of {dims:?}"))) }
    }
}

/// One use of a convolution on the host.
pub(super) struct HostCall<'a> {
    pub x: &'a Tensor,
    pub bias: Option<&'a [f32]>,
    pub added: Added<'a>,
    pub outputs: usize,
}

impl HostCall<'_> {
    /// The whole output, position after position.
    fn run<E: Element>(&self, weight: &Panels, windows: Windows) -> Result<Buffer> {
        let (rows, outputs, (down, across)) = (self.x.dims()[0], self.outputs, windows.outputs);
        let mut output = Buffer::new(E::FORMAT, rows * down * across * outputs)?;
        let placing = Placing { first: 0, row: down * across * outputs, line: across * outputs, position: outputs };
        self.run_windows::<E>(weight, windows, placing, &mut output)?;
        Ok(output)
    }

    /// The whole output by minimal filtering with patches of `N` a side, of the doubled map with `D`.
    fn filter<E: Element, const N: usize, const D: bool>(&self, weight: &Panels) -> Result<Buffer> {
        let (rows, height, width, _) = self.x.dims4()?;
        let pixels = if D { 4 * height * width } else { height * width };
        let mut output = Buffer::new(E::FORMAT, rows * pixels * self.outputs)?;
        self.finish::<E>(|host, map, finish| {
            winograd::Call { host, rows, map, weight, finish }.run::<N, D>(&Shared::new(output.values_mut()))
        })?;
        Ok(output)
    }

    /// Outputs that go where `placing` says.
    pub fn run_windows<E: Element>(
        &self,
        weight: &Panels,
        windows: Windows,
        placing: Placing,
        output: &mut Buffer,
    ) -> Result<()> {
        self.finish::<E>(|host, map, finish| {
            let call = Call { host, rows: self.x.dims()[0], map, windows, weight, finish, placing };
            call.run(&Shared::new(output.values_mut::<E>()))
        })
    }

    /// Calls `compute` with the input's values and what is done with the sums.
    fn finish<E: Element>(&self, compute: impl FnOnce(&Host, Map, &Finish<'_, E>) -> Result<()>) -> Result<()> {
        let Values::Host(host) = &self.x.values else {
            return Err(misuse("a tensor is not on the host".to_owned()));
        };
        let (_, height, width, channels) = self.x.dims4()?;
        let (per_row, residual) = match self.added {
            Added::Nothing => (None, None),
            Added::PerRow(values) => (Some(values.resolved()?), None),
            Added::Residual(values) => (None, Some(values.resolved()?)),
        };
        let per_row = per_row.as_ref().map(Tensor::host).transpose()?.map(Buffer::values::<E>);
        let residual = residual.as_ref().map(Tensor::host).transpose()?.map(Buffer::values::<E>);
        let finish =
            Finish { outputs: self.outputs, bias: self.bias, per_row, scale: None, residual, then: Then::Nothing };
        compute(host, Map { height, width, channels }, &finish)
    }
}

/// Values that a convolution on another device has in hand at once, without its input and its result. Where the
/// device copies all windows before it multiplies them, a whole map's would not fit, and beyond 2³² of them its
/// kernels go wrong; libraries that copy nothing still count a map's values in 31 bits.
const IN_HAND: usize = 256 << 20;

fn on_device(
    x: &candle_core::Tensor,
    (weight, bias): (&candle_core::Tensor, Option<&candle_core::Tensor>),
    shape: ConvShape,
    added: Added<'_>,
    in_hand: usize,
) -> Result<candle_core::Tensor> {
    let y = match (x.dtype(), x.device()) {
        // candle has cuDNN sum up in `f16`. Where this becomes TF32, that has all digits of the factors.
        (DType::F16, Device::Cuda(_)) if cfg!(feature = "cudnn") => {
            let (x, weight) = (x.to_dtype(DType::F32)?, weight.to_dtype(DType::F32)?);
            in_pieces(&x, &weight, shape, in_hand)?.to_dtype(DType::F16)?
        }
        _ => in_pieces(x, weight, shape, in_hand)?,
    };
    let y = match bias {
        Some(bias) => y.broadcast_add(bias)?,
        None => y,
    };
    Ok(match added {
        Added::PerRow(Tensor { values: Values::Device(values), .. }) => {
            y.broadcast_add(&values.unsqueeze(1)?.unsqueeze(1)?)?
        }
        Added::Residual(Tensor { values: Values::Device(values), .. }) => (y + values)?,
        Added::Nothing => y,
        _ => return Err(misuse("a convolution and what is added are on different devices".to_owned())),
    })
}

/// (rows, height, width, in) → (rows, height', width', out), so many rows and lines at a time that their windows are
/// at most `in_hand` values.
fn in_pieces(
    x: &candle_core::Tensor,
    weight: &candle_core::Tensor,
    ConvShape { stride, padding: (before, after) }: ConvShape,
    in_hand: usize,
) -> Result<candle_core::Tensor> {
    let (x, (_, inputs, kernel, across)) = (layout::first(x)?, weight.dims4()?);
    let (rows, _, height, width) = x.dims4()?;
    let down = (height + before + after - kernel) / stride + 1;
    let line = ((width + before + after - across) / stride + 1) * kernel * across * inputs;
    let some_rows = (in_hand / (down * line).max(1)).clamp(1, rows.max(1));
    let some_lines = if down * line <= in_hand { down } else { (in_hand / line.max(1)).clamp(1, down) };
    let (x, padding) = if before == after && some_lines == down {
        (x, before)
    } else {
        (x.pad_with_zeros(2, before, after)?.pad_with_zeros(3, before, after)?, 0)
    };
    let mut of_rows = Vec::new();
    for row in (0..rows).step_by(some_rows) {
        let x = x.narrow(0, row, some_rows.min(rows - row))?;
        let mut of_lines = Vec::new();
        for top in (0..down).step_by(some_lines) {
            let count = some_lines.min(down - top);
            let piece =
                if count == down { x.clone() } else { x.narrow(2, top * stride, (count - 1) * stride + kernel)? };
            of_lines.push(layout::last(&piece.contiguous()?.conv2d(weight, padding, stride, 1, 1)?)?);
        }
        of_rows.push(candle_core::Tensor::cat(&of_lines, 1)?);
    }
    Ok(candle_core::Tensor::cat(&of_rows, 0)?)
}

#[cfg(test)]
mod tests;
