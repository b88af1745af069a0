//! What `kiln render` asks of its private farm: a request for each picture, with what they start from, and what the
//! refiner is asked for after them.

use std::path::Path;

use anyhow::{Context, Result, bail};
use farm::catalog::Catalog;
use farm::config::Config;
use farm::job::{JobView, Lane};
use farm::spec::{RenderRequest, RenderSpec};
use uuid::Uuid;

use crate::cli::RenderArgs;
use crate::client::Client;

/// A request for each picture, the first of them checked (they differ in their seeds alone).
pub fn requests(args: &RenderArgs, config: &Config, catalog: &Catalog) -> Result<Vec<RenderRequest>> {
    // Short enough to be typed again.
    let drawn = || i64::from(Uuid::new_v4().as_fields().0);
    let first = args.seed.unwrap_or_else(drawn);
    let Some(last) = first.checked_add(i64::from(args.count) - 1) else {
        bail!("--seed must leave room for {} seeds, but is {first}", args.count);
    };
    let request = RenderRequest {
        prompt: Some(args.prompt.clone()),
        negative_prompt: args.negative.clone(),
        width: args.width,
        height: args.height,
        steps: args.steps,
        guidance_scale: args.guidance,
        sampler: args.sampler.clone(),
        schedule: args.schedule.clone(),
        seed: Some(first),
        denoising_end: args.refiner.as_ref().map(|_| args.switch_at).or(args.denoising_end),
        lane: Some(Lane::Interactive.as_str().to_owned()),
        ..RenderRequest::default()
    };
    let check = |request: RenderRequest| request.validate(catalog, &config.limits, Lane::Interactive, || 0);
    let valid: RenderSpec = check(request.clone())?;
    if let Some(refiner) = &args.refiner {
        let latent = format!("latent.{}", farm::latent::EXTENSION);
        check(after(args, refiner, &valid, latent)).context("--refiner cannot go on from there")?;
    }
    Ok((first..=last).map(|seed| RenderRequest { seed: Some(seed), ..request.clone() }).collect())
}

/// What the refiner is asked for after a job that ended early.
pub fn refined(args: &RenderArgs, refiner: &str, job: &JobView) -> RenderRequest {
    after(args, refiner, &job.spec, job.image_key.clone().unwrap_or_default())
}

/// A request like that of `spec`, which goes on from a latent with the refiner.
fn after(args: &RenderArgs, refiner: &str, spec: &RenderSpec, latent: String) -> RenderRequest {
    let mask = spec.init_image.as_ref().and_then(|init| init.mask.as_ref());
    RenderRequest {
        model: Some(refiner.to_owned()),
        prompt: Some(spec.prompt.clone()),
        negative_prompt: Some(spec.negative_prompt.clone()),
        width: Some(spec.width.into()),
        height: Some(spec.height.into()),
        steps: Some(spec.steps.into()),
        guidance_scale: Some(spec.guidance_scale),
        sampler: args.sampler.clone(),
        schedule: args.schedule.clone(),
        seed: i64::try_from(spec.seed).ok(),
        init_image: Some(latent),
        mask_image: mask.map(|mask| mask.key.clone()),
        mask_blur: mask.map(|mask| mask.blur),
        denoising_start: Some(args.switch_at),
        lane: Some(Lane::Interactive.as_str().to_owned()),
        ..RenderRequest::default()
    }
}

/// The requests with the init image and the mask that the command line names, which the farm has by then.
pub async fn with_pictures(
    client: &Client,
    args: &RenderArgs,
    requests: Vec<RenderRequest>,
) -> Result<Vec<RenderRequest>> {
    let send = async |option: &str, path: &Path| -> Result<String> {
        let bytes = tokio::fs::read(path)
            .await
            .with_context(|| format!("{option} must be a picture, but `{}` cannot be read", path.display()))?;
        let stored = client.upload(bytes.into()).await;
        Ok(stored.with_context(|| format!("{option} `{}` was not taken", path.display()))?.key)
    };
    let Some(init) = &args.init else { return Ok(requests) };
    let init = send("--init", init).await?;
    let mask = match &args.mask {
        Some(mask) => Some(send("--mask", mask).await?),
        None => None,
    };
    let given = RenderRequest {
        init_image: Some(init),
        mask_image: mask,
        strength: args.strength,
        denoising_start: args.denoising_start,
        mask_blur: args.mask_blur,
        masked_content: args.masked_content.clone(),
        ..RenderRequest::default()
    };
    Ok(requests.into_iter().map(|request| request.or(&given)).collect())
}
