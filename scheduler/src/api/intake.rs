//! A submission as JSON Lines: read, checked and spooled line by line, then stored whole. Memory holds one line
//! and one piece of the body, however long the body is; a bad line, or a client that goes away, leaves nothing.

use axum::body::Body;
use axum::extract::Query;
use axum::http::Uri;
use axum::response::Response;
use farm::artifact::ArtifactStore;
use farm::catalog::Catalog;
use farm::job::{Lane, NewSubmission};
use farm::spec::{Limits, RenderRequest};
use serde::{Deserialize, Serialize};
use utoipa::IntoParams;

use super::Api;
use super::body::Pieces;
use super::error::ApiError;
use super::idempotency::{Fingerprint, ScopedKey};
use super::query::{parameter, read_query};
use crate::images::Uploads;
use crate::refusal::{read_json, refuse};
use crate::submission::{LineSplitter, Spool, SpooledJobs, draw_seed};

/// What holds for the whole submission (JSON Lines only).
#[derive(Debug, Default, Serialize, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct LinesParameters {
    /// A name of the client's own, shown in listings.
    name: Option<String>,
    /// Once so many jobs have failed, the rest is cancelled.
    #[param(value_type = Option<u64>)]
    failure_limit: Option<String>,
    /// How many times a job is tried before it fails.
    #[param(value_type = Option<u32>)]
    max_attempts: Option<String>,
    /// The checkpoint of lines that name none.
    model: Option<String>,
    /// The negative prompt of lines without one.
    negative_prompt: Option<String>,
    /// The width of lines without one.
    #[param(value_type = Option<u32>)]
    width: Option<String>,
    /// The height of lines without one.
    #[param(value_type = Option<u32>)]
    height: Option<String>,
    /// The steps of lines without any.
    #[param(value_type = Option<u32>)]
    steps: Option<String>,
    /// The guidance scale of lines without one.
    #[param(value_type = Option<f64>)]
    guidance_scale: Option<String>,
    /// The sampler of lines without one.
    sampler: Option<String>,
    /// The schedule of lines without one.
    schedule: Option<String>,
    /// The `max_sequence_length` of lines without one.
    #[param(value_type = Option<u32>)]
    max_sequence_length: Option<String>,
    /// The `true_cfg_scale` of lines without one.
    #[param(value_type = Option<f64>)]
    true_cfg_scale: Option<String>,
    /// The picture that lines without one start from: a key that `POST /v1/artifacts` answered, or an `s3://` address.
    init_image: Option<String>,
    /// The mask of lines without one.
    mask_image: Option<String>,
    /// The strength of lines without one.
    #[param(value_type = Option<f64>)]
    strength: Option<String>,
    /// The blur of the mask of lines without one.
    #[param(value_type = Option<f64>)]
    mask_blur: Option<String>,
    /// What the painted part starts from, of lines that do not say.
    masked_content: Option<String>,
    /// The lane of lines without one. Default: `bulk`.
    lane: Option<String>,
}

impl LinesParameters {
    fn settings(&self, api: &Api) -> Result<NewSubmission, ApiError> {
        let whole = |name, text: &Option<String>| parameter(name, "a whole number", text.as_deref());
        let failure_limit = whole("failure_limit", &self.failure_limit)?;
        let max_attempts = whole("max_attempts", &self.max_attempts)?;
        api.new_submission(self.name.clone(), failure_limit, max_attempts)
    }

    fn defaults(self) -> Result<RenderRequest, ApiError> {
        let whole = |name, text: Option<String>| parameter(name, "a whole number", text.as_deref());
        let number = |name, text: Option<String>| parameter(name, "a number", text.as_deref());
        Ok(RenderRequest {
            model: self.model,
            negative_prompt: self.negative_prompt,
            width: whole("width", self.width)?,
            height: whole("height", self.height)?,
            steps: whole("steps", self.steps)?,
            guidance_scale: number("guidance_scale", self.guidance_scale)?,
            sampler: self.sampler,
            schedule: self.schedule,
            max_sequence_length: whole("max_sequence_length", self.max_sequence_length)?,
            true_cfg_scale: number("true_cfg_scale", self.true_cfg_scale)?,
            init_image: self.init_image,
            mask_image: self.mask_image,
            strength: number("strength", self.strength)?,
            mask_blur: number("mask_blur", self.mask_blur)?,
            masked_content: self.masked_content,
            lane: self.lane,
            ..RenderRequest::default()
        })
    }
}

/// Takes a submission in.
pub(super) async fn submit(api: &Api, uri: &Uri, key: Option<ScopedKey>, body: Body) -> Result<Response, ApiError> {
    let parameters: LinesParameters = read_query(Query::try_from_uri(uri))?;
    let mut submission = parameters.settings(api)?;
    let mut intake = Intake {
        catalog: &api.catalog,
        limits: &api.limits,
        fingerprint: Fingerprint::new("POST /v1/submissions, JSON Lines").with_request(&parameters),
        defaults: parameters.defaults()?,
        spool: Spool::create(api.config.spool_dir.as_deref()).await?,
        artifacts: api.artifacts.as_ref(),
        uploads: Uploads::default(),
    };
    let mut pieces = Pieces::of(body);
    match intake.take_all(&mut pieces).await {
        Ok(()) => {}
        Err(error) => {
            pieces.drain();
            return Err(error);
        }
    }
    let Intake { spool, fingerprint, .. } = intake;
    if spool.jobs() == 0 {
        return Err(refuse("body", "at least one line with a job", "no line").into());
    }
    submission.idempotency = key.map(|key| key.of(fingerprint));
    let spooled: SpooledJobs = spool.finish().await?;
    api.store_submission(&submission, spooled.into_stream()).await
}

/// A submission being read.
struct Intake<'a> {
    catalog: &'a Catalog,
    limits: &'a Limits,
    defaults: RenderRequest,
    fingerprint: Fingerprint,
    spool: Spool,
    artifacts: &'a dyn ArtifactStore,
    /// Pictures of the lines since the last piece of the body.
    uploads: Uploads,
}

impl Intake<'_> {
    async fn take_all(&mut self, pieces: &mut Pieces) -> Result<(), ApiError> {
        let mut lines = LineSplitter::new(self.limits.body_bytes);
        while let Some(piece) = pieces.next().await? {
            let taken = lines.push(&piece, |number, line| self.take(number, line));
            taken.map_err(|error| error.at_line(lines.line()))?;
            self.spool.flush().await?;
            self.uploads.store(self.artifacts).await?;
        }
        lines.finish(|number, line| self.take(number, line))?;
        Ok(self.uploads.store(self.artifacts).await?)
    }

    fn take(&mut self, number: u64, line: &[u8]) -> Result<(), ApiError> {
        let checked = read_json::<RenderRequest>(line).map_err(ApiError::from).and_then(|request| {
            if self.spool.jobs() == self.limits.submission_jobs {
                let limit = format!("at most {} jobs", self.limits.submission_jobs);
                return Err(refuse("body", limit, "more").into());
            }
            let mut request = request.or(&self.defaults);
            self.uploads.take_in(&mut request, self.limits, self.artifacts)?;
            Ok(request.validate(self.catalog, self.limits, Lane::Bulk, draw_seed)?)
        });
        let spec = checked.map_err(|error| error.at_line(number))?;
        self.fingerprint.add(line);
        self.spool.push(&spec);
        Ok(())
    }
}
