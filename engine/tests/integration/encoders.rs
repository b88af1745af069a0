//! Text encoders that are let go and read again: the same pictures, in less memory.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use engine::{
    Checkpoint, EncoderCounts, Error, LoadOptions, Precision, RowRequest, RunningBatch, TextEncoders, render,
};
use image::RgbImage;

use crate::company::{Finished, decode, drain};
use crate::recipe::Recipe;
use crate::support::{copy_of, cpu, folder, request};

fn load(path: &Path, text_encoders: TextEncoders, embedding_bytes: Option<usize>) -> Arc<Checkpoint> {
    let options = LoadOptions { text_encoders, embedding_bytes, ..LoadOptions::default() };
    Checkpoint::load_with(path, &cpu(), Precision::F32, options).map(Arc::new).unwrap()
}

fn dropping(path: &Path) -> Arc<Checkpoint> {
    load(path, TextEncoders::Drop, None)
}

/// One with a negative prompt that every family listens to.
fn asking(prompt: &str) -> RowRequest {
    RowRequest { negative_prompt: "a ring".into(), true_cfg_scale: Some(2.0), steps: 2, ..request(prompt) }
}

fn picture(checkpoint: &Arc<Checkpoint>, prompt: &str) -> RgbImage {
    render(checkpoint, &asking(prompt), |_, _| {}).unwrap()
}

fn reads(checkpoint: &Checkpoint) -> u64 {
    checkpoint.encoder_counts().reads
}

/// Each kind of source, with its number of encoders.
fn sources() -> (Vec<(PathBuf, u64)>, Vec<tempfile::TempDir>) {
    let folders = [("sd1", 1), ("sdxl", 2), ("sdxl_refiner", 1), ("sd3", 3), ("sd3_without_t5", 2), ("flux_dev", 2)];
    let mut sources: Vec<_> = folders.map(|(name, encoders)| (folder(name), encoders)).into();
    let (within, file) = Recipe::read("sd35_medium").write(|_| {});
    sources.push((file, 2));
    let quantised = copy_of("flux_dev");
    let place = quantised.path().join("text_encoder_2");
    std::fs::remove_file(place.join("model.safetensors")).unwrap();
    let t5 = "t5-tiny-encoder-Q5_K_M.gguf";
    std::fs::copy(folder("flux_gguf").join(t5), place.join(t5)).unwrap();
    sources.push((quantised.path().to_owned(), 2));
    (sources, vec![within, quantised])
}

#[test]
fn pictures_are_the_same_bit_for_bit_and_memory_is_free_while_rows_are_denoised() {
    let (sources, _folders) = sources();
    for (path, encoders) in sources {
        let name = path.display();
        let (keeps, drops) = (load(&path, TextEncoders::Keep, None), dropping(&path));
        let EncoderCounts { bytes, .. } = keeps.encoder_counts();
        assert!(bytes > 1000, "{name}");
        assert_eq!(keeps.encoder_counts(), EncoderCounts { bytes, held_bytes: bytes, reads: encoders }, "{name}");
        assert_eq!(drops.encoder_counts(), EncoderCounts { bytes, held_bytes: 0, reads: 0 }, "{name}");

        let mut batch = RunningBatch::new(Arc::clone(&drops), 64, 64);
        batch.join(1, &asking("a small red star")).unwrap();
        batch.join(2, &asking("a blue cross")).unwrap();
        assert_eq!(drops.encoder_counts(), EncoderCounts { bytes, held_bytes: bytes, reads: encoders }, "{name}");
        batch.step(&[1, 2]).unwrap();
        assert_eq!(drops.encoder_counts().held_bytes, 0, "{name}");

        // Prompts that the cache has read nothing; a new one reads all encoders once.
        for prompt in ["a small red star", "a blue cross", "a ring"] {
            assert!(picture(&keeps, prompt) == picture(&drops, prompt), "{name}: {prompt}");
            assert_eq!(reads(&drops), encoders, "{name}: {prompt}");
        }
        assert!(picture(&keeps, "a white diamond") == picture(&drops, "a white diamond"), "{name}");
        assert_eq!(drops.encoder_counts(), EncoderCounts { bytes, held_bytes: 0, reads: 2 * encoders }, "{name}");
        assert_eq!(reads(&keeps), encoders, "{name}");
    }
}

