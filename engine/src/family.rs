//! The families of models: one row of facts for each, and nowhere else. What a checkpoint's own files
//! say wins over its family's row; a single file says little, and lives by it.

use crate::{Error, Result};

/// What a denoiser was trained to predict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PredictionKind {
    /// The noise in the sample.
    Epsilon,
    /// Noise and picture, weighted by each other's share.
    Velocity,
    /// The clean picture.
    Sample,
    /// The straight way from noise to picture.
    Flow,
}

impl PredictionKind {
    /// The word that configurations use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Epsilon => "epsilon",
            Self::Velocity => "v_prediction",
            Self::Sample => "sample",
            Self::Flow => "flow",
        }
    }
}

/// A family of models that share an architecture and defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // `FAMILIES` says what each is.
pub enum FamilyKind {
    Sd1,
    Sd1Inpaint,
    Sd2,
    Sd2Base,
    Sd2Inpaint,
    Sdxl,
    SdxlTurbo,
    SdxlRefiner,
    SdxlInpaint,
    Sd3,
    Sd35Medium,
    Sd35Large,
    Sd35LargeTurbo,
    FluxDev,
    FluxSchnell,
}

/// What is true of a family unless a checkpoint says otherwise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FamilyFacts {
    /// The family.
    pub kind: FamilyKind,
    /// Its word in configurations and answers.
    pub word: &'static str,
    /// Its name, for people.
    pub name: &'static str,
    /// Pixels of a side it was trained at.
    pub side: usize,
    /// Denoising steps that suit it.
    pub steps: u32,
    /// The guidance scale that suits it; 1 or less is none.
    pub guidance_scale: f64,
    /// What its denoiser predicts.
    pub prediction: PredictionKind,
    /// What latents are multiplied by for the denoiser.
    pub scaling_factor: f64,
    /// What is taken off latents before.
    pub shift_factor: f64,
    /// Channels of a latent.
    pub latent_channels: usize,
    /// Latent values along a side that its denoiser takes as one.
    pub patch: usize,
    /// The licence that its first checkpoints came with; a finetune's may differ.
    pub licence: &'static str,
    /// What stands in the `scheduler_config.json` of the first checkpoints.
    pub scheduler: &'static str,
    /// The pipeline that their `model_index.json` names.
    pub pipeline: &'static str,
    /// The parts with weights that it cannot do without.
    pub parts: &'static [&'static str],
}

const PNDM: &str = r#"{"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "clip_sample": false, "set_alpha_to_one": false,
    "skip_prk_steps": true, "steps_offset": 1}"#;
const DDIM: &str = r#"{"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "clip_sample": false, "set_alpha_to_one": false,
    "steps_offset": 1}"#;
const EULER: &str = r#"{"_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "interpolation_type": "linear",
    "timestep_spacing": "leading", "steps_offset": 1, "use_karras_sigmas": false}"#;
const EULER_TRAILING: &str = r#"{"_class_name": "EulerAncestralDiscreteScheduler", "beta_start": 0.00085,
    "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "timestep_spacing": "trailing",
    "steps_offset": 1}"#;
const FLOW: &str = r#"{"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}"#;
const FLOW_BY_SIZE: &str = r#"{"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000,
    "shift": 3.0, "use_dynamic_shifting": true, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
    "max_image_seq_len": 4096}"#;
const FLOW_UNSHIFTED: &str = r#"{"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000,
    "shift": 1.0, "use_dynamic_shifting": false, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
    "max_image_seq_len": 4096}"#;

const OPENRAIL: &str = "CreativeML OpenRAIL-M";
const OPENRAIL_PLUS: &str = "CreativeML Open RAIL++-M";
const COMMUNITY: &str = "Stability AI Community";
const RESEARCH: &str = "Stability AI Non-Commercial Research Community";

