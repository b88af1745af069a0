//! The linear layer.

use std::ops::Range;

use candle_core::quantized::{QStorage, QTensor};
use candle_core::{D, DType};
use half::bf16;

use super::buffer::{Buffer, Format};
use super::kernel::element::Element;
use super::kernel::isa::{Isa, dispatch};
use super::kernel::panels::{PANEL, Panels};
use super::kernel::product::{Block, Finish, Line, Then, chunks, sums_len, unpacked_len};
use super::parameter::Parameter;
use super::shared::{Shared, run_tasks, wanted_tasks, with_scratch};
use super::tensor::{Place, Tensor, Values};
use super::{misuse, windows};
use crate::Result;

/// What follows a linear layer's sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Activation {
    Nothing,
    Silu,
    Gelu,
    QuickGelu,
    /// GELU's approximation by tanh.
    GeluTanh,
    Relu,
    /// GEGLU: the first half of the outputs times GELU of the second half.
    Gate,
}

/// `y = activation(x · W (+ bias))`.
pub(crate) struct Linear {
    weight: Weight,
    inputs: usize,
    outputs: usize,
    activation: Activation,
}

enum Weight {
    Host {
        panels: Panels,
        bias: Option<Vec<f32>>,
    },
    /// The weight, and (out).
    Device {
        weight: DeviceWeight,
        bias: Option<candle_core::Tensor>,
    },
}

/// A weight on another device.
enum DeviceWeight {
    /// (in, out)
    Dense(candle_core::Tensor),
    /// (out, in): it stays small, and becomes numbers each time that it is used. The products are then
    /// those of the dense weight; candle's own quantised ones would round the activations to eight bits.
    Quantised(Box<QTensor>),
}

impl DeviceWeight {
    fn new(weight: &Parameter<'_>, place: &Place) -> Result<Self> {
        let of_blocks = |values: usize| weight.dims().last().is_some_and(|inputs| inputs.is_multiple_of(values));
        let Some(quantisation) = weight.quantised().filter(|blocks| of_blocks(blocks.values())) else {
            return Ok(Self::Dense(weight.on_device(place)?.t()?.contiguous()?));
        };
        let storage = QStorage::from_data(weight.bytes()?, place.device(), quantisation.on_device())?;
        Ok(Self::Quantised(Box::new(QTensor::new(storage, weight.dims())?)))
    }

    /// x (positions, in) · W, in x's format.
    fn multiply(&self, x: &candle_core::Tensor) -> Result<candle_core::Tensor> {
        match self {
            Self::Dense(weight) => Ok(x.matmul(weight)?),
            Self::Quantised(weight) => {
                let weight = weight.dequantize(x.device())?.to_dtype(x.dtype())?;
                Ok(x.matmul(&weight.t()?)?)
            }
        }
    }
}

impl Linear {
    /// A layer from a checkpoint's (out, in) weight and (out) bias.
    pub fn new(weight: &Parameter<'_>, bias: Option<&Parameter<'_>>, place: &Place) -> Result<Self> {
        Self::with_activation(weight, bias, Activation::Nothing, place)
    }

    /// [`Linear::new`], followed by `activation`; with [`Activation::Gate`] the result has half of the
    /// weight's outputs.
    pub fn with_activation(
        weight: &Parameter<'_>,
        bias: Option<&Parameter<'_>>,
        activation: Activation,
        place: &Place,
    ) -> Result<Self> {
        let [outputs, inputs] = weight.dims()[..] else {
            return Err(misuse(format!("a linear layer was given a weight of {:?}", weight.dims())));
        };
        if activation == Activation::Gate && outputs % 2 == 1 {
            return Err(misuse(format!("a gate halves its outputs, but there are {outputs}")));
        }
        let packed = match place.on_host() {
            None => Weight::Device {
                weight: DeviceWeight::new(weight, place)?,
                bias: bias.map(|bias| bias.on_device(place)).transpose()?,
            },
            Some(format) => {
                let panels = pack(weight, [outputs, inputs], activation, format)?;
                Weight::Host { panels, bias: bias.map(Parameter::values).transpose()? }
            }
        };
        Ok(Self { weight: packed, inputs, outputs, activation })
    }

