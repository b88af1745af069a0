//! Weights as the tile kernels read them, packed once at load.
//!
//! The outputs are cut into panels of [`PANEL`]. Within a panel the inner positions follow each other,
//! each as the values of its [`PANEL`] outputs; `bf16` positions go in pairs, the two values of an output
//! side by side. So one vector load (or one tile of sixteen lines) is what one multiply-add takes.

use half::bf16;
use rayon::prelude::*;

use super::blocks::Quantisation;
use super::element::Element;
use super::isa::{Isa, Kernel, dispatch};
use super::quantised::Quantised;
use super::simd::Simd;
use crate::Result;
use crate::ops::buffer::{Buffer, Format};
use crate::ops::misuse;
use crate::ops::shared::{Shared, with_scratch};

/// Outputs of a panel: the lanes of the widest vector, and the columns of a tile.
pub(in crate::ops) const PANEL: usize = 16;

/// A packed right factor (inner, outputs).
pub(in crate::ops) struct Panels {
    values: Values,
    /// Inner positions, a whole number of `DEPTH`s.
    inner: usize,
    /// Outputs that stand for something; the last panel is filled up with zeros.
    outputs: usize,
}

enum Values {
    Packed(Buffer),
    /// Unpacked on the way into a product of this format.
    Quantised(Quantised, Format),
}

impl Panels {
    /// Packs `outputs` columns of `blocks` quantised blocks each for products of `format`; `of(column)` is
    /// a column's bytes, `None` for zeros.
    pub fn pack_quantised<'a>(
        format: Format,
        quantisation: Quantisation,
        outputs: usize,
        blocks: usize,
        of: impl Fn(usize) -> Option<&'a [u8]> + Send + Sync,
    ) -> Self {
        let quantised = Quantised::pack(quantisation, outputs, blocks, of);
        let inner = quantised.inner();
        Self { values: Values::Quantised(quantised, format), inner, outputs }
    }

    /// Packs `outputs` columns of `inner` positions; `fill(output, column)` writes one column, whose
    /// values start as zeros. The positions are padded to whole `DEPTH`s of the format.
    pub fn pack(
        format: Format,
        outputs: usize,
        inner: usize,
        fill: impl Fn(usize, &mut [f32]) + Send + Sync,
    ) -> Result<Self> {
        let mut parts = Self::pack_parts(format, 1, outputs, inner, fill)?;
        parts.pop().ok_or_else(|| misuse("a factor without parts".to_owned()))
    }

    /// Packs several factors of one shape; `fill(output, columns)` writes an output's columns of all of
    /// them, each padded to whole `DEPTH`s, one after the other.
    pub fn pack_parts(
        format: Format,
        parts: usize,
        outputs: usize,
        inner: usize,
        fill: impl Fn(usize, &mut [f32]) + Send + Sync,
    ) -> Result<Vec<Self>> {
        match format {
            Format::F32 => Self::pack_as::<f32>(parts, outputs, inner, fill),
            Format::Bf16 => Self::pack_as::<bf16>(parts, outputs, inner, fill),
        }
    }

    fn pack_as<E: Element>(
        parts: usize,
        outputs: usize,
        inner: usize,
        fill: impl Fn(usize, &mut [f32]) + Send + Sync,
    ) -> Result<Vec<Self>> {
        let inner = inner.next_multiple_of(E::DEPTH);
        let panels = outputs.div_ceil(PANEL);
        let mut buffers =
            (0..parts).map(|_| Buffer::new(E::FORMAT, panels * inner * PANEL)).collect::<Result<Vec<_>>>()?;
        let shared: Vec<_> = buffers.iter_mut().map(|buffer| Shared::new(buffer.values_mut::<E>())).collect();
        (0..panels).into_par_iter().try_for_each(|panel| {
            with_scratch(parts * inner, |columns: &mut [f32]| {
                with_scratch(PANEL * parts * inner, |lanes: &mut [E]| {
                    for (lane, values) in lanes.chunks_exact_mut(parts * inner).enumerate() {
                        columns.fill(0.0);
                        if panel * PANEL + lane < outputs {
                            fill(panel * PANEL + lane, columns);
                        }
                        dispatch(Isa::best(), Narrow { from: columns, to: values });
                    }
                    for (part, shared) in shared.iter().enumerate() {
                        // SAFETY: each task writes its own panel.
                        let target = unsafe { shared.part(panel * inner * PANEL..(panel + 1) * inner * PANEL) };
                        interleave(&lanes[part * inner..], parts * inner, target);
                    }
                })
            })?
        })?;
        Ok(buffers.into_iter().map(|values| Self { values: Values::Packed(values), inner, outputs }).collect())
    }

    pub fn format(&self) -> Format {
        match &self.values {
            Values::Packed(values) => values.format(),
            Values::Quantised(_, format) => *format,
        }
    }

    pub fn inner(&self) -> usize {
        self.inner
    }

    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// The packed values: (panels, inner / DEPTH, [`PANEL`], DEPTH); none where weights are quantised.
    pub fn values<E: Element>(&self) -> &[E] {
        match &self.values {
            Values::Packed(values) => values.values(),
            Values::Quantised(..) => &[],
        }
    }

    /// The weights, if they are to be unpacked first.
    pub(super) fn quantised(&self) -> Option<&Quantised> {
        match &self.values {
            Values::Packed(_) => None,
            Values::Quantised(weight, _) => Some(weight),
        }
    }

    /// Whether the weights are to be unpacked first.
    pub fn is_quantised(&self) -> bool {
        self.quantised().is_some()
    }
}

