//! The processor's kernels: written once over [`Simd`](simd::Simd), compiled for each instruction set,
//! chosen when the program runs.
//!
//! Reading order: `isa` (which instructions there are), `simd` and its implementations, `element` (`f32`
//! and `bf16` factors), `convert` (numbers as stored), `panels` and `packing` (packed weights), `blocks` and
//! `quantised` (weights of few bits), `tile` (the innermost loop), `product` (blocks of positions times panels,
//! and what is done with the sums), `winograd` and `winograd_product` (the same with fewer products),
//! `functions`, `attention` (keys and queries head by head), `attention_pack`, `attention_group` (block by block of
//! keys), `attention_softmax` and `attention_vectors` (its two products), `amx` (products by tiles).

// Kernels read and write raw memory throughout; every `unsafe fn` says what it needs, and the boundaries
// (`product`, `windows`) check it once per block.
#![allow(unsafe_code)]

pub(super) mod attention;
pub(super) mod blocks;
pub(super) mod convert;
pub(super) mod element;
pub(super) mod functions;
pub(super) mod isa;
pub(super) mod panels;
pub(super) mod product;
pub(super) mod simd;
pub(super) mod winograd;
pub(super) mod winograd_product;

mod attention_group;
mod attention_pack;
mod attention_probability;
mod attention_softmax;
mod attention_vectors;
mod packing;
mod portable;
mod quantised;
mod tile;

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

#[cfg(all(test, target_arch = "x86_64"))]
pub(super) use amx::emulated_attention;
