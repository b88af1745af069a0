//! One job's place in a running batch, as the caller sees it.

use std::sync::Arc;

use image::{GrayImage, RgbImage};

use crate::{Error, Result, SamplerKind, ScheduleKind};

/// A row's name within its batch; the caller chooses it.
pub type RowId = u64;

/// Everything that a picture is a function of, besides the checkpoint.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RowRequest {
    /// What to draw.
    pub prompt: String,
    /// What to steer away from; only read with guidance.
    pub negative_prompt: String,
    /// Width in pixels, a multiple of the checkpoint's VAE factor.
    pub width: usize,
    /// Height in pixels, a multiple of the checkpoint's VAE factor.
    pub height: usize,
    /// Denoising steps.
    pub steps: usize,
    /// Classifier-free guidance scale; 1 or less turns guidance off and halves the work. FLUX has learnt
    /// what pictures of a guidance look like and is told of it instead.
    pub guidance_scale: f64,
    /// `None`: the one that the checkpoint's `scheduler_config.json` names.
    pub sampler: Option<SamplerKind>,
    /// `None`: the one that the checkpoint's `scheduler_config.json` names.
    pub schedule: Option<ScheduleKind>,
    /// Seed of the initial noise and of the sampler's own.
    pub seed: u64,
    /// What Stable Diffusion XL is told of sizes; other families do not read it.
    pub micro_conditioning: MicroConditioning,
    /// Tokens of a prompt that T5 reads at most, in families with T5; `None`: as many as the checkpoint is used to.
    pub max_sequence_length: Option<usize>,
    /// FLUX's scale of guidance by a negative prompt, beside the scale that the model is told; `None`, or 1 or
    /// less: no such guidance.
    pub true_cfg_scale: Option<f64>,
    /// Stable Diffusion 3's guidance away from what a few of its layers leave out.
    pub skip_layer_guidance: Option<SkipLayerGuidance>,
    /// A picture or a latent to start from; `None`: from noise alone.
    pub init_image: Option<InitImage>,
    /// Stable Diffusion XL: the share of the way from noise that lies behind the init image, between 0 and 1. No
    /// noise is added to it, and its strength is not read. `None`: the strength says where the row begins.
    pub denoising_start: Option<f64>,
    /// Stable Diffusion XL: the share of the way from noise after which the row ends, between 0 and 1. Its latent is
    /// what another row may start from. `None`: the whole way.
    pub denoising_end: Option<f64>,
}

/// What a row starts from instead of noise alone.
#[derive(Clone, Debug, PartialEq)]
pub struct InitImage {
    /// A picture, or a latent.
    pub content: InitContent,
    /// How much of the way from noise the row goes, above 0 and at most 1: the share of the steps that it takes.
    pub strength: f64,
    /// What of the picture is painted anew; `None`: all.
    pub mask: Option<Mask>,
}

/// What an init image is.
#[derive(Clone, Debug, PartialEq)]
pub enum InitContent {
    /// Resized to the row's size where it has another.
    Picture(Arc<RgbImage>),
    /// Stable Diffusion XL: what a row of this size ended in, here or elsewhere.
    Latent(Arc<Latent>),
}

/// What of an init image is painted anew.
#[derive(Clone, Debug, PartialEq)]
pub struct Mask {
    /// White is painted anew, black stays; resized as the picture.
    pub picture: Arc<GrayImage>,
    /// The deviation in pixels of a Gaussian blur of the mask's edges. With 0 the mask is all or nothing, cut in
    /// the middle between black and white. Inpainting checkpoints see a blurred mask cut in the middle, too.
    pub blur: f64,
    /// What the painted part starts from.
    pub content: MaskedContent,
}

/// What the painted part of a picture starts from, before its noise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum MaskedContent {
    /// What the picture has there.
    #[default]
    Original,
    /// Noise.
    Noise,
}

impl MaskedContent {
    /// The word used in JSON and flags.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Original => "original",
            Self::Noise => "noise",
        }
    }
}

