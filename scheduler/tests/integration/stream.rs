//! `/v1/jobs/{id}/stream`.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use farm::job::{FailureKind, Lane};
use serde_json::json;

use crate::support::{Events, Farm, Fault, eventually, png};

#[tokio::test]
async fn a_reader_gets_the_steps_then_the_image_then_the_end() {
    let farm = Farm::start().await;
    let job = farm.submit(json!({"prompt": "a", "steps": 3})).await;
    let mut events = Events::of(&farm, &job).await;
    assert!(["pending", "queued"].contains(&events.next_state().await.as_str()));
    let taken = farm.take("demo", Lane::Interactive).await;
    assert_eq!(taken.id(), job);
    eventually("the stream is subscribed", async || farm.broker.watches() > 0).await;
    for step in 1..=3 {
        taken.step(step, 3).await;
        assert_eq!(events.next().await, json!({"event": "progress", "step": step, "total": 3}));
    }
    taken.finish().await;
    let complete = events.next().await;
    let expected =
        json!({"event": "complete", "image": STANDARD.encode(png()), "url": format!("/v1/jobs/{job}/image")});
    assert_eq!(complete, expected);
    events.assert_done().await;
    farm.stop().await;
}

#[tokio::test]
async fn a_late_reader_gets_the_end_and_so_does_one_that_comes_back() {
    let farm = Farm::start().await;
    let job = farm.submit(json!({"prompt": "a"})).await;
    farm.take("demo", Lane::Interactive).await.finish().await;
    for _ in 0..2 {
        let mut events = Events::of(&farm, &job).await;
        assert_eq!(events.next().await["event"], "complete");
        events.assert_done().await;
    }
}

#[tokio::test]
async fn a_failed_job_ends_its_stream_with_the_failure() {
    let farm = Farm::start().await;
    let job = farm.submit(json!({"prompt": "a"})).await;
    let mut events = Events::of(&farm, &job).await;
    farm.take("demo", Lane::Interactive).await.fail(FailureKind::Invalid, "no such checkpoint").await;
    let expected = json!({"event": "failed", "error": {"kind": "invalid", "message": "no such checkpoint"}});
    assert_eq!(events.next().await, expected);
    events.assert_done().await;
}

#[tokio::test]
async fn a_failure_that_is_tried_again_does_not_end_the_stream() {
    let farm = Farm::start().await;
    let job = farm.submit(json!({"prompt": "a"})).await;
    let mut events = Events::of(&farm, &job).await;
    farm.take("demo", Lane::Interactive).await.fail(FailureKind::Retryable, "the lamp went out").await;
    farm.take("demo", Lane::Interactive).await.finish().await;
    assert_eq!(events.next().await["event"], "complete");
    events.assert_done().await;
}

#[tokio::test]
async fn a_cancelled_job_ends_its_stream() {
    let farm = Farm::start().await;
    farm.broker.set_down(true);
    let job = farm.submit(json!({"prompt": "a"})).await;
    let mut events = Events::of(&farm, &job).await;
    assert_eq!(events.next_state().await, "pending");
    farm.delete(&format!("/v1/jobs/{job}")).await;
    assert_eq!(events.next().await, json!({"event": "cancelled"}));
    events.assert_done().await;
}

#[tokio::test]
async fn a_reader_whose_watch_dies_learns_the_end_from_the_store() {
    let farm = Farm::start().await;
    farm.broker.end_watches();
    let job = farm.submit(json!({"prompt": "a"})).await;
    let mut events = Events::of(&farm, &job).await;
    eventually("the watch has been tried twice", async || farm.broker.watches() > 1).await;
    farm.take("demo", Lane::Interactive).await.finish().await;
    assert_eq!(events.next().await["event"], "complete");
    events.assert_done().await;
}

#[tokio::test]
async fn a_reader_outlives_a_store_and_a_broker_that_are_away_for_a_while() {
    let farm = Farm::start().await;
    let job = farm.submit(json!({"prompt": "a"})).await;
    let taken = farm.take("demo", Lane::Interactive).await;
    let mut events = Events::of(&farm, &job).await;
    farm.broker.set_down(true);
    farm.store_faults.set(Some(Fault::Unavailable));
    taken.finish().await;
    tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
    farm.store_faults.set(None);
    assert_eq!(events.next().await["event"], "complete");
    events.assert_done().await;
}

#[tokio::test]
async fn an_image_that_is_gone_does_not_keep_the_end_away() {
    let farm = Farm::start().await;
    let job = farm.submit(json!({"prompt": "a"})).await;
    farm.take("demo", Lane::Interactive).await.finish().await;
    let key = farm.get(&format!("/v1/jobs/{job}")).await.json["image_key"].as_str().unwrap().to_owned();
    farm.artifacts.delete(&key).await.unwrap();
    let mut events = Events::of(&farm, &job).await;
    let complete = events.next().await;
    assert_eq!((&complete["event"], &complete["image"]), (&json!("complete"), &json!(null)));
    assert!(complete["error"]["message"].as_str().unwrap().contains(&key), "{complete}");
    events.assert_done().await;
}

#[tokio::test]
async fn many_readers_of_one_job_all_get_the_end() {
    let farm = Farm::start().await;
    let job = farm.submit(json!({"prompt": "a"})).await;
    let mut readers = Vec::new();
    for _ in 0..20 {
        readers.push(Events::of(&farm, &job).await);
    }
    farm.take("demo", Lane::Interactive).await.finish().await;
    for mut events in readers {
        assert_eq!(events.next().await["event"], "complete");
        events.assert_done().await;
    }
}
