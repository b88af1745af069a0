//! What is stored of a rendered job: the PNG with its text (or the latent), and the JSON sidecar.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use chrono::{DateTime, Utc};
use farm::id::{JobId, SubmissionId, WorkerId};
use farm::latent::LatentFile;
use farm::spec::{RenderSpec, Sampler, Schedule};
use image::RgbImage;
use serde::Serialize;

/// What an image is a function of, and what made it. Written into the PNG's `kiln` chunk and the
/// sidecar.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Provenance {
    pub(crate) job_id: JobId,
    pub(crate) submission_id: SubmissionId,
    pub(crate) attempt: u32,
    pub(crate) spec: RenderSpec,
    pub(crate) kiln: &'static str,
    pub(crate) device: String,
    pub(crate) dtype: String,
}

/// Where a job's time went, in milliseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Timings {
    /// From being accepted to this attempt's claim.
    pub(crate) queued_ms: u64,
    /// From the claim to joining a batch.
    pub(crate) wait_ms: u64,
    /// Loading the checkpoint, which the worker did once for many jobs.
    pub(crate) load_ms: u64,
    /// From joining to the last step.
    pub(crate) denoise_ms: u64,
    /// From the last step to the picture.
    pub(crate) decode_ms: u64,
    /// Writing the PNG.
    pub(crate) encode_ms: u64,
    /// Storing the PNG, with retries.
    pub(crate) upload_ms: u64,
}

/// Who shared the passes; the picture does not depend on it.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct BatchSeen {
    pub(crate) largest: u32,
    pub(crate) mean: f64,
}

/// The JSON beside an image.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Sidecar {
    #[serde(flatten)]
    pub(crate) provenance: Provenance,
    pub(crate) worker: WorkerId,
    pub(crate) image_key: String,
    pub(crate) image_bytes: u64,
    pub(crate) sha256: String,
    pub(crate) rendered_at: DateTime<Utc>,
    pub(crate) batch: BatchSeen,
    pub(crate) timings: Timings,
}

pub(crate) fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// The text that A1111's web UI writes into its PNGs' `parameters`, and that image browsers read.
pub(crate) fn parameters(spec: &RenderSpec) -> String {
    let mut text = spec.prompt.clone();
    if !spec.negative_prompt.is_empty() {
        let _ = write!(text, "\nNegative prompt: {}", spec.negative_prompt);
    }
    let _ = write!(text, "\nSteps: {}", spec.steps);
    if let Some(sampler) = spec.sampler {
        let _ = write!(text, ", Sampler: {}", sampler_name(sampler));
    }
    if let Some(schedule) = spec.schedule {
        let _ = write!(text, ", Schedule type: {}", schedule_name(schedule));
    }
    let RenderSpec { guidance_scale, seed, width, height, model, .. } = spec;
    let _ =
        write!(text, ", CFG scale: {guidance_scale}, Seed: {seed}, Size: {width}x{height}, Model: {}", quoted(model));
    if let Some(init) = &spec.init_image {
        if let Some(strength) = init.strength {
            let _ = write!(text, ", Denoising strength: {strength}");
        }
        if let Some(start) = spec.options.denoising_start {
            let _ = write!(text, ", Denoising start: {start}");
        }
        if let Some(mask) = &init.mask {
            let _ = write!(text, ", Mask blur: {}", mask.blur);
        }
    }
    text
}

fn sampler_name(sampler: Sampler) -> &'static str {
    match sampler {
        Sampler::Ddim => "DDIM",
        Sampler::Euler => "Euler",
        Sampler::EulerAncestral => "Euler a",
        Sampler::Dpmpp2m => "DPM++ 2M",
        Sampler::Pndm => "PLMS",
        Sampler::FlowMatchEuler => "Euler",
    }
}

fn schedule_name(schedule: Schedule) -> &'static str {
    match schedule {
        Schedule::Normal => "Uniform",
        Schedule::Karras => "Karras",
        Schedule::Exponential => "Exponential",
        Schedule::Beta => "Beta",
    }
}

/// A value that would read as several is written as a JSON string.
fn quoted(value: &str) -> Cow<'_, str> {
    if value.contains([',', ':', '\n']) { serde_json::json!(value).to_string().into() } else { value.into() }
}

/// Writes a PNG with both texts: `parameters` as `tEXt` where Latin-1 holds it, else as `iTXt`; `kiln`
/// always as `iTXt`.
pub(crate) fn encode(image: &RgbImage, provenance: &Provenance) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(image.as_raw().len() / 2);
    let mut encoder = png::Encoder::new(&mut bytes, image.width(), image.height());
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_compression(png::Compression::Fast);
    let text = parameters(&provenance.spec);
    if text.chars().all(|character| u32::from(character) < 256) {
        encoder.add_text_chunk("parameters".into(), text)?;
    } else {
        encoder.add_itxt_chunk("parameters".into(), text)?;
    }
    encoder.add_itxt_chunk("kiln".into(), serde_json::to_string(provenance)?)?;
    let mut writer = encoder.write_header()?;
    writer.write_image_data(image.as_raw())?;
    writer.finish()?;
    Ok(bytes)
}

/// Writes a latent with the text that a PNG has in its `kiln` chunk.
pub(crate) fn encode_latent(latent: &LatentFile, provenance: &Provenance) -> anyhow::Result<Vec<u8>> {
    Ok(latent.write(BTreeMap::from([("kiln".to_owned(), serde_json::to_string(provenance)?)])))
}

