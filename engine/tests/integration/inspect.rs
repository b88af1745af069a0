//! What `inspect` says of files and folders.

use engine::{Inspection, inspect};
use safetensors::Dtype;

use crate::recipe::Recipe;
use crate::support::{copy_of, folder};

fn names(inspection: &Inspection) -> Vec<&str> {
    inspection.parts.iter().map(|part| part.name.as_str()).collect()
}

#[test]
fn a_single_file_is_told_with_its_parts_and_formats() {
    let recipe = Recipe::read("sdxl");
    let (_folder, path) = recipe.write(|tensors| {
        tensors.insert("v_pred".to_owned(), (Dtype::F32, vec![0], Vec::new()));
    });
    let found = inspect(&path).unwrap();
    assert_eq!((found.layout, found.family), ("safetensors", Some("sdxl")));
    assert_eq!(names(&found), ["other", "text_encoder", "text_encoder_2", "unet", "vae"]);
    assert_eq!(found.files.len(), 1);
    assert_eq!(found.files[0].bytes, std::fs::metadata(&path).unwrap().len());
    let tensors = &found.files[0].tensors;
    assert_eq!(tensors.len(), found.parts.iter().map(|part| part.tensors).sum::<usize>());
    let conv = tensors.iter().find(|tensor| tensor.name == "model.diffusion_model.out.2.weight").unwrap();
    assert_eq!((conv.shape.as_slice(), conv.format.as_str(), conv.bytes), ([4, 32, 3, 3].as_slice(), "F16", 2304));
    let unet = &found.parts[3];
    assert_eq!(
        unet.formats.iter().map(|(word, count)| (word.as_str(), *count)).collect::<Vec<_>>(),
        [("F16", unet.tensors)]
    );
}

#[test]
fn a_gguf_file_is_told_with_its_blocks() {
    let found = inspect(&folder("flux_gguf").join("flux1-tiny-Q4_K_S.gguf")).unwrap();
    assert_eq!((found.layout, found.family), ("gguf", Some("flux_dev")));
    assert_eq!(names(&found), ["transformer"]);
    let formats = &found.parts[0].formats;
    assert!(formats.contains_key("F32") && formats.keys().any(|word| word.starts_with('Q')), "{formats:?}");
    assert_eq!(formats.values().sum::<usize>(), found.files[0].tensors.len());
}

#[test]
fn a_file_of_something_else_has_no_family_and_other_tensors() {
    let (_folder, path) = Recipe::read("flux_schnell").write(|tensors| {
        *tensors = [("lora_unet_up.weight".to_owned(), (Dtype::BF16, vec![2, 2], vec![0; 8]))].into();
    });
    let found = inspect(&path).unwrap();
    assert_eq!((found.family, names(&found).as_slice()), (None, ["other"].as_slice()));
    assert_eq!(found.parts[0].formats["BF16"], 1);
}

#[test]
fn a_diffusers_folder_is_told_part_by_part() {
    let found = inspect(&folder("sd2")).unwrap();
    assert_eq!((found.layout, found.family), ("diffusers", Some("sd2")));
    assert_eq!(names(&found), ["text_encoder", "unet", "vae"]);
    assert_eq!(found.files.len(), 3);
    let bytes = |part: &str| std::fs::metadata(folder("sd2").join(part)).unwrap().len();
    assert_eq!(found.files[1].bytes, bytes("unet/diffusion_pytorch_model.safetensors"));
    assert!(found.parts.iter().all(|part| part.problem.is_none() && part.formats.contains_key("F16")));
}

#[test]
fn a_part_that_cannot_be_read_is_told_beside_the_others() {
    let copy = copy_of("sd1");
    let unet = copy.path().join("unet/diffusion_pytorch_model.safetensors");
    std::fs::rename(&unet, unet.with_extension("bin")).unwrap();
    let found = inspect(copy.path()).unwrap();
    assert!(found.parts[1].problem.as_ref().unwrap().contains("unet"), "{:?}", found.parts[1]);
    assert!(found.parts[2].problem.is_none() && found.parts[2].tensors > 0);
}

#[test]
fn broken_files_and_pickles_are_named() {
    let (_folder, path) = Recipe::read("flux_dev").write(|_| {});
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    let error = inspect(&path).unwrap_err().to_string();
    assert!(error.contains("flux_dev.safetensors: is not a complete safetensors file"), "{error}");
    let pickle = path.with_extension("ckpt");
    std::fs::rename(&path, &pickle).unwrap();
    let error = inspect(&pickle).unwrap_err().to_string();
    assert!(error.contains("flux_dev.ckpt") && error.contains("can run code"), "{error}");
    let error = inspect(pickle.parent().unwrap()).unwrap_err().to_string();
    assert!(error.contains("no `model_index.json`"), "{error}");
}
