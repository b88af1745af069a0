//! Nearest-neighbour enlargement followed by a 3×3 convolution, in one.
//!
//! Doubling repeats each pixel four times, so of a window's nine values only four differ. Minimal filtering of the
//! doubled map makes use of that with a quarter of the multiplications or less. Where it is not worth it, the outputs
//! of each of the four phases (even or odd line, even or odd column) are a 2×2 convolution of the small map with the
//! sums of the weights that meet the same pixel: 4/9 of the multiplications. Neither stores the large map.

use std::sync::OnceLock;

use half::bf16;

use super::buffer::{Buffer, Format, Value};
use super::conv::{Added, Conv2d, ConvShape, HostCall, may_filter};
use super::kernel::element::Element;
use super::kernel::panels::Panels;
use super::parameter::Parameter;
use super::shared::{Shared, run_tasks};
use super::tensor::{Place, Tensor};
use super::windows::{Map, Placing, Windows};
use super::{layout, misuse};
use crate::Result;

/// Enlarges a feature map and convolves it with a 3×3 window.
pub(crate) struct UpsampleConv {
    weight: Weight,
    channels: (usize, usize),
}

enum Weight {
    Filtered(Conv2d),
    Phases {
        /// Phase (line, column) at 2 · line + column.
        phases: [Panels; 4],
        bias: Vec<f32>,
        plain: Box<Plain>,
    },
    Device(Conv2d),
}

/// The convolution as it is, for sizes that are not doubled; packed when one is first asked for.
struct Plain {
    weight: Parameter<'static>,
    bias: Parameter<'static>,
    place: Place,
    packed: OnceLock<Conv2d>,
}

impl UpsampleConv {
    /// From a checkpoint's (out, in, 3, 3) weight and (out) bias.
    pub fn new(weight: &Parameter<'_>, bias: &Parameter<'_>, place: &Place) -> Result<Self> {
        let [outputs, inputs, 3, 3] = weight.dims()[..] else {
            return Err(misuse(format!("an enlarging convolution was given a weight of {:?}", weight.dims())));
        };
        let packed = match place.on_host() {
            None => Weight::Device(Conv2d::new(weight, Some(bias), ConvShape::same(3), place)?),
            Some(format) if may_filter(format, inputs, outputs) => {
                Weight::Filtered(Conv2d::new(weight, Some(bias), ConvShape::same(3), place)?)
            }
            Some(format) => {
                let phase = |line, column| pack_phase(format, weight, (outputs, inputs), (line, column));
                Weight::Phases {
                    phases: [phase(0, 0)?, phase(0, 1)?, phase(1, 0)?, phase(1, 1)?],
                    bias: bias.values()?,
                    plain: Box::new(Plain {
                        weight: weight.to_owned()?,
                        bias: bias.to_owned()?,
                        place: place.clone(),
                        packed: OnceLock::new(),
                    }),
                }
            }
        };
        Ok(Self { weight: packed, channels: (inputs, outputs) })
    }

    /// (rows, h, w, in) → (rows, `height`, `width`, out): each pixel from its nearest one as torch
    /// chooses it (rounding down), then convolved.
    pub fn forward(&self, x: &Tensor, height: usize, width: usize) -> Result<Tensor> {
        let (rows, from_height, from_width, channels) = x.dims4()?;
        if channels != self.channels.0 {
            return Err(misuse(format!(
                "an enlarging convolution of {} channels was given {:?}",
                self.channels.0,
                x.dims()
            )));
        }
        let doubles = (height, width) == (2 * from_height, 2 * from_width);
        match &self.weight {
            Weight::Device(conv) => {
                let Some(x) = x.device_values() else {
                    return Err(misuse("a convolution and its input are on different devices".to_owned()));
                };
                let large = layout::first(x)?.upsample_nearest2d(height, width)?;
                conv.forward(&Tensor::on_device(layout::last(&large)?))
            }
            Weight::Filtered(conv) => {
                let doubled = if doubles { conv.forward_doubled(x)? } else { None };
                doubled.map_or_else(|| conv.forward(&upsample_nearest(x, height, width)?), Ok)
            }
            Weight::Phases { phases, bias, .. } if doubles => {
                let map = Map { height: from_height, width: from_width, channels };
                let dims = [rows, height, width, self.channels.1];
                let output = match phases[0].format() {
                    Format::F32 => double::<f32>(x, map, phases, bias, dims),
                    Format::Bf16 => double::<bf16>(x, map, phases, bias, dims),
                }?;
                Ok(Tensor::on_host(output, &dims))
            }
            Weight::Phases { plain, .. } => plain.conv()?.forward(&upsample_nearest(x, height, width)?),
        }
    }
}