#[cfg(test)]
mod tests {
    use super::*;
    use farm::job::Lane;
    use farm::spec::{InitImage, Mask, MaskedContent};

    fn spec() -> RenderSpec {
        RenderSpec {
            model: "demo".into(),
            prompt: "a red star".into(),
            negative_prompt: String::new(),
            width: 4,
            height: 2,
            steps: 20,
            guidance_scale: 7.5,
            sampler: Some(Sampler::EulerAncestral),
            schedule: None,
            seed: 42,
            init_image: None,
            lane: Lane::Bulk,
            tags: vec![],
            metadata: serde_json::Map::new(),
            options: farm::spec::FamilyOptions::default(),
        }
    }

    fn provenance(spec: RenderSpec) -> Provenance {
        Provenance {
            job_id: JobId::new(),
            submission_id: SubmissionId::new(),
            attempt: 2,
            spec,
            kiln: "0.1.0",
            device: "cpu".into(),
            dtype: "f32".into(),
        }
    }

    fn read(bytes: &[u8]) -> (png::Reader<std::io::Cursor<&[u8]>>, Vec<u8>) {
        let mut reader = png::Decoder::new(std::io::Cursor::new(bytes)).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut pixels).unwrap();
        (reader, pixels)
    }

    #[test]
    fn the_parameters_read_as_a1111_writes_them() {
        let expected = "a red star\nSteps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 42, Size: 4x2, Model: demo";
        assert_eq!(parameters(&spec()), expected);
        let mask = Mask { key: "uploads/m.png".into(), blur: 4.0, content: MaskedContent::Original };
        let init = InitImage { key: "uploads/a.png".into(), strength: Some(0.6), mask: Some(mask) };
        let started = parameters(&RenderSpec { init_image: Some(init), ..spec() });
        assert_eq!(started, format!("{expected}, Denoising strength: 0.6, Mask blur: 4"));
        let options = farm::spec::FamilyOptions { denoising_start: Some(0.8), ..Default::default() };
        let init = InitImage { key: "uploads/a.8x8.safetensors".into(), strength: None, mask: None };
        let refined = parameters(&RenderSpec { init_image: Some(init), options, ..spec() });
        assert_eq!(refined, format!("{expected}, Denoising start: 0.8"));
        let spec = RenderSpec {
            negative_prompt: "blurry".into(),
            guidance_scale: 7.0,
            schedule: Some(Schedule::Karras),
            model: "a, b".into(),
            ..spec()
        };
        let expected = "a red star\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, Schedule type: Karras, CFG scale: 7, Seed: 42, Size: 4x2, Model: \"a, b\"";
        assert_eq!(parameters(&spec), expected);
    }

    #[test]
    fn a_png_carries_its_pixels_and_both_texts() {
        let image = RgbImage::from_fn(4, 2, |x, y| image::Rgb([x as u8, y as u8, 200]));
        let provenance = provenance(RenderSpec { prompt: "un café".into(), ..spec() });
        let bytes = encode(&image, &provenance).unwrap();
        let (reader, pixels) = read(&bytes);
        assert_eq!(pixels, *image.as_raw());
        let info = reader.info();
        let [parameters] = &info.uncompressed_latin1_text[..] else { panic!("one tEXt chunk") };
        assert_eq!((parameters.keyword.as_str(), parameters.text.lines().next()), ("parameters", Some("un café")));
        let [kiln] = &info.utf8_text[..] else { panic!("one iTXt chunk") };
        assert_eq!(kiln.keyword, "kiln");
        let kiln: serde_json::Value = serde_json::from_str(&kiln.get_text().unwrap()).unwrap();
        assert_eq!(kiln["job_id"], provenance.job_id.to_string());
        assert_eq!((&kiln["attempt"], &kiln["spec"]["seed"]), (&2.into(), &42.into()));
    }

    #[test]
    fn a_latent_carries_its_numbers_and_where_it_came_from() {
        let latent = LatentFile { channels: 1, height: 1, width: 2, values: vec![0.5, -3.0] };
        let provenance = provenance(RenderSpec { prompt: "un café".into(), ..spec() });
        let bytes = encode_latent(&latent, &provenance).unwrap();
        assert_eq!(LatentFile::read(&bytes).unwrap(), latent);
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        let kiln: serde_json::Value = serde_json::from_str(header["__metadata__"]["kiln"].as_str().unwrap()).unwrap();
        assert_eq!((&kiln["spec"]["prompt"], &kiln["attempt"]), (&"un café".into(), &2.into()));
    }

    #[test]
    fn a_prompt_beyond_latin_1_goes_into_an_itxt_chunk() {
        let provenance = provenance(RenderSpec { prompt: "赤い星 ★".into(), ..spec() });
        let bytes = encode(&RgbImage::new(4, 2), &provenance).unwrap();
        let (reader, _) = read(&bytes);
        let info = reader.info();
        assert!(info.uncompressed_latin1_text.is_empty());
        let parameters = info.utf8_text.iter().find(|chunk| chunk.keyword == "parameters").unwrap();
        assert!(parameters.get_text().unwrap().starts_with("赤い星 ★\nSteps: 20"));
    }
}
