//! What a checkpoint is, before any of its weights is read: its family by the structure of its parts, and
//! its facts by its own files first, its family's row after.

use std::path::Path;

use serde_json::Value;

use crate::config::ConfigFile;
use crate::sampler::PNDM_ORDER;
use crate::source::Source;
use crate::{Error, FamilyKind, PredictionKind, Result};

/// Channels of a denoiser that sees a mask and a masked latent beside the latent.
const INPAINTING_CHANNELS: usize = 9;

/// What is known of a checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct CheckpointFacts {
    /// Its family.
    pub family: FamilyKind,
    /// Native width in pixels.
    pub width: usize,
    /// Native height in pixels.
    pub height: usize,
    /// Pixels per latent value along a side.
    pub vae_factor: usize,
    /// Channels of a latent.
    pub latent_channels: usize,
    /// Latent values along a side that its denoiser takes as one.
    pub patch: usize,
    /// What its denoiser predicts.
    pub prediction: PredictionKind,
    /// What latents are multiplied by for the denoiser.
    pub scaling_factor: f64,
    /// What is taken off latents before.
    pub shift_factor: f64,
    /// Denoising steps that suit its family.
    pub steps: u32,
    /// The guidance scale that suits its family.
    pub guidance_scale: f64,
    /// Whether PNDM is the sampler that its scheduler's file names.
    pub samples_by_pndm: bool,
    /// The fewest steps that PNDM takes with it: more than one where its Runge-Kutta steps are not skipped.
    pub least_pndm_steps: u32,
    /// The licence that its family came with.
    pub licence: &'static str,
}

impl FamilyKind {
    /// What is assumed of a checkpoint of this family while its files are not at hand.
    pub fn assumed(self) -> CheckpointFacts {
        let facts = self.facts();
        let (samples_by_pndm, least_pndm_steps) = pndm(&facts.scheduler.parse().unwrap_or_default());
        CheckpointFacts {
            family: self,
            width: facts.side,
            height: facts.side,
            vae_factor: 8,
            latent_channels: facts.latent_channels,
            patch: facts.patch,
            prediction: facts.prediction,
            scaling_factor: facts.scaling_factor,
            shift_factor: facts.shift_factor,
            steps: facts.steps,
            guidance_scale: facts.guidance_scale,
            samples_by_pndm,
            least_pndm_steps,
            licence: facts.licence,
        }
    }
}

/// The facts of the checkpoint at `path`, of the family that it is told to be or, without a word, of the
/// one that it looks like. Parts that a single file lacks need not be at hand.
///
/// # Errors
/// [`Error::Checkpoint`] where it is no checkpoint of a known family.
pub fn facts(path: &Path, told: Option<FamilyKind>) -> Result<CheckpointFacts> {
    facts_of(&Source::look(path, None, told)?)
}

fn facts_of(source: &Source) -> Result<CheckpointFacts> {
    let mut facts = source.family().assumed();
    if let Some(vae) = source.config("vae")? {
        facts.latent_channels = vae.count("latent_channels", Some(facts.latent_channels))?;
        facts.scaling_factor = vae.number("scaling_factor", facts.scaling_factor)?;
        facts.shift_factor = vae.number("shift_factor", facts.shift_factor)?;
        let levels = vae.counts("block_out_channels")?.len() as u32;
        let factor = 1usize.checked_shl(levels - 1);
        facts.vae_factor = factor.ok_or_else(|| vae.refuse("block_out_channels", "a list of at most 64 numbers"))?;
    }
    for part in ["unet", "transformer"] {
        let Some(denoiser) = source.config(part)? else { continue };
        if denoiser.get("sample_size").is_some() {
            let sides = denoiser.count_per_block("sample_size", 2, 64)?;
            (facts.height, facts.width) = (sides[0] * facts.vae_factor, sides[1] * facts.vae_factor);
        }
    }
    let scheduler = source.scheduler()?;
    facts.prediction = prediction(&scheduler)?;
    (facts.samples_by_pndm, facts.least_pndm_steps) = pndm(&scheduler.to_value());
    Ok(facts)
}

