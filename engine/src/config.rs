//! The JSON files beside the weights: each number is read with its limits, and an option that would
//! change the maths and is not known here is refused by name.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::sampler::quote_infinities;
use crate::{Error, Result};

/// Layers, channels or heads beyond this are a broken file, not a model.
const LARGEST: usize = 1 << 20;

/// One configuration file: a JSON object.
pub(crate) struct ConfigFile {
    path: PathBuf,
    fields: Map<String, Value>,
}

impl ConfigFile {
    /// Reads the file.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| Error::checkpoint(path, error))?;
        match serde_json::from_str(&quote_infinities(&text)) {
            Ok(Value::Object(fields)) => Ok(Self { path: path.to_owned(), fields }),
            Ok(_) => Err(Error::checkpoint(path, "is not a JSON object")),
            Err(error) => Err(Error::checkpoint(path, format!("is not valid JSON: {error}"))),
        }
    }

    /// What such a file at `path` would say, were there one.
    pub fn told(path: &Path, fields: Map<String, Value>) -> Self {
        Self { path: path.to_owned(), fields }
    }

    /// Takes a field over from another configuration, if that has it.
    pub fn learn(&mut self, field: &str, other: &Self) {
        if let Some(value) = other.get(field) {
            self.fields.insert(field.to_owned(), value.clone());
        }
    }

    /// All of it.
    pub fn to_value(&self) -> Value {
        Value::Object(self.fields.clone())
    }

    /// Reads the file if there is one.
    pub fn read_if_present(path: &Path) -> Result<Option<Self>> {
        if path.exists() { Self::read(path).map(Some) } else { Ok(None) }
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A field's value; absent and `null` are the same.
    pub fn get(&self, field: &str) -> Option<&Value> {
        self.fields.get(field).filter(|value| !value.is_null())
    }

    /// Whether a field is there and says `null`.
    pub fn is_null(&self, field: &str) -> bool {
        self.fields.get(field).is_some_and(Value::is_null)
    }

    /// An error that names a field and its value.
    pub fn refuse(&self, field: &str, limit: impl std::fmt::Display) -> Error {
        let value = self.fields.get(field).map_or_else(|| "missing".to_owned(), Value::to_string);
        Error::checkpoint(&self.path, format!("`{field}` must be {limit}, but is {value}"))
    }

    /// Refuses any value of `field` but those listed; absent is fine.
    pub fn only(&self, field: &str, accepted: &[Value]) -> Result<()> {
        match self.get(field) {
            Some(value) if !accepted.contains(value) => {
                let words: Vec<String> = accepted.iter().map(Value::to_string).collect();
                let limit = if words.is_empty() { "null".to_owned() } else { words.join(" or ") };
                Err(self.refuse(field, format!("{limit} (nothing else is supported)")))
            }
            _ => Ok(()),
        }
    }

    /// A count of at least 1.
    pub fn count(&self, field: &str, default: Option<usize>) -> Result<usize> {
        match self.get(field) {
            None => default.ok_or_else(|| self.refuse(field, "present")),
            Some(value) => as_count(value).ok_or_else(|| self.refuse(field, count_limit())),
        }
    }

    /// A count of at least 1 for each of `blocks`, given as a list or as one number for all.
    pub fn count_per_block(&self, field: &str, blocks: usize, default: usize) -> Result<Vec<usize>> {
        match self.get(field) {
            None => Ok(vec![default; blocks]),
            Some(Value::Array(values)) => {
                let counts: Option<Vec<usize>> = values.iter().map(as_count).collect();
                counts.filter(|counts| counts.len() == blocks).ok_or_else(|| {
                    self.refuse(field, format!("a number or a list of {blocks} numbers, each {}", count_limit()))
                })
            }
            Some(value) => match as_count(value) {
                Some(count) => Ok(vec![count; blocks]),
                None => {
                    Err(self.refuse(field, format!("a number or a list of {blocks} numbers, each {}", count_limit())))
                }
            },
        }
    }

    /// A list of counts of at least 1, not empty.
    pub fn counts(&self, field: &str) -> Result<Vec<usize>> {
        let counts: Option<Vec<usize>> =
            self.get(field).and_then(Value::as_array).and_then(|values| values.iter().map(as_count).collect());
        let limit = || format!("a list of numbers, each {}", count_limit());
        counts.filter(|counts| !counts.is_empty()).ok_or_else(|| self.refuse(field, limit()))
    }

    /// A switch.
    pub fn flag(&self, field: &str, default: bool) -> Result<bool> {
        match self.get(field) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.refuse(field, "true or false")),
        }
    }

    /// A switch for each of `blocks`, given as a list or as one for all.
    pub fn flag_per_block(&self, field: &str, blocks: usize) -> Result<Vec<bool>> {
        match self.get(field) {
            Some(Value::Array(values)) => {
                let flags: Option<Vec<bool>> = values.iter().map(Value::as_bool).collect();
                flags
                    .filter(|flags| flags.len() == blocks)
                    .ok_or_else(|| self.refuse(field, format!("true, false or a list of {blocks} of them")))
            }
            _ => Ok(vec![self.flag(field, false)?; blocks]),
        }
    }

    /// A finite number.
    pub fn number(&self, field: &str, default: f64) -> Result<f64> {
        match self.get(field) {
            None => Ok(default),
            Some(value) => {
                value.as_f64().filter(|number| number.is_finite()).ok_or_else(|| self.refuse(field, "a number"))
            }
        }
    }

    /// A finite number above zero.
    pub fn positive(&self, field: &str, default: f64) -> Result<f64> {
        let number = self.number(field, default)?;
        if number > 0.0 { Ok(number) } else { Err(self.refuse(field, "a number above 0")) }
    }

    /// A word.
    pub fn word(&self, field: &str) -> Result<Option<&str>> {
        match self.get(field) {
            None => Ok(None),
            Some(value) => value.as_str().map(Some).ok_or_else(|| self.refuse(field, "a string")),
        }
    }

    /// A list of words.
    pub fn words(&self, field: &str) -> Result<Vec<&str>> {
        let words: Option<Vec<&str>> =
            self.get(field).and_then(Value::as_array).and_then(|values| values.iter().map(Value::as_str).collect());
        words.ok_or_else(|| self.refuse(field, "a list of strings"))
    }
}

