//! `/v1/jobs`.

use std::collections::HashSet;

use farm::job::{FailureKind, Lane};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::{Answer, Farm, Fault, Settings};

#[tokio::test]
async fn a_job_needs_nothing_but_a_prompt() {
    let farm = Farm::start().await;
    let accepted = farm.post("/v1/jobs", json!({"prompt": "a red star"})).await.with_status(StatusCode::ACCEPTED);
    let job = accepted.json["job_id"].as_str().unwrap();
    assert_eq!(accepted.json["sse_url"], format!("/v1/jobs/{job}/stream"));
    assert_eq!(accepted.json["status_url"], format!("/v1/jobs/{job}"));
    assert_eq!(accepted.header("location"), format!("/v1/jobs/{job}"));

    let view = farm.get(&format!("/v1/jobs/{job}")).await.with_status(StatusCode::OK).json;
    assert_eq!(view["job_id"], job);
    assert_eq!(view["submission_id"], accepted.json["submission_id"]);
    let spec = &view["spec"];
    let expected = [
        ("model", json!("demo")),
        ("width", json!(128)),
        ("height", json!(128)),
        ("steps", json!(20)),
        ("lane", json!("interactive")),
        ("negative_prompt", json!("")),
    ];
    for (field, value) in expected {
        assert_eq!(spec[field], value, "{field}");
    }
    farm.stop().await;
}

#[tokio::test]
async fn every_field_of_a_request_is_kept() {
    let farm = Farm::start().await;
    let request = json!({
        "operation": "image_generation", "model": "large", "prompt": "p", "negative_prompt": "n", "width": 256, "height": 64,
        "steps": 7, "guidance_scale": 3.5, "sampler": "euler_ancestral", "schedule": "karras", "seed": 9007199254740993i64,
        "lane": "bulk", "tags": ["a", "b"], "metadata": {"sku": {"nested": [1, null]}}
    });
    let job = farm.submit(request.clone()).await;
    let spec = farm.get(&format!("/v1/jobs/{job}")).await.json["spec"].take();
    for (field, value) in request.as_object().unwrap().iter().filter(|(field, _)| *field != "operation") {
        assert_eq!(&spec[field], value, "{field}");
    }
}

#[tokio::test]
async fn the_seed_of_a_job_without_one_is_drawn_and_recorded() {
    let farm = Farm::start().await;
    let mut seeds = HashSet::new();
    for _ in 0..5 {
        let job = farm.submit(json!({"prompt": "a"})).await;
        let seed = farm.get(&format!("/v1/jobs/{job}")).await.json["spec"]["seed"].as_u64().unwrap();
        assert!(seed <= u64::from(u32::MAX));
        seeds.insert(seed);
    }
    assert!(seeds.len() > 1, "five jobs drew the same seed {seeds:?}");
}

#[tokio::test]
async fn what_is_wrong_with_a_job_is_named_by_field_limit_and_value() {
    let farm = Farm::start().await;
    let cases = [
        (json!({}), "prompt", "present", "missing"),
        (json!({"prompt": "a", "steps": 1_000_000_000}), "steps", "1 to 1000", "1000000000"),
        (json!({"prompt": "a", "steps": 0}), "steps", "1 to 1000", "0"),
        (json!({"prompt": "a", "steps": "many"}), "steps", "a whole number", "string \"many\""),
        (json!({"prompt": "a", "steps": 2.5}), "steps", "a whole number", "floating point `2.5`"),
        (json!({"prompt": "a", "width": 130}), "width", "8 to 4096 and a multiple of 8", "130"),
        (json!({"prompt": "a", "height": -8}), "height", "8 to 4096 and a multiple of 8", "-8"),
        (json!({"prompt": "a", "guidance_scale": 1e9}), "guidance_scale", "0 to 100", "1000000000"),
        (json!({"prompt": "a", "model": "sdxl"}), "model", "one of demo, large", "`sdxl`"),
        (json!({"prompt": "a", "sampler": "ddpm"}), "sampler", "one of ddim, euler", "`ddpm`"),
        (json!({"prompt": "a", "schedule": "linear"}), "schedule", "one of normal, karras", "`linear`"),
        (json!({"prompt": "a", "lane": "fast"}), "lane", "one of interactive, bulk", "`fast`"),
        (json!({"prompt": "a", "seed": -1}), "seed", "0 to 9223372036854775807", "-1"),
        (json!({"prompt": "a", "operation": "upscale"}), "operation", "`image_generation`", "`upscale`"),
        (json!({"prompt": "a", "tags": [""]}), "tags", "each 1 to 128 bytes", "``"),
        (json!({"prompt": "a", "tags": ["x", 7]}), "tags[1]", "a string", "integer `7`"),
        (json!({"prompt": "a\0b"}), "prompt", "without NUL", "text with one"),
        (json!({"prompt": "a".repeat(10_001)}), "prompt", "at most 10000 bytes", "10001 bytes"),
        (json!({"prompt": "a", "metadata": [1]}), "metadata", "an object", "sequence"),
        (json!({"prompt": "a", "colour": "red"}), "colour", "`negative_prompt`", "present"),
    ];
    for (request, field, limit, value) in cases {
        let answer = farm.post("/v1/jobs", request.clone()).await;
        let problem = answer.problem(422);
        assert_eq!(problem.0, field, "{request}");
        assert!(problem.1.contains(limit), "{request}: {}", problem.1);
        assert_eq!(problem.2, value, "{request}");
    }
    assert_eq!(farm.jobs_stored().await, 0);
}

