//! Checkpoints in one file (safetensors or GGUF), in the layout that their makers published: recognised by their
//! tensors, and read by our loaders through new names. A name in the file stands for one tensor of ours,
//! for several (queries, keys and values in one) or for none; no tensor is copied before its layer is
//! built. What `config.json` would say is told by the tensors' shapes and by the family.

mod flux;
mod mmdit;
mod names;
mod tensors;
mod text;
mod unet;
mod vae;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Once};

use serde_json::{Map, Value, json};

use self::names::{Ours, Share, whole};
use self::tensors::Tensors;
use super::{Entry, Order, Stored, WeightFile, Weights, bytes_at, entries};
use crate::config::ConfigFile;
use crate::ops::{Place, Stored as Format};
use crate::{Error, FamilyKind, PredictionKind, Result};

/// A tensor that only a finished training of Stable Diffusion 2 base has: its number of steps.
const STEPS_OF_SD2_BASE: f64 = 875_000.0;

/// One file that holds several parts of a checkpoint.
pub(crate) struct SingleFile {
    path: PathBuf,
    file: Arc<WeightFile>,
    /// By their names in the file.
    stored: BTreeMap<String, Stored>,
    parts: BTreeMap<&'static str, Found>,
    read_ahead: Once,
}

/// A part in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Found {
    prefix: &'static str,
    layout: Layout,
}

/// How a part's tensors are named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    UNet,
    Mmdit,
    Flux,
    Vae,
    Clip {
        activation: &'static str,
        /// The projection is none: what it is applied to comes out as it is.
        identity: bool,
    },
    OpenClip {
        /// The last layer is not used.
        but_last: bool,
    },
    T5,
    LlamaT5,
}

const CLIP: Layout = Layout::Clip { activation: "quick_gelu", identity: false };

/// Where denoisers stand, by a tensor that each has.
const DENOISERS: [(&str, &str, Layout); 3] = [
    ("unet", "input_blocks.0.0.weight", Layout::UNet),
    ("transformer", "joint_blocks.0.x_block.attn.qkv.weight", Layout::Mmdit),
    ("transformer", "double_blocks.0.img_attn.qkv.weight", Layout::Flux),
];
const DENOISER_PREFIXES: [&str; 2] = ["model.diffusion_model.", ""];
const VAE_PREFIXES: [&str; 3] = ["first_stage_model.", "vae.", ""];
const VAE_TENSOR: &str = "decoder.mid.block_1.conv1.weight";

/// Where text encoders stand. T5 is the third of Stable Diffusion 3's and the second of FLUX's.
const TEXT_ENCODERS: [(&str, &str, Layout); 9] = [
    ("text_encoder", "cond_stage_model.transformer.", CLIP),
    ("text_encoder", "cond_stage_model.model.", Layout::OpenClip { but_last: true }),
    ("text_encoder", "conditioner.embedders.0.transformer.", CLIP),
    ("text_encoder_2", "conditioner.embedders.1.model.", Layout::OpenClip { but_last: false }),
    ("text_encoder_2", "conditioner.embedders.0.model.", Layout::OpenClip { but_last: false }),
    ("text_encoder", "text_encoders.clip_l.transformer.", CLIP),
    ("text_encoder_2", "text_encoders.clip_g.transformer.", Layout::Clip { activation: "gelu", identity: false }),
    ("text_encoder_3", "text_encoders.t5xxl.transformer.", Layout::T5),
    ("text_encoder_2", "text_encoders.t5xxl.transformer.", Layout::T5),
];

/// A T5 encoder as llama.cpp names it, alone in its file: FLUX's second text encoder, or Stable Diffusion 3's
/// third.
const LLAMA_T5: &str = "enc.blk.0.attn_q.weight";

impl SingleFile {
    /// Opens the file and finds its parts; none is an error.
    pub fn open(path: &Path) -> Result<Self> {
        let file = Self::read(path)?;
        if file.parts.is_empty() {
            let problem = "is no checkpoint of a known layout: it has neither a denoiser nor a VAE nor a text encoder";
            return Err(Error::checkpoint(path, problem));
        }
        Ok(file)
    }

