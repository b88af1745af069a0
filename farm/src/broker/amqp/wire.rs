//! Messages as they travel: JSON, with what operators and tracers look for beside it.

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};
use serde::Deserialize;

use crate::message::{JobMessage, ProgressEvent, VERSION};

const JSON: &str = "application/json";
const PERSISTENT: u8 = 2;
const TRANSIENT: u8 = 1;

/// The W3C trace context's header. A client sends it in the job's `metadata` under the same name.
const TRACEPARENT: &str = "traceparent";

/// A job's body and properties.
pub(super) fn encode_job(message: &JobMessage) -> (Vec<u8>, BasicProperties) {
    let body = serde_json::to_vec(message).expect("a job message is plain data");
    let mut headers = FieldTable::default();
    headers.insert("version".into(), AMQPValue::LongLongInt(i64::from(message.version)));
    headers.insert("attempts".into(), AMQPValue::LongLongInt(i64::from(message.attempts)));
    let trace = message.spec.metadata.get(TRACEPARENT).and_then(|value| value.as_str());
    if let Some(trace) = trace.filter(|trace| is_traceparent(trace)) {
        headers.insert(TRACEPARENT.into(), AMQPValue::LongString(trace.into()));
    }
    let properties = BasicProperties::default()
        .with_content_type(JSON.into())
        .with_delivery_mode(PERSISTENT)
        .with_type("job".into())
        .with_message_id(message.job_id.to_string().into())
        .with_timestamp(chrono::Utc::now().timestamp().unsigned_abs())
        .with_headers(headers);
    (body, properties)
}

/// Reads a job's body, or says why it cannot.
pub(super) fn decode_job(body: &[u8]) -> Result<JobMessage, String> {
    #[derive(Deserialize)]
    struct Head {
        version: u32,
    }
    // The version first: a newer message may be shaped otherwise.
    let head: Head = serde_json::from_slice(body).map_err(|error| format!("it has no version: {error}"))?;
    if head.version > VERSION {
        return Err(format!("its version is {}, this build reads up to {VERSION}", head.version));
    }
    serde_json::from_slice(body).map_err(|error| error.to_string())
}

/// An event's body and properties.
pub(super) fn encode_event(event: &ProgressEvent) -> (Vec<u8>, BasicProperties) {
    let body = serde_json::to_vec(event).expect("an event is plain data");
    let properties = BasicProperties::default()
        .with_content_type(JSON.into())
        .with_delivery_mode(TRANSIENT)
        .with_type("progress".into());
    (body, properties)
}

/// Reads an event's body.
pub(super) fn decode_event(body: &[u8]) -> Result<ProgressEvent, serde_json::Error> {
    serde_json::from_slice(body)
}

/// W3C Trace Context, section 3.2: four fields of 2, 32, 16 and 2 lowercase hex digits.
fn is_traceparent(text: &str) -> bool {
    let hex = |field: &str| field.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let lengths: Vec<_> = text.split('-').map(str::len).collect();
    lengths == [2, 32, 16, 2] && text.split('-').all(hex)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::id::JobId;

    fn message(metadata: serde_json::Value) -> JobMessage {
        serde_json::from_value(json!({
            "version": VERSION, "job_id": JobId::new(), "attempts": 2,
            "batch_key": {"model": "demo", "width": 128, "height": 64},
            "spec": {
                "model": "demo", "prompt": "a star", "negative_prompt": "", "width": 128, "height": 64, "steps": 20,
                "guidance_scale": 7.5, "sampler": "euler", "schedule": null, "seed": 7, "lane": "bulk",
                "metadata": metadata,
            },
        }))
        .unwrap()
    }

    #[test]
    fn a_job_comes_back_as_it_was_sent() {
        let message = message(json!({"customer": "ü"}));
        let (body, properties) = encode_job(&message);
        assert_eq!(decode_job(&body).unwrap(), message);
        assert_eq!(properties.message_id().as_ref().unwrap().as_str(), message.job_id.to_string());
        assert_eq!(properties.delivery_mode(), &Some(PERSISTENT));
    }

    #[test]
    fn a_trace_travels_in_the_headers_and_only_a_well_formed_one() {
        let sent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let header = |trace: &str| {
            let (_, properties) = encode_job(&message(json!({"traceparent": trace})));
            properties.headers().as_ref().unwrap().inner().get(TRACEPARENT).cloned()
        };
        assert_eq!(header(sent), Some(AMQPValue::LongString(sent.into())));
        assert_eq!(header("00-xyz"), None);
    }

    #[test]
    fn what_cannot_be_read_says_why() {
        let mut newer = serde_json::to_value(message(json!({}))).unwrap();
        newer["version"] = json!(VERSION + 1);
        let error = decode_job(newer.to_string().as_bytes()).unwrap_err();
        assert!(error.contains(&format!("version is {}", VERSION + 1)), "{error}");
        assert!(decode_job(b"rubbish").unwrap_err().contains("no version"));
        assert!(decode_job(br#"{"version": 1}"#).unwrap_err().contains("job_id"));
    }
}
