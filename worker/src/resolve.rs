//! From a catalog entry's source to weights on this machine: a folder or a file as it is, a hub id through
//! the hub's cache and, where that lacks files, the hub.

use std::path::{Path, PathBuf};

use farm::catalog::ModelFacts;
use farm::config::WorkerConfig;
use farm::job::FailureKind;
use tokio_util::sync::CancellationToken;

use crate::hub::Hub;

/// Why a checkpoint's folder was not found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// It is not where it is said to be, or may not be read: trying again does not help.
    #[error("{0}")]
    Missing(String),
    /// The network or the disk failed: try again later.
    #[error("{0}")]
    Unavailable(String),
    /// The caller wants to stop.
    #[error("stopped while downloading; what has arrived is kept")]
    Stopped,
}

impl ResolveError {
    /// What that means for the checkpoint's jobs.
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Missing(_) => FailureKind::Invalid,
            Self::Unavailable(_) | Self::Stopped => FailureKind::Retryable,
        }
    }
}

/// A checkpoint on the hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubId {
    /// `org/name`.
    pub name: String,
    /// A branch, tag or commit.
    pub revision: String,
}

/// Where weights come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A folder or a file on this machine.
    Local(PathBuf),
    /// A repository on the hub.
    Hub(HubId),
}

impl Source {
    /// Reads a catalog entry's source: a folder or file if there is one of that name, else a hub id.
    pub fn parse(text: &str) -> Result<Self, ResolveError> {
        let path = Path::new(text);
        if path.is_dir() || path.is_file() {
            return Ok(Self::Local(path.to_owned()));
        }
        let (name, revision) = text.split_once('@').unwrap_or((text, "main"));
        let is_name = |part: &str| part.starts_with(|c: char| c.is_ascii_alphanumeric()) && part.chars().all(is_plain);
        match name.split_once('/') {
            Some((org, repo)) if is_name(org) && is_name(repo) && is_revision(revision) => {
                Ok(Self::Hub(HubId { name: name.to_owned(), revision: revision.to_owned() }))
            }
            _ => Err(ResolveError::Missing(format!(
                "there is no `{text}`: give a folder in diffusers layout, a single file or a hub id (`org/name[@revision]`)"
            ))),
        }
    }
}

/// Characters of names that may become paths.
pub(crate) fn is_plain(character: char) -> bool {
    character.is_ascii_alphanumeric() || matches!(character, '.' | '_' | '-')
}

fn is_revision(revision: &str) -> bool {
    !revision.is_empty()
        && revision.split('/').all(|part| !part.starts_with('.') && !part.is_empty() && part.chars().all(is_plain))
}

/// A checkpoint on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// Its folder or file.
    pub path: PathBuf,
    /// The folder with the parts that its file lacks.
    pub parts: Option<PathBuf>,
    /// The family that it is said to belong to.
    pub family: Option<String>,
}

/// What is wanted of a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// Everything that rendering needs.
    Whole,
    /// Everything but the denoiser: a file beside it has that.
    Parts,
}

/// A checkpoint by its facts, downloaded if need be.
///
/// # Errors
/// As [`resolve`].
pub async fn locate(
    facts: &ModelFacts,
    config: &WorkerConfig,
    stop: &CancellationToken,
) -> Result<Located, ResolveError> {
    let path = resolve(&facts.source, config, stop).await?;
    let parts = match &facts.parts {
        Some(parts) => Some(find(parts, Wanted::Parts, config, stop).await?),
        None => None,
    };
    Ok(Located { path, parts, family: facts.family.clone() })
}

/// The folder or file of a source, downloaded if need be. Downloads go on where an earlier one was cut.
/// `stop` ends them early.
///
/// # Errors
/// Where there is no such thing, or the network failed.
pub async fn resolve(source: &str, config: &WorkerConfig, stop: &CancellationToken) -> Result<PathBuf, ResolveError> {
    find(source, Wanted::Whole, config, stop).await
}

async fn find(
    source: &str,
    wanted: Wanted,
    config: &WorkerConfig,
    stop: &CancellationToken,
) -> Result<PathBuf, ResolveError> {
    let id = match Source::parse(source)? {
        Source::Local(path) => return Ok(path),
        Source::Hub(id) => id,
    };
    let (config, stop) = (config.clone(), stop.clone());
    let found = tokio::task::spawn_blocking(move || Hub::new(&config, stop).folder(&id, wanted)).await;
    found.unwrap_or_else(|panic| Err(ResolveError::Unavailable(format!("looking for `{source}`: {panic}"))))
}

