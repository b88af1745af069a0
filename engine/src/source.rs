//! Where a checkpoint's parts lie: in a diffusers folder, or in one file of its makers' layout and, as far
//! as that lacks them, in a folder beside it.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::json;

use crate::config::ConfigFile;
use crate::facts::family_of_folder;
use crate::weights::{Part, SingleFile};
use crate::{Error, FamilyKind, Result};

/// A checkpoint on this machine.
pub(crate) struct Source {
    main: Main,
    /// What else may hold parts: a diffusers folder.
    beside: Option<PathBuf>,
    family: FamilyKind,
}

enum Main {
    Folder(PathBuf),
    File(Arc<SingleFile>),
}

/// Where a tokenizer's vocabulary is.
pub(crate) enum TokenizerFiles {
    Folder(PathBuf),
    /// CLIP's own, which single files leave out.
    Clip {
        pad: &'static str,
    },
}

impl Source {
    /// A whole checkpoint at `path`: a diffusers folder or a single file, whose missing parts are `beside` it.
    /// It belongs to the family that it is told to be or, without a word, to the one that it looks like.
    pub fn open(path: &Path, beside: Option<&Path>, told: Option<FamilyKind>) -> Result<Self> {
        let source = Self::look(path, beside, told)?;
        source.check_parts(path)?;
        Ok(source)
    }

    /// [`Source::open`], whether it is whole or not.
    pub fn look(path: &Path, beside: Option<&Path>, told: Option<FamilyKind>) -> Result<Self> {
        let name = name(path);
        if path.is_file() {
            refuse_pickles(path)?;
            let file = SingleFile::open(path)?;
            let Some(family) = file.family()? else {
                let held: Vec<_> = file.parts().map(|(part, _)| format!("`{part}`")).collect();
                let problem = format!("holds {} and no denoiser: it is a part of a checkpoint", held.join(", "));
                return Err(Error::checkpoint(path, problem));
            };
            let beside = beside.map(Path::to_owned);
            let family = told.unwrap_or(family.named(&name));
            return Ok(Self { main: Main::File(Arc::new(file)), beside, family });
        }
        if !path.join("model_index.json").exists() {
            return Err(Error::checkpoint(path, "is not a diffusers folder: it has no `model_index.json`"));
        }
        let family = match told {
            Some(family) => family,
            None => family_of_folder(path)?.named(&name),
        };
        Ok(Self { main: Main::Folder(path.to_owned()), beside: None, family })
    }

    /// A single file and what is beside it must make a whole checkpoint.
    fn check_parts(&self, path: &Path) -> Result<()> {
        if matches!(self.main, Main::Folder(_)) {
            // What a folder lacks is named by who asks for it.
            return Ok(());
        }
        let missing = self.family.facts().parts.iter().filter(|part| !self.has(part));
        let mut missing: Vec<_> = missing.map(|part| format!("`{part}`")).collect();
        for (encoder, tokenizer) in [("text_encoder_2", "tokenizer_2"), ("text_encoder_3", "tokenizer_3")] {
            let known = !self.has(encoder) || matches!(self.tokenizer(tokenizer), TokenizerFiles::Clip { .. });
            if !known && !self.path(tokenizer).is_dir() {
                missing.push(format!("`{tokenizer}`"));
            }
        }
        if missing.is_empty() {
            return Ok(());
        }
        let (missing, name) = (missing.join(", "), self.family.facts().name);
        let problem = match &self.beside {
            Some(beside) => format!("lacks {missing} of {name}, and so does {}", beside.display()),
            None => format!(
                "lacks {missing} of {name}: name a folder or hub id that has them as `parts` of this model in the configuration"
            ),
        };
        Err(Error::checkpoint(path, problem))
    }

    /// Its family.
    pub fn family(&self) -> FamilyKind {
        self.family
    }

    fn file(&self) -> Option<&Arc<SingleFile>> {
        match &self.main {
            Main::File(file) => Some(file),
            Main::Folder(_) => None,
        }
    }

    /// The folder that would hold a part.
    pub fn path(&self, part: &str) -> PathBuf {
        match (&self.main, &self.beside) {
            (Main::Folder(folder), _) => folder.join(part),
            (Main::File(file), Some(beside)) if !file.has(part) => beside.join(part),
            (Main::File(file), _) => file.path().join(part),
        }
    }

    /// Whether there is such a part.
    pub fn has(&self, part: &str) -> bool {
        self.file().is_some_and(|file| file.has(part)) || self.path(part).is_dir()
    }

    /// A part's configuration and weights.
    pub fn part(&self, name: &'static str) -> Part {
        match self.file() {
            Some(file) if file.has(name) => {
                let beside = self.beside.as_ref().map(|beside| beside.join(name));
                Part::Within { file: Arc::clone(file), name, family: self.family, beside }
            }
            _ => Part::Folder(self.path(name)),
        }
    }