    /// [`SingleFile::open`] for one of its parts: the others are not read ahead.
    pub fn open_for(path: &Path, part: &str) -> Result<Self> {
        let file = Self::open(path)?;
        let bytes = file.bytes(part)?;
        file.read_ahead.call_once(|| file.file.read_ahead(bytes));
        Ok(file)
    }

    /// From the first to the last byte of a part's tensors.
    fn bytes(&self, part: &str) -> Result<Range<usize>> {
        let tensors = self.tensors(part, self.found(part)?);
        let ranges = || tensors.stored.values().map(|stored| &stored.bytes);
        let start = ranges().map(|bytes| bytes.start).min();
        let end = ranges().map(|bytes| bytes.end).max();
        Ok(start.unwrap_or(0)..end.unwrap_or(0))
    }

    /// The weights of a file that holds one part alone, in any known layout; `None` for another file.
    pub fn only_part(path: &Path, place: &Place) -> Result<Option<Weights>> {
        let file = Self::read(path)?;
        let mut parts = file.parts.keys();
        match (parts.next(), parts.next()) {
            (Some(part), None) => file.weights(part, place).map(Some),
            _ => Ok(None),
        }
    }

    fn read(path: &Path) -> Result<Self> {
        let file = WeightFile::open(path)?;
        let entry = |Entry { name, format, shape, bytes }: Entry| {
            (name, Stored { file: 0, bytes, format, shape, order: Order::Plain })
        };
        let stored: BTreeMap<String, Stored> = entries(&file)?.into_iter().map(entry).collect();
        let mut file = Self { path: path.to_owned(), file, stored, parts: BTreeMap::new(), read_ahead: Once::new() };
        file.parts = file.find_parts();
        Ok(file)
    }

