//! Reads server-sent events.

use reqwest::{Method, Response};
use serde_json::Value;

use super::{Farm, PATIENCE};

/// A job's stream, as a client reads it.
pub struct Events {
    response: Response,
    text: String,
}

impl Events {
    pub async fn of(farm: &Farm, job: &str) -> Self {
        let response = farm.request(Method::GET, &format!("/v1/jobs/{job}/stream")).send().await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Self { response, text: String::new() }
    }

    /// The `data` of the next event; `None` once the stream has ended. Comments are skipped.
    pub async fn next_data(&mut self) -> Option<String> {
        loop {
            if let Some((block, rest)) = self.text.split_once("\n\n") {
                let data = block.lines().find_map(|line| line.strip_prefix("data: ")).map(str::to_owned);
                self.text = rest.to_owned();
                match data {
                    Some(data) => return Some(data),
                    None => continue,
                }
            }
            let chunk = tokio::time::timeout(PATIENCE, self.response.chunk()).await.expect("the stream goes on");
            self.text.push_str(std::str::from_utf8(&chunk.expect("the stream ends in order")?).unwrap());
        }
    }

    /// The next event.
    pub async fn next(&mut self) -> Value {
        serde_json::from_str(&self.next_data().await.expect("there is another event")).unwrap()
    }

    /// The next event that is not about a state on the way.
    pub async fn next_beyond_states(&mut self) -> Value {
        loop {
            let event = self.next().await;
            if event["event"] != "state" {
                return event;
            }
        }
    }

    /// Asserts that the stream is over, in order.
    pub async fn assert_done(mut self) {
        assert_eq!(self.next_data().await.as_deref(), Some("[DONE]"));
        assert_eq!(self.next_data().await, None);
    }
}
