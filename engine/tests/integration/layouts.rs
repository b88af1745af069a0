//! The same weights in every way that folders hold them give the same picture, for every part.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use engine::{Checkpoint, Precision, RowRequest, render};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::json;

use crate::support::{copy_of, cpu, folder, request};

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn read(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |(name, view): (&str, TensorView<'_>)| {
        (name.to_owned(), (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
    };
    file.iter().map(tensor).collect()
}

fn write(path: &Path, tensors: &Tensors) {
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, bytes))| (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// The weights of each part of a checkpoint.
fn weights(folder: &Path) -> Vec<PathBuf> {
    let parts = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files =
        parts.flat_map(|part| ["model.safetensors", "diffusion_pytorch_model.safetensors"].map(|name| part.join(name)));
    let found: Vec<PathBuf> = files.filter(|path| path.exists()).collect();
    assert!(found.len() >= 3, "{found:?}");
    found
}

/// Cuts a file in three, named as `save_pretrained` names the shards of a variant.
fn shard(path: &Path, variant: Option<&str>) {
    const SHARDS: usize = 3;
    let tensors = read(path);
    std::fs::remove_file(path).unwrap();
    let stem = path.file_stem().unwrap().to_str().unwrap();
    let word = variant.map_or(String::new(), |variant| format!(".{variant}"));
    let (mut map, each) = (serde_json::Map::new(), tensors.len().div_ceil(SHARDS));
    for number in 1..=SHARDS {
        let name = format!("{stem}{word}-{number:05}-of-{SHARDS:05}.safetensors");
        let part: Tensors = tensors.clone().into_iter().skip((number - 1) * each).take(each).collect();
        map.extend(part.keys().map(|tensor| (tensor.clone(), json!(name))));
        write(&path.with_file_name(name), &part);
    }
    let index = path.with_file_name(format!("{stem}.safetensors.index{word}.json"));
    std::fs::write(index, json!({"metadata": {}, "weight_map": map}).to_string()).unwrap();
}

/// Gives CLIP's tensors the prefix `text_model.`, or takes it away.
fn change_prefix(path: &Path) {
    let tensors = read(path);
    let has_it = tensors.keys().any(|name| name.starts_with("text_model."));
    let rename = |name: String| match name.strip_prefix("text_model.") {
        Some(bare) => bare.to_owned(),
        None if has_it || name == "text_projection.weight" => name,
        None => format!("text_model.{name}"),
    };
    let renamed = tensors.into_iter().map(|(name, tensor)| (rename(name), tensor)).collect();
    write(path, &renamed);
}

#[test]
fn shards_variants_and_prefixes_change_nothing_in_any_part() {
    for name in ["sdxl", "sd3"] {
        let asked = RowRequest { width: 64, height: 64, steps: 3, ..request("a star") };
        let plain = Checkpoint::load(&folder(name), &cpu(), Precision::F32).map(Arc::new).unwrap();
        let expected = render(&plain, &asked, |_, _| {}).unwrap();
        for variant in [None, Some("fp16"), Some("bf16")] {
            let copy = copy_of(name);
            let mut changed = 0;
            for path in weights(copy.path()) {
                let part = path.parent().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
                if ["text_encoder", "text_encoder_2"].contains(&part.as_str()) {
                    change_prefix(&path);
                    changed += 1;
                }
                shard(&path, variant);
            }
            assert_eq!(changed, 2);
            let sharded = Checkpoint::load(copy.path(), &cpu(), Precision::F32).map(Arc::new).unwrap();
            assert!(render(&sharded, &asked, |_, _| {}).unwrap() == expected, "{name}, {variant:?}");
        }
    }
}

#[test]
fn a_shard_that_is_not_there_is_named_whichever_part_lacks_it() {
    for part in ["text_encoder_2/model", "text_encoder_3/model", "transformer/diffusion_pytorch_model"] {
        let folder = copy_of("sd3");
        shard(&folder.path().join(format!("{part}.safetensors")), Some("fp16"));
        let gone = format!("{part}.fp16-00002-of-00003.safetensors");
        std::fs::remove_file(folder.path().join(&gone)).unwrap();
        let error = Checkpoint::load(folder.path(), &cpu(), Precision::F32).err().unwrap().to_string();
        assert!(error.contains(&gone), "{error}");
    }
}

#[test]
fn a_pickle_in_any_part_is_refused_with_the_reason() {
    let plain = folder("sd3");
    for path in weights(&plain) {
        let copy = copy_of("sd3");
        let path = copy.path().join(path.strip_prefix(&plain).unwrap());
        std::fs::rename(&path, path.with_extension("bin")).unwrap();
        let error = Checkpoint::load(copy.path(), &cpu(), Precision::F32).err().unwrap().to_string();
        assert!(error.contains("a pickle that can run code"), "{error}");
    }
}
