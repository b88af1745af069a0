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
    /// Whether the kernels of the host compute.
    host: bool,
}

impl Place {
    /// On the processor `f16` is computed as `f32`: few processors multiply it.
    pub fn new(device: &Device, dtype: DType) -> Self {
        Self { device: device.clone(), dtype, host: device.is_cpu() }
    }

    /// The same place computed at as if it were not the host.
    pub fn elsewhere(self) -> Self {
        Self { host: false, ..self }
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

    /// Whether it computes in `f16`, which ends at 65,504. The host computes `f16` as `f32`.
    pub fn is_f16(&self) -> bool {
        !self.host && self.dtype == DType::F16
    }

    /// The same place with a format that holds numbers as large as `f32` does.
    pub fn with_wide_range(&self) -> Self {
        if !self.is_f16() {
            return self.clone();
        }
        let half = Self { dtype: DType::BF16, ..self.clone() };
        if half.works() { half } else { self.in_f32() }
    }

    /// Whether the device computes in the format: NVIDIA's GPUs before Ampere do not in `bf16`.
    pub fn works(&self) -> bool {
        let one = || candle_core::Tensor::ones(1, self.dtype, &self.device)?.to_dtype(DType::F32);
        self.host || one().is_ok()
    }

    /// The format of tensors on the host; `None` elsewhere.
    pub(super) fn on_host(&self) -> Option<Format> {
        self.host.then_some(if self.dtype == DType::BF16 { Format::Bf16 } else { Format::F32 })
    }

    /// Bytes of a value as it is computed with here.
    pub fn value_bytes(&self) -> usize {
        self.on_host().map_or(self.dtype.size_in_bytes(), Format::bytes)
    }

    /// Whether quantised matrices stay as they are here.
    pub fn keeps_blocks(&self) -> bool {
        self.on_host().is_some()
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

    /// A tensor of nothing but zeros.
    pub fn zeros(dims: &[usize], place: &Place) -> Result<Self> {
        Self::new(&vec![0.0; dims.iter().product()], dims, place)
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

    /// The same values in `place`'s format; `place` must be where they are.
    pub fn in_format_of(&self, place: &Place) -> Result<Self> {
        match (&self.values, place.on_host()) {
            (Values::Device(tensor), None) => Ok(Self::on_device(tensor.to_dtype(place.dtype)?)),
            (Values::Host(_), Some(format)) if self.format() == Some(format) => Ok(self.clone()),
            (Values::Host(_), Some(_)) => Self::new(&self.to_values()?, &self.dims, place),
            _ => Err(misuse("a tensor is not where its values are wanted".to_owned())),
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

    /// The same values in another shape. A pending norm stays pending if rows and channels do.
    pub fn reshape(&self, dims: &[usize]) -> Result<Self> {
        if self.elements() != dims.iter().product::<usize>() {
            return Err(misuse(format!("{:?} cannot become {dims:?}", self.dims)));
        }
        let values = match &self.values {
            Values::Host(Host { pending: Some(_), .. })
                if (dims.first(), dims.last()) != (self.dims.first(), self.dims.last()) =>
            {
                return self.resolved()?.reshape(dims);
            }
            Values::Host(host) => Values::Host(host.clone()),
            Values::Device(tensor) => Values::Device(tensor.reshape(dims)?),
        };
        Ok(Self { dims: dims.to_vec(), values })
    }

    /// The rows of all `tensors`, one after the other.
    pub fn cat_rows(tensors: &[&Self]) -> Result<Self> {
        let Some(first) = tensors.first() else { return Err(misuse("no tensors to join".to_owned())) };
        if first.dims.is_empty() || tensors.iter().any(|tensor| tensor.dims.get(1..) != first.dims.get(1..)) {
            return Err(misuse("tensors of different rows cannot be joined".to_owned()));
        }
        let rows = tensors.iter().map(|tensor| tensor.dims[0]).sum();
        let dims: Vec<usize> = std::iter::once(rows).chain(first.dims[1..].iter().copied()).collect();
        if let Values::Device(_) = first.values {
            let parts: Option<Vec<_>> = tensors.iter().map(|tensor| tensor.device_values()).collect();
            let Some(parts) = parts else {
                return Err(misuse("tensors on different devices cannot be joined".to_owned()));
            };
            return Ok(Self::on_device(candle_core::Tensor::cat(&parts, 0)?));
        }
        let tensors = tensors.iter().map(|tensor| tensor.resolved()).collect::<Result<Vec<_>>>()?;
        let buffers = tensors.iter().map(|tensor| tensor.host()).collect::<Result<Vec<_>>>()?;
        let format = buffers[0].format();
        if buffers.iter().any(|buffer| buffer.format() != format) {
            return Err(misuse("tensors of different formats cannot be joined".to_owned()));
        }
        let mut joined = Buffer::new(format, dims.iter().product())?;
        match joined.format() {
            Format::F32 => join::<f32>(&mut joined, &buffers),
            Format::Bf16 => join::<bf16>(&mut joined, &buffers),
        }
        Ok(Self::on_host(joined, &dims))
    }

    /// The format of its values on the host; `None` on another device.
    pub(super) fn format(&self) -> Option<Format> {
        match &self.values {
            Values::Host(host) => Some(host.buffer.format()),
            Values::Device(_) => None,
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::norm::GroupNorm;
    use crate::ops::reference::{self, parameter, tensor_at};

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    #[test]
    fn values_come_back_as_they_went_in_up_to_their_format() {
        let values = [1.0, -2.5, 0.1, f32::INFINITY, -0.0, 1e-3];
        let x = Tensor::new(&values, &[2, 3], &Place::host()).unwrap();
        assert_eq!(bits(&reference::values(&x)), bits(&values));
        let x = Tensor::new(&values, &[2, 3], &reference::bf16_place()).unwrap();
        let rounded = values.map(|value| bf16::from_f32(value).to_f32());
        assert_eq!(bits(&reference::values(&x)), bits(&rounded));
        assert_eq!(bits(&reference::values(&reference::elsewhere(&x))), bits(&rounded));
    }

    #[test]
    fn the_processor_computes_f16_as_f32() {
        let half = Place::new(&Device::Cpu, DType::F16);
        assert_eq!((half.on_host(), reference::bf16_place().on_host()), (Some(Format::F32), Some(Format::Bf16)));
        assert_eq!(reference::bf16_place().in_f32().on_host(), Some(Format::F32));
        assert_eq!(
            (tensor_at([2, 3], 1, &half).bytes(), tensor_at([2, 3], 1, &reference::bf16_place()).bytes()),
            (24, 12)
        );
        assert_eq!(reference::elsewhere(&tensor_at([2, 3], 1, &half)).bytes(), 24);
    }

    #[test]
    fn values_change_their_format_and_nothing_else() {
        let (full, half) = (Place::host(), reference::bf16_place());
        let x = reference::tensor([2, 3], 1);
        let rounded = tensor_at([2, 3], 1, &half);
        reference::assert_same(&x.in_format_of(&half).unwrap(), &rounded);
        assert_eq!(x.in_format_of(&half).unwrap().format(), Some(Format::Bf16));
        reference::assert_same(&rounded.in_format_of(&full).unwrap(), &rounded);
        reference::assert_same(&x.in_format_of(&full).unwrap(), &x);
        assert!(reference::elsewhere(&x).in_format_of(&full).is_err());
        let half = Place::new(&Device::Cpu, DType::F16);
        assert_eq!((half.with_wide_range().on_host(), half.on_host()), (Some(Format::F32), Some(Format::F32)));
    }

    #[test]
    fn a_tensor_has_as_many_values_as_its_dimensions_ask_for() {
        for place in reference::places() {
            assert!(Tensor::new(&[1.0; 5], &[2, 3], &place).is_err());
            assert!(Tensor::new(&[1.0; 2], &[], &place).is_err());
            assert_eq!(Tensor::new(&[1.0], &[], &place).unwrap().to_values().unwrap(), [1.0]);
            let x = tensor_at([2, 3, 4], 1, &place);
            assert_eq!((x.elements(), x.dims3().unwrap()), (24, (2, 3, 4)));
            assert!(x.dims4().is_err());
            let x = x.reshape(&[1, 4, 2, 3]).unwrap();
            assert_eq!(x.dims4().unwrap(), (1, 4, 2, 3));
            assert!(x.dims3().is_err());
            assert!(x.reshape(&[5, 5]).is_err());
            assert!(reference::elsewhere(&x).reshape(&[5, 5]).is_err());
        }
    }

    #[test]
    fn joined_rows_follow_each_other_with_what_was_pending_done() {
        for place in reference::places() {
            let norm = GroupNorm::new(&parameter([3], 1), &parameter([3], 2), 1, 1e-5).unwrap();
            let (a, b) = (tensor_at([1, 2, 2, 3], 3, &place), tensor_at([2, 2, 2, 3], 4, &place));
            let pending = norm.forward_silu(&b).unwrap();
            let joined = Tensor::cat_rows(&[&a, &pending, &b]).unwrap();
            assert_eq!(joined.dims(), [5, 2, 2, 3]);
            let expected = [reference::values(&a), reference::values(&pending), reference::values(&b)].concat();
            assert_eq!(reference::values(&joined), expected);
            let there = Tensor::cat_rows(&[&reference::elsewhere(&a), &reference::elsewhere(&b)]).unwrap();
            assert_eq!(reference::values(&there), [reference::values(&a), reference::values(&b)].concat());
        }
    }

    #[test]
    fn tensors_that_do_not_fit_together_are_errors_and_not_panics() {
        for place in reference::places() {
            let (a, number) = (tensor_at([1, 3], 1, &place), tensor_at([], 1, &place));
            assert!(Tensor::cat_rows(&[]).is_err());
            assert!(Tensor::cat_rows(&[&a, &tensor_at([1, 4], 1, &place)]).is_err());
            assert!(Tensor::cat_rows(&[&a, &tensor_at([1, 3, 1], 1, &place)]).is_err());
            assert!(Tensor::cat_rows(&[&number, &number]).is_err());
            assert!(Tensor::cat_rows(&[&a, &number]).is_err());
            assert!(Tensor::cat_rows(&[&a, &reference::elsewhere(&a)]).is_err());
            assert!(Tensor::cat_rows(&[&reference::elsewhere(&a), &a]).is_err());
        }
    }

    #[test]
    fn values_with_something_pending_are_not_given_out() {
        let norm = GroupNorm::new(&parameter([3], 1), &parameter([3], 2), 1, 1e-5).unwrap();
        let pending = norm.forward(&reference::tensor([2, 2, 2, 3], 3)).unwrap();
        assert!(pending.host().is_err());
        assert!(pending.resolved().unwrap().host().is_ok());
        // In another shape, too, the norm is that of its own rows and channels.
        for dims in [vec![2, 4, 3], vec![1, 24], vec![2, 12], vec![8, 3], vec![4, 2, 3], vec![24]] {
            assert_eq!(reference::values(&pending.reshape(&dims).unwrap()), reference::values(&pending), "{dims:?}");
        }
        assert!(pending.reshape(&[2, 4, 3]).unwrap().host().is_err(), "needlessly applied");
        assert!(reference::elsewhere(&pending).host().is_err());
    }
}
