//! An orderly stop.

use std::time::{Duration, Instant};

use reqwest::StatusCode;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{Events, Farm, Settings};

#[tokio::test]
async fn an_open_stream_is_sent_away_and_does_not_hold_up_the_stop() {
    let mut farm = Farm::start().await;
    let job = farm.submit(json!({"prompt": "a"})).await;
    let mut events = Events::of(&farm, &job).await;
    assert!(["pending", "queued"].contains(&events.next_state().await.as_str()));
    let begun = Instant::now();
    farm.begin_stop();
    // In order, but without `[DONE]`: the reader knows that it must come back.
    while let Some(data) = events.next_data().await {
        assert_ne!(data, "[DONE]");
    }
    farm.stopped().await;
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_request_that_is_under_way_is_answered_before_the_stop() {
    let mut farm = Farm::start().await;
    let mut socket = TcpStream::connect(farm.address).await.unwrap();
    let body = r#"{"prompt":"a"}"#;
    let head = format!(
        "POST /v1/jobs HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    socket.write_all(head.as_bytes()).await.unwrap();
    socket.write_all(&body.as_bytes()[..5]).await.unwrap();
    // Another request has been answered since: this one has been read as far as it goes.
    farm.get("/healthz").await.with_status(StatusCode::OK);
    farm.begin_stop();
    tokio::time::sleep(Duration::from_millis(100)).await;
    socket.write_all(&body.as_bytes()[5..]).await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 202"), "{answer}");
    let store = farm.store.clone();
    farm.stopped().await;
    assert_eq!(store.totals().await.unwrap().total(), 1);
}

#[tokio::test]
async fn a_client_that_never_finishes_its_request_cannot_stop_the_stop() {
    let mut settings = Settings::default();
    settings.config.shutdown_seconds = 0.3;
    let mut farm = Farm::start_with(settings).await;
    let mut socket = TcpStream::connect(farm.address).await.unwrap();
    let head = "POST /v1/submissions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/x-ndjson\r\ncontent-length: 1000\r\n\r\n";
    socket.write_all(head.as_bytes()).await.unwrap();
    farm.get("/healthz").await.with_status(StatusCode::OK);
    let begun = Instant::now();
    farm.begin_stop();
    let store = farm.store.clone();
    farm.stopped().await;
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    assert_eq!(store.totals().await.unwrap().total(), 0);
}

#[tokio::test]
async fn nobody_is_served_after_the_stop() {
    let farm = Farm::start().await;
    let address = farm.address;
    farm.stop().await;
    assert!(TcpStream::connect(address).await.is_err());
}