/// A file of the checkpoint's folder that says what its parts are.
pub(crate) const INDEX: &str = "model_index.json";

/// Parts that a pipeline lists and rendering does not need.
const SPARE: [&str; 3] = ["safety_checker", "feature_extractor", "image_encoder"];

const DENOISERS: [&str; 2] = ["unet", "transformer"];

/// The files of a repository that rendering needs, of all its `files` (`part/name`), as its parsed
/// `model_index.json` lists its parts. What is missing is named.
pub(crate) fn needed(index: &serde_json::Value, files: &[String], wanted: Wanted) -> Result<Vec<String>, String> {
    let entries = index.as_object().ok_or(format!("{INDEX} is not a JSON object"))?;
    let mut needed = vec![INDEX.to_owned()];
    let mut missing = Vec::new();
    // Parts are listed as [library, class], left-out ones as [null, null].
    let is_part = |value: &serde_json::Value| value.get(1).is_some_and(serde_json::Value::is_string);
    for part in entries.iter().filter(|(_, value)| is_part(value)).map(|(part, _)| part.as_str()) {
        if SPARE.contains(&part) || wanted == Wanted::Parts && DENOISERS.contains(&part) {
            continue;
        }
        let names: Vec<&str> = files
            .iter()
            .filter_map(|file| file.strip_prefix(part)?.strip_prefix('/'))
            .filter(|name| !name.contains('/'))
            .collect();
        let picked = if part.starts_with("tokenizer") {
            tokenizer(&names)
        } else if part == "scheduler" {
            whole(&names, &["scheduler_config.json"])
        } else {
            whole(&names, &["config.json"]).and_then(|mut picked| {
                picked.extend(weights(&names)?);
                Ok(picked)
            })
        };
        match picked {
            Ok(names) => needed.extend(names.into_iter().map(|name| format!("{part}/{name}"))),
            Err(lacking) => missing.push(format!("{part}/{lacking}")),
        }
    }
    if missing.is_empty() { Ok(needed) } else { Err(missing.join(", ")) }
}

fn whole(names: &[&str], wanted: &[&str]) -> Result<Vec<String>, String> {
    match wanted.iter().find(|name| !names.contains(name)) {
        Some(lacking) => Err((*lacking).to_owned()),
        None => Ok(wanted.iter().map(|name| (*name).to_owned()).collect()),
    }
}

fn tokenizer(names: &[&str]) -> Result<Vec<String>, String> {
    const FILES: [&str; 7] = [
        "tokenizer.json",
        "spiece.model",
        "vocab.json",
        "merges.txt",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    ];
    if !names.contains(&"tokenizer.json") && !names.contains(&"spiece.model") {
        whole(names, &["vocab.json", "merges.txt"]).map_err(|lacking| format!("tokenizer.json (or {lacking})"))?;
    }
    Ok(FILES.into_iter().filter(|name| names.contains(name)).map(str::to_owned).collect())
}

/// A part's safetensors: in full precision where there are such, else a variant in half precision; one file,
/// or all shards and their index.
fn weights(names: &[&str]) -> Result<Vec<String>, String> {
    for stem in ["model", "diffusion_pytorch_model"] {
        for variant in ["", ".fp16", ".bf16"] {
            let single = format!("{stem}{variant}.safetensors");
            if names.contains(&single.as_str()) {
                return Ok(vec![single]);
            }
            let index = format!("{stem}.safetensors.index{variant}.json");
            let prefix = format!("{stem}{variant}-");
            let shards: Vec<&str> = names
                .iter()
                .copied()
                .filter(|name| name.starts_with(&prefix) && name.ends_with(".safetensors"))
                .collect();
            if names.contains(&index.as_str()) && !shards.is_empty() {
                return sharded(index, &prefix, &shards);
            }
        }
    }
    let pickled = names.iter().any(|name| name.ends_with(".bin") || name.ends_with(".ckpt"));
    let reason =
        if pickled { "*.safetensors (there are pickled weights, which are never read)" } else { "*.safetensors" };
    Err(reason.to_owned())
}