    fn find_parts(&self) -> BTreeMap<&'static str, Found> {
        let mut parts = BTreeMap::new();
        for prefix in DENOISER_PREFIXES {
            for (part, tensor, layout) in DENOISERS {
                if self.stored.contains_key(&format!("{prefix}{tensor}")) {
                    parts.entry(part).or_insert(Found { prefix, layout });
                }
            }
        }
        for prefix in VAE_PREFIXES {
            if self.stored.contains_key(&format!("{prefix}{VAE_TENSOR}")) {
                parts.entry("vae").or_insert(Found { prefix, layout: Layout::Vae });
            }
        }
        if self.stored.contains_key(LLAMA_T5) {
            parts.entry("text_encoder_2").or_insert(Found { prefix: "", layout: Layout::LlamaT5 });
        }
        let transformer = parts.get("transformer").map(|found| found.layout);
        for (part, prefix, layout) in TEXT_ENCODERS {
            let fits = layout != Layout::T5 || (part == "text_encoder_2") == (transformer == Some(Layout::Flux));
            if fits && self.any_below(prefix) {
                // Where Stable Diffusion 3 takes the pooled prompt, it takes it as it is.
                let identity = part == "text_encoder" && transformer == Some(Layout::Mmdit);
                let layout = match layout {
                    Layout::Clip { activation, .. } => Layout::Clip { activation, identity },
                    other => other,
                };
                parts.entry(part).or_insert(Found { prefix, layout });
            }
        }
        parts
    }

    fn any_below(&self, prefix: &str) -> bool {
        self.stored.range(prefix.to_owned()..).next().is_some_and(|(name, _)| name.starts_with(prefix))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The parts that it holds, with the prefix of their names.
    pub fn parts(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        self.parts.iter().map(|(part, found)| (*part, found.prefix))
    }

    pub fn has(&self, part: &str) -> bool {
        self.parts.contains_key(part)
    }

    /// The part's tensors; one with an empty prefix has what no other part has.
    fn tensors(&self, part: &str, found: Found) -> Tensors<'_> {
        let others = self.parts.iter().filter(|(other, _)| **other != part).map(|(_, found)| found.prefix);
        let others: Vec<&str> = others.filter(|prefix| found.prefix.is_empty() && !prefix.is_empty()).collect();
        let below = self
            .stored
            .range(found.prefix.to_owned()..)
            .map_while(|(name, stored)| Some((name, name.strip_prefix(found.prefix)?, stored)));
        let own = below.filter(|(name, ..)| !others.iter().any(|prefix| name.starts_with(prefix)));
        Tensors { path: self.path.join(part), stored: own.map(|(_, name, stored)| (name, stored)).collect() }
    }

    fn found(&self, part: &str) -> Result<Found> {
        let found = self.parts.get(part).copied();
        found.ok_or_else(|| Error::checkpoint(&self.path, format!("has no part `{part}`")))
    }

    /// What prompts of a CLIP encoder among its parts are padded with: OpenCLIP's by the first token, CLIP's
    /// own by the last.
    pub fn clip_padding(&self, part: &str) -> Option<&'static str> {
        match self.parts.get(part)?.layout {
            Layout::OpenClip { .. } | Layout::Clip { activation: "gelu", .. } => Some("!"),
            Layout::Clip { .. } => Some("<|endoftext|>"),
            _ => None,
        }
    }

    /// The family that its tensors tell; `None`: it has no denoiser.
    pub fn family(&self) -> Result<Option<FamilyKind>> {
        if let Some(found) = self.parts.get("unet") {
            return self.family_of_unet(&self.tensors("unet", *found)).map(Some);
        }
        let Some(found) = self.parts.get("transformer") else { return Ok(None) };
        let tensors = self.tensors("transformer", *found);
        Ok(Some(match found.layout {
            Layout::Flux if tensors.has("guidance_in.in_layer.weight") => FamilyKind::FluxDev,
            Layout::Flux => FamilyKind::FluxSchnell,
            _ if tensors.find(".attn2.qkv.weight").is_some() => FamilyKind::Sd35Medium,
            _ if tensors.find(".attn.ln_q.weight").is_some() => FamilyKind::Sd35Large,
            _ => FamilyKind::Sd3,
        }))
    }

    fn family_of_unet(&self, tensors: &Tensors<'_>) -> Result<FamilyKind> {
        let inpaints = tensors.dim("input_blocks.0.0.weight", 1)? == 9;
        if tensors.has("label_emb.0.0.weight") {
            let refines = match (self.has("text_encoder"), self.has("text_encoder_2")) {
                (false, true) => true,
                (false, false) => unet::Shape::of(tensors)?.levels == 4,
                _ => false,
            };
            return Ok(match (refines, inpaints) {
                (true, _) => FamilyKind::SdxlRefiner,
                (false, true) => FamilyKind::SdxlInpaint,
                (false, false) => FamilyKind::Sdxl,
            });
        }
        let open_clip = match self.parts.get("text_encoder") {
            Some(found) => matches!(found.layout, Layout::OpenClip { .. }),
            None => tensors.find(".1.proj_in.weight").is_some_and(|shape| shape.len() == 2),
        };
        Ok(match (open_clip, inpaints) {
            (false, false) => FamilyKind::Sd1,
            (false, true) => FamilyKind::Sd1Inpaint,
            (true, true) => FamilyKind::Sd2Inpaint,
            (true, false) if self.number("global_step") == Some(STEPS_OF_SD2_BASE) => FamilyKind::Sd2Base,
            (true, false) => FamilyKind::Sd2,
        })
    }

    /// The only value of a tensor.
    fn number(&self, name: &str) -> Option<f64> {
        let stored = self.stored.get(name)?;
        let bytes = self.file.bytes(stored.bytes.clone()).ok()?;
        match &stored.format {
            Err(word) if word == "I64" => Some(i64::from_le_bytes(bytes.try_into().ok()?) as f64),
            Err(word) if word == "I32" => Some(f64::from(i32::from_le_bytes(bytes.try_into().ok()?))),
            Ok(Format::F32) => Some(f64::from(f32::from_le_bytes(bytes.try_into().ok()?))),
            _ => None,
        }
    }

    /// What a configuration beside the part's weights would say.
    pub fn config(&self, part: &str, family: FamilyKind) -> Result<ConfigFile> {
        let found = self.found(part)?;
        let tensors = self.tensors(part, found);
        let side = family.facts().side;
        let sample_size = || -> Result<usize> {
            let vae = self.parts.get("vae").map(|found| vae::levels(&self.tensors("vae", *found)));
            Ok(side >> vae.unwrap_or(4).saturating_sub(1).min(16))
        };
        let value = match found.layout {
            Layout::UNet => unet::config(&tensors, family, sample_size()?)?,
            Layout::Mmdit => mmdit::config(&tensors, sample_size()?)?,
            Layout::Flux => flux::config(&tensors)?,
            Layout::Vae => vae::config(&tensors, family)?,
            Layout::Clip { activation, .. } => text::config_of_clip(&tensors, activation)?,
            Layout::OpenClip { but_last } => text::config_of_open_clip(&tensors, open_clip_layers(&tensors, but_last))?,
            Layout::T5 => text::config_of_t5(&tensors)?,
            Layout::LlamaT5 => text::config_of_llama_t5(&tensors)?,
        };
        Ok(self.says(part, value))
    }

    /// What a `scheduler_config.json` would say: the family's, and what marks in the file overrule.
    pub fn scheduler(&self, family: FamilyKind) -> Result<ConfigFile> {
        let facts = family.facts();
        let mut value: Value = serde_json::from_str(facts.scheduler)
            .map_err(|error| Error::checkpoint(&self.path, format!("{}: {error}", facts.word)))?;
        if facts.prediction != PredictionKind::Flow {
            let velocity = self.stored.contains_key("v_pred");
            let prediction = if velocity { PredictionKind::Velocity } else { facts.prediction };
            value["prediction_type"] = json!(prediction.as_str());
            if ["ztsnr", "zsnr"].iter().any(|mark| self.stored.contains_key(*mark)) {
                value["rescale_betas_zero_snr"] = json!(true);
                value["timestep_spacing"] = json!("trailing");
            }
        }
        Ok(self.says("scheduler", value))
    }

    fn says(&self, part: &str, value: Value) -> ConfigFile {
        let fields = if let Value::Object(fields) = value { fields } else { Map::new() };
        ConfigFile::told(&self.path.join(part), fields)
    }

    /// About how many bytes the part's weights take at `place`.
    pub fn weight_bytes(&self, part: &str, place: &Place) -> Result<usize> {
        let tensors = self.tensors(part, self.found(part)?);
        let bytes = |it: &&Stored| bytes_at(place, &it.format, &it.shape, it.bytes.len());
        Ok(tensors.stored.values().map(bytes).sum())
    }

    /// The part's weights under our names.
    pub fn weights(&self, part: &str, place: &Place) -> Result<Weights> {
        self.read_ahead.call_once(|| self.file.read_ahead(0..self.file.len()));
        let found = self.found(part)?;
        let tensors = self.tensors(part, found);
        let mut ours = HashMap::with_capacity(tensors.stored.len());
        let names = Names::of(&tensors, found.layout)?;
        for (name, stored) in &tensors.stored {
            let mut renamed = names.ours(name);
            if renamed.is_empty() && !names.is_spare(name) {
                // Nothing of ours: it stays under its own name, for the loader's list of what is too much.
                renamed = whole(*name);
            }
            for (our, share) in renamed {
                let cut = stored.share(share).ok_or_else(|| {
                    tensors.refuse(format!("tensor `{name}` of shape {:?} has no {share:?}", stored.shape))
                })?;
                if ours.insert(our.clone(), cut).is_some() {
                    return Err(tensors.refuse(format!("has two tensors for `{our}`")));
                }
            }
        }
        if let Layout::Clip { identity: true, .. } = found.layout {
            let model = ["text_model.", ""].map(|model| format!("{model}final_layer_norm.weight"));
            let width = model.iter().find_map(|name| tensors.dim(name, 0).ok()).unwrap_or(0);
            ours.insert("text_projection.weight".to_owned(), Stored::identity(width));
        }
        Ok(Weights::of(tensors.path.clone(), Arc::clone(&self.file), ours, place))
    }
}