const SD1: FamilyFacts = FamilyFacts {
    kind: FamilyKind::Sd1,
    word: "sd1",
    name: "Stable Diffusion 1.x",
    side: 512,
    steps: 25,
    guidance_scale: 7.5,
    prediction: PredictionKind::Epsilon,
    scaling_factor: 0.18215,
    shift_factor: 0.0,
    latent_channels: 4,
    patch: 1,
    licence: OPENRAIL,
    scheduler: PNDM,
    pipeline: "StableDiffusionPipeline",
    parts: &["text_encoder", "unet", "vae"],
};

const SD2: FamilyFacts = FamilyFacts {
    kind: FamilyKind::Sd2,
    word: "sd2",
    name: "Stable Diffusion 2.x",
    side: 768,
    prediction: PredictionKind::Velocity,
    licence: OPENRAIL_PLUS,
    scheduler: DDIM,
    ..SD1
};

const SD2_BASE: FamilyFacts = FamilyFacts {
    kind: FamilyKind::Sd2Base,
    word: "sd2_base",
    name: "Stable Diffusion 2.x base",
    side: 512,
    prediction: PredictionKind::Epsilon,
    scheduler: PNDM,
    ..SD2
};

const SDXL: FamilyFacts = FamilyFacts {
    kind: FamilyKind::Sdxl,
    word: "sdxl",
    name: "Stable Diffusion XL",
    side: 1024,
    steps: 30,
    guidance_scale: 5.0,
    scaling_factor: 0.13025,
    licence: OPENRAIL_PLUS,
    scheduler: EULER,
    pipeline: "StableDiffusionXLPipeline",
    parts: &["text_encoder", "text_encoder_2", "unet", "vae"],
    ..SD1
};

const SD3: FamilyFacts = FamilyFacts {
    kind: FamilyKind::Sd3,
    word: "sd3",
    name: "Stable Diffusion 3",
    side: 1024,
    steps: 28,
    guidance_scale: 7.0,
    prediction: PredictionKind::Flow,
    scaling_factor: 1.5305,
    shift_factor: 0.0609,
    latent_channels: 16,
    patch: 2,
    licence: COMMUNITY,
    scheduler: FLOW,
    pipeline: "StableDiffusion3Pipeline",
    parts: &["text_encoder", "text_encoder_2", "transformer", "vae"],
};

const SD35_LARGE: FamilyFacts = FamilyFacts {
    kind: FamilyKind::Sd35Large,
    word: "sd35_large",
    name: "Stable Diffusion 3.5 Large",
    guidance_scale: 3.5,
    ..SD3
};

const FLUX_DEV: FamilyFacts = FamilyFacts {
    kind: FamilyKind::FluxDev,
    word: "flux_dev",
    name: "FLUX.1 [dev]",
    side: 1024,
    steps: 28,
    guidance_scale: 3.5,
    prediction: PredictionKind::Flow,
    scaling_factor: 0.3611,
    shift_factor: 0.1159,
    latent_channels: 16,
    patch: 2,
    licence: "FLUX.1 [dev] Non-Commercial",
    scheduler: FLOW_BY_SIZE,
    pipeline: "FluxPipeline",
    parts: &["text_encoder", "text_encoder_2", "transformer", "vae"],
};