impl Plain {
    fn conv(&self) -> Result<&Conv2d> {
        if let Some(conv) = self.packed.get() {
            return Ok(conv);
        }
        let conv = Conv2d::new(&self.weight, Some(&self.bias), ConvShape::same(3), &self.place)?;
        Ok(self.packed.get_or_init(|| conv))
    }
}

/// The 2×2 weights of a phase. Of three taps along a side, the first phase sees one pixel with the first
/// tap and the next pixel with the other two; the second phase sees two taps on the first pixel.
fn pack_phase(
    format: Format,
    weight: &Parameter<'_>,
    (outputs, inputs): (usize, usize),
    (line, column): (usize, usize),
) -> Result<Panels> {
    let pixel = match format {
        Format::F32 => inputs.next_multiple_of(f32::DEPTH),
        Format::Bf16 => inputs.next_multiple_of(bf16::DEPTH),
    };
    let meets = |phase: usize, tap: usize| usize::from(tap > phase);
    Panels::pack(format, outputs, 4 * pixel, |output, to| {
        let mut values = vec![0.0; inputs * 9];
        weight.read(output * inputs * 9, &mut values)?;
        for (input, values) in values.chunks_exact(9).enumerate() {
            for (tap, value) in values.iter().enumerate() {
                let place = 2 * meets(line, tap / 3) + meets(column, tap % 3);
                to[place * pixel + input] += value;
            }
        }
        Ok(())
    })
}

fn double<E: Element>(x: &Tensor, map: Map, phases: &[Panels; 4], bias: &[f32], dims: [usize; 4]) -> Result<Buffer> {
    let [rows, height, width, outputs] = dims;
    let mut output = Buffer::new(E::FORMAT, rows * height * width * outputs)?;
    let call = HostCall { x, bias: Some(bias), added: Added::Nothing, outputs };
    for (index, panels) in phases.iter().enumerate() {
        let (line, column) = (index / 2, index % 2);
        let windows =
            Windows { kernel: (2, 2), stride: 1, before: (1 - line, 1 - column), outputs: (map.height, map.width) };
        let placing = Placing {
            first: (line * width + column) * outputs,
            row: height * width * outputs,
            line: 2 * width * outputs,
            position: 2 * outputs,
        };
        call.run_windows::<E>(panels, windows, placing, &mut output)?;
    }
    Ok(output)
}

/// Resizes a feature map on the host, each pixel from its nearest one.
fn upsample_nearest(x: &Tensor, height: usize, width: usize) -> Result<Tensor> {
    let (rows, from_height, from_width, channels) = x.dims4()?;
    let x = x.resolved()?;
    let from = x.host()?;
    let mut to = Buffer::new(from.format(), rows * height * width * channels)?;
    let sizes = ((from_height, from_width), (height, width));
    match from.format() {
        Format::F32 => resize::<f32>(from.values(), to.values_mut(), sizes, channels),
        Format::Bf16 => resize::<bf16>(from.values(), to.values_mut(), sizes, channels),
    }?;
    Ok(Tensor::on_host(to, &[rows, height, width, channels]))
}

