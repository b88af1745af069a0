//! What a `unet/config.json` says, and what it must not say.

use std::path::Path;

use serde_json::{Value, json};

use crate::config::ConfigFile;
use crate::denoiser::embedding::Waves;
use crate::{Error, Result};

/// One level of the U, outermost first.
#[derive(Clone, Debug)]
pub(super) struct Level {
    pub channels: usize,
    pub layers: usize,
    pub transformer_layers: usize,
    pub heads: usize,
    pub context: usize,
    pub only_cross_attention: bool,
    pub down_attends: bool,
    pub up_attends: bool,
}

/// What lies at the bottom of the U.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Middle {
    Nothing,
    Resnet,
    CrossAttention,
}

/// What a U-Net is told beside timestep and prompt (`addition_embed_type` is `text_time`).
#[derive(Clone, Copy, Debug)]
pub(crate) struct AddedConfig {
    /// Values that each number is turned into.
    pub waves: usize,
    /// Values of the pooled prompt and all numbers together.
    pub inputs: usize,
}

/// A U-Net's dimensions.
#[derive(Clone, Debug)]
pub(crate) struct UNetConfig {
    pub in_channels: usize,
    pub out_channels: usize,
    /// Height and width of the latents it was trained on.
    pub sample_size: (usize, usize),
    pub added: Option<AddedConfig>,
    pub(super) levels: Vec<Level>,
    pub(super) middle: Middle,
    pub(super) time_width: usize,
    pub(super) waves: Waves,
    pub(super) groups: usize,
    pub(super) epsilon: f64,
    pub(super) center_input_sample: bool,
    pub(super) downsample_padding: usize,
    pub(super) conv_in_kernel: usize,
    pub(super) conv_out_kernel: usize,
}

impl UNetConfig {
    /// The widths of text embeddings that its levels expect.
    pub fn context_widths(&self) -> impl Iterator<Item = usize> {
        self.levels.iter().map(|level| level.context)
    }

    /// An error if the U-Net in `folder` is told more than timestep and prompt.
    pub fn refuse_added(&self, folder: &Path) -> Result<()> {
        match self.added {
            None => Ok(()),
            Some(_) => {
                let problem = "`addition_embed_type` must be null for Stable Diffusion 1.x and 2.x";
                Err(Error::checkpoint(folder.join("config.json"), problem))
            }
        }
    }

    /// Reads the file.
    pub fn read(config: &ConfigFile) -> Result<Self> {
        refuse_other_maths(config)?;
        let levels = levels(config)?;
        let middle = match config.word("mid_block_type")? {
            // diffusers' default is the attending block; an explicit null is none at all.
            None if config.is_null("mid_block_type") => Middle::Nothing,
            None | Some("UNetMidBlock2DCrossAttn") => Middle::CrossAttention,
            Some("UNetMidBlock2D") => Middle::Resnet,
            Some(_) => {
                return Err(config.refuse("mid_block_type", "`UNetMidBlock2DCrossAttn`, `UNetMidBlock2D` or null"));
            }
        };
        let kernel = |field: &str| match config.count(field, Some(3))? {
            kernel if kernel % 2 == 1 && kernel <= 15 => Ok(kernel),
            _ => Err(config.refuse(field, "an odd number up to 15")),
        };
        let downsample_padding = match config.get("downsample_padding").map(Value::as_u64) {
            None | Some(Some(1)) => 1,
            Some(Some(0)) => 0,
            Some(_) => return Err(config.refuse("downsample_padding", "0 or 1")),
        };
        Ok(Self {
            in_channels: config.count("in_channels", Some(4))?,
            out_channels: config.count("out_channels", Some(4))?,
            sample_size: sample_size(config)?,
            added: added(config)?,
            middle,
            time_width: config.count("time_embedding_dim", Some(levels[0].channels * 4))?,
            waves: Waves {
                width: levels[0].channels,
                flip_sin_to_cos: config.flag("flip_sin_to_cos", true)?,
                freq_shift: config.number("freq_shift", 0.0)?,
            },
            groups: config.count("norm_num_groups", Some(32))?,
            epsilon: config.positive("norm_eps", 1e-5)?,
            center_input_sample: config.flag("center_input_sample", false)?,
            downsample_padding,
            conv_in_kernel: kernel("conv_in_kernel")?,
            conv_out_kernel: kernel("conv_out_kernel")?,
            levels,
        })
    }
}

