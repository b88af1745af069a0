//! Group norm and layer norm.
//!
//! A group norm only looks at its input: what it makes of each value is left to whoever reads the
//! result, which for a convolution or a linear layer costs nothing extra. It can look at a map in pieces,
//! too, and makes of them what it makes of the whole (`pieces`).

mod pieces;

use std::sync::Arc;

use candle_core::{D, DType};
use half::bf16;

use super::buffer::{Buffer, Format};
use super::kernel::element::Element;
use super::kernel::isa::{Isa, Kernel, dispatch};
use super::kernel::simd::Simd;
use super::parameter::Parameter;
use super::shared::{Shared, run_tasks};
use super::tensor::{Host, Pending, Tensor, Values};
use super::windows::normalise;
use super::{layout, misuse};
use crate::Result;

pub(crate) use pieces::Seen;

/// Work of a norm per value, in multiply-adds.
const WORK: usize = 16;

/// Normalises groups of channels over a feature map's pixels.
pub(crate) struct GroupNorm {
    weight: Vec<f32>,
    bias: Vec<f32>,
    groups: usize,
    epsilon: f64,
}

impl GroupNorm {
    /// A norm of `groups` groups from (channels) weight and bias.
    pub fn new(weight: &Parameter<'_>, bias: &Parameter<'_>, groups: usize, epsilon: f64) -> Result<Self> {
        let (weight, bias) = (weight.values()?, bias.values()?);
        let channels = weight.len();
        if groups == 0 || channels % groups != 0 || bias.len() != channels {
            return Err(misuse(format!("{channels} channels cannot be cut into {groups} groups")));
        }
        Ok(Self { weight, bias, groups, epsilon })
    }

    /// (rows, height, width, channels), normalised.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, false)
    }

    /// (rows, height, width, channels), normalised, then SiLU.
    pub fn forward_silu(&self, x: &Tensor) -> Result<Tensor> {
        self.run(x, true)
    }

    fn run(&self, x: &Tensor, silu: bool) -> Result<Tensor> {
        let (rows, height, width, channels) = x.dims4()?;
        if channels != self.weight.len() {
            return Err(misuse(format!("a group norm of {} channels was given {:?}", self.weight.len(), x.dims())));
        }
        if let Some(x) = x.device_values() {
            return Ok(Tensor::on_device(self.on_device(x, silu)?));
        }
        let x = x.resolved()?;
        let mut moments = vec![Moments::default(); rows * channels];
        join_moments(x.host()?, Parts::of_lines(height, width), channels, &mut moments)?;
        with_pending(&x, self.pending(&moments, channels, silu))
    }

    /// The affine map of each row and channel that normalises its group.
    fn pending(&self, moments: &[Moments], channels: usize, silu: bool) -> Pending {
        let size = channels / self.groups;
        let (mut scale, mut shift) = (Vec::with_capacity(moments.len()), Vec::with_capacity(moments.len()));
        for (index, group) in moments.chunks_exact(size).enumerate() {
            let all = group.iter().copied().fold(Moments::default(), Moments::join);
            let deviation = 1.0 / (all.squares / all.count.max(1.0) + self.epsilon).sqrt();
            let first = index % self.groups * size;
            for channel in first..first + size {
                let factor = (deviation * f64::from(self.weight[channel])) as f32;
                scale.push(factor);
                // By the factor that it is used with: what rounding did to it then cancels.
                shift.push((f64::from(self.bias[channel]) - all.mean * f64::from(factor)) as f32);
            }
        }
        Pending { scale, shift, silu }
    }

    fn on_device(&self, x: &candle_core::Tensor, silu: bool) -> Result<candle_core::Tensor> {
        let dtype = x.dtype();
        let first = layout::first(x)?;
        let (rows, channels, height, width) = first.dims4()?;
        let grouped =
            first.reshape((rows, self.groups, channels / self.groups * height * width))?.to_dtype(DType::F32)?;
        let centred = grouped.broadcast_sub(&grouped.mean_keepdim(D::Minus1)?)?;
        let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
        let normal = centred.broadcast_div(&(variance + self.epsilon)?.sqrt()?)?;
        let last = layout::last(&normal.reshape((rows, channels, height, width))?)?;
        let weight = candle_core::Tensor::new(self.weight.as_slice(), x.device())?;
        let bias = candle_core::Tensor::new(self.bias.as_slice(), x.device())?;
        let y = last.broadcast_mul(&weight)?.broadcast_add(&bias)?;
        Ok(if silu { y.silu()? } else { y }.to_dtype(dtype)?)
    }
}