fn resize<T: Value>(
    from: &[T],
    to: &mut [T],
    ((from_height, from_width), (height, width)): ((usize, usize), (usize, usize)),
    channels: usize,
) -> Result<()> {
    let columns: Vec<usize> = (0..width).map(|column| nearest(column, from_width, width)).collect();
    let (line_len, lines, work) = (width * channels, to.len() / (width * channels).max(1), to.len());
    let shared = Shared::new(to);
    run_tasks(lines, work, |line| {
        let (row, y) = (line / height, nearest(line % height, from_height, height));
        let from = &from[(row * from_height + y) * from_width * channels..][..from_width * channels];
        // SAFETY: each task writes its own line.
        #[allow(unsafe_code)]
        let to = unsafe { shared.part(line * line_len..(line + 1) * line_len) };
        for (to, column) in to.chunks_exact_mut(channels).zip(&columns) {
            to.copy_from_slice(&from[column * channels..(column + 1) * channels]);
        }
        Ok(())
    })
}

/// Where pixel `to` of `to_len` comes from, with the scale in `f32` as torch computes it.
fn nearest(to: usize, from_len: usize, to_len: usize) -> usize {
    let scale = from_len as f32 / to_len as f32;
    ((to as f32 * scale) as usize).min(from_len - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::norm::GroupNorm;
    use crate::ops::reference::{self, parameter, tensor_at};

    /// Enlarged, then convolved, by the definitions.
    fn plain(x: &Tensor, weight: &[f32], bias: &[f32], (height, width): (usize, usize)) -> Vec<f32> {
        let inputs = x.dims()[3];
        let large = Tensor::new(
            &reference::values(&upsample_nearest(x, height, width).unwrap()),
            &[x.dims()[0], height, width, inputs],
            &Place::host(),
        )
        .unwrap();
        reference::convolution(&large, (weight, [bias.len(), inputs, 3, 3]), bias, ConvShape::same(3)).1
    }

    #[test]
    fn doubling_repeats_each_pixel_four_times() {
        for place in reference::places() {
            let x = tensor_at([2, 2, 3, 5], 1, &place);
            let large = upsample_nearest(&x, 4, 6).unwrap();
            assert_eq!(large.dims(), [2, 4, 6, 5]);
            let (small, large) = (reference::values(&x), reference::values(&large));
            for (row, y, at) in (0..2).flat_map(|row| (0..4).flat_map(move |y| (0..6).map(move |at| (row, y, at)))) {
                let pixel = &large[((row * 4 + y) * 6 + at) * 5..][..5];
                assert_eq!(pixel, &small[((row * 2 + y / 2) * 3 + at / 2) * 5..][..5]);
            }
        }
    }

    #[test]
    fn an_odd_size_takes_the_pixels_that_torch_takes() {
        // torch.nn.functional.interpolate(arange(3), size=5) and (arange(4), size=7), mode "nearest".
        let chosen = |from, to| (0..to).map(|at| nearest(at, from, to)).collect::<Vec<_>>();
        assert_eq!(chosen(3, 5), [0, 0, 1, 1, 2]);
        assert_eq!(chosen(4, 7), [0, 0, 1, 1, 2, 2, 3]);
    }

    #[test]
    fn a_doubled_or_odd_size_equals_enlarging_and_then_convolving() {
        let cases = [
            ([1, 1, 1, 1], 1, (2, 2)),
            ([2, 3, 5, 5], 7, (6, 10)),
            ([2, 3, 5, 5], 7, (5, 9)),
            ([1, 7, 9, 33], 35, (14, 18)),
            ([1, 7, 9, 33], 35, (13, 17)),
            ([1, 2, 36, 3], 320, (4, 72)),
            ([2, 9, 4, 64], 64, (18, 8)),
            ([2, 9, 4, 64], 64, (18, 7)),
            ([1, 3, 3, 4], 5, (3, 3)),
            ([1, 5, 4, 3], 2, (15, 12)),
        ];
        for place in reference::places() {
            for (dims, outputs, (height, width)) in cases {
                let (x, weight, bias) =
                    (tensor_at(dims, 1, &place), parameter([outputs, dims[3], 3, 3], 2), parameter([outputs], 3));
                let conv = UpsampleConv::new(&weight, &bias, &place).unwrap();
                let got = conv.forward(&x, height, width).unwrap();
                assert_eq!(got.dims(), [dims[0], height, width, outputs]);
                let expected =
                    plain(&x, &reference::weight_values(&weight, &place), &bias.values().unwrap(), (height, width));
                reference::assert_close(&reference::values(&got), &expected, reference::tolerance(&place));
            }
        }
    }

    #[test]
    fn a_pending_norm_that_is_read_gives_what_the_norm_and_then_the_convolution_give() {
        for place in reference::places() {
            let norm = GroupNorm::new(&parameter([33], 1), &parameter([33], 2), 11, 1e-5).unwrap();
            let conv = UpsampleConv::new(&parameter([7, 33, 3, 3], 3), &parameter([7], 4), &place).unwrap();
            let pending = norm.forward_silu(&tensor_at([2, 5, 7, 33], 5, &place)).unwrap();
            for (height, width) in [(10, 14), (9, 13)] {
                let after = conv.forward(&pending.resolved().unwrap(), height, width).unwrap();
                reference::assert_same(&conv.forward(&pending, height, width).unwrap(), &after);
            }
        }
    }

    #[test]
    fn neither_company_nor_threads_nor_damage_in_another_row_show() {
        for place in reference::places() {
            for (channels, (height, width)) in [(5, (12, 22)), (5, (11, 21)), (64, (12, 22)), (64, (11, 21))] {
                let weight = parameter([70, channels, 3, 3], 1);
                let conv = UpsampleConv::new(&weight, &parameter([70], 2), &place).unwrap();
                let x = tensor_at([3, 6, 11, channels], 3, &place);
                let run = |x: &Tensor| conv.forward(x, height, width).unwrap();
                reference::assert_rows_stand_alone(&x, &place, run);
                reference::assert_threads_do_not_show(|| run(&x));
                reference::assert_damage_stays_in_its_row(&x, &place, run);
            }
        }
    }

    #[test]
    fn the_path_for_other_devices_agrees() {
        let (weight, bias) = (parameter([6, 5, 3, 3], 1), parameter([6], 2));
        let here = UpsampleConv::new(&weight, &bias, &Place::host()).unwrap();
        let there = UpsampleConv::new(&weight, &bias, &Place::host().elsewhere()).unwrap();
        let x = reference::tensor([2, 4, 3, 5], 3);
        for (height, width) in [(8, 6), (7, 5)] {
            let expected = here.forward(&x, height, width).unwrap();
            let got = there.forward(&reference::elsewhere(&x), height, width).unwrap();
            assert_eq!(got.dims(), expected.dims());
            reference::assert_close(&reference::values(&got), &reference::values(&expected), 1e-5);
        }
        assert!(there.forward(&x, 8, 6).is_err());
    }

    #[test]
    fn wrong_shapes_are_errors_and_not_panics() {
        for place in reference::places() {
            let conv = UpsampleConv::new(&parameter([6, 5, 3, 3], 1), &parameter([6], 2), &place).unwrap();
            for x in [tensor_at([1, 4, 3, 6], 3, &place), tensor_at([1, 4, 3, 4], 3, &place)] {
                assert!(conv.forward(&x, 8, 6).is_err());
                assert!(conv.forward(&x, 7, 6).is_err());
            }
            assert!(conv.forward(&tensor_at([12, 5], 3, &place), 8, 6).is_err());
            assert!(conv.forward(&tensor_at([], 3, &place), 2, 2).is_err());
            assert!(conv.forward(&reference::elsewhere(&tensor_at([1, 4, 3, 5], 3, &place)), 8, 6).is_err());
            assert!(UpsampleConv::new(&parameter([6, 5, 1, 1], 1), &parameter([6], 2), &place).is_err());
        }
    }
}