/// Changes the format of a column.
struct Narrow<'a, E> {
    from: &'a [f32],
    to: &'a mut [E],
}

impl<E: Element> Kernel for Narrow<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        for (from, to) in self.from.chunks(S::LANES).zip(self.to.chunks_mut(S::LANES)) {
            // SAFETY: both have as many values, at most a vector's.
            unsafe {
                if from.len() == S::LANES {
                    E::store(simd, to.as_mut_ptr(), simd.load(from.as_ptr()));
                } else {
                    E::store_some(simd, to.as_mut_ptr(), simd.load_some(from.as_ptr(), from.len()), from.len());
                }
            }
        }
    }
}

/// Lays [`PANEL`] columns, `stride` apart, side by side: `DEPTH` values of each in turn.
fn interleave<E: Element>(columns: &[E], stride: usize, to: &mut [E]) {
    /// Steps at a time, so that of each column a whole line of the cache is read at once: columns often lie
    /// a multiple of 4 KiB apart and push each other out.
    const STEPS: usize = 16;
    const { assert!(E::DEPTH <= 2) };
    let mut block = [[E::default(); 2 * STEPS]; PANEL];
    for (index, lines) in to.chunks_mut(STEPS * PANEL * E::DEPTH).enumerate() {
        let len = lines.len() / PANEL;
        for (lane, values) in block.iter_mut().enumerate() {
            values[..len].copy_from_slice(&columns[lane * stride + index * STEPS * E::DEPTH..][..len]);
        }
        for (step, line) in lines.chunks_exact_mut(PANEL * E::DEPTH).enumerate() {
            for (to, values) in line.chunks_exact_mut(E::DEPTH).zip(&block) {
                to.copy_from_slice(&values[step * E::DEPTH..][..E::DEPTH]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panel_holds_its_outputs_side_by_side_and_pairs_of_positions() {
        let (outputs, inner) = (18, 3);
        let fill = |output: usize, column: &mut [f32]| {
            (0..inner).for_each(|at| column[at] = (output * 10 + at) as f32);
        };
        let single = Panels::pack(Format::F32, outputs, inner, fill).unwrap();
        assert_eq!(single.values::<f32>()[..2], [0.0, 10.0]);
        assert_eq!(single.values::<f32>()[PANEL], 1.0);
        assert_eq!(single.values::<f32>()[3 * PANEL..3 * PANEL + 3], [160.0, 170.0, 0.0]);
        let pairs = Panels::pack(Format::Bf16, outputs, inner, fill).unwrap();
        assert_eq!((pairs.inner(), pairs.outputs()), (4, 18));
        let values: Vec<f32> = pairs.values::<bf16>().iter().map(|value| value.to_f32()).collect();
        assert_eq!(values[..4], [0.0, 1.0, 10.0, 11.0]);
        // The fourth position does not exist.
        assert_eq!(values[2 * PANEL..2 * PANEL + 4], [2.0, 0.0, 12.0, 0.0]);
    }
}