    /// (rows, …, in) → (rows, …, out).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, Added::default())
    }

    /// (rows, …, in) → (rows, …, out), plus `residual` of that shape.
    pub fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        self.run(x, Added { residual: Some(residual), ..Added::default() })
    }

    /// (rows, …, in) → (rows, …, out): the outputs times `gate` (rows, out), each row by its own, plus
    /// `residual` as the outputs.
    pub fn forward_gated(&self, x: &Tensor, gate: &Tensor, residual: &Tensor) -> Result<Tensor> {
        self.run(x, Added { gate: Some(gate), residual: Some(residual) })
    }

    fn run(&self, x: &Tensor, added: Added<'_>) -> Result<Tensor> {
        let Some((&inputs, before)) = x.dims().split_last() else {
            return Err(misuse("a linear layer was given a single number".to_owned()));
        };
        let outputs = if self.activation == Activation::Gate { self.outputs / 2 } else { self.outputs };
        let dims: Vec<usize> = before.iter().copied().chain([outputs]).collect();
        let gated = |gate: &Tensor| before.first().is_some_and(|rows| gate.dims() == [*rows, outputs]);
        let fitting = added.residual.is_none_or(|residual| residual.dims() == dims) && added.gate.is_none_or(gated);
        if inputs != self.inputs || !fitting {
            return Err(misuse(format!("a linear layer of {} inputs was given {:?}", self.inputs, x.dims())));
        }
        match (&self.weight, &x.values) {
            (Weight::Device { weight, bias }, Values::Device(x)) => {
                let layer = (weight, bias.as_ref(), self.activation);
                let y = on_device(x, [self.inputs, self.outputs], layer)?;
                Ok(Tensor::on_device(added.on_device(y)?))
            }
            (Weight::Host { panels, bias }, Values::Host(host)) => {
                let (rows, positions) =
                    before.split_first().map_or((1, 1), |(rows, positions)| (*rows, positions.iter().product()));
                let (gate, residual) = (added.gate.map(Tensor::resolved), added.residual.map(Tensor::resolved));
                let (gate, residual) = (gate.transpose()?, residual.transpose()?);
                let gate = gate.as_ref().map(Tensor::host).transpose()?;
                let residual = residual.as_ref().map(Tensor::host).transpose()?;
                let bias = bias.as_deref();
                let call = Call { panels, bias, gate, residual, then: self.then(), rows, positions, outputs };
                let other = |buffer: &Buffer| buffer.format() != panels.format();
                if other(&host.buffer) || [gate, residual].into_iter().flatten().any(other) {
                    return Err(misuse(
                        "a linear layer, its input and what is added are of different formats".to_owned(),
                    ));
                }
                let output = match panels.format() {
                    Format::F32 => call.run::<f32>(x),
                    Format::Bf16 => call.run::<bf16>(x),
                }?;
                Ok(Tensor::on_host(output, &dims))
            }
            _ => Err(misuse("a linear layer and its input are on different devices".to_owned())),
        }
    }

    fn then(&self) -> Then {
        match self.activation {
            Activation::Nothing => Then::Nothing,
            Activation::Silu => Then::Silu,
            Activation::Gelu => Then::Gelu,
            Activation::QuickGelu => Then::QuickGelu,
            Activation::GeluTanh => Then::GeluTanh,
            Activation::Relu => Then::Relu,
            Activation::Gate => Then::Gate,
        }
    }
}

/// What becomes of the outputs.
#[derive(Clone, Copy, Default)]
struct Added<'a> {
    /// (rows, out): multiplied with all outputs of a row.
    gate: Option<&'a Tensor>,
    /// Added last.
    residual: Option<&'a Tensor>,
}