fn open_clip_layers(tensors: &Tensors<'_>, but_last: bool) -> usize {
    tensors.count("transformer.resblocks.").saturating_sub(usize::from(but_last))
}

/// A layout with what the names of one file need to be read.
enum Names {
    UNet(unet::Shape),
    Mmdit {
        blocks: usize,
    },
    Flux,
    Vae {
        levels: usize,
    },
    OpenClip {
        layers: usize,
    },
    LlamaT5 {
        gated: bool,
    },
    /// As ours are.
    Same {
        identity: bool,
    },
}

impl Names {
    fn of(tensors: &Tensors<'_>, layout: Layout) -> Result<Self> {
        Ok(match layout {
            Layout::UNet => Self::UNet(unet::Shape::of(tensors)?),
            Layout::Mmdit => Self::Mmdit { blocks: mmdit::blocks(tensors) },
            Layout::Flux => Self::Flux,
            Layout::Vae => Self::Vae { levels: vae::levels(tensors) },
            Layout::OpenClip { but_last } => Self::OpenClip { layers: open_clip_layers(tensors, but_last) },
            Layout::Clip { identity, .. } => Self::Same { identity },
            Layout::T5 => Self::Same { identity: false },
            Layout::LlamaT5 => Self::LlamaT5 { gated: text::is_gated(tensors) },
        })
    }

