//! `/openapi.json`.

use std::collections::BTreeSet;

use reqwest::{Method, StatusCode};
use serde_json::Value;
use uuid::Uuid;

use crate::support::{Answer, Farm};

async fn document(farm: &Farm) -> Value {
    let answer = farm.get("/openapi.json").await.with_status(StatusCode::OK);
    assert_eq!(answer.header("content-type"), "application/json");
    answer.json
}

#[tokio::test]
async fn the_document_lists_every_route_and_every_listed_route_answers() {
    let farm = Farm::start().await;
    let document = document(&farm).await;
    let mut listed = BTreeSet::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for method in item.as_object().unwrap().keys() {
            listed.insert(format!("{} {path}", method.to_uppercase()));
        }
    }
    let expected = [
        "GET /healthz",
        "GET /metrics",
        "GET /openapi.json",
        "GET /readyz",
        "GET /v1/jobs",
        "POST /v1/jobs",
        "DELETE /v1/jobs/{id}",
        "GET /v1/jobs/{id}",
        "GET /v1/jobs/{id}/image",
        "POST /v1/jobs/{id}/retry",
        "GET /v1/jobs/{id}/sidecar",
        "GET /v1/jobs/{id}/stream",
        "GET /v1/models",
        "GET /v1/submissions",
        "POST /v1/submissions",
        "DELETE /v1/submissions/{id}",
        "GET /v1/submissions/{id}",
        "POST /v1/submissions/{id}/retry",
        "GET /v1/workers",
        "POST /v1/artifacts",
    ];
    assert_eq!(listed, expected.map(str::to_owned).into());
    for route in listed {
        let (method, path) = route.split_once(' ').unwrap();
        let path = path.replace("{id}", &Uuid::now_v7().to_string());
        let answer = Answer::of(farm.request(Method::from_bytes(method.as_bytes()).unwrap(), &path)).await;
        let detail = answer.json["detail"].as_str().unwrap_or_default();
        assert!(!detail.contains("/openapi.json"), "{route}: {detail}");
    }
}

#[tokio::test]
async fn every_reference_in_the_document_leads_somewhere() {
    let farm = Farm::start().await;
    let document = document(&farm).await;
    let mut references = Vec::new();
    collect_references(&document, &mut references);
    assert!(references.len() > 20, "{references:?}");
    for reference in references {
        let pointer = reference.strip_prefix('#').expect("references stay in the document");
        assert!(document.pointer(pointer).is_some(), "{reference} leads nowhere");
    }
}

fn collect_references<'a>(value: &'a Value, references: &mut Vec<&'a str>) {
    match value {
        Value::Object(members) => {
            references.extend(members.get("$ref").and_then(Value::as_str));
            members.values().for_each(|member| collect_references(member, references));
        }
        Value::Array(items) => items.iter().for_each(|item| collect_references(item, references)),
        _ => {}
    }
}

#[tokio::test]
async fn bodies_answers_and_problems_have_schemas() {
    let farm = Farm::start().await;
    let document = document(&farm).await;
    let schemas = document["components"]["schemas"].as_object().unwrap();
    for name in [
        "RenderRequest",
        "RenderSpec",
        "SubmissionRequest",
        "SweepValues",
        "SeedRange",
        "JobAccepted",
        "SubmissionAccepted",
        "JobView",
        "JobPage",
        "JobState",
        "SubmissionView",
        "SubmissionPage",
        "Counters",
        "StreamEvent",
        "Models",
        "Workers",
        "Ready",
        "Problem",
    ] {
        assert!(schemas.contains_key(name), "{name} is not among {:?}", schemas.keys().collect::<Vec<_>>());
    }
    assert!(schemas["RenderRequest"]["properties"]["steps"]["description"].is_string());
    let content = &document["paths"]["/v1/submissions"]["post"]["requestBody"]["content"];
    for kind in ["application/json", "application/x-ndjson"] {
        assert!(content[kind]["schema"]["$ref"].is_string(), "{kind} of {content}");
    }
    let problem = &document["paths"]["/v1/jobs"]["post"]["responses"]["4XX"]["content"]["application/problem+json"];
    assert_eq!(problem["schema"]["$ref"], "#/components/schemas/Problem");
    assert_eq!(document["components"]["securitySchemes"]["api_key"]["scheme"], "bearer");
    assert_eq!(document["paths"]["/healthz"]["get"]["security"], serde_json::json!([{}]));
}