/// Options of other families and experiments that change what is computed.
fn refuse_other_maths(config: &ConfigFile) -> Result<()> {
    config.only("_class_name", &[json!("UNet2DConditionModel")])?;
    config.only("act_fn", &[json!("silu"), json!("swish")])?;
    config.only("attention_type", &[json!("default")])?;
    config.only("time_embedding_type", &[json!("positional")])?;
    config.only("resnet_time_scale_shift", &[json!("default")])?;
    for field in ["mid_block_scale_factor", "resnet_out_scale_factor"] {
        config.only(field, &[json!(1), json!(1.0)])?;
    }
    for field in ["dual_cross_attention", "resnet_skip_time_act", "class_embeddings_concat"] {
        config.only(field, &[json!(false)])?;
    }
    for field in [
        "class_embed_type",
        "num_class_embeds",
        "encoder_hid_dim",
        "encoder_hid_dim_type",
        "time_embedding_act_fn",
        "timestep_post_act",
        "time_cond_proj_dim",
        "cross_attention_norm",
        "num_attention_heads",
        "reverse_transformer_layers_per_block",
    ] {
        config.only(field, &[])?;
    }
    Ok(())
}

fn added(config: &ConfigFile) -> Result<Option<AddedConfig>> {
    match config.word("addition_embed_type")? {
        None => Ok(None),
        Some("text_time") => Ok(Some(AddedConfig {
            waves: config.count("addition_time_embed_dim", None)?,
            inputs: config.count("projection_class_embeddings_input_dim", None)?,
        })),
        Some(_) => Err(config.refuse("addition_embed_type", "`text_time` or null")),
    }
}

fn levels(config: &ConfigFile) -> Result<Vec<Level>> {
    let channels = config.counts("block_out_channels")?;
    let blocks = channels.len();
    let layers = config.count_per_block("layers_per_block", blocks, 2)?;
    let transformer_layers = config.count_per_block("transformer_layers_per_block", blocks, 1)?;
    // The name is diffusers' mistake: the number is that of heads.
    let heads = config.count_per_block("attention_head_dim", blocks, 8)?;
    let context = config.count_per_block("cross_attention_dim", blocks, 1280)?;
    let only_cross = config.flag_per_block("only_cross_attention", blocks)?;
    let down = attends(config, "down_block_types", blocks, "DownBlock2D", "CrossAttnDownBlock2D")?;
    let mut up = attends(config, "up_block_types", blocks, "UpBlock2D", "CrossAttnUpBlock2D")?;
    up.reverse();
    let bottom = blocks - 1;
    let mut levels = Vec::with_capacity(blocks);
    for index in 0..blocks {
        let attending = down[index] || up[index] || index == bottom;
        if attending && channels[index] % heads[index] != 0 {
            let limit = format!("a divisor of `block_out_channels` ({} at level {index})", channels[index]);
            return Err(config.refuse("attention_head_dim", limit));
        }
        levels.push(Level {
            channels: channels[index],
            layers: layers[index],
            transformer_layers: transformer_layers[index],
            heads: heads[index],
            context: context[index],
            only_cross_attention: only_cross[index],
            down_attends: down[index],
            up_attends: up[index],
        });
    }
    Ok(levels)
}

/// Which of the block types attend.
fn attends(config: &ConfigFile, field: &str, blocks: usize, plain: &str, cross: &str) -> Result<Vec<bool>> {
    let types = config.words(field)?;
    if types.len() != blocks || types.iter().any(|word| *word != plain && *word != cross) {
        return Err(config.refuse(field, format!("a list of {blocks}, each `{plain}` or `{cross}`")));
    }
    Ok(types.into_iter().map(|word| word == cross).collect())
}

/// One number for a square, or height and width.
fn sample_size(config: &ConfigFile) -> Result<(usize, usize)> {
    let sides = config.count_per_block("sample_size", 2, 64)?;
    Ok((sides[0], sides[1]))
}
