//! What a `transformer/config.json` of Stable Diffusion 3 says, and what it must not say.

use serde_json::json;

use crate::Result;
use crate::config::ConfigFile;

/// A transformer's dimensions.
#[derive(Clone, Debug)]
pub(crate) struct MmditConfig {
    pub in_channels: usize,
    pub out_channels: usize,
    /// Latent values along a side that become one token.
    pub patch: usize,
    /// Height and width of the latents it was trained on.
    pub sample_size: usize,
    /// Width of the prompt's tokens.
    pub context: usize,
    /// Width of the prompt's pooled state.
    pub pooled: usize,
    pub layers: usize,
    /// Tokens along a side of the largest picture.
    pub most_tokens: usize,
    pub(super) heads: usize,
    pub(super) head_width: usize,
    /// Whether queries and keys are normalised head by head.
    pub(super) qk_norm: bool,
    /// For each layer whether the picture attends to itself once more.
    pub(super) dual_attention: Vec<bool>,
}

impl MmditConfig {
    /// Reads the file.
    pub fn read(config: &ConfigFile) -> Result<Self> {
        config.only("_class_name", &[json!("SD3Transformer2DModel")])?;
        let in_channels = config.count("in_channels", Some(16))?;
        let layers = config.count("num_layers", Some(18))?;
        let (heads, head_width) =
            (config.count("num_attention_heads", Some(18))?, config.count("attention_head_dim", Some(64))?);
        let width = heads * head_width;
        if config.count("caption_projection_dim", Some(1152))? != width {
            let limit = format!("`num_attention_heads` times `attention_head_dim` ({width})");
            return Err(config.refuse("caption_projection_dim", limit));
        }
        if width % 4 != 0 {
            return Err(config.refuse("num_attention_heads", "such that the channels are a multiple of 4"));
        }
        let patch = config.count("patch_size", Some(2))?;
        let sample_size = config.count("sample_size", Some(128))?;
        if sample_size < patch {
            return Err(config.refuse("sample_size", format!("at least `patch_size` ({patch})")));
        }
        if config.is_null("pos_embed_max_size") {
            return Err(config.refuse("pos_embed_max_size", "a number: positions of any size are not supported"));
        }
        let qk_norm = match config.word("qk_norm")? {
            None => false,
            Some("rms_norm") => true,
            Some(_) => return Err(config.refuse("qk_norm", "`rms_norm` or null")),
        };
        Ok(Self {
            in_channels,
            out_channels: config.count("out_channels", Some(in_channels))?,
            patch,
            sample_size,
            context: config.count("joint_attention_dim", Some(4096))?,
            pooled: config.count("pooled_projection_dim", Some(2048))?,
            layers,
            most_tokens: config.count("pos_embed_max_size", Some(96))?,
            heads,
            head_width,
            qk_norm,
            dual_attention: dual_attention(config, layers)?,
        })
    }

    /// Channels of a token.
    pub(super) fn width(&self) -> usize {
        self.heads * self.head_width
    }
}

fn dual_attention(config: &ConfigFile, layers: usize) -> Result<Vec<bool>> {
    let field = "dual_attention_layers";
    let mut dual = vec![false; layers];
    let Some(value) = config.get(field) else { return Ok(dual) };
    let limit = || format!("a list of layers, each below `num_layers` ({layers})");
    for layer in value.as_array().ok_or_else(|| config.refuse(field, limit()))? {
        let layer = layer.as_u64().and_then(|layer| usize::try_from(layer).ok()).filter(|layer| *layer < layers);
        dual[layer.ok_or_else(|| config.refuse(field, limit()))?] = true;
    }
    Ok(dual)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn read(fields: Value) -> Result<MmditConfig> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        std::fs::write(&path, fields.to_string()).unwrap();
        MmditConfig::read(&ConfigFile::read(&path)?)
    }

    #[test]
    fn layers_that_attend_twice_are_listed_from_zero() {
        let config = read(json!({"num_layers": 4, "dual_attention_layers": [0, 2]})).unwrap();
        assert_eq!(config.dual_attention, [true, false, true, false]);
        assert_eq!(read(json!({"num_layers": 2, "dual_attention_layers": []})).unwrap().dual_attention, [false; 2]);
    }

    #[test]
    fn other_maths_are_refused_by_name() {
        for (fields, named) in [
            (json!({"_class_name": "FluxTransformer2DModel"}), "`_class_name`"),
            (json!({"qk_norm": "layer_norm"}), "`qk_norm` must be `rms_norm` or null"),
            (json!({"dual_attention_layers": [18]}), "`dual_attention_layers` must be a list of layers, each below"),
            (json!({"dual_attention_layers": 3}), "`dual_attention_layers`"),
            (json!({"pos_embed_max_size": null}), "`pos_embed_max_size`"),
            (json!({"caption_projection_dim": 1024}), "`caption_projection_dim` must be `num_attention_heads` times"),
            (json!({"sample_size": 1}), "`sample_size` must be at least `patch_size` (2)"),
        ] {
            let error = read(fields).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
