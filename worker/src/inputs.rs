//! Pictures and latents that jobs start from: fetched, decoded and brought to the job's size beside the device, before the row
//! goes there.

use std::collections::HashMap;
use std::io::Cursor;
use std::sync::{Arc, Mutex, Weak};

use bytes::Bytes;
use engine::{InitContent, InitImage};
use farm::artifact::ArtifactError;
use farm::job::{Failure, FailureKind};
use farm::latent::{self, LatentFile};
use farm::spec::{self, Limits, MaskedContent, RenderSpec};
use image::{DynamicImage, ImageDecoder, ImageReader, RgbImage};

use crate::context::{Backoff, Context};

/// Why a row cannot have its pictures.
pub(crate) enum NoInput {
    /// The job fails.
    Failed(Failure),
    /// The worker stops while the artifact store is away: the job goes back.
    Stopped,
}

impl From<Failure> for NoInput {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// An object at a size.
type Name = (String, u32, u32);

/// Pictures that rows in hand hold: a thousand jobs that start from one picture decode it once as long as any of them
/// is under way.
#[derive(Default)]
pub(crate) struct Inputs(Mutex<HashMap<Name, Weak<RgbImage>>>);

impl Inputs {
    fn known(&self, name: &Name) -> Option<Arc<RgbImage>> {
        self.0.lock().expect("no holder of this lock panics").get(name)?.upgrade()
    }

    fn remember(&self, name: Name, picture: &Arc<RgbImage>) {
        let mut known = self.0.lock().expect("no holder of this lock panics");
        known.retain(|_, picture| picture.strong_count() > 0);
        known.insert(name, Arc::downgrade(picture));
    }
}

/// What a job starts from; `None`: from noise alone.
pub(crate) async fn fetch(context: &Context, spec: &RenderSpec) -> Result<Option<InitImage>, NoInput> {
    let Some(spec::InitImage { key, strength, mask }) = &spec.init_image else { return Ok(None) };
    let content = match latent::is_latent(key) {
        true => InitContent::Latent(Arc::new(latent(context, key).await?)),
        false => InitContent::Picture(picture(context, "init_image", key, spec).await?),
    };
    let mask = match mask {
        None => None,
        Some(mask) => {
            let content = match mask.content {
                MaskedContent::Original => engine::MaskedContent::Original,
                MaskedContent::Noise => engine::MaskedContent::Noise,
            };
            let colours = self::picture(context, "mask_image", &mask.key, spec).await?;
            Some(engine::Mask { picture: Arc::new(engine::gray(&colours)), blur: mask.blur, content })
        }
    };
    // Where the job says where it begins, its strength is not read.
    Ok(Some(InitImage { content, strength: strength.unwrap_or(1.0), mask }))
}

/// A latent, whose size the engine compares with the job's.
async fn latent(context: &Context, key: &str) -> Result<engine::Latent, NoInput> {
    let bytes = bytes(context, "init_image", key).await?;
    let read = tokio::task::spawn_blocking(move || {
        let LatentFile { channels, height, width, values } = LatentFile::read(&bytes)?;
        let shape = [channels, height, width].map(|side| side as usize);
        engine::Latent::new(values, shape).map_err(|error| error.to_string())
    });
    match read.await {
        Ok(read) => read.map_err(|problem| refused("init_image", key, format!("`{key}` {problem}")).into()),
        Err(panic) => Err(Failure { kind: FailureKind::Poison, message: format!("`init_image`: {panic}") }.into()),
    }
}

async fn picture(context: &Context, field: &str, key: &str, spec: &RenderSpec) -> Result<Arc<RgbImage>, NoInput> {
    let size = (spec.width, spec.height);
    let name = (key.to_owned(), size.0, size.1);
    if let Some(picture) = context.inputs.known(&name) {
        return Ok(picture);
    }
    let bytes = bytes(context, field, key).await?;
    let limits = context.limits.clone();
    let decoded =
        tokio::task::spawn_blocking(move || decode(bytes, &limits).map(|picture| engine::resized(picture, size)));
    match decoded.await {
        Ok(Ok(picture)) => {
            let picture = Arc::new(picture);
            context.inputs.remember(name, &picture);
            Ok(picture)
        }
        Ok(Err(problem)) => Err(refused(field, key, format!("`{key}` {problem}")).into()),
        Err(panic) => Err(Failure { kind: FailureKind::Poison, message: format!("`{field}`: {panic}") }.into()),
    }
}

fn refused(field: &str, key: &str, problem: String) -> Failure {
    let kind = if latent::is_latent(key) { "latent" } else { "picture" };
    Failure {
        kind: FailureKind::Invalid,
        message: format!("`{field}` must be a {kind} in the artifact store: {problem}"),
    }
}

/// An object's bytes; an artifact store that is away is waited for.
async fn bytes(context: &Context, field: &str, key: &str) -> Result<Bytes, NoInput> {
    let mut pause = Backoff::default();
    loop {
        match context.artifacts.get(key).await {
            Ok(bytes) if bytes.len() <= context.limits.init_image_bytes => return Ok(bytes),
            Ok(bytes) => {
                let (most, bytes) = (context.limits.init_image_bytes, bytes.len());
                return Err(refused(field, key, format!("`{key}` has {bytes} bytes, more than {most}")).into());
            }
            Err(error @ (ArtifactError::Unavailable(_) | ArtifactError::Full(_))) => {
                tracing::warn!(worker.id = %context.id, %error, key, "an init image could not be fetched: trying again");
            }
            Err(error) => return Err(refused(field, key, error.to_string()).into()),
        }
        if context.stop.run_until_cancelled(pause.rest()).await.is_none() {
            return Err(NoInput::Stopped);
        }
    }
}

/// A picture as its camera held it, in RGB; one that is too large is refused by its header.
fn decode(bytes: Bytes, limits: &Limits) -> Result<RgbImage, String> {
    let broken = |error: image::ImageError| format!("cannot be decoded: {error}");
    let reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(|error| error.to_string())?;
    let mut decoder = reader.into_decoder().map_err(broken)?;
    let (width, height) = decoder.dimensions();
    let pixels = u64::from(width) * u64::from(height);
    if pixels == 0 || pixels > limits.init_image_pixels {
        let most = limits.init_image_pixels;
        return Err(format!("has {width} × {height} pixels, where 1 to {most} are allowed"));
    }
    let orientation = decoder.orientation().map_err(broken)?;
    let mut picture = DynamicImage::from_decoder(decoder).map_err(broken)?;
    picture.apply_orientation(orientation);
    Ok(picture.into_rgb8())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The left half red, the right half blue.
    fn halves(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, _| image::Rgb(if x < width / 2 { [220, 10, 10] } else { [10, 10, 220] }))
    }