/// Whether a scheduler's configuration is PNDM's, and how many steps PNDM takes at least by it.
fn pndm(scheduler: &Value) -> (bool, u32) {
    let class = scheduler["_class_name"].as_str().unwrap_or_default();
    let skips = scheduler["skip_prk_steps"].as_bool().unwrap_or(false);
    (class == "PNDMScheduler", if skips || class.starts_with("FlowMatch") { 1 } else { PNDM_ORDER as u32 })
}

/// What a scheduler's configuration says that the denoiser predicts.
fn prediction(scheduler: &ConfigFile) -> Result<PredictionKind> {
    if scheduler.word("_class_name")?.is_some_and(|class| class.starts_with("FlowMatch")) {
        return Ok(PredictionKind::Flow);
    }
    match scheduler.word("prediction_type")? {
        None | Some("epsilon") => Ok(PredictionKind::Epsilon),
        Some("v_prediction") => Ok(PredictionKind::Velocity),
        Some("sample") => Ok(PredictionKind::Sample),
        Some(_) => Err(scheduler.refuse("prediction_type", "`epsilon`, `v_prediction` or `sample`")),
    }
}

/// The family of a diffusers folder, by the structure of its parts and not by their sizes.
pub(crate) fn family_of_folder(folder: &Path) -> Result<FamilyKind> {
    let index = ConfigFile::read(&folder.join("model_index.json"))?;
    let class = index.word("_class_name")?.unwrap_or("StableDiffusionPipeline");
    if !class.starts_with("StableDiffusion") && !class.starts_with("Flux") {
        let limit = "a pipeline of Stable Diffusion or FLUX (`StableDiffusion…`, `Flux…`)";
        return Err(index.refuse("_class_name", limit));
    }
    let config = |part: &str| {
        let file = if part == "scheduler" { "scheduler_config.json" } else { "config.json" };
        ConfigFile::read_if_present(&folder.join(part).join(file))
    };
    if let Some(transformer) = config("transformer")? {
        return family_of_transformer(&transformer);
    }
    let Some(unet) = config("unet")? else {
        let problem = "has neither `unet/config.json` nor `transformer/config.json`";
        return Err(Error::checkpoint(folder, problem));
    };
    let scheduler = config("scheduler")?;
    if unet.word("addition_embed_type")? == Some("text_time") {
        let first_encoder = index.get("text_encoder").and_then(|part| part.get(1)).is_some_and(Value::is_string);
        let spacing = scheduler.as_ref().map(|config| config.word("timestep_spacing")).transpose()?.flatten();
        return Ok(match (first_encoder, is_inpainting(&unet)?, spacing) {
            (false, ..) => FamilyKind::SdxlRefiner,
            (true, true, _) => FamilyKind::SdxlInpaint,
            // Few-step checkpoints begin at the last timestep; the base begins before it.
            (true, false, Some("trailing")) => FamilyKind::SdxlTurbo,
            (true, false, _) => FamilyKind::Sdxl,
        });
    }
    // OpenCLIP's activation; CLIP's own is `quick_gelu`.
    let open_clip = match config("text_encoder")? {
        Some(text) => text.word("hidden_act")? == Some("gelu"),
        None => unet.flag("use_linear_projection", false)?,
    };
    let predicted = scheduler.map_or(Ok(PredictionKind::Epsilon), |scheduler| prediction(&scheduler))?;
    Ok(match (open_clip, is_inpainting(&unet)?, predicted) {
        (false, false, _) => FamilyKind::Sd1,
        (false, true, _) => FamilyKind::Sd1Inpaint,
        (true, true, _) => FamilyKind::Sd2Inpaint,
        (true, false, PredictionKind::Velocity) => FamilyKind::Sd2,
        (true, false, _) => FamilyKind::Sd2Base,
    })
}

fn is_inpainting(unet: &ConfigFile) -> Result<bool> {
    Ok(unet.count("in_channels", Some(4))? == INPAINTING_CHANNELS)
}

