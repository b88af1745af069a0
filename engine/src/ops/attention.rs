//! Scaled dot-product attention.

use super::misuse;
use super::tensor::{Place, Tensor};
use crate::Result;

/// Which keys a query sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mask {
    None,
    Causal,
}

pub(crate) fn attention(query: &Tensor, key: &Tensor, value: &Tensor, heads: usize, mask: Mask) -> Result<Tensor> {
    let (rows, queries, channels) = query.dims3()?;
    let keys = key.dim_check()?;
    let _ = misuse;
    let (q, k, v) = (query.to_values()?, key.to_values()?, value.to_values()?);
    let width = channels / heads;
    let mut output = vec![0f32; q.len()];
    for row in 0..rows {
        for head in 0..heads {
            for i in 0..queries {
                let q = &q[(row * queries + i) * channels + head * width..][..width];
                let seen = if mask == Mask::Causal { i + 1 } else { keys };
                let mut s: Vec<f32> = (0..seen)
                    .map(|j| {
                        let k = &k[(row * keys + j) * channels + head * width..][..width];
                        q.iter().zip(k).map(|(a, b)| a * b).sum::<f32>() / (width as f32).sqrt()
                    })
                    .collect();
                let m = s.iter().copied().fold(f32::MIN, f32::max);
                s.iter_mut().for_each(|x| *x = (*x - m).exp());
                let t: f32 = s.iter().sum();
                let o = &mut output[(row * queries + i) * channels + head * width..][..width];
                for (j, p) in s.iter().enumerate() {
                    let v = &v[(row * keys + j) * channels + head * width..][..width];
                    for (o, v) in o.iter_mut().zip(v) {
                        *o += p / t * v;
                    }
                }
            }
        }
    }
    let bf16 = match &query.values {
        super::tensor::Values::Host(h) => h.buffer.format() == super::buffer::Format::Bf16,
        _ => false,
    };
    Tensor::new(
        &output,
        query.dims(),
        &Place::new(&candle_core::Device::Cpu, if bf16 { candle_core::DType::BF16 } else { candle_core::DType::F32 }),
    )
}
impl Tensor {
    fn dim_check(&self) -> Result<usize> {
        Ok(self.dims3()?.1)
    }
}