fn as_count(value: &Value) -> Option<usize> {
    let count = usize::try_from(value.as_u64()?).ok()?;
    (1..=LARGEST).contains(&count).then_some(count)
}

fn count_limit() -> String {
    format!("a whole number from 1 to {LARGEST}")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config(fields: Value) -> ConfigFile {
        let Value::Object(fields) = fields else { unreachable!("tests pass objects") };
        ConfigFile { path: "unet/config.json".into(), fields }
    }

    #[test]
    fn a_number_or_a_list_gives_one_count_per_block() {
        let config = config(json!({"heads": 8, "layers": [1, 2, 3], "absent": null}));
        assert_eq!(config.count_per_block("heads", 3, 1).unwrap(), [8, 8, 8]);
        assert_eq!(config.count_per_block("layers", 3, 1).unwrap(), [1, 2, 3]);
        assert_eq!(config.count_per_block("absent", 2, 5).unwrap(), [5, 5]);
    }

    #[test]
    fn a_wrong_value_is_refused_with_field_limit_and_value() {
        let config = config(json!({"heads": 0, "layers": [1, 2], "act": "mish", "eps": "small", "huge": 1e12}));
        let text = |error: Error| error.to_string();
        assert_eq!(
            text(config.count("heads", None).unwrap_err()),
            "unet/config.json: `heads` must be a whole number from 1 to 1048576, but is 0"
        );
        assert_eq!(
            text(config.count("missing", None).unwrap_err()),
            "unet/config.json: `missing` must be present, but is missing"
        );
        assert!(text(config.count_per_block("layers", 3, 1).unwrap_err()).contains("list of 3 numbers"));
        assert!(text(config.only("act", &[json!("silu")]).unwrap_err()).contains("`act` must be \"silu\""));
        assert!(text(config.number("eps", 0.0).unwrap_err()).ends_with("a number, but is \"small\""));
        assert!(config.count("huge", None).is_err());
    }
}
