//! Pictures that jobs start from.

use std::collections::BTreeMap;
use std::io::Cursor;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use farm::latent::LatentFile;
use farm::spec::Limits;
use image::{ImageFormat, RgbImage};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::{Answer, Farm, Settings};

fn picture(format: ImageFormat, width: u32) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    RgbImage::from_pixel(width, 4, image::Rgb([1, 2, 3])).write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

fn data_url(width: u32) -> String {
    format!("data:image/png;base64,{}", STANDARD.encode(picture(ImageFormat::Png, width)))
}

async fn upload(farm: &Farm, kind: &str, bytes: Vec<u8>) -> Answer {
    Answer::of(farm.request(Method::POST, "/v1/artifacts").header("content-type", kind).body(bytes)).await
}

/// The init images of a submission's jobs, in their order.
async fn keys(farm: &Farm, accepted: &Value) -> Vec<String> {
    let submission = accepted["submission_id"].as_str().unwrap();
    let page = farm.get(&format!("/v1/jobs?submission_id={submission}")).await.json;
    let key = |job: &Value| job["spec"]["init_image"]["key"].as_str().unwrap_or("none").to_owned();
    page["jobs"].as_array().unwrap().iter().map(key).collect()
}

#[tokio::test]
async fn a_picture_is_stored_once_under_what_it_holds_whatever_it_is_sent_as() {
    let farm = Farm::start().await;
    for (format, kind, end) in [
        (ImageFormat::Png, "image/png", ".png"),
        (ImageFormat::Jpeg, "image/jpeg", ".jpg"),
        (ImageFormat::WebP, "image/webp", ".webp"),
    ] {
        let bytes = picture(format, 6);
        let stored = upload(&farm, kind, bytes.clone()).await.with_status(StatusCode::CREATED).json;
        let key = stored["key"].as_str().unwrap();
        assert_eq!(key, format!("uploads/{}{end}", stored["sha256"].as_str().unwrap()));
        assert_eq!(
            (&stored["width"], &stored["height"], &stored["bytes"]),
            (&6.into(), &4.into(), &bytes.len().into())
        );
        assert_eq!(stored["content_type"], kind);
        assert_eq!(farm.artifacts.get(key).await.unwrap(), bytes);
        let again = upload(&farm, "application/octet-stream", bytes).await.with_status(StatusCode::CREATED).json;
        assert_eq!(again, stored);
    }
    assert_eq!(farm.artifacts.list("uploads/").await.unwrap().len(), 3);
}

#[tokio::test]
async fn what_is_no_picture_or_too_large_is_refused_by_field_limit_and_value() {
    let limits = Limits { init_image_bytes: 2000, init_image_pixels: 100, ..Limits::default() };
    let farm = Farm::start_with(Settings { limits, ..Settings::default() }).await;
    let refused = async |kind: &str, bytes: Vec<u8>, status: u16| upload(&farm, kind, bytes).await.problem(status);
    let (field, ..) = refused("text/plain", picture(ImageFormat::Png, 4), 415).await;
    assert_eq!(field, "Content-Type");
    let (field, limit, value) = refused("image/png", vec![0; 2001], 413).await;
    assert_eq!((field.as_str(), limit.as_str()), ("body", "at most 2000 bytes"), "{value}");
    let (_, limit, value) = refused("image/png", picture(ImageFormat::Png, 26), 422).await;
    assert_eq!((limit.as_str(), value.as_str()), ("a picture of 1 to 100 pixels", "26 × 4"));
    let broken = picture(ImageFormat::Png, 4)[..20].to_vec();
    for bytes in [b"GIF89a, or so it says".to_vec(), b"<svg/>".to_vec(), Vec::new(), broken] {
        let (_, limit, _) = refused("image/png", bytes, 422).await;
        assert_eq!(limit, "a PNG, JPEG or WebP picture");
    }
    assert!(farm.artifacts.list("").await.unwrap().is_empty());
}

#[tokio::test]
async fn a_latent_is_stored_under_its_size_and_a_broken_one_refused() {
    let farm = Farm::start().await;
    let latent = LatentFile { channels: 4, height: 2, width: 3, values: vec![0.5; 24] };
    let bytes = latent.write(BTreeMap::new());
    let stored = upload(&farm, "application/safetensors", bytes.clone()).await.with_status(StatusCode::CREATED).json;
    let key = stored["key"].as_str().unwrap();
    assert_eq!(key, format!("uploads/{}.3x2.safetensors", stored["sha256"].as_str().unwrap()));
    assert_eq!((&stored["width"], &stored["height"]), (&3.into(), &2.into()));
    assert_eq!(stored["content_type"], "application/safetensors");
    assert_eq!(farm.artifacts.get(key).await.unwrap(), bytes);
    // Within a job it is the same object, and the job has its size.
    let url = format!("data:application/safetensors;base64,{}", STANDARD.encode(&bytes));
    let job = json!({"prompt": "a", "init_image": url, "denoising_start": 0.8});
    let accepted = farm.post("/v1/jobs", job).await.with_status(StatusCode::ACCEPTED).json;
    let spec = farm.get(accepted["status_url"].as_str().unwrap()).await.json["spec"].clone();
    assert_eq!((&spec["width"], &spec["height"]), (&24.into(), &16.into()));
    assert_eq!(spec["init_image"], json!({ "key": key }));
    let broken = LatentFile { values: vec![f32::NAN; 24], ..latent }.write(BTreeMap::new());
    let (field, limit, value) = upload(&farm, "application/octet-stream", broken).await.problem(422);
    assert_eq!(
        (field.as_str(), limit.as_str(), value.as_str()),
        (
            "body",
            "a PNG, JPEG or WebP picture, or a latent (a safetensors file)",
            "a file that must have finite `latents`, but some are not"
        )
    );
}

