//! `/v1/workers`: who renders.

use axum::Json;
use axum::extract::State;
use farm::store::WorkerView;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::SharedApi;
use super::error::ApiError;
use super::openapi::Problems;

/// The fleet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Workers {
    /// Workers, the live ones first; those silent for over a day are left out.
    pub workers: Vec<WorkerView>,
}

/// List the workers.
#[utoipa::path(get, path = "/v1/workers", tag = "farm", responses((status = 200, body = Workers), Problems))]
pub(super) async fn list(State(api): State<SharedApi>) -> Result<Json<Workers>, ApiError> {
    Ok(Json(Workers { workers: api.store.workers().await? }))
}
