//! `/v1/submissions` as JSON, and what becomes of submissions.

use std::collections::HashSet;

use farm::job::{FailureKind, Lane};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::{Answer, Farm, Settings};

async fn specs(farm: &Farm, submission: &str) -> Vec<Value> {
    let page = farm.get(&format!("/v1/jobs?submission_id={submission}&limit=1000")).await.with_status(StatusCode::OK);
    page.json["jobs"].as_array().unwrap().iter().map(|job| job["spec"].clone()).collect()
}

async fn submit(farm: &Farm, body: Value) -> (String, u64) {
    let answer = farm.post("/v1/submissions", body).await.with_status(StatusCode::ACCEPTED);
    let submission = answer.json["submission_id"].as_str().unwrap().to_owned();
    assert_eq!(answer.json["status_url"], format!("/v1/submissions/{submission}"));
    (submission, answer.json["jobs"].as_u64().unwrap())
}

#[tokio::test]
async fn prompts_times_a_sweep_are_stored_in_order() {
    let farm = Farm::start().await;
    let body = json!({
        "name": "catalogue", "defaults": {"steps": 4, "model": "large"}, "prompts": ["cat", "dog"],
        "sweep": {"seed": {"start": 10, "count": 3}}
    });
    let (submission, jobs) = submit(&farm, body).await;
    assert_eq!(jobs, 6);
    let order: Vec<_> = specs(&farm, &submission)
        .await
        .iter()
        .map(|spec| (spec["prompt"].as_str().unwrap().to_owned(), spec["seed"].as_u64().unwrap()))
        .collect();
    let expected = [("cat", 10), ("cat", 11), ("cat", 12), ("dog", 10), ("dog", 11), ("dog", 12)];
    assert_eq!(order, expected.map(|(prompt, seed)| (prompt.to_owned(), seed)));
    assert!(specs(&farm, &submission).await.iter().all(|spec| spec["lane"] == "bulk" && spec["model"] == "large"));

    let view = farm.get(&format!("/v1/submissions/{submission}")).await.with_status(StatusCode::OK).json;
    assert_eq!(view["name"], "catalogue");
    let counters = view["counters"].as_object().unwrap();
    assert_eq!(counters.values().map(|count| count.as_u64().unwrap()).sum::<u64>(), 6);
    farm.stop().await;
}

#[tokio::test]
async fn jobs_without_a_seed_draw_one_each() {
    let farm = Farm::start().await;
    let (submission, _) =
        submit(&farm, json!({"jobs": [{"prompt": "a"}, {"prompt": "a"}, {"prompt": "a", "seed": 5}]})).await;
    let seeds: Vec<_> = specs(&farm, &submission).await.iter().map(|spec| spec["seed"].as_u64().unwrap()).collect();
    assert_ne!(seeds[0], seeds[1]);
    assert_eq!(seeds[2], 5);
}

#[tokio::test]
async fn a_product_is_measured_before_it_is_made() {
    let farm = Farm::start().await;
    let body = json!({"prompts": ["a", "b"], "sweep": {"seed": {"start": 0, "count": 9_000_000_000_000_000_000i64}, "steps": [1, 2]}});
    let problem = farm.post("/v1/submissions", body).await.problem(422);
    assert_eq!(problem.0, "sweep");
    assert_eq!(problem.1, "a product of at most 10000000 jobs");
    assert_eq!(problem.2, "more than 18446744073709551615 jobs");
    let body = json!({"prompts": ["a"], "sweep": {"seed": {"start": 0, "count": 10_000_001}}});
    assert_eq!(farm.post("/v1/submissions", body).await.problem(422).2, "10000001 jobs");
    assert_eq!(farm.jobs_stored().await, 0);
}

#[tokio::test]
async fn one_bad_job_keeps_all_others_out() {
    let farm = Farm::start().await;
    let body = json!({"prompts": ["a"], "sweep": {"seed": {"start": 0, "count": 600}, "steps": [20, 5000]}});
    let answer = farm.post("/v1/submissions", body).await;
    assert_eq!(answer.problem(422), ("steps".into(), "1 to 1000".into(), "5000".into()));
    assert_eq!(answer.json["job"], 1);
    assert!(answer.json["detail"].as_str().unwrap().starts_with("job 1: `steps`"), "{}", answer.json);
    assert_eq!(farm.jobs_stored().await, 0);
    let page = farm.get("/v1/submissions").await.json;
    assert_eq!(page["submissions"], json!([]));
}

#[tokio::test]
async fn what_is_wrong_with_a_submission_is_named() {
    let farm = Farm::start().await;
    for (body, field) in [
        (json!({}), "jobs"),
        (json!({"prompts": []}), "prompts"),
        (json!({"prompts": ["a"], "jobs": [{"prompt": "b"}]}), "jobs"),
        (json!({"prompts": "a"}), "prompts"),
        (json!({"jobs": [{"prompt": "a", "step": 1}]}), "jobs[0].step"),
        (json!({"jobs": [{"prompt": "a"}, {"prompt": "a", "width": 9}]}), "width"),
        (json!({"prompts": ["a"], "defaults": {"guidance_scale": "x"}}), "defaults.guidance_scale"),
        (json!({"prompts": ["a"], "sweep": {"steps": [1, "x"]}}), "sweep.steps[1]"),
        (json!({"prompts": ["a"], "name": ""}), "name"),
        (json!({"prompts": ["a"], "name": "n".repeat(201)}), "name"),
        (json!({"prompts": ["a"], "failure_limit": 0}), "failure_limit"),
        (json!({"prompts": ["a"], "max_attempts": 101}), "max_attempts"),
        (json!({"prompts": ["a"], "max_attempts": 1.5}), "max_attempts"),
        (json!({"prompts": ["a"], "priority": 1}), "priority"),
    ] {
        assert_eq!(farm.post("/v1/submissions", body.clone()).await.problem(422).0, field, "{body}");
    }
    let query = farm.post("/v1/submissions?name=x", json!({"prompts": ["a"]})).await;
    assert_eq!(query.problem(422).0, "query");
    assert_eq!(farm.jobs_stored().await, 0);
}

