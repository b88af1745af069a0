//! Every route. A path and its place in the OpenAPI document come from the same line, its handler's attribute.

use axum::Router;
use axum::http::{Method, Uri};
use axum::middleware::{from_fn, from_fn_with_state};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::error::{ApiError, ProblemKind};
use super::{
    SharedApi, artifacts, auth, health, image, jobs, models, observe, openapi, scrape, stream, submissions, workers,
};

/// Routes that answer at once, open to everybody.
fn open() -> OpenApiRouter<SharedApi> {
    OpenApiRouter::new()
        .routes(routes!(health::healthz))
        .routes(routes!(health::readyz))
        .routes(routes!(openapi::serve))
}

/// Routes that answer at once.
fn quick() -> OpenApiRouter<SharedApi> {
    OpenApiRouter::new()
        .routes(routes!(jobs::submit, jobs::list))
        .routes(routes!(jobs::get, jobs::cancel))
        .routes(routes!(jobs::retry))
        .routes(routes!(image::image))
        .routes(routes!(image::sidecar))
        .routes(routes!(submissions::list))
        .routes(routes!(submissions::get))
        .routes(routes!(models::list))
        .routes(routes!(workers::list))
        .routes(routes!(scrape::metrics))
}

/// Routes that take as long as they take: they follow a job, take a picture in, or touch millions.
fn long() -> OpenApiRouter<SharedApi> {
    OpenApiRouter::new()
        .routes(routes!(stream::follow))
        .routes(routes!(artifacts::store))
        .routes(routes!(submissions::submit))
        .routes(routes!(submissions::cancel))
        .routes(routes!(submissions::retry))
}

/// All routes with their documentation.
pub(super) fn documented() -> OpenApiRouter<SharedApi> {
    OpenApiRouter::with_openapi(openapi::preamble()).merge(open()).merge(quick()).merge(long())
}

/// The service: routes, and what every request passes through.
pub(crate) fn router(api: SharedApi) -> Router {
    let limited = open().merge(quick()).layer(from_fn(observe::limit_time));
    let (routes, _document) = limited.merge(long()).split_for_parts();
    routes
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(from_fn_with_state(api.clone(), auth::check))
        .layer(from_fn_with_state(api.clone(), observe::observe))
        .with_state(api)
}

async fn no_route(uri: Uri) -> ApiError {
    ApiError::new(ProblemKind::NotFound, format!("there is nothing at `{}`; /openapi.json lists all paths", uri.path()))
}

async fn no_method(method: Method, uri: Uri) -> ApiError {
    let detail = format!("`{}` does not answer {method}; /openapi.json lists all paths", uri.path());
    ApiError::new(ProblemKind::MethodNotAllowed, detail)
}