/// The sizes that a Stable Diffusion XL picture shall look as if it had, all (width, height) or (left, top)
/// in pixels: the model has learnt how enlarged and how cropped pictures look.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MicroConditioning {
    /// The size before cropping and scaling; `None`: the picture's own.
    pub original_size: Option<(usize, usize)>,
    /// What was cut off on the left and at the top.
    pub crop: (usize, usize),
    /// The size that was aimed at; `None`: the picture's own.
    pub target_size: Option<(usize, usize)>,
}

/// Skip-layer guidance of Stable Diffusion 3: in some steps the denoiser is asked once more, without some of its
/// layers, and the row is led away from what it then says. Only with guidance.
///
/// Reference: Hyung et al. 2024, <https://arxiv.org/abs/2411.18664>.
#[derive(Clone, Debug, PartialEq)]
pub struct SkipLayerGuidance {
    /// The layers to leave out, counted from 0.
    pub layers: Vec<usize>,
    /// How far to lead away.
    pub scale: f64,
    /// The share of the steps after which it starts,
    pub start: f64,
    /// and before which it stops.
    pub stop: f64,
}

impl Default for SkipLayerGuidance {
    /// What diffusers and Stable Diffusion 3.5 medium's authors use, but for the layers, of which there are none.
    fn default() -> Self {
        Self { layers: Vec::new(), scale: 2.8, start: 0.01, stop: 0.2 }
    }
}

impl SkipLayerGuidance {
    /// An error unless a denoiser of so many `layers` can do it.
    pub(super) fn check(&self, layers: usize) -> Result<()> {
        let field = "skip_layer_guidance.layers";
        if layers == 0 {
            return Err(Error::request(field, "absent for this checkpoint's family", format!("{:?}", self.layers)));
        }
        if self.layers.is_empty() || self.layers.iter().any(|layer| *layer >= layers) {
            let limit = format!("some of this checkpoint's layers 0 to {}", layers - 1);
            return Err(Error::request(field, limit, format!("{:?}", self.layers)));
        }
        for (field, value) in [
            ("skip_layer_guidance.scale", self.scale),
            ("skip_layer_guidance.start", self.start),
            ("skip_layer_guidance.stop", self.stop),
        ] {
            if !value.is_finite() {
                return Err(Error::request(field, "a finite number", value));
            }
        }
        Ok(())
    }
}

/// What one step did to a row.
#[derive(Clone, Debug)]
pub struct RowStep {
    /// The row.
    pub id: RowId,
    /// Denoiser calls done so far.
    pub step: usize,
    /// Denoiser calls in all; some samplers take more than the steps that were asked for.
    pub total: usize,
    /// Present once the row is finished; it has then left the batch.
    pub latent: Option<Latent>,
}

/// A row's latent on the host, (channels, height, width) in `f32` as the denoiser takes it.
#[derive(Clone, Debug, PartialEq)]
pub struct Latent {
    pub(crate) values: Vec<f32>,
    pub(crate) channels: usize,
    pub(crate) height: usize,
    pub(crate) width: usize,
    /// The row it came from, so that an error in decoding can name it.
    pub(crate) row: RowId,
}

impl Latent {
    /// A latent of `values`, (channels, height, width).
    ///
    /// # Errors
    /// [`Error::Request`] naming `init_image`, unless there are that many values and all of them are finite.
    pub fn new(values: Vec<f32>, [channels, height, width]: [usize; 3]) -> Result<Self> {
        let expected = channels.checked_mul(height).and_then(|values| values.checked_mul(width));
        if expected != Some(values.len()) || values.is_empty() {
            let limit = format!("{channels} × {height} × {width} values, more than none");
            return Err(Error::request("init_image", limit, format!("{} values", values.len())));
        }
        if !values.iter().all(|value| value.is_finite()) {
            return Err(Error::request("init_image", "finite numbers", "a latent with others"));
        }
        Ok(Self { values, channels, height, width, row: 0 })
    }

    /// The values, channel after channel, line after line.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Channels, height and width.
    pub fn shape(&self) -> [usize; 3] {
        [self.channels, self.height, self.width]
    }
}
