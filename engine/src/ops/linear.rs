//! The linear layer.

use half::bf16;

use super::buffer::{Buffer, Format};
use super::kernel::element::Element;
use super::kernel::isa::{Isa, dispatch};
use super::kernel::panels::{PANEL, Panels};
use super::kernel::product::{Block, Finish, Line, Then, chunks, sums_len};
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
    /// (in, out), and (out).
    Device {
        weight: candle_core::Tensor,
        bias: Option<candle_core::Tensor>,
    },
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
                weight: weight.on_device(place)?.t()?.contiguous()?,
                bias: bias.map(|bias| bias.on_device(place)).transpose()?,
            },
            Some(format) => {
                let (columns, order) = panel_order(outputs, activation);
                let panels = Panels::pack(format, columns, inputs, |column, to| {
                    if let Some(output) = order(column) {
                        weight.read(output * inputs, &mut to[..inputs]);
                    }
                })?;
                Weight::Host { panels, bias: bias.map(|bias| bias.values()) }
            }
        };
        Ok(Self { weight: packed, inputs, outputs, activation })
    }

    /// (rows, …, in) → (rows, …, out).
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, None)
    }

    /// (rows, …, in) → (rows, …, out), plus `residual` of that shape.
    pub fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        self.run(x, Some(residual))
    }

    fn run(&self, x: &Tensor, residual: Option<&Tensor>) -> Result<Tensor> {
        let Some((&inputs, before)) = x.dims().split_last() else {
            return Err(misuse("a linear layer was given a single number".to_owned()));
        };
        let outputs = if self.activation == Activation::Gate { self.outputs / 2 } else { self.outputs };
        let dims: Vec<usize> = before.iter().copied().chain([outputs]).collect();
        if inputs != self.inputs || residual.is_some_and(|residual| residual.dims() != dims) {
            return Err(misuse(format!("a linear layer of {} inputs was given {:?}", self.inputs, x.dims())));
        }
        match (&self.weight, &x.values) {
            (Weight::Device { weight, bias }, Values::Device(x)) => {
                let y = on_device(x, weight, bias.as_ref(), self.activation)?;
                let Some(residual) = residual else { return Ok(Tensor::on_device(y)) };
                let Some(residual) = residual.device_values() else {
                    return Err(misuse("a linear layer and its residual are on different devices".to_owned()));
                };
                Ok(Tensor::on_device((y + residual)?))
            }
            (Weight::Host { panels, bias }, Values::Host(host)) => {
                let (rows, positions) =
                    before.split_first().map_or((1, 1), |(rows, positions)| (*rows, positions.iter().product()));
                let call = Call { panels, bias: bias.as_deref(), then: self.then(), rows, positions, outputs };
                let residual = residual.map(Tensor::resolved).transpose()?;
                let residual = residual.as_ref().map(Tensor::host).transpose()?;
                let other = |buffer: &Buffer| buffer.format() != panels.format();
                if other(&host.buffer) || residual.is_some_and(other) {
                    return Err(misuse(
                        "a linear layer, its input and what is added are of different formats".to_owned(),
                    ));
                }
                let output = match panels.format() {
                    Format::F32 => call.run::<f32>(x, residual),
                    Format::Bf16 => call.run::<bf16>(x, residual),
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
            Activation::Gate => Then::Gate,
        }
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
    then: Then,
    rows: usize,
    /// Positions of a row.
    positions: usize,
    outputs: usize,
}

impl Call<'_> {
    fn run<E: Element>(&self, x: &Tensor, residual: Option<&Buffer>) -> Result<Buffer> {
        let mut output = Buffer::new(E::FORMAT, self.rows * self.positions * self.outputs)?;
        let finish = Finish {
            outputs: self.outputs,
            bias: self.bias,
            per_row: None,
            residual: residual.map(Buffer::values::<E>),
            then: self.then,
        };
        let Values::Host(host) = &x.values else { return Err(misuse("a tensor is not on the host".to_owned())) };
        let inputs = x.dims()[x.dims().len() - 1];
        let ready = host.pending.is_none() && inputs == self.panels.inner();
        if ready {
            self.multiply(host.buffer.values::<E>(), &finish, &Shared::new(output.values_mut()))?;
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
        /// Positions that share one reading of the weights.
        const BLOCK: usize = 256;
        let (inner, outputs) = (self.panels.inner(), self.outputs);
        let positions = self.rows * self.positions;
        let work = positions * inner * self.panels.outputs();
        let pieces = chunks::<E>([(0, inner)]);
        let wanted = wanted_tasks(work);
        let block = positions.div_ceil(wanted).next_multiple_of(8).clamp(32, BLOCK);
        let blocks = positions.div_ceil(block);
        let slices = windows::slices(self.panels.outputs(), wanted.div_ceil(blocks.max(1)), self.then);
        run_tasks(blocks * slices.len(), work, |task| {
            let (slice, first) = (&slices[task / blocks], task % blocks * block);
            let line =
                Line { left: first * inner, output: first * outputs, row: 0, positions: block.min(positions - first) };
            with_scratch(sums_len(line.positions), |sums| {
                let block = Block {
                    left,
                    lines: &[line],
                    left_stride: inner,
                    output_stride: outputs,
                    weight: self.panels,
                    panels: slice.clone(),
                    pieces: &pieces,
                    finish,
                    output,
                    sums,
                };
                dispatch(Isa::best(), block);
            })
        })
    }
}

fn on_device(
    x: &candle_core::Tensor,
    weight: &candle_core::Tensor,
    bias: Option<&candle_core::Tensor>,
    activation: Activation,
) -> Result<candle_core::Tensor> {
    let (inputs, outputs) = weight.dims2()?;
    let flat = x.reshape(((), inputs))?;
    let mut y = flat.matmul(weight)?;
    if let Some(bias) = bias {
        y = y.broadcast_add(bias)?;
    }
    let mut dims = x.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = outputs;
    }
    let y = y.reshape(dims)?;
    Ok(match activation {
        Activation::Nothing => y,
        Activation::Silu => y.silu()?,
        Activation::Gelu => y.gelu_erf()?,
        Activation::QuickGelu => (&y * candle_nn::ops::sigmoid(&(&y * 1.702)?)?)?,
        Activation::Gate => {
            let half = outputs / 2;
            let (value, gate) =
                (y.narrow(candle_core::D::Minus1, 0, half)?, y.narrow(candle_core::D::Minus1, half, half)?);
            (value * gate.contiguous()?.gelu_erf()?)?
        }
    })
}

#[cfg(test)]
mod tests;