    /// What the configuration of a part says, if it has that part.
    pub fn config(&self, part: &'static str) -> Result<Option<ConfigFile>> {
        match self.file() {
            Some(file) if file.has(part) => file.config(part, self.family).map(Some),
            _ => ConfigFile::read_if_present(&self.path(part).join("config.json")),
        }
    }

    /// What the scheduler's configuration says.
    pub fn scheduler(&self) -> Result<ConfigFile> {
        match self.file() {
            Some(file) => file.scheduler(self.family),
            None => ConfigFile::read(&self.path("scheduler").join("scheduler_config.json")),
        }
    }

    /// What `model_index.json` says: the pipeline and its parts.
    pub fn index(&self) -> Result<ConfigFile> {
        let file = match &self.main {
            Main::Folder(folder) => return ConfigFile::read(&folder.join("model_index.json")),
            Main::File(file) => file,
        };
        let refines = self.family == FamilyKind::SdxlRefiner;
        let listed = |part: &str, class: &str| {
            if self.has(part) { json!(["transformers", class]) } else { json!([null, null]) }
        };
        let index = json!({
            "_class_name": self.family.facts().pipeline,
            "text_encoder": listed("text_encoder", "CLIPTextModel"),
            "text_encoder_2": listed("text_encoder_2", "CLIPTextModelWithProjection"),
            "text_encoder_3": listed("text_encoder_3", "T5EncoderModel"),
            "requires_aesthetics_score": refines,
            "force_zeros_for_empty_prompt": !refines,
        });
        let fields = index.as_object().cloned().unwrap_or_default();
        Ok(ConfigFile::told(file.path(), fields))
    }

    /// The vocabulary of a tokenizer, `tokenizer` or one with a number.
    pub fn tokenizer(&self, name: &str) -> TokenizerFiles {
        match self.file().and_then(|file| file.clip_padding(&name.replace("tokenizer", "text_encoder"))) {
            Some(pad) => TokenizerFiles::Clip { pad },
            None => TokenizerFiles::Folder(self.path(name)),
        }
    }
}

/// Refuses pickles, by their names and first bytes, with the reason.
pub(crate) fn refuse_pickles(path: &Path) -> Result<()> {
    let mut start = [0; 8];
    let file = std::fs::File::open(path).map_err(|error| Error::checkpoint(path, error))?;
    let mut taken = file.take(start.len() as u64);
    let mut read = 0;
    while read < start.len() {
        match taken.read(&mut start[read..]).map_err(|error| Error::checkpoint(path, error))? {
            0 => break,
            count => read += count,
        }
    }
    let extension = path.extension().map(|extension| extension.to_string_lossy().to_ascii_lowercase());
    let pickled = ["ckpt", "pt", "pth", "bin"].iter().any(|known| extension.as_deref() == Some(known));
    // A zip archive, or a pickle's own first byte before its version.
    if pickled || start.starts_with(b"PK\x03\x04") || (start[0] == 0x80 && start[1] < 6) && start[2] != 0 {
        let problem =
            "is a pickle, which can run code as it is read; it is never read: convert it to safetensors first";
        return Err(Error::checkpoint(path, problem));
    }
    Ok(())
}

/// What people call the checkpoint at `path`: the last step of it or, in the hub's cache, the
/// repository's (`models--ORG--NAME/snapshots/COMMIT`).
fn name(path: &Path) -> String {
    let steps: Vec<_> = path.components().rev().take(3).map(|step| step.as_os_str().to_string_lossy()).collect();
    let named = steps.iter().find(|step| step.starts_with("models--")).or(steps.first());
    named.map(ToString::to_string).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_is_called_by_its_folder_or_its_repository() {
        assert_eq!(name(Path::new("/turbo/weights/sdxl")), "sdxl");
        let cached = "/hub/models--stabilityai--sdxl-turbo/snapshots/0123";
        assert_eq!(name(Path::new(cached)), "models--stabilityai--sdxl-turbo");
    }

    #[test]
    fn pickles_are_refused_by_name_and_by_content() {
        let folder = tempfile::tempdir().unwrap();
        let refusal = |name: &str, bytes: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            refuse_pickles(&path).err().map(|error| error.to_string())
        };
        for (name, bytes) in
            [("a.ckpt", b"".as_slice()), ("b.safetensors", b"PK\x03\x04zip"), ("c.safetensors", b"\x80\x02}q\x00")]
        {
            let text = refusal(name, bytes).unwrap();
            assert!(text.contains(name) && text.contains("can run code"), "{text}");
        }
        assert_eq!(refusal("d.gguf", b"GGUF\x03\0\0\0"), None);
        // A header of 640 bytes begins as a pickle does, but for its zeros.
        assert_eq!(refusal("e.safetensors", &[0x80, 2, 0, 0, 0, 0, 0, 0]), None);
    }
}