#[tokio::test]
async fn the_same_key_and_request_give_the_same_submission() {
    let farm = Farm::start().await;
    let post = |prompts: &[&str]| {
        let request = farm.request(Method::POST, "/v1/submissions").header("idempotency-key", "night-run");
        Answer::of(request.json(&json!({"prompts": prompts, "sweep": {"steps": [3, 4]}})))
    };
    let first = post(&["a", "b"]).await.with_status(StatusCode::ACCEPTED);
    let again = post(&["a", "b"]).await.with_status(StatusCode::ACCEPTED);
    assert_eq!(first.json, again.json);
    post(&["a", "c"]).await.problem(409);
    assert_eq!(farm.jobs_stored().await, 4);
}

#[tokio::test]
async fn submissions_are_listed_newest_first_in_pages() {
    let farm = Farm::start().await;
    let mut all = Vec::new();
    for name in ["one", "two", "three"] {
        all.push(submit(&farm, json!({"name": name, "prompts": ["a"]})).await.0);
    }
    let page = farm.get("/v1/submissions?limit=2").await.with_status(StatusCode::OK).json;
    let names = |page: &Value| -> Vec<String> {
        page["submissions"].as_array().unwrap().iter().map(|view| view["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names(&page), ["three", "two"]);
    assert_eq!(page["next"], all[1]);
    let rest = farm.get(&format!("/v1/submissions?limit=2&before={}", all[1])).await.json;
    assert_eq!((names(&rest), &rest["next"]), (vec!["one".to_owned()], &Value::Null));
    assert_eq!(farm.get("/v1/submissions?limit=0").await.problem(422).0, "limit");
    assert_eq!(farm.get("/v1/submissions?before=x").await.problem(422).0, "before");
    assert_eq!(farm.get("/v1/submissions?page=2").await.problem(422).0, "page");
}

#[tokio::test]
async fn a_cancelled_submission_stops_and_a_retry_brings_it_back() {
    let farm = Farm::start().await;
    let (submission, _) = submit(&farm, json!({"prompts": ["a", "b", "c"], "max_attempts": 1})).await;
    farm.take("demo", Lane::Bulk).await.finish().await;
    farm.take("demo", Lane::Bulk).await.fail(FailureKind::Retryable, "the lamp went out").await;
    let answer = farm.delete(&format!("/v1/submissions/{submission}")).await.with_status(StatusCode::OK).json;
    assert_eq!(answer["submission_id"], submission);
    let counters = |counters: &Value| ["done", "failed", "cancelled"].map(|state| counters[state].as_u64().unwrap());
    assert_eq!(counters(&answer["counters"]), [1, 1, 1]);

    let retry =
        |query: &str| Answer::of(farm.request(Method::POST, &format!("/v1/submissions/{submission}/retry{query}")));
    assert_eq!(retry("").await.with_status(StatusCode::OK).json["retried"], 1);
    assert_eq!(retry("?cancelled=true").await.json["retried"], 1);
    assert_eq!(retry("?cancelled=maybe").await.problem(422).0, "cancelled");
    farm.take("demo", Lane::Bulk).await.finish().await;
    farm.take("demo", Lane::Bulk).await.finish().await;
    let view = farm.get(&format!("/v1/submissions/{submission}")).await.json;
    assert_eq!(counters(&view["counters"]), [3, 0, 0]);
    assert!(view["finished_at"].is_string(), "{view}");
}

#[tokio::test]
async fn a_submission_that_does_not_exist_is_not_found() {
    let farm = Farm::start().await;
    let id = Uuid::now_v7();
    for (method, suffix) in [(Method::GET, ""), (Method::DELETE, ""), (Method::POST, "/retry")] {
        let answer = Answer::of(farm.request(method.clone(), &format!("/v1/submissions/{id}{suffix}"))).await;
        assert_eq!(answer.problem(404).2, id.to_string(), "{method}");
    }
}

#[tokio::test]
async fn a_large_product_is_stored_whole_and_each_job_once() {
    let mut settings = Settings::default();
    settings.limits.submission_jobs = 5000;
    let farm = Farm::start_with(settings).await;
    let body =
        json!({"defaults": {"prompt": "a"}, "sweep": {"steps": [1, 2, 3, 4, 5], "seed": {"start": 0, "count": 1000}}});
    let (submission, jobs) = submit(&farm, body).await;
    assert_eq!(jobs, 5000);
    let (mut seen, mut after) = (HashSet::new(), String::new());
    loop {
        let page = farm.get(&format!("/v1/jobs?submission_id={submission}&limit=1000{after}")).await.json;
        for job in page["jobs"].as_array().unwrap() {
            seen.insert((job["spec"]["steps"].as_u64().unwrap(), job["spec"]["seed"].as_u64().unwrap()));
        }
        match page["next"].as_str() {
            Some(next) => after = format!("&after={next}"),
            None => break,
        }
    }
    assert_eq!(seen.len(), 5000);
}