#[tokio::test]
async fn a_data_url_becomes_an_object_and_only_its_key_travels() {
    let farm = Farm::start().await;
    let expected =
        upload(&farm, "image/png", picture(ImageFormat::Png, 6)).await.json["key"].as_str().unwrap().to_owned();
    let job = json!({"prompt": "a", "init_image": data_url(6), "mask_image": data_url(8), "strength": 0.5});
    let accepted = farm.post("/v1/jobs", job.clone()).await.with_status(StatusCode::ACCEPTED).json;
    let view = farm.get(accepted["status_url"].as_str().unwrap()).await.json;
    let init = &view["spec"]["init_image"];
    assert_eq!((&init["key"], &init["strength"]), (&expected.as_str().into(), &0.5.into()));
    let mask = init["mask"]["key"].as_str().unwrap();
    assert_eq!(farm.artifacts.get(mask).await.unwrap(), picture(ImageFormat::Png, 8));
    assert_eq!((&init["mask"]["blur"], &init["mask"]["content"]), (&0.0.into(), &"original".into()));
}

#[tokio::test]
async fn submissions_take_data_urls_wherever_a_job_may_have_one() {
    let farm = Farm::start().await;
    let mut expected = Vec::new();
    for width in [5, 6, 7] {
        let stored = upload(&farm, "image/png", picture(ImageFormat::Png, width)).await;
        expected.push(stored.json["key"].as_str().unwrap().to_owned());
    }
    let body = json!({
        "defaults": {"init_image": data_url(5)},
        "jobs": [{"prompt": "a"}, {"prompt": "b", "init_image": data_url(6)}],
    });
    let accepted = farm.post("/v1/submissions", body.clone()).await.with_status(StatusCode::ACCEPTED).json;
    assert_eq!(keys(&farm, &accepted).await, expected[..2]);
    let body = json!({"prompts": ["a"], "sweep": {"init_image": [data_url(7), expected[0]]}});
    let accepted = farm.post("/v1/submissions", body.clone()).await.with_status(StatusCode::ACCEPTED).json;
    assert_eq!(keys(&farm, &accepted).await, [expected[2].clone(), expected[0].clone()]);
    let lines = format!("{}\n{}\n", json!({"prompt": "a", "init_image": data_url(6)}), json!({"prompt": "b"}));
    let accepted = farm.post_lines("/v1/submissions", lines).await.with_status(StatusCode::ACCEPTED).json;
    assert_eq!(keys(&farm, &accepted).await, [expected[1].clone(), "none".to_owned()]);
}

#[tokio::test]
async fn a_picture_that_cannot_be_is_named_with_its_place_and_nothing_is_accepted() {
    let farm = Farm::start().await;
    for (value, limit) in [
        ("data:image/png,plain", "a data URL in base64 (`data:image/png;base64,…`)"),
        ("data:image/png;base64,????", "a data URL in base64"),
        ("data:image/png;base64,AAAA", "a PNG, JPEG or WebP picture"),
        ("s3://elsewhere/a.png", "an address in the farm's own bucket"),
    ] {
        let answer = farm.post("/v1/jobs", json!({"prompt": "a", "init_image": value})).await;
        let problem = answer.problem(422);
        assert_eq!((problem.0.as_str(), problem.1.as_str()), ("init_image", limit));
    }
    let body = json!({"jobs": [{"prompt": "a"}, {"prompt": "b", "init_image": "data:,x"}]});
    assert_eq!(farm.post("/v1/submissions", body.clone()).await.problem(422).0, "jobs[1].init_image");
    let lines = "{\"prompt\": \"a\"}\n{\"prompt\": \"b\", \"init_image\": \"data:,x\"}\n";
    let answer = farm.post_lines("/v1/submissions", lines).await;
    assert_eq!((answer.problem(422).0.as_str(), &answer.json["line"]), ("init_image", &2.into()));
    assert_eq!(farm.jobs_stored().await, 0);
}

#[tokio::test]
async fn an_artifact_store_that_is_away_accepts_no_job_that_needs_it() {
    let farm = Farm::start().await;
    farm.artifact_faults.set_down(true);
    let job = json!({"prompt": "a", "init_image": data_url(6)});
    farm.post("/v1/jobs", job.clone()).await.with_status(StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(farm.jobs_stored().await, 0);
    upload(&farm, "image/png", picture(ImageFormat::Png, 6)).await.with_status(StatusCode::SERVICE_UNAVAILABLE);
    farm.artifact_faults.set_down(false);
    farm.post("/v1/jobs", job.clone()).await.with_status(StatusCode::ACCEPTED);
}
