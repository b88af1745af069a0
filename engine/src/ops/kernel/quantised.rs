//! Weights that stay quantised in memory and become panels on the way into a product.
//!
//! The blocks of a panel's outputs lie side by side byte by byte, so that unpacking works on whole vectors
//! of outputs whatever the format is.

use std::ops::Range;

use rayon::prelude::*;

use super::blocks::{Quantisation, STRETCH};
use super::element::Element;
use super::isa::Kernel;
use super::panels::PANEL;
use super::simd::Simd;
use crate::Result;

/// Quantised weights (outputs, inner).
pub(super) struct Quantised {
    format: Quantisation,
    /// (panels, blocks of an output, bytes of a block, [`PANEL`])
    bytes: Vec<u8>,
    /// Blocks of an output.
    blocks: usize,
}

impl Quantised {
    /// Packs `columns` of `inputs` values, whole blocks; `lend(panel, pack)` calls `pack` with the bytes of a panel's
    /// columns, `None` for zeros.
    pub fn pack(
        format: Quantisation,
        inputs: usize,
        columns: usize,
        lend: impl Fn(usize, &mut dyn FnMut([Option<&[u8]>; PANEL]) -> Result<()>) -> Result<()> + Send + Sync,
    ) -> Result<Self> {
        let blocks = inputs / format.values();
        let panel_bytes = blocks * format.bytes() * PANEL;
        let mut bytes = vec![0; columns.div_ceil(PANEL) * panel_bytes];
        bytes.par_chunks_mut(panel_bytes.max(1)).enumerate().try_for_each(|(panel, to)| {
            lend(panel, &mut |columns| {
                for (lane, column) in columns.into_iter().enumerate() {
                    let Some(column) = column else { continue };
                    to[lane..].iter_mut().step_by(PANEL).zip(column).for_each(|(to, byte)| *to = *byte);
                }
                Ok(())
            })
        })?;
        Ok(Self { format, bytes, blocks })
    }

    /// Inner positions.
    pub fn inner(&self) -> usize {
        self.blocks * self.format.values()
    }

    /// The blocks of a panel that hold the inner position `at`.
    #[inline(always)]
    fn block(&self, panel: usize, at: usize) -> &[[u8; PANEL]] {
        let each = self.format.bytes() * PANEL;
        let start = (panel * self.blocks + at / self.format.values()) * each;
        self.bytes[start..start + each].as_chunks().0
    }
}

/// Lays panels of quantised weights out as [`Panels`](super::panels::Panels) has them.
pub(super) struct Unpack<'a, E> {
    pub weight: &'a Quantised,
    pub panels: Range<usize>,
    /// Inner positions, whole [`STRETCH`]es.
    pub inner: Range<usize>,
    /// (panels, inner / DEPTH, [`PANEL`], DEPTH)
    pub to: &'a mut [E],
}

impl<E: Element> Kernel for Unpack<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        let Self { weight, panels, inner, to } = self;
        let format = weight.format;
        let mut lines = [[0.0; PANEL]; STRETCH];
        for (panel, to) in panels.zip(to.chunks_exact_mut(inner.len() * PANEL)) {
            for (at, to) in inner.clone().step_by(STRETCH).zip(to.chunks_exact_mut(STRETCH * PANEL)) {
                format.unpack(weight.block(panel, at), at % format.values() / STRETCH, &mut lines);
                E::lay_out(&lines, to);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::ops::kernel::isa::{Isa, dispatch};
    use crate::ops::kernel::panels::Panels;
    use crate::ops::parameter::{Parameter, Stored};
    use crate::ops::reference;

    /// Any part of unpacked panels has the bits of the same weights packed as numbers.
    fn assert_as_panels<E: Element>(format: Quantisation, isa: Isa) {
        let outputs = 37;
        let bytes = reference::quantised(format, outputs * 512, 1);
        let parameter = Parameter::new(&bytes, Stored::Quantised(format), &[outputs, 512]);
        let packed = Panels::pack_quantised(E::FORMAT, format, &parameter, outputs, Some).unwrap();
        let packed = packed.quantised().unwrap();
        assert_eq!(packed.inner(), 512);
        let expected = Panels::pack(E::FORMAT, outputs, 512, |output, to| parameter.read(output * 512, to)).unwrap();
        for (panels, inner) in [(0..3, 0..512), (1..3, 32..96), (2..3, 480..512), (0..1, 256..288)] {
            let mut to = vec![E::from_f32(f32::NAN); panels.len() * inner.len() * PANEL];
            let (weight, target) = (packed, to.as_mut_slice());
            dispatch(isa, Unpack { weight, panels: panels.clone(), inner: inner.clone(), to: target });
            let expected = panels.flat_map(|panel| {
                let start = (panel * 512 + inner.start) * PANEL;
                &expected.values::<E>()[start..start + inner.len() * PANEL]
            });
            assert!(to.iter().zip(expected).all(|(a, b)| a.to_f32() == b.to_f32()), "{isa} {format:?} {:?}", E::FORMAT);
        }
    }

    #[test]
    fn unpacked_panels_are_those_of_the_same_numbers() {
        for isa in Isa::available() {
            for format in Quantisation::ALL {
                assert_as_panels::<f32>(format, isa);
                assert_as_panels::<bf16>(format, isa);
            }
        }
    }
}