fn family_of_transformer(config: &ConfigFile) -> Result<FamilyKind> {
    match config.word("_class_name")? {
        Some("SD3Transformer2DModel") => {
            let dual = config.get("dual_attention_layers").and_then(Value::as_array);
            Ok(match (dual.is_some_and(|layers| !layers.is_empty()), config.word("qk_norm")?) {
                (true, _) => FamilyKind::Sd35Medium,
                (false, Some(_)) => FamilyKind::Sd35Large,
                (false, None) => FamilyKind::Sd3,
            })
        }
        Some("FluxTransformer2DModel") => {
            Ok(if config.flag("guidance_embeds", false)? { FamilyKind::FluxDev } else { FamilyKind::FluxSchnell })
        }
        _ => Err(config.refuse("_class_name", "`SD3Transformer2DModel` or `FluxTransformer2DModel`")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A folder of configurations only.
    fn folder(index: Value, parts: &[(&str, Value)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("model_index.json"), index.to_string()).unwrap();
        for (part, config) in parts {
            std::fs::create_dir(folder.path().join(part)).unwrap();
            let file = if *part == "scheduler" { "scheduler_config.json" } else { "config.json" };
            std::fs::write(folder.path().join(part).join(file), config.to_string()).unwrap();
        }
        folder
    }

    fn told(index: Value, parts: &[(&str, Value)]) -> FamilyKind {
        family_of_folder(folder(index, parts).path()).unwrap()
    }

    #[test]
    fn stable_diffusion_1_and_2_differ_in_their_text_encoder_and_prediction() {
        let index = json!({"_class_name": "StableDiffusionPipeline"});
        let (clip, open_clip) = (json!({"hidden_act": "quick_gelu"}), json!({"hidden_act": "gelu"}));
        let (unet, inpainting) = (json!({}), json!({"in_channels": 9}));
        let (noise, velocity) = (json!({}), json!({"prediction_type": "v_prediction"}));
        let of = |text: &Value, unet: &Value, scheduler: &Value| {
            let parts = [("text_encoder", text.clone()), ("unet", unet.clone()), ("scheduler", scheduler.clone())];
            told(index.clone(), &parts)
        };
        assert_eq!(of(&clip, &unet, &noise), FamilyKind::Sd1);
        assert_eq!(of(&clip, &unet, &velocity), FamilyKind::Sd1);
        assert_eq!(of(&clip, &inpainting, &noise), FamilyKind::Sd1Inpaint);
        assert_eq!(of(&open_clip, &unet, &velocity), FamilyKind::Sd2);
        assert_eq!(of(&open_clip, &unet, &noise), FamilyKind::Sd2Base);
        assert_eq!(of(&open_clip, &inpainting, &noise), FamilyKind::Sd2Inpaint);
    }

    #[test]
    fn pndm_takes_few_steps_only_without_its_runge_kutta_steps() {
        assert_eq!(pndm(&json!({"_class_name": "PNDMScheduler"})), (true, 4));
        assert_eq!(pndm(&json!({"_class_name": "PNDMScheduler", "skip_prk_steps": true})), (true, 1));
        assert_eq!(pndm(&json!({"_class_name": "DDIMScheduler", "skip_prk_steps": true})), (false, 1));
        assert_eq!(pndm(&json!({"_class_name": "EulerDiscreteScheduler"})), (false, 4));
        let (sd1, flux) = (FamilyKind::Sd1.assumed(), FamilyKind::FluxDev.assumed());
        assert_eq!((sd1.samples_by_pndm, sd1.least_pndm_steps), (true, 1));
        assert_eq!((flux.samples_by_pndm, flux.least_pndm_steps), (false, 1));
    }

    #[test]
    fn the_siblings_of_sdxl_differ_in_encoders_channels_and_spacing() {
        let (encoder, none) = (json!(["transformers", "CLIPTextModel"]), json!([null, null]));
        let of = |encoder: &Value, channels: usize, spacing: &str| {
            let index = json!({"_class_name": "StableDiffusionXLPipeline", "text_encoder": encoder});
            let unet = json!({"addition_embed_type": "text_time", "in_channels": channels});
            told(index, &[("unet", unet), ("scheduler", json!({"timestep_spacing": spacing}))])
        };
        assert_eq!(of(&encoder, 4, "leading"), FamilyKind::Sdxl);
        assert_eq!(of(&encoder, 4, "trailing"), FamilyKind::SdxlTurbo);
        assert_eq!(of(&encoder, 9, "leading"), FamilyKind::SdxlInpaint);
        assert_eq!(of(&none, 4, "leading"), FamilyKind::SdxlRefiner);
    }

    #[test]
    fn transformers_differ_in_their_options() {
        let of = |class: &str, mut config: Value| {
            config["_class_name"] = json!(class);
            told(json!({"_class_name": "StableDiffusion3Pipeline"}), &[("transformer", config)])
        };
        let sd3 = "SD3Transformer2DModel";
        assert_eq!(of(sd3, json!({"dual_attention_layers": []})), FamilyKind::Sd3);
        assert_eq!(of(sd3, json!({"qk_norm": "rms_norm"})), FamilyKind::Sd35Large);
        assert_eq!(of(sd3, json!({"qk_norm": "rms_norm", "dual_attention_layers": [0, 1]})), FamilyKind::Sd35Medium);
        assert_eq!(of("FluxTransformer2DModel", json!({"guidance_embeds": true})), FamilyKind::FluxDev);
        assert_eq!(of("FluxTransformer2DModel", json!({})), FamilyKind::FluxSchnell);
    }

    #[test]
    fn another_pipeline_is_refused_by_name() {
        for (index, parts, word) in [
            (json!({"_class_name": "WuerstchenPipeline"}), vec![], "WuerstchenPipeline"),
            (json!({"_class_name": "StableDiffusionPipeline"}), vec![], "neither `unet/config.json`"),
            (
                json!({"_class_name": "FluxPipeline"}),
                vec![("transformer", json!({"_class_name": "DiTTransformer2DModel"}))],
                "DiTTransformer2DModel",
            ),
        ] {
            let error = family_of_folder(folder(index, &parts).path()).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn a_checkpoints_own_files_win_over_its_family() {
        let index = json!({"_class_name": "StableDiffusionPipeline"});
        let parts = [
            ("unet", json!({"sample_size": [12, 16]})),
            ("vae", json!({"block_out_channels": [8, 8, 8], "scaling_factor": 0.25, "shift_factor": 0.5})),
            ("scheduler", json!({"prediction_type": "sample"})),
        ];
        let folder = folder(index, &parts);
        let found = facts(folder.path(), None).unwrap();
        let expected = CheckpointFacts {
            height: 48,
            width: 64,
            vae_factor: 4,
            scaling_factor: 0.25,
            shift_factor: 0.5,
            prediction: PredictionKind::Sample,
            samples_by_pndm: false,
            least_pndm_steps: 4,
            ..FamilyKind::Sd1.assumed()
        };
        assert_eq!(found, expected);
        let told = facts(folder.path(), Some(FamilyKind::SdxlTurbo)).unwrap();
        assert_eq!((told.family, told.steps, told.width), (FamilyKind::SdxlTurbo, 4, 64));
    }

    #[test]
    fn numbers_as_python_writes_them_do_not_hide_a_scheduler() {
        let folder = folder(json!({"_class_name": "StableDiffusionPipeline"}), &[("unet", json!({}))]);
        std::fs::create_dir(folder.path().join("scheduler")).unwrap();
        let text = r#"{"prediction_type": "v_prediction", "lambda_min_clipped": -Infinity}"#;
        std::fs::write(folder.path().join("scheduler/scheduler_config.json"), text).unwrap();
        assert_eq!(facts(folder.path(), None).unwrap().prediction, PredictionKind::Velocity);
    }
}
