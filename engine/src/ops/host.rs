//! Tensors on the host as plain `f32` slices, and back.

use std::ops::Deref;

use candle_core::{CpuStorage, DType, Device, Shape, Storage, StorageRef, Tensor};

use crate::{Error, Result};

/// `tensor` as contiguous `f32`; free of cost if it already is.
pub(super) fn as_f32(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.to_dtype(DType::F32)?.contiguous()?)
}

/// A borrowed view of a contiguous `f32` host tensor's values.
pub(super) struct HostSlice<'a> {
    storage: StorageRef<'a>,
    start: usize,
    len: usize,
}

/// Borrows the values of what [`as_f32`] returned.
pub(super) fn values(tensor: &Tensor) -> Result<HostSlice<'_>> {
    let (storage, layout) = tensor.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else {
        return Err(candle_core::Error::RequiresContiguous { op: "host slice" }.into());
    };
    if !matches!(&*storage, Storage::Cpu(CpuStorage::F32(_))) {
        let (expected, got) = (DType::F32, tensor.dtype());
        return Err(candle_core::Error::UnexpectedDType { msg: "host slice", expected, got }.into());
    }
    Ok(HostSlice { storage, start, len: end - start })
}

impl Deref for HostSlice<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.start..self.start + self.len],
            // `values` made sure of the format, and the guard keeps the storage as it was.
            _ => &[],
        }
    }
}

/// `len` zeros, or an error where the system refuses the memory.
pub(super) fn zeros(len: usize) -> Result<Vec<f32>> {
    let mut probe = Vec::<f32>::new();
    let bytes = len * size_of::<f32>();
    probe.try_reserve_exact(len).map_err(|_| Error::OutOfMemory(format!("{bytes} bytes on the host")))?;
    drop(probe);
    Ok(vec![0.0; len])
}

/// A host tensor of format `dtype` from `f32` values; no copy for `f32`.
pub(super) fn tensor(values: Vec<f32>, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
    Ok(Tensor::from_vec(values, shape.into(), &Device::Cpu)?.to_dtype(dtype)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_sees_only_its_own_part_of_a_shared_storage() {
        let whole = Tensor::arange(0f32, 6f32, &Device::Cpu).unwrap().reshape((2, 3)).unwrap();
        let part = as_f32(&whole.narrow(0, 1, 1).unwrap()).unwrap();
        assert_eq!(&*values(&part).unwrap(), &[3.0, 4.0, 5.0]);
    }

    #[test]
    fn another_format_is_refused_and_converted_on_request() {
        let half = Tensor::new(&[1f32, 2.0], &Device::Cpu).unwrap().to_dtype(DType::F16).unwrap();
        assert!(values(&half).is_err());
        assert_eq!(&*values(&as_f32(&half).unwrap()).unwrap(), &[1.0, 2.0]);
    }
}