#[tokio::test]
async fn a_body_that_is_no_json_object_is_refused() {
    let farm = Farm::start().await;
    let post = |body: &'static str| {
        farm.request(Method::POST, "/v1/jobs").header("content-type", "application/json").body(body)
    };
    for (body, value) in [
        ("{\"prompt\": \"a\"", "text with an error at character 14"),
        ("{'prompt': 'a'}", "text with an error at character 2"),
        ("", "text with an error"),
        ("[]", "`[]`"),
        ("{\"prompt\": \"a\"} x", "text with an error at character 17"),
    ] {
        let problem = Answer::of(post(body)).await.problem(400);
        assert_eq!(problem.0, "body", "{body}");
        assert!(problem.2.starts_with(value), "{body}: {}", problem.2);
    }
}

#[tokio::test]
async fn only_json_is_taken_for_json() {
    let farm = Farm::start().await;
    for kind in ["text/plain", "application/x-www-form-urlencoded", "application/x-ndjson"] {
        let request = farm.request(Method::POST, "/v1/jobs").header("content-type", kind).body("{\"prompt\":\"a\"}");
        assert_eq!(Answer::of(request).await.problem(415).0, "Content-Type", "{kind}");
    }
    let request = farm.request(Method::POST, "/v1/jobs").body("{\"prompt\":\"a\"}");
    assert_eq!(Answer::of(request).await.problem(415).2, "``");
    assert_eq!(farm.jobs_stored().await, 0);
}

#[tokio::test]
async fn a_body_beyond_the_limit_is_refused_whether_announced_or_not() {
    let mut settings = Settings::default();
    settings.limits.body_bytes = 1000;
    let farm = Farm::start_with(settings).await;
    let text = json!({"prompt": "a".repeat(2000)}).to_string();
    let post = || farm.request(Method::POST, "/v1/jobs").header("content-type", "application/json");
    let announced = Answer::of(post().body(text.clone())).await.problem(413);
    assert_eq!(announced.0, "body");
    assert!(announced.1.starts_with("at most 1000 bytes"), "{}", announced.1);
    let pieces = futures_util::stream::iter(
        text.into_bytes().chunks(100).map(|piece| Ok::<_, std::io::Error>(piece.to_vec())).collect::<Vec<_>>(),
    );
    assert_eq!(Answer::of(post().body(reqwest::Body::wrap_stream(pieces))).await.problem(413).0, "body");
}

