//! `/v1/submissions` as JSON Lines.

use std::fmt::Write;

use bytes::Bytes;
use reqwest::{Body, Method, StatusCode};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{Answer, Farm, Fault, Settings, eventually};

fn lines(count: usize) -> String {
    (0..count).fold(String::new(), |mut text, number| {
        writeln!(text, r#"{{"prompt":"number {number}","seed":{number}}}"#).unwrap();
        text
    })
}

/// The body in pieces, so that its length is not announced and lines are cut anywhere.
fn streamed(text: String, piece: usize) -> Body {
    let bytes = Bytes::from(text);
    let pieces: Vec<_> = (0..bytes.len())
        .step_by(piece)
        .map(|at| Ok::<_, std::io::Error>(bytes.slice(at..bytes.len().min(at + piece))))
        .collect();
    Body::wrap_stream(futures_util::stream::iter(pieces))
}

/// What the jobs of `lines` are once they have been posted to `path`, in order.
async fn specs(farm: &Farm, path: &str, lines: &'static str) -> Vec<Value> {
    let answer = farm.post_lines(path, lines).await.with_status(StatusCode::ACCEPTED).json;
    let submission = answer["submission_id"].as_str().unwrap();
    let page = farm.get(&format!("/v1/jobs?submission_id={submission}")).await.json;
    page["jobs"].as_array().unwrap().iter().map(|job| job["spec"].clone()).collect()
}

#[tokio::test]
async fn fifty_thousand_lines_become_fifty_thousand_jobs_in_order() {
    let farm = Farm::start().await;
    let answer = farm.post_lines("/v1/submissions?name=many", streamed(lines(50_000), 9973)).await;
    let answer = answer.with_status(StatusCode::ACCEPTED).json;
    assert_eq!(answer["jobs"], 50_000);
    assert_eq!(farm.jobs_stored().await, 50_000);
    let submission = answer["submission_id"].as_str().unwrap();
    let page = farm.get(&format!("/v1/jobs?submission_id={submission}&limit=1000")).await.json;
    for (number, job) in page["jobs"].as_array().unwrap().iter().enumerate() {
        assert_eq!(job["index"], number);
        assert_eq!(job["spec"]["prompt"], format!("number {number}"));
        assert_eq!(job["spec"]["lane"], "bulk");
    }
    assert_eq!(farm.get(&format!("/v1/submissions/{submission}")).await.json["name"], "many");
}

#[tokio::test]
async fn a_malformed_line_far_into_the_stream_rejects_all_of_it_by_its_number() {
    let farm = Farm::start().await;
    let mut all: Vec<String> = lines(50_000).lines().map(str::to_owned).collect();
    all[48_212] = r#"{"prompt":"broken" "seed":1}"#.into();
    let answer = farm.post_lines("/v1/submissions", streamed(all.join("\n"), 65_536)).await;
    let problem = answer.problem(400);
    assert_eq!(answer.json["line"], 48_213);
    assert_eq!((problem.0.as_str(), problem.1.as_str()), ("body", "valid JSON"));
    assert!(problem.2.starts_with("text with an error at character 20"), "{}", problem.2);
    assert!(answer.json["detail"].as_str().unwrap().starts_with("line 48213: "), "{}", answer.json);
    assert_eq!(farm.jobs_stored().await, 0);
    assert_eq!(farm.get("/v1/submissions").await.json["submissions"], json!([]));
}

#[tokio::test]
async fn an_invalid_line_is_named_with_field_limit_and_value() {
    let farm = Farm::start().await;
    for (line, field, limit) in [
        (r#"{"prompt":"a","steps":1000000000}"#, "steps", "1 to 1000"),
        (r#"{"prompt":"a","width":100}"#, "width", "multiple of 8"),
        (r#"{"prompt":"a","model":"sdxl"}"#, "model", "one of demo, large"),
        (r#"{"prompt":"a","seed":"x"}"#, "seed", "a whole number"),
        (r#"{"seed":1}"#, "prompt", "present"),
        (r#"{"prompt":"a","colour":1}"#, "colour", "absent"),
    ] {
        // The blank line counts.
        let body = format!("{}\n{line}\n{}", lines(2), lines(3));
        let answer = farm.post_lines("/v1/submissions", body).await;
        let problem = answer.problem(422);
        assert_eq!((problem.0.as_str(), &answer.json["line"]), (field, &json!(4)), "{line}");
        assert!(problem.1.contains(limit), "{line}: {}", problem.1);
    }
    assert_eq!(farm.jobs_stored().await, 0);
}

#[tokio::test]
async fn a_refusal_reaches_a_client_that_is_still_sending() {
    let farm = Farm::start().await;
    let body = format!("nonsense\n{}", lines(400_000));
    let answer = farm.post_lines("/v1/submissions", streamed(body, 16_384)).await;
    answer.problem(400);
    assert_eq!(answer.json["line"], 1);
}

#[tokio::test]
async fn blank_lines_are_skipped_and_nothing_but_blanks_is_refused() {
    let farm = Farm::start().await;
    let answer = farm.post_lines("/v1/submissions", "\r\n{\"prompt\":\"a\"}\r\n\n  \n{\"prompt\":\"b\"}").await;
    assert_eq!(answer.with_status(StatusCode::ACCEPTED).json["jobs"], 2);
    for body in ["", "\n\n", "  \r\n"] {
        assert_eq!(farm.post_lines("/v1/submissions", body).await.problem(422).1, "at least one line with a job");
    }
    assert_eq!(farm.jobs_stored().await, 2);
}

#[tokio::test]
async fn the_query_says_what_the_lines_leave_open() {
    let farm = Farm::start().await;
    let path = "/v1/submissions?steps=9&model=large&lane=interactive&guidance_scale=2.5&max_attempts=2&failure_limit=1";
    let specs = specs(&farm, path, "{\"prompt\":\"a\"}\n{\"prompt\":\"b\",\"steps\":3}").await;
    assert_eq!([&specs[0]["steps"], &specs[1]["steps"]], [&json!(9), &json!(3)]);
    assert!(specs.iter().all(|spec| spec["model"] == "large" && spec["lane"] == "interactive"));
    for (query, field) in
        [("stepz=9", "stepz"), ("steps=x", "steps"), ("max_attempts=0", "max_attempts"), ("name=a&name=b", "name")]
    {
        assert_eq!(farm.post_lines(&format!("/v1/submissions?{query}"), lines(1)).await.problem(422).0, field);
    }
    // A default that is wrong is found with the first line that needs it.
    assert_eq!(farm.post_lines("/v1/submissions?steps=5000", lines(1)).await.problem(422).0, "steps");
}

#[tokio::test]
async fn the_query_says_what_the_lines_start_from() {
    let farm = Farm::start().await;
    let path = "/v1/submissions?init_image=uploads/a.png&mask_image=uploads/m.png&strength=0.5&mask_blur=4&masked_content=noise";
    let specs = specs(&farm, path, "{\"prompt\":\"a\"}\n{\"prompt\":\"b\",\"strength\":0.75}").await;
    let mask = json!({"key": "uploads/m.png", "blur": 4.0, "content": "noise"});
    for (spec, strength) in specs.iter().zip([0.5, 0.75]) {
        let expected = json!({"key": "uploads/a.png", "strength": strength, "mask": mask});
        assert_eq!(spec["init_image"], expected);
    }
    for (query, field) in [
        ("init_image=uploads/a.png&strength=x", "strength"),
        ("strength=0.5", "strength"),
        ("init_image=s3://elsewhere/a.png", "init_image"),
        ("true_cfg_scale=x", "true_cfg_scale"),
        ("max_sequence_length=1.5", "max_sequence_length"),
    ] {
        assert_eq!(farm.post_lines(&format!("/v1/submissions?{query}"), lines(1)).await.problem(422).0, field);
    }
}

#[tokio::test]
async fn a_line_has_a_limit_and_the_body_has_none() {
    let mut settings = Settings::default();
    settings.limits.body_bytes = 200;
    let farm = Farm::start_with(settings).await;
    assert_eq!(
        farm.post_lines("/v1/submissions", lines(1000)).await.with_status(StatusCode::ACCEPTED).json["jobs"],
        1000
    );
    let long = format!("{}{{\"prompt\":\"{}\"}}", lines(3), "a".repeat(300));
    let answer = farm.post_lines("/v1/submissions", streamed(long, 50)).await;
    assert_eq!(answer.problem(422).1, "lines of at most 200 bytes");
    assert_eq!(answer.json["line"], 4);
}

#[tokio::test]
async fn a_stream_of_too_many_jobs_is_refused() {
    let mut settings = Settings::default();
    settings.limits.submission_jobs = 10;
    let farm = Farm::start_with(settings).await;
    assert_eq!(farm.post_lines("/v1/submissions", lines(10)).await.with_status(StatusCode::ACCEPTED).json["jobs"], 10);
    let answer = farm.post_lines("/v1/submissions", lines(11)).await;
    assert_eq!(answer.problem(422).1, "at most 10 jobs");
    assert_eq!(answer.json["line"], 11);
}

#[tokio::test]
async fn the_same_key_and_lines_give_the_same_submission() {
    let farm = Farm::start().await;
    let post = |query: &str, body: Body| {
        let request = farm.request(Method::POST, &format!("/v1/submissions{query}")).header("idempotency-key", "k");
        Answer::of(request.header("content-type", "application/jsonl").body(body))
    };
    let first = post("", lines(300).into()).await.with_status(StatusCode::ACCEPTED);
    let again = post("", streamed(lines(300), 77)).await.with_status(StatusCode::ACCEPTED);
    assert_eq!(first.json, again.json);
    post("", lines(301).into()).await.problem(409);
    post("?steps=3", lines(300).into()).await.problem(409);
    assert_eq!(farm.jobs_stored().await, 300);
}

#[tokio::test]
async fn a_client_that_goes_away_leaves_nothing_behind() {
    let farm = Farm::start().await;
    let mut socket = TcpStream::connect(farm.address).await.unwrap();
    let head = "POST /v1/submissions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/x-ndjson\r\ntransfer-encoding: chunked\r\n\r\n";
    socket.write_all(head.as_bytes()).await.unwrap();
    let text = lines(1000);
    socket.write_all(format!("{:x}\r\n{text}\r\n", text.len()).as_bytes()).await.unwrap();
    drop(socket);
    // A request that came later has been answered: the one before it is over, too.
    let later = farm.post_lines("/v1/submissions", lines(5)).await;
    later.with_status(StatusCode::ACCEPTED);
    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    assert_eq!(farm.jobs_stored().await, 5);
}

#[tokio::test]
async fn a_body_that_breaks_off_in_a_chunk_is_no_submission() {
    let farm = Farm::start().await;
    let mut socket = TcpStream::connect(farm.address).await.unwrap();
    let head = "POST /v1/submissions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/x-ndjson\r\ntransfer-encoding: chunked\r\n\r\n";
    socket.write_all(format!("{head}10\r\n{{\"prompt\":\"a\"}}\n\r\nnonsense\r\n").as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer).await.unwrap();
    assert!(!String::from_utf8_lossy(&answer).starts_with("HTTP/1.1 2"), "{}", String::from_utf8_lossy(&answer));
    assert_eq!(farm.jobs_stored().await, 0);
}

#[tokio::test]
async fn a_store_that_fails_while_storing_keeps_nothing_of_a_stream() {
    let farm = Farm::start().await;
    farm.store_faults.set(Some(Fault::Full));
    assert_eq!(farm.post_lines("/v1/submissions", lines(100)).await.problem(507).0, "store");
    farm.store_faults.set(None);
    assert_eq!(farm.jobs_stored().await, 0);
    eventually("the scheduler works again", async || {
        farm.post_lines("/v1/submissions", lines(100)).await.status == StatusCode::ACCEPTED
    })
    .await;
    assert_eq!(farm.jobs_stored().await, 100);
}
