//! Typed reading of a scheduler configuration's values. Every sampler names the keys it knows and its
//! class's defaults; a value that it cannot honour is refused with the key's name.

use serde_json::{Map, Value};

use crate::{Error, Result};

/// Where the values come from, for errors.
pub(super) const CONFIG_FILE: &str = "scheduler/scheduler_config.json";

/// The values that one sampler reads.
#[derive(Clone, Debug)]
pub(super) struct Options {
    values: Map<String, Value>,
}

impl Options {
    pub(super) fn new(values: Map<String, Value>) -> Self {
        Self { values }
    }

    /// A switch; null is off.
    pub(super) fn flag(&self, name: &str, default: bool) -> Result<bool> {
        match self.values.get(name) {
            None => Ok(default),
            Some(Value::Null) => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            other => Err(refuse(name, "true or false", other)),
        }
    }

    /// A number, which may be infinite.
    pub(super) fn number(&self, name: &str, default: f64) -> Result<f64> {
        match self.values.get(name) {
            None => Ok(default),
            Some(Value::String(word)) if word == "-Infinity" => Ok(f64::NEG_INFINITY),
            Some(Value::String(word)) if word == "Infinity" => Ok(f64::INFINITY),
            Some(value) => value.as_f64().ok_or_else(|| refuse(name, "a number", Some(value))),
        }
    }

    /// A finite number; null or absent: none.
    pub(super) fn optional_number(&self, name: &str) -> Result<Option<f64>> {
        match self.values.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match self.number(name, 0.0)? {
                number if number.is_finite() => Ok(Some(number)),
                _ => Err(refuse(name, "a finite number", Some(value))),
            },
        }
    }

    /// A finite number above zero; null or absent: none.
    pub(super) fn optional_positive(&self, name: &str) -> Result<Option<f64>> {
        match self.values.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match self.number(name, 0.0)? {
                number if number > 0.0 && number.is_finite() => Ok(Some(number)),
                _ => Err(refuse(name, "above 0", Some(value))),
            },
        }
    }

    /// A finite number above zero.
    pub(super) fn positive(&self, name: &str, default: f64) -> Result<f64> {
        match self.values.get(name) {
            None => Ok(default),
            value @ Some(_) => self.optional_positive(name)?.ok_or_else(|| refuse(name, "above 0", value)),
        }
    }

    /// A whole number of at least zero.
    pub(super) fn count(&self, name: &str, default: usize) -> Result<usize> {
        match self.values.get(name) {
            None => Ok(default),
            Some(value) => value
                .as_u64()
                .and_then(|count| usize::try_from(count).ok())
                .ok_or_else(|| refuse(name, "a whole number", Some(value))),
        }
    }

    /// A list of numbers; null or absent: none.
    pub(super) fn numbers(&self, name: &str) -> Result<Option<Vec<f64>>> {
        match self.values.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Array(list)) => list
                .iter()
                .map(|value| value.as_f64().ok_or_else(|| refuse(name, "a list of numbers", Some(value))))
                .collect::<Result<_>>()
                .map(Some),
            other => Err(refuse(name, "a list of numbers", other)),
        }
    }

    /// One of a few words. Absent: `default`, one of the words too.
    pub(super) fn choice<T: Copy>(&self, name: &str, default: T, words: &[(&str, T)]) -> Result<T> {
        let known = || format!("one of {}", words.iter().map(|(word, _)| *word).collect::<Vec<_>>().join(", "));
        match self.values.get(name) {
            None => Ok(default),
            Some(Value::String(word)) => words
                .iter()
                .find(|(known, _)| known == word)
                .map(|(_, value)| *value)
                .ok_or_else(|| refuse(name, known(), self.values.get(name))),
            other => Err(refuse(name, known(), other)),
        }
    }

    /// Refuses a switch that changes the mathematics in a way that no sampler here knows.
    pub(super) fn must_be_off(&self, name: &str) -> Result<()> {
        match self.values.get(name) {
            None | Some(Value::Null | Value::Bool(false)) => Ok(()),
            other => Err(refuse(name, "off for a Stable Diffusion checkpoint", other)),
        }
    }
}

/// An error that names the key, what it must be and what it is.
pub(super) fn refuse(name: &str, limit: impl std::fmt::Display, value: Option<&Value>) -> Error {
    let mut shown = value.map_or_else(|| "missing".to_owned(), Value::to_string);
    if shown.chars().count() > 80 {
        shown = shown.chars().take(80).chain("…".chars()).collect();
    }
    Error::checkpoint(CONFIG_FILE, format!("`{name}` must be {limit}, but is {shown}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn options(value: Value) -> Options {
        Options::new(value.as_object().expect("an object").clone())
    }

    #[test]
    fn absent_values_take_the_class_default() {
        let options = options(json!({}));
        assert_eq!(options.flag("clip_sample", true).ok(), Some(true));
        assert_eq!(options.number("beta_start", 0.5).ok(), Some(0.5));
        assert_eq!(options.count("solver_order", 2).ok(), Some(2));
        assert_eq!(options.choice("solver_type", 'm', &[("midpoint", 'm'), ("heun", 'h')]).ok(), Some('m'));
        assert_eq!(options.numbers("trained_betas").ok(), Some(None));
        assert_eq!(options.optional_positive("sigma_min").ok(), Some(None));
    }

    #[test]
    fn null_is_off_or_none_as_in_python() {
        let options = options(json!({"clip_sample": null, "trained_betas": null, "sigma_min": null}));
        assert_eq!(options.flag("clip_sample", true).ok(), Some(false));
        assert_eq!(options.numbers("trained_betas").ok(), Some(None));
        assert_eq!(options.optional_positive("sigma_min").ok(), Some(None));
    }

    #[test]
    fn values_of_the_wrong_kind_are_refused_by_name() {
        let options = options(json!({"a": "x", "b": [1, "x"], "c": -1, "d": {"e": 1}}));
        for error in [
            options.flag("a", true).map(drop),
            options.number("a", 0.0).map(drop),
            options.count("a", 0).map(drop),
            options.choice("a", 0, &[("y", 0)]).map(drop),
            options.must_be_off("a"),
        ] {
            assert!(error.expect_err("no such value").to_string().contains("`a` must be"));
        }
        assert!(options.numbers("b").is_err());
        assert!(options.count("c", 0).is_err());
        assert!(options.optional_positive("c").is_err());
        assert!(options.choice("d", 0, &[("y", 0)]).is_err());
    }

    #[test]
    fn a_long_value_is_cut_in_the_error() {
        let error = refuse("trained_betas", "a list of numbers", Some(&json!("x".repeat(500)))).to_string();
        assert!(error.chars().count() < 200, "{error}");
    }
}