#[tokio::test]
async fn the_same_key_and_request_give_the_same_job() {
    let farm = Farm::start().await;
    let post = |key: &str, body: &'static str| {
        farm.request(Method::POST, "/v1/jobs")
            .header("content-type", "application/json")
            .header("idempotency-key", key)
            .body(body)
    };
    let first = Answer::of(post("k1", r#"{"prompt":"a","steps":5}"#)).await.with_status(StatusCode::ACCEPTED);
    let again = Answer::of(post("k1", r#"{ "steps": 5, "prompt": "a" }"#)).await.with_status(StatusCode::ACCEPTED);
    assert_eq!(first.json, again.json);
    let conflict = Answer::of(post("k1", r#"{"prompt":"b","steps":5}"#)).await;
    assert_eq!(conflict.problem(409).0, "Idempotency-Key");
    let other = Answer::of(post("k2", r#"{"prompt":"a","steps":5}"#)).await.with_status(StatusCode::ACCEPTED);
    assert_ne!(first.json["job_id"], other.json["job_id"]);
    assert_eq!(farm.jobs_stored().await, 2);
    assert_eq!(Answer::of(post(&"k".repeat(201), "{}")).await.problem(400).0, "Idempotency-Key");
}

#[tokio::test]
async fn requests_that_race_with_one_key_make_one_job() {
    let farm = Farm::start().await;
    let post = || {
        Answer::of(
            farm.request(Method::POST, "/v1/jobs").header("idempotency-key", "race").json(&json!({"prompt": "a"})),
        )
    };
    let answers = futures_util::future::join_all((0..16).map(|_| post())).await;
    let jobs: HashSet<_> =
        answers.into_iter().map(|answer| answer.with_status(StatusCode::ACCEPTED).json["job_id"].to_string()).collect();
    assert_eq!(jobs.len(), 1);
    assert_eq!(farm.jobs_stored().await, 1);
}

#[tokio::test]
async fn listings_filter_and_come_in_pages() {
    let farm = Farm::start().await;
    let mut all = Vec::new();
    for number in 0..7 {
        let (model, tag) = if number % 2 == 0 { ("demo", "even") } else { ("large", "odd") };
        all.push(farm.submit(json!({"prompt": number.to_string(), "model": model, "tags": [tag], "steps": 3})).await);
    }
    let ids = |answer: &Answer| -> Vec<String> {
        let jobs = answer.json["jobs"].as_array().expect("a page has jobs");
        jobs.iter().map(|job| job["job_id"].as_str().unwrap().to_owned()).collect()
    };
    let mut seen = Vec::new();
    let mut path = "/v1/jobs?limit=3".to_owned();
    let mut sizes = Vec::new();
    loop {
        let page = farm.get(&path).await.with_status(StatusCode::OK);
        sizes.push(ids(&page).len());
        seen.extend(ids(&page));
        match &page.json["next"] {
            Value::Null => break,
            next => path = format!("/v1/jobs?limit=3&after={}", next.as_str().unwrap()),
        }
    }
    assert_eq!((seen, sizes), (all.clone(), vec![3, 3, 1]));
    let whole = farm.get("/v1/jobs?limit=7").await;
    assert_eq!((ids(&whole).len(), &whole.json["next"]), (7, &Value::Null));

    assert_eq!(ids(&farm.get("/v1/jobs?tag=odd").await), [all[1].clone(), all[3].clone(), all[5].clone()]);
    assert_eq!(ids(&farm.get("/v1/jobs?model=large&tag=even").await), Vec::<String>::new());
    farm.delete(&format!("/v1/jobs/{}", all[2])).await;
    assert_eq!(ids(&farm.get("/v1/jobs?state=cancelled&model=demo").await), [all[2].clone()]);
    let submission = farm.get(&format!("/v1/jobs/{}", all[4])).await.json["submission_id"].as_str().unwrap().to_owned();
    assert_eq!(ids(&farm.get(&format!("/v1/jobs?submission_id={submission}")).await), [all[4].clone()]);
}

#[tokio::test]
async fn a_filter_that_makes_no_sense_is_named() {
    let farm = Farm::start().await;
    for (query, field, limit) in [
        ("limit=0", "limit", "1 to 1000"),
        ("limit=1001", "limit", "1 to 1000"),
        ("limit=ten", "limit", "1 to 1000"),
        ("state=running", "state", "one of pending, queued, leased, done, failed, cancelled"),
        ("after=7", "after", "a UUID"),
        ("submission_id=x", "submission_id", "a UUID"),
        ("colour=red", "colour", "absent"),
        ("limit=1&limit=2", "limit", "given once"),
    ] {
        let problem = farm.get(&format!("/v1/jobs?{query}")).await.problem(422);
        assert_eq!(problem.0, field, "{query}");
        assert!(problem.1.contains(limit), "{query}: {}", problem.1);
    }
}

#[tokio::test]
async fn a_job_that_does_not_exist_is_not_found() {
    let farm = Farm::start().await;
    let id = Uuid::now_v7();
    for (method, suffix) in [
        (Method::GET, ""),
        (Method::DELETE, ""),
        (Method::POST, "/retry"),
        (Method::GET, "/image"),
        (Method::GET, "/sidecar"),
        (Method::GET, "/stream"),
    ] {
        let answer = Answer::of(farm.request(method.clone(), &format!("/v1/jobs/{id}{suffix}"))).await;
        assert_eq!(answer.problem(404).2, id.to_string(), "{method} {suffix}");
        let answer = Answer::of(farm.request(method.clone(), &format!("/v1/jobs/7{suffix}"))).await;
        assert_eq!(answer.problem(422), ("id".into(), "a UUID".into(), "`7`".into()), "{method} {suffix}");
    }
}

#[tokio::test]
async fn a_job_is_cancelled_at_once_or_at_its_next_step() {
    let farm = Farm::start().await;
    let job = farm.submit(json!({"prompt": "a"})).await;
    let taken = farm.take("demo", Lane::Interactive).await;
    let answer = farm.delete(&format!("/v1/jobs/{job}")).await.with_status(StatusCode::OK);
    assert_eq!(answer.json, json!({"job_id": job, "state": "leased"}));
    taken.drop_cancelled().await;
    assert_eq!(farm.delete(&format!("/v1/jobs/{job}")).await.json["state"], "cancelled");

    farm.broker.set_down(true);
    let waiting = farm.submit(json!({"prompt": "b"})).await;
    assert_eq!(farm.delete(&format!("/v1/jobs/{waiting}")).await.json["state"], "cancelled");
}

#[tokio::test]
async fn a_failed_job_can_be_tried_again_and_a_done_one_cannot() {
    let farm = Farm::start().await;
    let job = farm.submit(json!({"prompt": "a"})).await;
    let taken = farm.take("demo", Lane::Interactive).await;
    taken.fail(FailureKind::Invalid, "`prompt` must be nicer").await;
    let view = farm.get(&format!("/v1/jobs/{job}")).await.json;
    assert_eq!(
        (view["state"].as_str(), view["error"]["message"].as_str()),
        (Some("failed"), Some("`prompt` must be nicer"))
    );

    let answer =
        Answer::of(farm.request(Method::POST, &format!("/v1/jobs/{job}/retry"))).await.with_status(StatusCode::OK);
    assert_eq!(answer.json["state"], "pending");
    farm.take("demo", Lane::Interactive).await.finish().await;
    let answer = Answer::of(farm.request(Method::POST, &format!("/v1/jobs/{job}/retry"))).await;
    answer.problem(409);
    assert_eq!(answer.json["state"], "done");
    assert_eq!(farm.delete(&format!("/v1/jobs/{job}")).await.json["state"], "done");
}

#[tokio::test]
async fn a_path_or_method_that_does_not_exist_is_answered_as_a_problem() {
    let farm = Farm::start().await;
    farm.get("/v1/pictures").await.problem(404);
    farm.get("/").await.problem(404);
    let answer = Answer::of(farm.request(Method::PUT, "/v1/jobs")).await;
    answer.problem(405);
    assert!(answer.header("allow").contains("POST"), "{}", answer.header("allow"));
}

#[tokio::test]
async fn a_store_in_trouble_is_told_apart_and_loses_nothing() {
    let farm = Farm::start().await;
    let request = || farm.post("/v1/jobs", json!({"prompt": "a"}));
    farm.store_faults.set(Some(Fault::Unavailable));
    let answer = request().await;
    answer.problem(503);
    assert_eq!(answer.header("retry-after"), "2");
    farm.store_faults.set(Some(Fault::Full));
    assert_eq!(request().await.problem(507).0, "store");
    farm.store_faults.set(Some(Fault::Internal));
    let answer = request().await;
    answer.problem(500);
    assert!(
        !String::from_utf8_lossy(&answer.bytes).contains("secret"),
        "what only the operator should know is not told"
    );
    farm.store_faults.set(Some(Fault::Panic));
    request().await.problem(500);
    farm.store_faults.set(None);
    assert_eq!(farm.jobs_stored().await, 0);
    let job = farm.submit(json!({"prompt": "a"})).await;
    farm.take("demo", Lane::Interactive).await.finish().await;
    farm.wait_for(&job, "done").await;
}