    fn encoded(format: image::ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        halves(16, 8).write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    }

    /// A JPEG with an EXIF block that says how the camera was held.
    fn turned(orientation: u8) -> Vec<u8> {
        let exif = [
            b"Exif\0\0MM\0*\0\0\0\x08".as_slice(),
            &[0, 1, 0x01, 0x12, 0, 3, 0, 0, 0, 1, 0, orientation, 0, 0, 0, 0, 0, 0],
        ]
        .concat();
        let plain = encoded(image::ImageFormat::Jpeg);
        let len = u16::try_from(exif.len() + 2).unwrap().to_be_bytes();
        [&plain[..2], &[0xff, 0xe1], &len, &exif, &plain[2..]].concat()
    }

    #[test]
    fn every_format_is_decoded_and_another_is_refused() {
        for format in [image::ImageFormat::Png, image::ImageFormat::Jpeg, image::ImageFormat::WebP] {
            let picture = decode(encoded(format).into(), &Limits::default()).unwrap();
            assert_eq!(picture.dimensions(), (16, 8), "{format:?}");
            assert!(picture.get_pixel(2, 4).0[0] > 150 && picture.get_pixel(13, 4).0[2] > 150, "{format:?}");
        }
        for bytes in [b"GIF89a".as_slice(), b"", b"<svg/>", &encoded(image::ImageFormat::Png)[..40]] {
            assert!(decode(bytes.to_vec().into(), &Limits::default()).is_err());
        }
    }

    #[test]
    fn a_picture_stands_as_its_camera_was_held() {
        // 6: turned right by a quarter to be upright. What was left is then at the top.
        let upright = decode(turned(6).into(), &Limits::default()).unwrap();
        assert_eq!(upright.dimensions(), (8, 16));
        assert!(upright.get_pixel(4, 2).0[0] > 150 && upright.get_pixel(4, 13).0[2] > 150);
        assert_eq!(decode(turned(1).into(), &Limits::default()).unwrap().dimensions(), (16, 8));
    }

    #[test]
    fn too_many_pixels_are_refused_by_the_header() {
        let limits = Limits { init_image_pixels: 127, ..Limits::default() };
        let problem = decode(encoded(image::ImageFormat::Png).into(), &limits).unwrap_err();
        assert_eq!(problem, "has 16 × 8 pixels, where 1 to 127 are allowed");
    }
}