#[test]
fn prompts_of_rows_that_wait_are_encoded_in_one_reading() {
    let (path, encoders) = (folder("sd3"), 3);
    let prompts = ["a star", "a ring", "a cross", "a heart", "a star"];
    let requests: Vec<RowRequest> = prompts.map(asking).into();
    let (keeps, drops) = (load(&path, TextEncoders::Keep, None), dropping(&path));
    drops.prepare(&requests[..1], &requests[1..]);
    let EncoderCounts { held_bytes, reads: first, .. } = drops.encoder_counts();
    assert_eq!((held_bytes, first), (0, encoders));
    for prompt in prompts {
        assert!(picture(&keeps, prompt) == picture(&drops, prompt), "{prompt}");
    }
    assert_eq!(reads(&drops), encoders);
    assert_eq!(drops.embedding_counts(), keeps.embedding_counts(), "as if each row had come alone");

    // Whoever joins has nothing new: what only waits is not worth a reading.
    drops.prepare(&requests, &[asking("a new one")]);
    assert_eq!(reads(&drops), encoders);
    // Nor are encoders that stay read for it.
    keeps.prepare(&[asking("a new one")], &requests);
    assert_eq!(keeps.encoder_counts().reads, encoders);
}

#[test]
fn what_a_small_cache_cannot_hold_is_read_again_and_comes_out_the_same() {
    let path = folder("flux_dev");
    let keeps = load(&path, TextEncoders::Keep, None);
    let requests: Vec<RowRequest> = ["a star", "a ring", "a cross", "a heart"].map(asking).into();
    let one_row = {
        picture(&keeps, "a star");
        keeps.embedding_counts().bytes
    };
    for bytes in [0, one_row, 2 * one_row] {
        let drops = load(&path, TextEncoders::Drop, Some(bytes));
        for (at, request) in requests.iter().enumerate() {
            drops.prepare(std::slice::from_ref(request), &requests[at + 1..]);
            assert!(picture(&keeps, &request.prompt) == picture(&drops, &request.prompt), "{bytes}");
            assert!(drops.embedding_counts().bytes <= bytes);
        }
        assert_eq!(drops.encoder_counts().held_bytes, 0);
    }
}

#[test]
fn threads_that_miss_at_once_get_the_same_pictures() {
    let path = folder("sdxl");
    let (keeps, drops) = (load(&path, TextEncoders::Keep, None), dropping(&path));
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (keeps, drops) = (&keeps, &drops);
            scope.spawn(move || {
                for number in 0..3 {
                    let prompt = format!("star {thread} of {number}");
                    assert!(picture(keeps, &prompt) == picture(drops, &prompt), "{prompt}");
                }
            });
        }
    });
    assert_eq!(drops.encoder_counts().held_bytes, 0);
}

#[test]
fn where_there_is_room_encoders_stay_by_themselves() {
    let checkpoint = load(&folder("sd1"), TextEncoders::Auto, None);
    let EncoderCounts { bytes, held_bytes, reads } = checkpoint.encoder_counts();
    assert_eq!((held_bytes, reads), (bytes, 1));
}

/// Changes the encoder's file in the middle of a batch: only the row that needs it fails, and says why.
fn a_changed_file_fails_only_rows_that_need_it(path: &Path, file: &Path, change: impl FnOnce(&Path)) {
    let keeps = load(path, TextEncoders::Keep, None);
    let expected = picture(&keeps, "a star");
    let drops = dropping(path);
    let mut batch = RunningBatch::new(Arc::clone(&drops), 64, 64);
    batch.join(1, &asking("a star")).unwrap();
    batch.step(&[1]).unwrap();
    change(file);

    let error = batch.join(2, &asking("a new prompt")).unwrap_err();
    assert!(matches!(error, Error::Changed { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains(&file.display().to_string()) && text.contains("loaded anew"), "{text}");
    drops.prepare(&[asking("another one")], &[]);

    batch.join(3, &asking("a star")).unwrap();
    let mut finished = Finished::new();
    drain(&mut batch, &mut finished);
    let pictures = decode(&drops, finished);
    assert_eq!(pictures.len(), 2);
    assert!(pictures.iter().all(|picture| *picture == expected));
}

#[test]
fn an_encoder_that_is_gone_or_became_another_is_never_used() {
    let gone = |file: &Path| std::fs::remove_file(file).unwrap();
    // The encoder of another checkpoint, with tensors of the same names and shapes.
    let finetuned = |file: &Path| {
        let mut bytes = std::fs::read(file).unwrap();
        let last = bytes.len() - 100;
        bytes[last] ^= 1;
        let other = file.with_extension("new");
        std::fs::write(&other, bytes).unwrap();
        std::fs::rename(other, file).unwrap();
    };
    let cut = |file: &Path| std::fs::File::options().write(true).open(file).unwrap().set_len(1000).unwrap();
    for change in [&gone as &dyn Fn(&Path), &finetuned, &cut] {
        let copy = copy_of("sd1");
        let file = copy.path().join("text_encoder/model.safetensors");
        a_changed_file_fails_only_rows_that_need_it(copy.path(), &file, change);
        let (_folder, file) = Recipe::read("sd1").write(|_| {});
        a_changed_file_fails_only_rows_that_need_it(&file, &file, change);
    }
}
