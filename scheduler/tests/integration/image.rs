//! What a job has made.

use farm::job::Lane;
use reqwest::{Method, StatusCode};
use serde_json::json;

use crate::support::{Answer, Farm, png};

async fn done_job(farm: &Farm) -> String {
    let job = farm.submit(json!({"prompt": "a"})).await;
    farm.take("demo", Lane::Interactive).await.finish().await;
    job
}

#[tokio::test]
async fn the_image_comes_as_bytes_with_its_hash_as_tag() {
    let farm = Farm::start().await;
    let job = done_job(&farm).await;
    let image = farm.get(&format!("/v1/jobs/{job}/image")).await.with_status(StatusCode::OK);
    assert_eq!((image.header("content-type"), &image.bytes), ("image/png", &png()));
    assert!(image.header("cache-control").contains("immutable"));
    let sha256 = farm.get(&format!("/v1/jobs/{job}")).await.json["sha256"].as_str().unwrap().to_owned();
    assert_eq!(image.header("etag"), format!("\"{sha256}\""));

    let request =
        farm.request(Method::GET, &format!("/v1/jobs/{job}/image")).header("if-none-match", image.header("etag"));
    assert_eq!(Answer::of(request).await.with_status(StatusCode::NOT_MODIFIED).bytes.len(), 0);
    let request = farm.request(Method::GET, &format!("/v1/jobs/{job}/image")).header("if-none-match", "\"other\"");
    Answer::of(request).await.with_status(StatusCode::OK);
    let head =
        Answer::of(farm.request(Method::HEAD, &format!("/v1/jobs/{job}/image"))).await.with_status(StatusCode::OK);
    assert_eq!((head.header("content-type"), head.bytes.len()), ("image/png", 0));
}

#[tokio::test]
async fn the_sidecar_comes_as_json() {
    let farm = Farm::start().await;
    let job = done_job(&farm).await;
    let sidecar = farm.get(&format!("/v1/jobs/{job}/sidecar")).await.with_status(StatusCode::OK);
    assert_eq!((sidecar.header("content-type"), &sidecar.json), ("application/json", &json!({"seed": 1})));
}

#[tokio::test]
async fn where_objects_have_urls_the_client_is_sent_there() {
    let farm = Farm::start().await;
    let job = done_job(&farm).await;
    farm.artifact_faults.presign();
    let image = farm.get(&format!("/v1/jobs/{job}/image")).await.with_status(StatusCode::TEMPORARY_REDIRECT);
    let key = farm.get(&format!("/v1/jobs/{job}")).await.json["image_key"].as_str().unwrap().to_owned();
    assert_eq!(image.header("location"), format!("http://objects.test/{key}?valid_for=3600"));
    assert_eq!(image.header("cache-control"), "no-store");
    let sidecar = farm.get(&format!("/v1/jobs/{job}/sidecar")).await.with_status(StatusCode::TEMPORARY_REDIRECT);
    assert!(sidecar.header("location").contains("/sidecars/"), "{}", sidecar.header("location"));
}

#[tokio::test]
async fn a_job_that_is_not_done_has_no_image_yet() {
    let farm = Farm::start().await;
    let job = farm.submit(json!({"prompt": "a"})).await;
    let taken = farm.take("demo", Lane::Interactive).await;
    for what in ["image", "sidecar"] {
        let answer = farm.get(&format!("/v1/jobs/{job}/{what}")).await;
        answer.problem(409);
        assert_eq!(answer.json["state"], "leased");
    }
    taken.finish().await;
    farm.get(&format!("/v1/jobs/{job}/image")).await.with_status(StatusCode::OK);
}

#[tokio::test]
async fn an_object_that_somebody_deleted_is_gone_and_one_out_of_reach_is_not() {
    let farm = Farm::start().await;
    let job = done_job(&farm).await;
    farm.artifact_faults.set_down(true);
    farm.get(&format!("/v1/jobs/{job}/image")).await.problem(503);
    farm.artifact_faults.set_down(false);
    let key = farm.get(&format!("/v1/jobs/{job}")).await.json["image_key"].as_str().unwrap().to_owned();
    farm.artifacts.delete(&key).await.unwrap();
    let answer = farm.get(&format!("/v1/jobs/{job}/image")).await;
    answer.problem(410);
    assert!(answer.json["detail"].as_str().unwrap().contains(&key), "{}", answer.json);
}
