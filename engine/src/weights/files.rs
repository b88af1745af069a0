//! Which files of a folder hold a part's tensors.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::config::ConfigFile;
use crate::{Error, Result};

/// Variants of the weights, in order of preference after the plain name.
const VARIANTS: [&str; 3] = ["fp16", "bf16", "non_ema"];

/// The files of `folder` that hold `stem`: one safetensors file, the shards that an index lists, or one GGUF
/// file of whatever name.
pub(crate) fn find(folder: &Path, stem: &str) -> Result<Vec<PathBuf>> {
    let whole = |variant: Option<&str>| match variant {
        None => format!("{stem}.safetensors"),
        Some(variant) => format!("{stem}.{variant}.safetensors"),
    };
    let index = |variant: Option<&str>| match variant {
        None => format!("{stem}.safetensors.index.json"),
        Some(variant) => format!("{stem}.safetensors.index.{variant}.json"),
    };
    for variant in std::iter::once(None).chain(VARIANTS.map(Some)) {
        let path = folder.join(whole(variant));
        if path.exists() {
            return Ok(vec![path]);
        }
        let path = folder.join(index(variant));
        if path.exists() {
            return shards(folder, &path);
        }
    }
    if let Some(path) = only_gguf(folder)? {
        return Ok(vec![path]);
    }
    let pickle = [format!("{stem}.bin"), "pytorch_model.bin".to_owned()];
    match pickle.iter().find(|name| folder.join(name).exists()) {
        Some(name) => {
            let problem = format!("holds only `{name}`, a pickle that can run code; convert it to safetensors first");
            Err(Error::checkpoint(folder, problem))
        }
        None => Err(Error::checkpoint(folder, format!("has no `{}`", whole(None)))),
    }
}

/// Whether a file is called a GGUF file.
pub(super) fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|end| end == "gguf")
}

/// The folder's GGUF file: these are called after the model and its format.
fn only_gguf(folder: &Path) -> Result<Option<PathBuf>> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Ok(None) };
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let mut found: Vec<PathBuf> = paths.filter(|path| is_gguf(path)).collect();
    if found.len() > 1 {
        let problem = format!("must hold one GGUF file, but has {}: which one is meant?", found.len());
        return Err(Error::checkpoint(folder, problem));
    }
    Ok(found.pop())
}

fn shards(folder: &Path, index: &Path) -> Result<Vec<PathBuf>> {
    let config = ConfigFile::read(index)?;
    let map = config.get("weight_map").and_then(|map| map.as_object());
    let names: Option<BTreeSet<&str>> = map.and_then(|map| map.values().map(|name| name.as_str()).collect());
    let names = names.ok_or_else(|| config.refuse("weight_map", "an object of file names"))?;
    // A shard lies beside its index; a path would reach out of the folder.
    if let Some(name) = names.iter().find(|name| name.contains(['/', '\\']) || !name.ends_with(".safetensors")) {
        return Err(Error::checkpoint(index, format!("`{name}` is not the name of a safetensors file beside it")));
    }
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(names: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in names {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        folder
    }

    fn names(paths: Result<Vec<PathBuf>>) -> Vec<String> {
        paths.unwrap().iter().map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn the_plain_file_is_preferred_to_a_variant() {
        let both = folder(&[("m.safetensors", ""), ("m.fp16.safetensors", "")]);
        assert_eq!(names(find(both.path(), "m")), ["m.safetensors"]);
        let variant = folder(&[("m.fp16.safetensors", "")]);
        assert_eq!(names(find(variant.path(), "m")), ["m.fp16.safetensors"]);
    }

    #[test]
    fn an_index_lists_its_shards_once() {
        let index = r#"{"weight_map": {"a": "m-2.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}}"#;
        let sharded = folder(&[("m.safetensors.index.json", index)]);
        assert_eq!(names(find(sharded.path(), "m")), ["m-1.safetensors", "m-2.safetensors"]);
    }

    #[test]
    fn a_shard_outside_the_folder_is_refused() {
        let index = r#"{"weight_map": {"a": "../secret.safetensors"}}"#;
        let sharded = folder(&[("m.safetensors.index.json", index)]);
        assert!(find(sharded.path(), "m").unwrap_err().to_string().contains("../secret.safetensors"));
    }

    #[test]
    fn a_gguf_file_of_any_name_is_found_where_there_is_one() {
        let one = folder(&[("flux1-dev-Q4_K_S.gguf", ""), ("config.json", "")]);
        assert_eq!(names(find(one.path(), "m")), ["flux1-dev-Q4_K_S.gguf"]);
        let both = folder(&[("a.gguf", ""), ("m.safetensors", "")]);
        assert_eq!(names(find(both.path(), "m")), ["m.safetensors"]);
        let two = folder(&[("a.gguf", ""), ("b.gguf", "")]);
        assert!(find(two.path(), "m").unwrap_err().to_string().contains("must hold one GGUF file, but has 2"));
    }

    #[test]
    fn a_pickle_is_refused_with_the_reason() {
        let pickle = folder(&[("m.bin", "")]);
        let error = find(pickle.path(), "m").unwrap_err().to_string();
        assert!(error.contains("`m.bin`, a pickle that can run code"), "{error}");
        let empty = folder(&[]);
        assert!(find(empty.path(), "m").unwrap_err().to_string().ends_with("has no `m.safetensors`"));
    }
}
