//! Init images, masks and latents as clients send them: looked at before anything is decoded, named by what they hold, and
//! stored before the job that names them.

use std::collections::HashMap;
use std::io::Cursor;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use farm::artifact::{self, ArtifactKey, ArtifactStore, UploadFormat};
use farm::latent::LatentFile;
use farm::spec::{Limits, RenderRequest, ValidationError};
use image::{ImageFormat, ImageReader};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::refusal::refuse;
use crate::submission::{SubmissionRequest, SweepValues};

/// The fields that hold pictures.
const FIELDS: [&str; 2] = ["init_image", "mask_image"];

/// What may be stored for jobs to start from.
#[derive(Clone, Debug)]
pub(crate) struct Upload {
    pub(crate) sha256: String,
    pub(crate) format: UploadFormat,
    pub(crate) bytes: Bytes,
    pub(crate) width: u32,
    pub(crate) height: u32,
}

impl Upload {
    /// A picture or a latent within the limits. Only a picture's header is read.
    pub(crate) fn check(field: &str, bytes: Bytes, limits: &Limits) -> Result<Self, ValidationError> {
        check_bytes(field, bytes.len(), limits)?;
        let (format, width, height) =
            if LatentFile::is_one(&bytes) { latent(field, &bytes)? } else { picture(field, &bytes, limits)? };
        let digest = Sha256::digest(&bytes);
        let sha256 = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { sha256, format, bytes, width, height })
    }

    /// What it is stored as.
    pub(crate) fn key(&self) -> ArtifactKey {
        ArtifactKey::Upload { sha256: self.sha256.clone(), format: self.format }
    }
}

/// What a picture is, and its pixels.
fn picture(field: &str, bytes: &Bytes, limits: &Limits) -> Result<(UploadFormat, u32, u32), ValidationError> {
    let kinds = "a PNG, JPEG or WebP picture";
    let reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format();
    let reader = reader.map_err(|error| refuse(field, kinds, format!("bytes that cannot be read: {error}")))?;
    let format = match reader.format() {
        Some(ImageFormat::Png) => UploadFormat::Png,
        Some(ImageFormat::Jpeg) => UploadFormat::Jpeg,
        Some(ImageFormat::WebP) => UploadFormat::Webp,
        _ => return Err(refuse(field, kinds, "something else")),
    };
    let size = reader.into_dimensions();
    let (width, height) = size.map_err(|error| refuse(field, kinds, format!("a broken one: {error}")))?;
    let pixels = u64::from(width) * u64::from(height);
    if pixels == 0 || pixels > limits.init_image_pixels {
        let limit = format!("a picture of 1 to {} pixels", limits.init_image_pixels);
        return Err(refuse(field, limit, format!("{width} × {height}")));
    }
    Ok((format, width, height))
}

/// A latent's values.
fn latent(field: &str, bytes: &Bytes) -> Result<(UploadFormat, u32, u32), ValidationError> {
    let kinds = "a PNG, JPEG or WebP picture, or a latent (a safetensors file)";
    let read = LatentFile::read(bytes).map_err(|problem| refuse(field, kinds, format!("a file that {problem}")))?;
    let (width, height) = (read.width, read.height);
    Ok((UploadFormat::Latent { width, height }, width, height))
}

fn check_bytes(field: &str, bytes: usize, limits: &Limits) -> Result<(), ValidationError> {
    if bytes <= limits.init_image_bytes {
        return Ok(());
    }
    Err(refuse(field, format!("a picture of at most {} bytes", limits.init_image_bytes), format!("{bytes} bytes")))
}

/// Pictures that came within requests, to be stored before their jobs are.
#[derive(Debug, Default)]
pub(crate) struct Uploads(HashMap<String, (ArtifactKey, Bytes)>);

impl Uploads {
    /// Puts keys in place of the data URLs and addresses of a request.
    pub(crate) fn take_in(
        &mut self,
        request: &mut RenderRequest,
        limits: &Limits,
        artifacts: &dyn ArtifactStore,
    ) -> Result<(), ValidationError> {
        let [init, mask] = FIELDS;
        for (field, value) in [(init, &mut request.init_image), (mask, &mut request.mask_image)] {
            if let Some(text) = value {
                self.replace(field, text, limits, artifacts)?;
            }
        }
        Ok(())
    }

    /// The same for all requests of a submission.
    pub(crate) fn take_in_all(
        &mut self,
        submission: &mut SubmissionRequest,
        limits: &Limits,
        artifacts: &dyn ArtifactStore,
    ) -> Result<(), ValidationError> {
        let within = |place: String, refusal: ValidationError| ValidationError {
            field: format!("{place}.{}", refusal.field),
            ..refusal
        };
        if let Some(defaults) = &mut submission.defaults {
            self.take_in(defaults, limits, artifacts).map_err(|refusal| within("defaults".into(), refusal))?;
        }
        for (place, job) in submission.jobs.iter_mut().flatten().enumerate() {
            self.take_in(job, limits, artifacts).map_err(|refusal| within(format!("jobs[{place}]"), refusal))?;
        }
        for (field, values) in submission.sweep.iter_mut().flat_map(|sweep| &mut sweep.0) {
            let SweepValues::List(list) = values else { continue };
            if !FIELDS.contains(&field.as_str()) {
                continue;
            }
            for value in list {
                if let Value::String(text) = value {
                    self.replace(field, text, limits, artifacts).map_err(|refusal| within("sweep".into(), refusal))?;
                }
            }
        }
        Ok(())
    }

    fn replace(
        &mut self,
        field: &str,
        text: &mut String,
        limits: &Limits,
        artifacts: &dyn ArtifactStore,
    ) -> Result<(), ValidationError> {
        if text.starts_with("s3://") {
            let refusal = || refuse(field, "an address in the farm's own bucket", format!("`{text}`"));
            *text = artifacts.path_of(text).ok_or_else(refusal)?;
        } else if let Some(url) = text.strip_prefix("data:") {
            let upload = Upload::check(field, decoded(field, url, limits)?, limits)?;
            let key = upload.key();
            *text = key.path();
            self.0.insert(key.path(), (key, upload.bytes));
        }
        Ok(())
    }

    /// Stores what has come together.
    pub(crate) async fn store(&mut self, artifacts: &dyn ArtifactStore) -> artifact::Result<()> {
        for (_, (key, bytes)) in self.0.drain() {
            artifacts.put(&key, bytes).await?;
        }
        Ok(())
    }
}

/// The bytes of a data URL, without its `data:`.
fn decoded(field: &str, url: &str, limits: &Limits) -> Result<Bytes, ValidationError> {
    let base64 = url.split_once(',').filter(|(head, _)| head.ends_with(";base64")).map(|(_, text)| text);
    let base64 = base64.ok_or_else(|| refuse(field, "a data URL in base64 (`data:image/png;base64,…`)", "another"))?;
    check_bytes(field, base64.len() / 4 * 3, limits)?;
    match STANDARD.decode(base64) {
        Ok(bytes) => Ok(bytes.into()),
        Err(error) => Err(refuse(field, "a data URL in base64", format!("one with an error: {error}"))),
    }
}
