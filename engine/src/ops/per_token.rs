//! What is done with tokens one by one, shared out among threads.

use half::bf16;

use super::buffer::{Buffer, Format};
use super::kernel::element::Element;
use super::shared::{Shared, run_tasks};
use super::tensor::Tensor;
use crate::Result;

/// A function of each token, and of the row that it is in.
pub(super) trait PerToken: Sync {
    /// Tokens of `row`, each of `width` values.
    fn run<E: Element>(&self, row: usize, width: usize, from: &[E], to: &mut [E]);
}

/// `function` of all runs of `width` values of a tensor on the host, which has `rows` rows of like size.
pub(super) fn per_token(x: &Tensor, width: usize, rows: usize, function: &impl PerToken) -> Result<Tensor> {
    let resolved = x.resolved()?;
    let from = resolved.host()?;
    let mut output = Buffer::new(from.format(), from.len())?;
    match from.format() {
        Format::F32 => share_out::<f32>(from.values(), output.values_mut(), width, rows, function),
        Format::Bf16 => share_out::<bf16>(from.values(), output.values_mut(), width, rows, function),
    }?;
    Ok(Tensor::on_host(output, x.dims()))
}

fn share_out<E: Element>(from: &[E], to: &mut [E], width: usize, rows: usize, function: &impl PerToken) -> Result<()> {
    /// Work per value, in multiply-adds.
    const WORK: usize = 16;
    /// Values of a task.
    const VALUES: usize = 64 * 1024;
    if from.is_empty() || width == 0 {
        return Ok(());
    }
    let row = from.len() / rows;
    let part = (VALUES / width).max(1) * width;
    let parts = row.div_ceil(part);
    let shared = Shared::new(to);
    run_tasks(rows * parts, WORK * from.len(), |task| {
        let (at, first) = (task / parts, task % parts * part);
        let range = at * row + first..at * row + row.min(first + part);
        // SAFETY: each task writes its own tokens.
        #[allow(unsafe_code)]
        let to = unsafe { shared.part(range.clone()) };
        function.run(at, width, &from[range], to);
        Ok(())
    })
}
