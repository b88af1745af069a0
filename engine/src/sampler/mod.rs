//! Samplers.

use std::str::FromStr;

use crate::{Error, Result};

/// Which sampler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SamplerKind {
    /// DDIM with eta 0.
    Ddim,
    /// Euler.
    Euler,
    /// Euler with fresh noise at each step.
    EulerAncestral,
    /// DPM-Solver++ of second order, multistep.
    Dpmpp2m,
    /// Pseudo numerical methods (PLMS).
    Pndm,
}

/// How noise levels are spread over the steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScheduleKind {
    /// The training schedule's own levels.
    Normal,
    /// Karras et al. 2022.
    Karras,
    /// Evenly spaced in log sigma.
    Exponential,
    /// Quantiles of a beta distribution.
    Beta,
}

impl SamplerKind {
    /// The word used in JSON and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ddim => "ddim",
            Self::Euler => "euler",
            Self::EulerAncestral => "euler_ancestral",
            Self::Dpmpp2m => "dpmpp_2m",
            Self::Pndm => "pndm",
        }
    }
}

impl ScheduleKind {
    /// The word used in JSON and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::Karras => "karras",
            Self::Exponential => "exponential",
            Self::Beta => "beta",
        }
    }
}

impl FromStr for SamplerKind {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self> {
        [Self::Ddim, Self::Euler, Self::EulerAncestral, Self::Dpmpp2m, Self::Pndm]
            .into_iter()
            .find(|kind| kind.as_str() == word)
            .ok_or_else(|| Error::request("sampler", "a known sampler", format!("`{word}`")))
    }
}

impl FromStr for ScheduleKind {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self> {
        [Self::Normal, Self::Karras, Self::Exponential, Self::Beta]
            .into_iter()
            .find(|kind| kind.as_str() == word)
            .ok_or_else(|| Error::request("schedule", "a known schedule", format!("`{word}`")))
    }
}
