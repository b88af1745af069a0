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
        self.next_line("data: ").await
    }

    /// The next state on the way, told in a comment.
    pub async fn next_state(&mut self) -> String {
        self.next_line(": state ").await.expect("there is another state")
    }

    /// What follows `prefix` in the next block that has it; `None` once the stream has ended.
    async fn next_line(&mut self, prefix: &str) -> Option<String> {
        loop {
            if let Some((block, rest)) = self.text.split_once("\n\n") {
                let line = block.lines().find_map(|line| line.strip_prefix(prefix)).map(str::to_owned);
                self.text = rest.to_owned();
                match line {
                    Some(line) => return Some(line),
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

    /// Asserts that the stream is over, in order.
    pub async fn assert_done(mut self) {
        assert_eq!(self.next_data().await.as_deref(), Some("[DONE]"));
        assert_eq!(self.next_data().await, None);
    }
}
