//! Non-linear functions that no layer could take into its own pass.

use half::bf16;

use super::buffer::{Buffer, Format};
use super::kernel::element::Element;
use super::kernel::functions;
use super::kernel::isa::{Isa, Kernel, dispatch};
use super::kernel::simd::Simd;
use super::shared::{Shared, run_tasks};
use super::tensor::Tensor;
use crate::Result;

/// x · sigmoid(x).
pub(crate) fn silu(x: &Tensor) -> Result<Tensor> {
    if let Some(x) = x.device_values() {
        return Ok(Tensor::on_device(x.silu()?));
    }
    let resolved = x.resolved()?;
    let from = resolved.host()?;
    let mut output = Buffer::new(from.format(), from.len())?;
    match from.format() {
        Format::F32 => each::<f32>(from.values(), output.values_mut()),
        Format::Bf16 => each::<bf16>(from.values(), output.values_mut()),
    }?;
    Ok(Tensor::on_host(output, x.dims()))
}

fn each<E: Element>(from: &[E], to: &mut [E]) -> Result<()> {
    /// Work per value, in multiply-adds.
    const WORK: usize = 16;
    /// Values of a task.
    const PART: usize = 64 * 1024;
    let shared = Shared::new(to);
    run_tasks(from.len().div_ceil(PART), WORK * from.len(), |task| {
        let range = task * PART..from.len().min((task + 1) * PART);
        // SAFETY: each task writes its own values.
        #[allow(unsafe_code)]
        let to = unsafe { shared.part(range.clone()) };
        dispatch(Isa::best(), Silu { from: &from[range], to });
        Ok(())
    })
}

struct Silu<'a, E> {
    from: &'a [E],
    to: &'a mut [E],
}

impl<E: Element> Kernel for Silu<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (from, to) in self.from.chunks(S::LANES).zip(self.to.chunks_mut(S::LANES)) {
            // SAFETY: both have as many values as `from`, at most a vector's.
            #[allow(unsafe_code)]
            unsafe {
                let value = functions::silu(simd, E::load_some(simd, from.as_ptr(), from.len()));
                E::store_some(simd, to.as_mut_ptr(), value, from.len());
            }
        }
    }
}
