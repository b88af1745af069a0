//! The JSON body of a submission, as sent.

use std::fmt;

use farm::spec::RenderRequest;
use serde::de::{Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;
use utoipa::ToSchema;

/// Entries of one list in a JSON body. A list lies in memory while it is expanded; JSON Lines do not.
pub(crate) const LIST_ENTRIES: usize = 250_000;

/// Many jobs at once: `prompts` or `jobs`, each with the submission's `defaults`, each times `sweep`. With a
/// sweep, both lists may be absent: `defaults` is then swept.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SubmissionRequest {
    /// A name of the client's own, shown in listings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What the jobs leave open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub defaults: Option<RenderRequest>,
    /// A job for each prompt.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "bounded_list")]
    pub prompts: Option<Vec<String>>,
    /// The jobs, each with fields of its own.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "bounded_list")]
    pub jobs: Option<Vec<RenderRequest>>,
    /// Values by field: every job is rendered with each combination of them. The last field of the
    /// sweep varies fastest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<std::collections::HashMap<String, SweepValues>>)]
    pub sweep: Option<Sweep>,
    /// Once so many jobs have failed, the rest is cancelled. Default: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure_limit: Option<i64>,
    /// How many times a job is tried before it fails. Default: the scheduler's setting.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_attempts: Option<i64>,
}

/// Values by field, in the order sent: the order is part of the meaning.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sweep(pub Vec<(String, SweepValues)>);

/// The values of one field of a sweep.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[serde(untagged)]
pub enum SweepValues {
    /// One after the other.
    List(Vec<Value>),
    /// Whole numbers that follow each other; for `seed`.
    Range(SeedRange),
}

/// `start`, `start + 1`, … , `count` of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SeedRange {
    /// The first.
    pub start: i64,
    /// How many.
    pub count: i64,
}

impl Serialize for Sweep {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (field, values) in &self.0 {
            map.serialize_entry(field, values)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Sweep {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;

        impl<'de> Visitor<'de> for InOrder {
            type Value = Sweep;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of lists by field")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Sweep, A::Error> {
                let mut fields: Vec<(String, SweepValues)> = Vec::new();
                while let Some((field, values)) = map.next_entry::<String, SweepValues>()? {
                    if fields.iter().any(|(known, _)| *known == field) {
                        return Err(A::Error::custom(format!("duplicate field `{field}`")));
                    }
                    fields.push((field, values));
                }
                Ok(Sweep(fields))
            }
        }

        deserializer.deserialize_map(InOrder)
    }
}

impl<'de> Deserialize<'de> for SweepValues {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ListOrRange;

        impl<'de> Visitor<'de> for ListOrRange {
            type Value = SweepValues;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of values, or for `seed` {\"start\": …, \"count\": …}")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, values: A) -> Result<SweepValues, A::Error> {
                collect_bounded(values).map(SweepValues::List)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<SweepValues, A::Error> {
                SeedRange::deserialize(serde::de::value::MapAccessDeserializer::new(map)).map(SweepValues::Range)
            }
        }

        deserializer.deserialize_any(ListOrRange)
    }
}

/// A list of at most [`LIST_ENTRIES`], or `null`.
fn bounded_list<'de, D, T>(deserializer: D) -> Result<Option<Vec<T>>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    struct Bounded<T>(std::marker::PhantomData<T>);

    impl<'de, T: Deserialize<'de>> Visitor<'de> for Bounded<T> {
        type Value = Option<Vec<T>>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list")
        }

        fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_seq<A: SeqAccess<'de>>(self, entries: A) -> Result<Self::Value, A::Error> {
            collect_bounded(entries).map(Some)
        }
    }

    deserializer.deserialize_any(Bounded(std::marker::PhantomData))
}

fn collect_bounded<'de, A: SeqAccess<'de>, T: Deserialize<'de>>(mut entries: A) -> Result<Vec<T>, A::Error> {
    let mut list = Vec::new();
    while let Some(entry) = entries.next_element()? {
        if list.len() == LIST_ENTRIES {
            return Err(A::Error::custom(format!(
                "invalid length {} or more, expected at most {LIST_ENTRIES} entries (send more as application/x-ndjson)",
                LIST_ENTRIES + 1
            )));
        }
        list.push(entry);
    }
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::refusal::{JsonError, read_json};

    fn field_refused(text: &str) -> (String, String) {
        match read_json::<SubmissionRequest>(text.as_bytes()).expect_err("it should be refused") {
            JsonError::Malformed(refusal) | JsonError::Field(refusal) => (refusal.field, refusal.limit),
        }
    }

    #[test]
    fn a_sweep_keeps_the_order_in_which_its_fields_were_sent() {
        let text = br#"{"sweep":{"steps":[1,2],"guidance_scale":[7.5],"seed":{"start":3,"count":4}}}"#;
        let request: SubmissionRequest = read_json(text).unwrap();
        let sweep = request.sweep.unwrap();
        assert_eq!(
            sweep.0.iter().map(|(field, _)| field.as_str()).collect::<Vec<_>>(),
            ["steps", "guidance_scale", "seed"]
        );
        assert_eq!(sweep.0[2].1, SweepValues::Range(SeedRange { start: 3, count: 4 }));
    }

    #[test]
    fn a_request_written_again_reads_as_the_same_request() {
        let text = br#"{"name":"n","prompts":["a"],"sweep":{"seed":[2,1],"steps":[3]},"failure_limit":3}"#;
        let request: SubmissionRequest = read_json(text).unwrap();
        assert_eq!(read_json::<SubmissionRequest>(&serde_json::to_vec(&request).unwrap()).unwrap(), request);
    }

    #[test]
    fn what_is_wrong_deep_inside_is_named_by_its_path() {
        assert_eq!(field_refused(r#"{"jobs":[{"prompt":"a"},{"steps":"x"}]}"#).0, "jobs[1].steps");
        assert_eq!(field_refused(r#"{"defaults":{"color":"red"}}"#).0, "defaults.color");
        assert_eq!(field_refused(r#"{"prompts":["a",7]}"#).0, "prompts[1]");
        assert_eq!(field_refused(r#"{"sweep":{"seed":{"start":1,"stop":2}}}"#).0, "sweep.seed.stop");
        assert_eq!(field_refused(r#"{"sweep":{"seed":7}}"#).0, "sweep.seed");
        assert_eq!(field_refused(r#"{"sweep":{"seed":[1],"seed":[2]}}"#), ("seed".into(), "given once".into()));
        assert_eq!(field_refused(r#"{"sweeps":{}}"#).0, "sweeps");
    }

    #[test]
    fn a_list_longer_than_memory_should_hold_is_refused_while_reading() {
        let text = format!(r#"{{"prompts":[{}]}}"#, vec![r#""a""#; LIST_ENTRIES + 1].join(","));
        let (field, limit) = field_refused(&text);
        assert!(field.starts_with("prompts"), "{field}");
        assert!(limit.contains("at most 250000 entries"), "{limit}");
    }
}