/// A host tensor that has nothing pending, with what is to be done to it.
fn with_pending(x: &Tensor, pending: Pending) -> Result<Tensor> {
    let pending = Some(Arc::new(pending));
    match &x.values {
        Values::Host(host) => Ok(Tensor { values: Values::Host(Host { pending, ..host.clone() }), ..x.clone() }),
        Values::Device(_) => Err(misuse("a tensor is not on the host".to_owned())),
    }
}

impl Tensor {
    /// The tensor with what was pending done.
    pub(super) fn resolved(&self) -> Result<Self> {
        let Values::Host(Host { buffer, pending: Some(pending) }) = &self.values else { return Ok(self.clone()) };
        let mut output = Buffer::new(buffer.format(), buffer.len())?;
        match buffer.format() {
            Format::F32 => apply::<f32>(buffer, pending, self.dims()[0], &mut output),
            Format::Bf16 => apply::<bf16>(buffer, pending, self.dims()[0], &mut output),
        }?;
        Ok(Self::on_host(output, self.dims()))
    }
}

/// Applies a pending norm to `rows` rows.
fn apply<E: Element>(from: &Buffer, pending: &Pending, rows: usize, to: &mut Buffer) -> Result<()> {
    let channels = pending.scale.len() / rows.max(1);
    let (from, shared) = (from.values::<E>(), Shared::new(to.values_mut::<E>()));
    let row_len = from.len() / rows.max(1);
    let parts = Parts::of(row_len / channels.max(1));
    run_tasks(rows * parts.count, WORK * from.len(), |task| {
        let (row, pixels) = (task / parts.count, parts.range(task % parts.count));
        let range = row * row_len + pixels.start * channels..row * row_len + pixels.end * channels;
        let of_row = row * channels..(row + 1) * channels;
        // SAFETY: each task writes its own pixels.
        #[allow(unsafe_code)]
        let to = unsafe { shared.part(range.clone()) };
        let (scale, shift) = (&pending.scale[of_row.clone()], &pending.shift[of_row]);
        dispatch(Isa::best(), Apply { from: &from[range], to, scale, shift, silu: pending.silu });
        Ok(())
    })
}

struct Apply<'a, E> {
    from: &'a [E],
    to: &'a mut [E],
    scale: &'a [f32],
    shift: &'a [f32],
    silu: bool,
}

impl<E: Element> Kernel for Apply<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let channels = self.scale.len();
        for (from, to) in self.from.chunks_exact(channels).zip(self.to.chunks_exact_mut(channels)) {
            normalise(simd, from, to, self.scale, self.shift, self.silu);
        }
    }
}

/// A row's pixels in parts, from their number alone.
#[derive(Clone, Copy)]
struct Parts {
    pixels: usize,
    size: usize,
    count: usize,
}

impl Parts {
    fn of(pixels: usize) -> Self {
        let size = pixels.div_ceil(8).next_multiple_of(BLOCK).clamp(BLOCK, 4096);
        Self { pixels, size, count: pixels.div_ceil(size) }
    }

    /// Parts of whole lines, so that pieces of a map can be cut where its parts are.
    fn of_lines(height: usize, width: usize) -> Self {
        let pixels = height * width;
        let size = (Self::of(pixels).size / width.max(1)).max(1) * width.max(1);
        Self { pixels, size, count: pixels.div_ceil(size) }
    }

    fn range(self, index: usize) -> std::ops::Range<usize> {
        index * self.size..self.pixels.min((index + 1) * self.size)
    }
}

/// Pixels that are summed in `f32` before they join the others in `f64`.
const BLOCK: usize = 64;

/// The mean of some numbers and the sum of their squared distances from it.
#[derive(Clone, Copy, Default)]
struct Moments {
    count: f64,
    mean: f64,
    squares: f64,
}

impl Moments {
    /// The moments of both together (Chan, Golub & LeVeque, 1979).
    fn join(self, other: Self) -> Self {
        let count = self.count + other.count;
        if count == 0.0 {
            return self;
        }
        let distance = other.mean - self.mean;
        Self {
            count,
            mean: self.mean + distance * other.count / count,
            squares: self.squares + other.squares + distance * distance * self.count * other.count / count,
        }
    }
}

/// Joins the moments of each row's channels (rows · channels) to those that were seen before, part after part.
fn join_moments(x: &Buffer, parts: Parts, channels: usize, totals: &mut [Moments]) -> Result<()> {
    match x.format() {
        Format::F32 => join_moments_of::<f32>(x.values(), parts, channels, totals),
        Format::Bf16 => join_moments_of::<bf16>(x.values(), parts, channels, totals),
    }
}

