//! What the models pass around: a tensor on the host, in the layout and format that the kernels want,
//! or on another device, where it is candle's.

use std::fmt;
use std::sync::Arc;

use candle_core::{DType, Device};
use half::bf16;

use super::buffer::{Buffer, Format};
use super::misuse;
use crate::Result;

/// Where a model's tensors live and in which format it computes.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    device: Device,
    dtype: DType,
}

impl Place {
    /// On the processor `f16` is computed as `f32`: few processors multiply it.
    pub fn new(device: &Device, dtype: DType) -> Self {
        Self { device: device.clone(), dtype }
    }

    /// The processor, with `f32`.
    #[cfg(test)]
    pub fn host() -> Self {
        Self::new(&Device::Cpu, DType::F32)
    }

    /// The same place with `f32`.
    pub fn in_f32(&self) -> Self {
        Self { dtype: DType::F32, ..self.clone() }
    }

    /// The format of tensors on the host; `None` elsewhere.
    pub(super) fn on_host(&self) -> Option<Format> {
        self.device.is_cpu().then_some(if self.dtype == DType::BF16 { Format::Bf16 } else { Format::F32 })
    }

    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    pub(super) fn dtype(&self) -> DType {
        self.dtype
    }
}

/// A tensor; cheap to clone, never changed.
#[derive(Clone)]
pub(crate) struct Tensor {
    pub(super) dims: Vec<usize>,
    pub(super) values: Values,
}

/// Where a tensor's values are.
#[derive(Clone)]
pub(super) enum Values {
    Host(Host),
    Device(candle_core::Tensor),
}

/// Values on the host, in order.
#[derive(Clone)]
pub(super) struct Host {
    pub buffer: Arc<Buffer>,
    /// What is still to be done to them; see [`Pending`].
    pub pending: Option<Arc<Pending>>,
}

/// A group norm that is applied where its result is read, so that nothing is stored in between.
pub(super) struct Pending {
    /// (rows, channels): the result is value · scale + shift,
    pub scale: Vec<f32>,
    /// (rows, channels)
    pub shift: Vec<f32>,
    /// and then SiLU.
    pub silu: bool,
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor {:?}", self.dims)
    }
}

impl Tensor {
    /// A tensor of these values in `place`'s format.
    pub fn new(values: &[f32], dims: &[usize], place: &Place) -> Result<Self> {
        if values.len() != dims.iter().product::<usize>() {
            return Err(misuse(format!("{} values for a tensor of {dims:?}", values.len())));
        }
        match place.on_host() {
            Some(format) => Ok(Self::on_host(Buffer::from_f32(values, format)?, dims)),
            None => {
                let tensor = candle_core::Tensor::from_slice(values, dims, &place.device)?.to_dtype(place.dtype)?;
                Ok(Self::on_device(tensor))
            }
        }
    }

    pub(super) fn on_host(buffer: Buffer, dims: &[usize]) -> Self {
        debug_assert_eq!(buffer.len(), dims.iter().product::<usize>(), "values of a tensor");
        let values = Values::Host(Host { buffer: Arc::new(buffer), pending: None });
        Self { dims: dims.to_vec(), values }
    }

    pub(super) fn on_device(tensor: candle_core::Tensor) -> Self {
        Self { dims: tensor.dims().to_vec(), values: Values::Device(tensor) }
    }

    /// Its values as `f32`, in order.
    pub fn to_values(&self) -> Result<Vec<f32>> {
        match &self.resolved()?.values {
            Values::Host(host) => Ok(host.buffer.to_f32()),
            Values::Device(tensor) => Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?),
        }
    }

    pub fn dims(&self) -> &[usize] {
        &self.dims
    }

    pub fn dims3(&self) -> Result<(usize, usize, usize)> {
        match self.dims[..] {
            [a, b, c] => Ok((a, b, c)),
            _ => Err(misuse(format!("three dimensions were expected, not {:?}", self.dims))),
        }
    }

    pub fn dims4(&self) -> Result<(usize, usize, usize, usize)> {
        match self.dims[..] {
            [a, b, c, d] => Ok((a, b, c, d)),
            _ => Err(misuse(format!("four dimensions were expected, not {:?}", self.dims))),
        }
    }

    pub fn elements(&self) -> usize {
        self.dims.iter().product()
    }

    /// Bytes that its values take.
    pub fn bytes(&self) -> usize {
        let each = match &self.values {
            Values::Host(host) => host.buffer.format().bytes(),
            Values::Device(tensor) => tensor.dtype().size_in_bytes(),
        };
        self.elements() * each
    }

    /// The same values in another shape; the first dimension (rows) must stay if a norm is pending.
    pub fn reshape(&self, dims: &[usize]) -> Result<Self> {
        if self.elements() != dims.iter().product::<usize>() {
            return Err(misuse(format!("{:?} cannot become {dims:?}", self.dims)));
        }
        let values = match &self.values {
            Values::Host(host) => Values::Host(host.clone()),
            Values::Device(tensor) => Values::Device(tensor.reshape(dims)?),
        };
        Ok(Self { dims: dims.to_vec(), values })
    }

    /// The rows of all `tensors`, one after the other.
    pub fn cat_rows(tensors: &[&Self]) -> Result<Self> {
        let Some(first) = tensors.first() else { return Err(misuse("no tensors to join".to_owned())) };
        if tensors.iter().any(|tensor| tensor.dims[1..] != first.dims[1..]) {
            return Err(misuse("tensors of different rows cannot be joined".to_owned()));
        }
        let rows = tensors.iter().map(|tensor| tensor.dims[0]).sum();
        let dims: Vec<usize> = std::iter::once(rows).chain(first.dims[1..].iter().copied()).collect();
        if let Values::Device(_) = first.values {
            let parts: Vec<&candle_core::Tensor> = tensors.iter().filter_map(|tensor| tensor.device_values()).collect();
            return Ok(Self::on_device(candle_core::Tensor::cat(&parts, 0)?));
        }
        let tensors = tensors.iter().map(|tensor| tensor.resolved()).collect::<Result<Vec<_>>>()?;
        let buffers = tensors.iter().map(|tensor| tensor.host()).collect::<Result<Vec<_>>>()?;
        let mut joined = Buffer::new(buffers[0].format(), dims.iter().product())?;
        match joined.format() {
            Format::F32 => join::<f32>(&mut joined, &buffers),
            Format::Bf16 => join::<bf16>(&mut joined, &buffers),
        }
        Ok(Self::on_host(joined, &dims))
    }

    /// Its host values, without anything pending.
    pub(super) fn host(&self) -> Result<&Buffer> {
        match &self.values {
            Values::Host(Host { buffer, pending: None }) => Ok(buffer),
            Values::Host(_) => Err(misuse("a pending norm was not applied".to_owned())),
            Values::Device(_) => Err(misuse("a tensor is not on the host".to_owned())),
        }
    }

    pub(super) fn device_values(&self) -> Option<&candle_core::Tensor> {
        match &self.values {
            Values::Host(_) => None,
            Values::Device(tensor) => Some(tensor),
        }
    }
}

fn join<T: super::buffer::Value>(joined: &mut Buffer, parts: &[&Buffer]) {
    let mut rest = joined.values_mut::<T>();
    for part in parts {
        let (here, behind) = rest.split_at_mut(part.len());
        here.copy_from_slice(part.values());
        rest = behind;
    }
}