/// Every family, in the order of [`FamilyKind`].
pub const FAMILIES: [FamilyFacts; 15] = [
    SD1,
    FamilyFacts { kind: FamilyKind::Sd1Inpaint, word: "sd1_inpaint", name: "Stable Diffusion 1.x inpainting", ..SD1 },
    SD2,
    SD2_BASE,
    FamilyFacts {
        kind: FamilyKind::Sd2Inpaint,
        word: "sd2_inpaint",
        name: "Stable Diffusion 2.x inpainting",
        ..SD2_BASE
    },
    SDXL,
    FamilyFacts {
        kind: FamilyKind::SdxlTurbo,
        word: "sdxl_turbo",
        name: "Stable Diffusion XL Turbo",
        side: 512,
        steps: 4,
        guidance_scale: 0.0,
        licence: RESEARCH,
        scheduler: EULER_TRAILING,
        ..SDXL
    },
    FamilyFacts {
        kind: FamilyKind::SdxlRefiner,
        word: "sdxl_refiner",
        name: "Stable Diffusion XL refiner",
        parts: &["text_encoder_2", "unet", "vae"],
        ..SDXL
    },
    FamilyFacts { kind: FamilyKind::SdxlInpaint, word: "sdxl_inpaint", name: "Stable Diffusion XL inpainting", ..SDXL },
    SD3,
    FamilyFacts {
        kind: FamilyKind::Sd35Medium,
        word: "sd35_medium",
        name: "Stable Diffusion 3.5 Medium",
        steps: 40,
        guidance_scale: 4.5,
        ..SD3
    },
    SD35_LARGE,
    FamilyFacts {
        kind: FamilyKind::Sd35LargeTurbo,
        word: "sd35_large_turbo",
        name: "Stable Diffusion 3.5 Large Turbo",
        steps: 4,
        guidance_scale: 0.0,
        ..SD35_LARGE
    },
    FLUX_DEV,
    FamilyFacts {
        kind: FamilyKind::FluxSchnell,
        word: "flux_schnell",
        name: "FLUX.1 [schnell]",
        steps: 4,
        guidance_scale: 0.0,
        licence: "Apache-2.0",
        scheduler: FLOW_UNSHIFTED,
        ..FLUX_DEV
    },
];

impl FamilyKind {
    /// Its row.
    pub fn facts(self) -> &'static FamilyFacts {
        &FAMILIES[self as usize]
    }

    /// Its word.
    pub fn as_str(self) -> &'static str {
        self.facts().word
    }

    /// The distilled sibling that a name tells of: such checkpoints have the very tensors of those that
    /// they were made from.
    pub(crate) fn named(self, name: &str) -> Self {
        let turbo = name.to_ascii_lowercase().contains("turbo");
        match self {
            Self::Sdxl if turbo => Self::SdxlTurbo,
            Self::Sd35Large if turbo => Self::Sd35LargeTurbo,
            other => other,
        }
    }
}

impl std::fmt::Display for FamilyKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for FamilyKind {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self> {
        let found = FAMILIES.iter().find(|facts| facts.word == word);
        found.map(|facts| facts.kind).ok_or_else(|| {
            let known = FAMILIES.map(|facts| facts.word).join(", ");
            Error::request("family", format!("one of {known}"), word)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_has_its_row_in_its_place() {
        for (index, facts) in FAMILIES.iter().enumerate() {
            assert_eq!(facts.kind as usize, index);
            assert_eq!(facts.kind.facts().word, facts.word);
            assert_eq!(facts.word.parse::<FamilyKind>().unwrap(), facts.kind);
        }
    }

    #[test]
    fn words_and_names_are_unique() {
        for (index, facts) in FAMILIES.iter().enumerate() {
            assert!(FAMILIES[..index].iter().all(|other| other.word != facts.word && other.name != facts.name));
        }
    }

    #[test]
    fn every_scheduler_is_an_object_with_a_class() {
        for facts in &FAMILIES {
            let value: serde_json::Value = serde_json::from_str(facts.scheduler).unwrap();
            assert!(value["_class_name"].is_string(), "{}", facts.word);
        }
    }

    #[test]
    fn an_unknown_word_is_answered_with_the_known() {
        let error = "sd9".parse::<FamilyKind>().unwrap_err().to_string();
        assert!(error.contains("`family`") && error.contains("sdxl_turbo") && error.ends_with("but is sd9"), "{error}");
    }

    #[test]
    fn a_distilled_sibling_is_told_by_its_name() {
        assert_eq!(FamilyKind::Sd35Large.named("stable-diffusion-3.5-large-Turbo"), FamilyKind::Sd35LargeTurbo);
        assert_eq!(FamilyKind::Sdxl.named("sd_xl_turbo_1.0_fp16.safetensors"), FamilyKind::SdxlTurbo);
        assert_eq!(FamilyKind::Sdxl.named("juggernaut.safetensors"), FamilyKind::Sdxl);
        assert_eq!(FamilyKind::Sd1.named("turbo"), FamilyKind::Sd1);
    }
}