fn join_moments_of<E: Element>(x: &[E], parts: Parts, channels: usize, totals: &mut [Moments]) -> Result<()> {
    let (rows, pixels) = (totals.len() / channels.max(1), parts.pixels);
    let mut partial = vec![0f64; rows * parts.count * channels * 2];
    let shared = Shared::new(&mut partial);
    run_tasks(rows * parts.count, WORK * x.len(), |task| {
        let (row, range) = (task / parts.count, parts.range(task % parts.count));
        let start = (row * pixels + range.start) * channels;
        // SAFETY: each task writes its own sums.
        #[allow(unsafe_code)]
        let sums = unsafe { shared.part(task * channels * 2..(task + 1) * channels * 2) };
        dispatch(Isa::best(), Sum { x: &x[start..start + range.len() * channels], channels, sums });
        Ok(())
    })?;
    for (task, sums) in partial.chunks_exact(channels * 2).enumerate() {
        let (row, range) = (task / parts.count, parts.range(task % parts.count));
        let count = range.len() as f64;
        let first = (row * pixels + range.start) * channels;
        for channel in 0..channels {
            let (sum, squares) = (sums[channel], sums[channels + channel]);
            let mean = f64::from(x[first + channel].to_f32()) + sum / count;
            let part = Moments { count, mean, squares: (squares - sum * sum / count).max(0.0) };
            let total = &mut totals[row * channels + channel];
            // `max` would turn a NaN into a number.
            *total = total.join(if squares.is_finite() { part } else { Moments { squares: f64::NAN, ..part } });
        }
    }
    Ok(())
}

/// Sums each channel's distances from its first pixel, and their squares: (2, channels). The first pixel
/// takes away what all have in common, so that little is lost between the two sums.
struct Sum<'a, E> {
    x: &'a [E],
    channels: usize,
    sums: &'a mut [f64],
}

impl<E: Element> Kernel for Sum<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        self.sums.fill(0.0);
        let (sums, squares) = self.sums.split_at_mut(self.channels);
        let mut channel = 0;
        while channel < self.channels {
            let left = self.channels - channel;
            if left >= 4 * S::LANES {
                columns::<S, E, 4>(simd, self.x, self.channels, channel, S::LANES, sums, squares);
                channel += 4 * S::LANES;
            } else {
                let count = left.min(S::LANES);
                columns::<S, E, 1>(simd, self.x, self.channels, channel, count, sums, squares);
                channel += count;
            }
        }
    }
}

/// The sums of `V` vectors of channels from `first` on, of which the last has `count`.
#[inline(always)]
fn columns<S: Simd, E: Element, const V: usize>(
    simd: S,
    x: &[E],
    channels: usize,
    first: usize,
    count: usize,
    sums: &mut [f64],
    squares: &mut [f64],
) {
    let zero = simd.splat(0.0);
    let load = |pixel: &[E], vector: usize| {
        let values = &pixel[first + vector * S::LANES..];
        // SAFETY: the slice has a whole vector, or at least the `count` values that are asked for.
        #[allow(unsafe_code)]
        unsafe {
            if values.len() >= S::LANES && count == S::LANES {
                E::load(simd, values.as_ptr())
            } else {
                E::load_some(simd, values.as_ptr(), count.min(values.len()))
            }
        }
    };
    let base: [S::F32; V] = std::array::from_fn(|vector| load(&x[..channels], vector));
    for block in x.chunks(BLOCK * channels) {
        let (mut sum, mut square) = ([zero; V], [zero; V]);
        for pixel in block.chunks_exact(channels) {
            for vector in 0..V {
                let distance = simd.sub(load(pixel, vector), base[vector]);
                sum[vector] = simd.add(sum[vector], distance);
                square[vector] = simd.mul_add(distance, distance, square[vector]);
            }
        }
        for vector in 0..V {
            let start = first + vector * S::LANES;
            add_lanes(simd, &mut sums[start..start + count], sum[vector]);
            add_lanes(simd, &mut squares[start..start + count], square[vector]);
        }
    }
}

#[inline(always)]
fn add_lanes<S: Simd>(simd: S, totals: &mut [f64], lanes: S::F32) {
    let mut values = [0f32; 16];
    // SAFETY: 16 is the widest vector.
    #[allow(unsafe_code)]
    unsafe {
        simd.store(values.as_mut_ptr(), lanes);
    }
    for (total, value) in totals.iter_mut().zip(values) {
        *total += f64::from(value);
    }
}

#[cfg(test)]
mod tests;
