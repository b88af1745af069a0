//! The words for samplers and schedules.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Result};

/// Which noise algorithm takes the latent from one step to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SamplerKind {
    /// DDIM without added noise.
    Ddim,
    /// Euler's method on the probability flow.
    Euler,
    /// Euler's method to a lower noise level, and fresh noise back up to the wanted one.
    EulerAncestral,
    /// DPM-Solver++, multistep, of second order unless the checkpoint says otherwise.
    Dpmpp2m,
    /// Pseudo numerical methods: Runge-Kutta steps (unless the checkpoint skips them), then PLMS.
    Pndm,
    /// Euler's method for models that were trained by flow matching.
    FlowMatchEuler,
}

impl SamplerKind {
    /// Every sampler.
    pub const ALL: [Self; 6] =
        [Self::Ddim, Self::Euler, Self::EulerAncestral, Self::Dpmpp2m, Self::Pndm, Self::FlowMatchEuler];

    /// The word used in JSON and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ddim => "ddim",
            Self::Euler => "euler",
            Self::EulerAncestral => "euler_ancestral",
            Self::Dpmpp2m => "dpmpp_2m",
            Self::Pndm => "pndm",
            Self::FlowMatchEuler => "flow_match_euler",
        }
    }
}

/// How the noise levels are spread over the steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScheduleKind {
    /// The levels of the training schedule at evenly spaced timesteps.
    Normal,
    /// Even in sigma to the power of 1/7 (Karras et al., 2022).
    Karras,
    /// Even in the logarithm of sigma.
    Exponential,
    /// Quantiles of the beta distribution (Lee et al., 2024): most steps at both ends.
    Beta,
}

impl ScheduleKind {
    /// Every schedule.
    pub const ALL: [Self; 4] = [Self::Normal, Self::Karras, Self::Exponential, Self::Beta];

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
        let known = Self::ALL.map(Self::as_str).join(", ");
        let found = Self::ALL.into_iter().find(|kind| kind.as_str() == word);
        found.ok_or_else(|| Error::request("sampler", format!("one of {known}"), format!("`{word}`")))
    }
}

impl FromStr for ScheduleKind {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self> {
        let known = Self::ALL.map(Self::as_str).join(", ");
        let found = Self::ALL.into_iter().find(|kind| kind.as_str() == word);
        found.ok_or_else(|| Error::request("schedule", format!("one of {known}"), format!("`{word}`")))
    }
}

impl fmt::Display for SamplerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for ScheduleKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_reads_back() {
        for kind in SamplerKind::ALL {
            assert_eq!(kind.to_string().parse::<SamplerKind>().ok(), Some(kind));
        }
        for kind in ScheduleKind::ALL {
            assert_eq!(kind.to_string().parse::<ScheduleKind>().ok(), Some(kind));
        }
    }

    #[test]
    fn an_unknown_word_is_refused_with_the_known_ones() {
        let error = "heun".parse::<SamplerKind>().expect_err("not ours").to_string();
        assert_eq!(
            error,
            "`sampler` must be one of ddim, euler, euler_ancestral, dpmpp_2m, pndm, flow_match_euler, but is `heun`"
        );
        let error = "sgm".parse::<ScheduleKind>().expect_err("not ours").to_string();
        assert_eq!(error, "`schedule` must be one of normal, karras, exponential, beta, but is `sgm`");
    }
}