/// `STEM-00001-of-00003.safetensors`: every one of them.
fn sharded(index: String, prefix: &str, shards: &[&str]) -> Result<Vec<String>, String> {
    let total = shards[0].rsplit_once("-of-").and_then(|(_, rest)| rest.strip_suffix(".safetensors"));
    let Some((width, total)) = total.and_then(|text| Some((text.len(), text.parse::<u32>().ok()?))) else {
        return Err(format!("{prefix}*-of-*.safetensors"));
    };
    let mut picked = vec![index];
    for number in 1..=total {
        let name = format!("{prefix}{number:0width$}-of-{total:0width$}.safetensors");
        if !shards.contains(&name.as_str()) {
            return Err(name);
        }
        picked.push(name);
    }
    Ok(picked)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index() -> serde_json::Value {
        serde_json::json!({
            "_class_name": "StableDiffusionPipeline",
            "feature_extractor": ["transformers", "CLIPImageProcessor"],
            "requires_safety_checker": false,
            "safety_checker": [null, null],
            "scheduler": ["diffusers", "PNDMScheduler"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
        })
    }

    fn pick(extra: &[&str]) -> Result<Vec<String>, String> {
        let mut files: Vec<_> =
            ["model_index.json", "README.md", "v1-5.ckpt", "scheduler/scheduler_config.json"].into();
        files.extend(["tokenizer/vocab.json", "tokenizer/merges.txt", "unet/config.json"]);
        files.extend(["safety_checker/model.safetensors", "feature_extractor/preprocessor_config.json"]);
        files.extend(extra);
        let files: Vec<String> = files.into_iter().map(str::to_owned).collect();
        let mut picked = needed(&index(), &files, Wanted::Whole)?;
        picked.retain(|file| file.starts_with("unet/"));
        Ok(picked)
    }

    #[test]
    fn full_precision_weights_are_preferred_and_fp16_will_do() {
        let (full, half) =
            ("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors");
        assert_eq!(
            pick(&[half, full, "unet/diffusion_pytorch_model.non_ema.safetensors"]).unwrap(),
            ["unet/config.json", full]
        );
        assert_eq!(pick(&[half]).unwrap(), ["unet/config.json", half]);
    }

    #[test]
    fn sharded_weights_come_whole_or_not_at_all() {
        let shard = |number| format!("unet/diffusion_pytorch_model-0000{number}-of-00002.safetensors");
        let index = "unet/diffusion_pytorch_model.safetensors.index.json";
        assert_eq!(pick(&[index, &shard(1), &shard(2)]).unwrap(), ["unet/config.json", index, &shard(1), &shard(2)]);
        assert_eq!(pick(&[index, &shard(1)]).unwrap_err(), shard(2));
    }

    #[test]
    fn pickled_weights_are_named_and_not_taken() {
        let error = pick(&["unet/diffusion_pytorch_model.bin"]).unwrap_err();
        assert_eq!(error, "unet/*.safetensors (there are pickled weights, which are never read)");
    }

    #[test]
    fn what_rendering_does_not_need_is_left_on_the_hub() {
        let mut files = ["model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"].to_vec();
        files.extend([
            "unet/config.json",
            "unet/model.safetensors",
            "safety_checker/model.safetensors",
            "big.safetensors",
        ]);
        let files: Vec<String> = files.into_iter().map(str::to_owned).collect();
        let picked = needed(&index(), &files, Wanted::Whole).unwrap();
        let expected = ["model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"];
        assert_eq!(picked[..3], expected);
        assert_eq!(picked[3..], ["unet/config.json", "unet/model.safetensors"]);
    }

    #[tokio::test]
    async fn a_file_is_located_with_the_folder_of_its_other_parts_and_its_family() {
        let (file, folder) = (concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"), env!("CARGO_MANIFEST_DIR"));
        let facts =
            ModelFacts { parts: Some(folder.into()), family: Some("flux_dev".into()), ..ModelFacts::assumed(file) };
        let (config, stop) = (WorkerConfig::default(), CancellationToken::new());
        let located = locate(&facts, &config, &stop).await.unwrap();
        let expected = Located { path: file.into(), parts: Some(folder.into()), family: Some("flux_dev".into()) };
        assert_eq!(located, expected);
        let lost = ModelFacts { parts: Some("/no/such/folder".into()), ..facts };
        let error = locate(&lost, &config, &stop).await.unwrap_err();
        assert_eq!(error.kind(), FailureKind::Invalid);
        assert!(error.to_string().contains("`/no/such/folder`"), "{error}");
    }

    /// What a repository of Stable Diffusion 3 or FLUX lists.
    fn files_of_transformers() -> (serde_json::Value, Vec<String>) {
        let index = serde_json::json!({
            "_class_name": "StableDiffusion3Pipeline",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "text_encoder_3": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "tokenizer_3": ["transformers", "T5TokenizerFast"],
            "transformer": ["diffusers", "SD3Transformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        });
        let mut files = vec!["model_index.json", "sd3_medium.safetensors", "scheduler/scheduler_config.json"];
        files.extend(["text_encoder/config.json", "text_encoder_2/config.json", "text_encoder_3/config.json"]);
        files.extend(["transformer/config.json", "vae/config.json"]);
        files.extend(["text_encoder/model.fp16.safetensors", "text_encoder/model.safetensors"]);
        files.extend(["text_encoder_2/model.fp16.safetensors", "vae/diffusion_pytorch_model.bf16.safetensors"]);
        files.extend(["text_encoder_3/model.safetensors.index.fp16.json"]);
        files.extend(["text_encoder_3/model.fp16-00001-of-00002.safetensors"]);
        files.extend(["text_encoder_3/model.fp16-00002-of-00002.safetensors"]);
        files.extend(["transformer/diffusion_pytorch_model.safetensors.index.json"]);
        files.extend(["transformer/diffusion_pytorch_model-00001-of-00001.safetensors"]);
        files.extend(["tokenizer/vocab.json", "tokenizer/merges.txt"]);
        files.extend(["tokenizer_2/vocab.json", "tokenizer_2/merges.txt"]);
        files.extend(["tokenizer_3/spiece.model", "tokenizer_3/tokenizer_config.json"]);
        (index, files.into_iter().map(str::to_owned).collect())
    }

    #[test]
    fn three_encoders_a_transformer_and_a_sentencepiece_vocabulary_come_whole() {
        let (index, files) = files_of_transformers();
        let picked = needed(&index, &files, Wanted::Whole).unwrap();
        let left: Vec<_> = files.iter().filter(|file| !picked.contains(file)).collect();
        assert_eq!(left, ["sd3_medium.safetensors", "text_encoder/model.fp16.safetensors"]);
        for lacking in ["tokenizer_3/spiece.model", "text_encoder_3/model.fp16-00002-of-00002.safetensors"] {
            let fewer: Vec<_> = files.iter().filter(|file| *file != lacking).cloned().collect();
            let missing = needed(&index, &fewer, Wanted::Whole).unwrap_err();
            assert!(missing.contains(lacking.split('/').next().unwrap()), "{lacking}: {missing}");
        }
    }

    #[test]
    fn beside_a_file_the_denoiser_is_left_on_the_hub() {
        let (index, files) = files_of_transformers();
        let parts = needed(&index, &files, Wanted::Parts).unwrap();
        assert!(parts.iter().all(|file| !file.starts_with("transformer/")), "{parts:?}");
        let whole = needed(&index, &files, Wanted::Whole).unwrap();
        assert_eq!(whole.len() - parts.len(), 3, "its configuration, its index and its one shard");
    }

    #[test]
    fn a_source_is_a_folder_a_file_or_a_hub_id_and_anything_else_is_explained() {
        let here = env!("CARGO_MANIFEST_DIR");
        assert_eq!(Source::parse(here), Ok(Source::Local(here.into())));
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
        assert_eq!(Source::parse(file), Ok(Source::Local(file.into())));
        let hub = |name: &str, revision: &str| Source::Hub(HubId { name: name.into(), revision: revision.into() });
        assert_eq!(Source::parse("org/some.model"), Ok(hub("org/some.model", "main")));
        assert_eq!(Source::parse("org/name@refs/pr/1"), Ok(hub("org/name", "refs/pr/1")));
        for text in ["/no/such/folder", "name", "../escape/me", "a/b/c", "org/name@", "org/name@../x", "org/..", ""] {
            let Err(ResolveError::Missing(message)) = Source::parse(text) else { panic!("`{text}` was accepted") };
            assert!(message.contains("org/name[@revision]"), "{message}");
        }
    }
}