impl Added<'_> {
    fn on_device(self, mut y: candle_core::Tensor) -> Result<candle_core::Tensor> {
        let there = |tensor: &Tensor| match tensor.device_values() {
            Some(values) => Ok(values.clone()),
            None => Err(misuse("a linear layer and what is added are on different devices".to_owned())),
        };
        if let Some(gate) = self.gate {
            let gate = there(gate)?;
            let mut dims = vec![1; y.rank()];
            (dims[0], dims[y.rank() - 1]) = gate.dims2()?;
            y = y.broadcast_mul(&gate.reshape(dims)?)?;
        }
        Ok(match self.residual {
            Some(residual) => (y + there(residual)?)?,
            None => y,
        })
    }
}

/// Packs a weight for the host; one that is stored in blocks stays so.
fn pack(
    weight: &Parameter<'_>,
    [outputs, inputs]: [usize; 2],
    activation: Activation,
    format: Format,
) -> Result<Panels> {
    let (columns, order) = panel_order(outputs, activation);
    match weight.quantised().filter(|quantisation| inputs.is_multiple_of(quantisation.values())) {
        Some(quantisation) => Panels::pack_quantised(format, quantisation, weight, columns, order),
        None => Panels::pack_weight(format, weight, (columns, 1), order),
    }
}

/// How many columns are packed, and which output each one is; with a gate, panels of values and of their
/// gates alternate.
fn panel_order(outputs: usize, activation: Activation) -> (usize, impl Fn(usize) -> Option<usize> + Sync + Send) {
    let half = outputs / 2;
    let gated = activation == Activation::Gate;
    let columns = if gated { 2 * half.next_multiple_of(PANEL) } else { outputs };
    (columns, move |column: usize| {
        if !gated {
            return Some(column);
        }
        let (panel, lane) = (column / PANEL, column % PANEL);
        let value = panel / 2 * PANEL + lane;
        (value < half).then_some(value + panel % 2 * half)
    })
}

/// One use of a layer on the host.
struct Call<'a> {
    panels: &'a Panels,
    bias: Option<&'a [f32]>,
    gate: Option<&'a Buffer>,
    residual: Option<&'a Buffer>,
    then: Then,
    rows: usize,
    /// Positions of a row.
    positions: usize,
    outputs: usize,
}