    fn ours(&self, name: &str) -> Ours {
        match self {
            Self::UNet(shape) => shape.ours(name),
            Self::Mmdit { blocks } => mmdit::ours(name, *blocks),
            Self::Flux => flux::ours(name),
            Self::Vae { levels } => vae::ours(name, *levels),
            Self::OpenClip { layers } => text::ours_of_open_clip(name, *layers),
            Self::LlamaT5 { gated } => text::ours_of_llama_t5(name, *gated),
            Self::Same { identity: true } if name == "text_projection.weight" => Vec::new(),
            Self::Same { .. } => whole(name),
        }
    }

    /// Whether nothing of ours needs this tensor, as is known of it.
    fn is_spare(&self, name: &str) -> bool {
        match self {
            Self::OpenClip { layers } => {
                let layer = name.strip_prefix("transformer.resblocks.").and_then(names::number);
                name == "logit_scale" || name == "attn_mask" || layer.is_some_and(|(layer, _)| layer >= *layers)
            }
            Self::Same { identity: true } => name == "text_projection.weight",
            // The training's loss, where a VAE is published with it.
            Self::Vae { .. } => name.starts_with("loss.") || name.starts_with("model_ema."),
            _ => false,
        }
    }
}

impl Stored {
    /// A square tensor that changes nothing.
    fn identity(width: usize) -> Self {
        let shape = vec![width, width];
        Self { file: 0, bytes: 0..0, format: Ok(Format::F32), shape, order: Order::Identity }
    }

    /// A share of this tensor; `None` if its shape cannot be cut so.
    fn share(&self, share: Share) -> Option<Self> {
        let mut cut = self.clone();
        match share {
            Share::Whole => {}
            Share::Rows { from, to, of } => {
                let rows = self.shape.first().copied().filter(|rows| rows.is_multiple_of(of))? / of;
                let each = self.bytes.len() / of;
                cut.bytes = self.bytes.start + from * each..self.bytes.start + to * each;
                cut.shape[0] = rows * (to - from);
            }
            Share::HalvesSwapped => {
                self.shape.first().filter(|rows| rows.is_multiple_of(2))?;
                cut.order = Order::HalvesSwapped;
            }
            Share::Transposed => {
                let [rows, columns] = self.shape.as_slice() else { return None };
                // Blocks lie along rows: they cannot be turned.
                self.format.as_ref().ok().filter(|format| format.block().0 == 1)?;
                cut.shape = vec![*columns, *rows];
                cut.order = Order::Transposed;
            }
        }
        Some(cut)
    }
}
