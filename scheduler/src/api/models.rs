//! `/v1/models`: the checkpoints that jobs may name.

use axum::Json;
use axum::extract::State;
use farm::catalog::ModelFacts;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::SharedApi;
use super::openapi::Problems;

/// The catalog.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Models {
    /// The checkpoint of jobs that name none.
    pub default: String,
    /// Every checkpoint, by name.
    pub models: Vec<ModelView>,
}

/// A checkpoint and its defaults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ModelView {
    /// What jobs call it.
    pub name: String,
    /// What is known about it.
    #[serde(flatten)]
    pub facts: ModelFacts,
}

/// List the checkpoints.
#[utoipa::path(get, path = "/v1/models", tag = "farm", responses((status = 200, body = Models), Problems))]
pub(super) async fn list(State(api): State<SharedApi>) -> Json<Models> {
    let models = api.catalog.models().map(|(name, facts)| ModelView { name: name.to_owned(), facts: facts.clone() });
    Json(Models { default: api.catalog.default_model().to_owned(), models: models.collect() })
}