impl Call<'_> {
    fn run<E: Element>(&self, x: &Tensor) -> Result<Buffer> {
        let mut output = Buffer::new(E::FORMAT, self.rows * self.positions * self.outputs)?;
        let finish = Finish {
            outputs: self.outputs,
            bias: self.bias,
            per_row: None,
            scale: self.gate.map(Buffer::values::<E>),
            residual: self.residual.map(Buffer::values::<E>),
            then: self.then,
        };
        let Values::Host(host) = &x.values else { return Err(misuse("a tensor is not on the host".to_owned())) };
        let inputs = x.dims()[x.dims().len() - 1];
        let ready = host.pending.is_none() && inputs == self.panels.inner();
        if ready || self.panels.is_quantised() {
            let x = x.resolved()?;
            self.multiply(x.host()?.values::<E>(), &finish, &Shared::new(output.values_mut()))?;
        } else {
            // A pending norm, or values that have to be laid out anew: a convolution of one pixel.
            let map = windows::Map { height: 1, width: self.positions, channels: inputs };
            let call = windows::Call {
                host,
                rows: self.rows,
                map,
                windows: windows::Windows::pointwise(),
                weight: self.panels,
                finish: &finish,
                placing: windows::Placing::dense(self.positions, self.outputs),
            };
            call.run(&Shared::new(output.values_mut::<E>()))?;
        }
        Ok(output)
    }

    /// All rows' positions in blocks, read where they lie.
    fn multiply<E: Element>(&self, left: &[E], finish: &Finish<'_, E>, output: &Shared<'_, E>) -> Result<()> {
        let (inner, outputs) = (self.panels.inner(), self.outputs);
        let positions = self.rows * self.positions;
        let work = positions * inner * self.panels.outputs();
        let pieces = chunks::<E>([(0, inner)]);
        let wanted = wanted_tasks(work);
        let block = self.block::<E>(positions, wanted);
        let blocks = positions.div_ceil(block);
        let slices = windows::slices(self.panels.outputs(), wanted.div_ceil(blocks.max(1)), self.then);
        run_tasks(blocks * slices.len(), work, |task| {
            let (slice, first) = (&slices[task / blocks], task % blocks * block);
            let count = block.min(positions - first);
            let lines = self.lines(first..first + count);
            with_scratch(sums_len(count), |sums| {
                with_scratch(unpacked_len::<E>(self.panels), |unpacked| {
                    let block = Block {
                        left,
                        lines: &lines,
                        left_stride: inner,
                        output_stride: outputs,
                        weight: self.panels,
                        panels: slice.clone(),
                        pieces: &pieces,
                        finish,
                        output,
                        sums,
                        unpacked,
                    };
                    dispatch(Isa::best(), block);
                })
            })?
        })
    }

    /// These positions as lines: each row's its own where it matters whose they are.
    fn lines(&self, positions: Range<usize>) -> Vec<Line> {
        let (inner, outputs) = (self.panels.inner(), self.outputs);
        let line = |row: usize, first: usize, end: usize| Line {
            left: first * inner,
            output: first * outputs,
            row,
            positions: end - first,
        };
        if self.gate.is_none() {
            return vec![line(0, positions.start, positions.end)];
        }
        let of_row = self.positions.max(1);
        let rows = positions.start / of_row..positions.end.div_ceil(of_row);
        rows.map(|row| line(row, positions.start.max(row * of_row), positions.end.min((row + 1) * of_row))).collect()
    }

    /// Positions that share one reading of the weights.
    fn block<E: Element>(&self, positions: usize, wanted: usize) -> usize {
        const BLOCK: usize = 256;
        if self.panels.is_quantised() {
            // Each block unpacks its weights anew: few large ones, and more where products are quicker.
            // Threads share the outputs instead.
            return (BLOCK * size_of::<f32>() / size_of::<E>()).min(positions.next_multiple_of(8)).max(32);
        }
        positions.div_ceil(wanted).next_multiple_of(8).clamp(32, BLOCK)
    }
}

fn on_device(
    x: &candle_core::Tensor,
    [inputs, outputs]: [usize; 2],
    (weight, bias, activation): (&DeviceWeight, Option<&candle_core::Tensor>, Activation),
) -> Result<candle_core::Tensor> {
    let mut y = weight.multiply(&x.reshape(((), inputs))?)?;
    if let Some(bias) = bias {
        y = y.broadcast_add(bias)?;
    }
    let mut dims = x.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = outputs;
    }
    activated(&y.reshape(dims)?, activation)
}

/// Functions are `f32` in every format: half-precision kernels would round after each of their operations.
fn activated(y: &candle_core::Tensor, activation: Activation) -> Result<candle_core::Tensor> {
    let wide = |y: &candle_core::Tensor| y.to_dtype(DType::F32);
    let activated = match activation {
        Activation::Nothing => return Ok(y.clone()),
        Activation::Relu => return Ok(y.relu()?),
        Activation::Silu => wide(y)?.silu()?,
        Activation::Gelu => wide(y)?.gelu_erf()?,
        Activation::QuickGelu => {
            let y = wide(y)?;
            (&y * candle_nn::ops::sigmoid(&(&y * 1.702)?)?)?
        }
        Activation::GeluTanh => wide(y)?.gelu()?,
        Activation::Gate => {
            let half = y.dim(D::Minus1)? / 2;
            let (value, gate) = (y.narrow(D::Minus1, 0, half)?, y.narrow(D::Minus1, half, half)?);
            let gate = wide(&gate.contiguous()?)?.gelu_erf()?.to_dtype(y.dtype())?;
            return Ok((value * gate)?);
        }
    };
    Ok(activated.to_dtype(y.dtype())?)
}

#[cfg(test)]
mod tests;
