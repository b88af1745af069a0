//! `/openapi.json`: the API's description, made from the handlers themselves.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use axum::http::header;
use axum::response::{IntoResponse, Response};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{
    ComponentsBuilder, ContentBuilder, InfoBuilder, License, OpenApi, OpenApiBuilder, Ref, RefOr, ResponseBuilder,
};
use utoipa::{IntoResponses, PartialSchema, ToSchema};

use super::error::Problem;
use super::router::documented;

/// The name of the security scheme.
const API_KEY: &str = "api_key";

/// The answers that every route may give beside its own: problem documents.
pub(super) struct Problems;

impl IntoResponses for Problems {
    fn responses() -> BTreeMap<String, RefOr<utoipa::openapi::Response>> {
        let problem = |description: &str| {
            let content = ContentBuilder::new().schema(Some(Ref::from_schema_name(Problem::name()))).build();
            let response = ResponseBuilder::new().description(description);
            RefOr::T(response.content("application/problem+json", content).build())
        };
        BTreeMap::from([
            (
                "4XX".to_owned(),
                problem("The request is at fault: the problem names the field, its limit and its value"),
            ),
            ("5XX".to_owned(), problem("The farm is at fault; nothing that was accepted is lost")),
        ])
    }
}

/// What the document says before any route.
pub(super) fn preamble() -> OpenApi {
    let scheme = HttpBuilder::new()
        .scheme(HttpAuthScheme::Bearer)
        .description(Some("An API key. Not needed where the scheduler has none configured and listens on loopback."));
    let components = ComponentsBuilder::new()
        .schema(Problem::name(), Problem::schema())
        .schema(farm::job::JobState::name(), farm::job::JobState::schema())
        .security_scheme(API_KEY, SecurityScheme::Http(scheme.build()));
    let info = InfoBuilder::new()
        .title("Kiln")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some("A render farm: submit prompts, get every picture once."))
        .license(Some(License::new(env!("CARGO_PKG_LICENSE"))));
    OpenApiBuilder::new()
        .info(info.build())
        .components(Some(components.build()))
        .security(Some([SecurityRequirement::new::<_, [&str; 0], &str>(API_KEY, [])]))
        .build()
}

/// The API's description.
pub fn document() -> OpenApi {
    documented().into_openapi()
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", tag = "health", security(()), responses((status = 200, body = serde_json::Value)))]
pub(super) async fn serve() -> Response {
    static TEXT: LazyLock<String> =
        LazyLock::new(|| document().to_pretty_json().expect("the document can be written as JSON"));
    ([(header::CONTENT_TYPE, "application/json")], TEXT.as_str()).into_response()
}
