//! Why a request is refused: the field, what it must be, what it was. Also for what serde alone finds.

use farm::spec::ValidationError;
use serde::de::DeserializeOwned;

/// Characters of a value that an error repeats.
const VALUE_CHARACTERS: usize = 120;

/// A refusal; a long value is shortened.
pub(crate) fn refuse(field: impl Into<String>, limit: impl Into<String>, value: impl ToString) -> ValidationError {
    ValidationError { field: field.into(), limit: limit.into(), value: shorten(&value.to_string()) }
}

fn shorten(value: &str) -> String {
    match value.char_indices().nth(VALUE_CHARACTERS) {
        Some((end, _)) => format!("{}…", &value[..end]),
        None => value.to_owned(),
    }
}

/// What is wrong with a JSON text.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum JsonError {
    /// It is not JSON.
    Malformed(ValidationError),
    /// It is JSON, but a field is unknown or has the wrong type.
    Field(ValidationError),
}

/// Reads a JSON object. What is wrong is named by its path (`jobs[3].steps`).
pub(crate) fn read_json<T: DeserializeOwned>(text: &[u8]) -> Result<T, JsonError> {
    let first = text.iter().find(|byte| !byte.is_ascii_whitespace());
    // Derived readers would take a list for an object, field by field.
    if first.is_some_and(|byte| *byte != b'{') {
        let start = String::from_utf8_lossy(text.trim_ascii()).into_owned();
        return Err(JsonError::Malformed(refuse("body", "a JSON object", format!("`{start}`"))));
    }
    let mut json = serde_json::Deserializer::from_slice(text);
    let value = serde_path_to_error::deserialize(&mut json)
        .map_err(|error| explain(&error.path().to_string(), error.inner()))?;
    json.end().map_err(|error| explain("body", &error))?;
    Ok(value)
}

fn explain(path: &str, error: &serde_json::Error) -> JsonError {
    let text = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    let message = text.strip_suffix(&place).unwrap_or(&text);
    if error.is_data() {
        return JsonError::Field(explain_mismatch(path, message));
    }
    let place = match error.line() {
        0 | 1 => format!("at character {}", error.column()),
        line => format!("at line {line}, character {}", error.column()),
    };
    JsonError::Malformed(refuse("body", "valid JSON", format!("text with an error {place}: {message}")))
}

/// A refusal from serde's words, which are the same for all formats: `invalid type: VALUE, expected LIMIT`,
/// ``unknown field `NAME`, expected one of LIMIT``.
pub(crate) fn explain_mismatch(path: &str, message: &str) -> ValidationError {
    if let Some(rest) = message.strip_prefix("unknown field `")
        && let Some((name, rest)) = rest.split_once('`')
    {
        let known = rest.trim_start_matches(", expected ").trim_start_matches("one of ");
        // The path may or may not end with the unknown name itself.
        let parent = path.strip_suffix(name).unwrap_or(path).trim_end_matches('.');
        let field = if parent.is_empty() { name.to_owned() } else { format!("{parent}.{name}") };
        return refuse(field, format!("absent, since only these are known: {known}"), "present");
    }
    for prefix in ["invalid type: ", "invalid value: ", "invalid length "] {
        if let Some((value, expected)) = message.strip_prefix(prefix).and_then(|rest| rest.rsplit_once(", expected ")) {
            return refuse(path, in_words(expected), value);
        }
    }
    if let Some(name) = message.strip_prefix("missing field `").and_then(|rest| rest.strip_suffix('`')) {
        let field = if path == "." { name.to_owned() } else { format!("{path}.{name}") };
        return refuse(field, "present", "missing");
    }
    if let Some(name) = message.strip_prefix("duplicate field `").and_then(|rest| rest.strip_suffix('`')) {
        return refuse(name, "given once", "given more than once");
    }
    refuse(path, "readable", message)
}

/// Rust's names of types, as people say them.
fn in_words(expected: &str) -> &str {
    match expected {
        "i64" => "a whole number from -9223372036854775808 to 9223372036854775807",
        "f64" => "a number",
        "a sequence" => "a list",
        "a map" | "struct RenderRequest" => "an object",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use farm::spec::RenderRequest;

    use super::*;

    fn refusal(text: &str) -> ValidationError {
        match read_json::<RenderRequest>(text.as_bytes()).expect_err("it should be refused") {
            JsonError::Malformed(refusal) | JsonError::Field(refusal) => refusal,
        }
    }

    #[test]
    fn a_field_of_the_wrong_type_is_named_with_what_it_must_be() {
        let refusal = refusal(r#"{"prompt":"a star","steps":"many"}"#);
        assert_eq!(refusal.field, "steps");
        assert!(refusal.limit.starts_with("a whole number"), "{}", refusal.limit);
        assert_eq!(refusal.value, "string \"many\"");
    }

    #[test]
    fn an_unknown_field_is_named_with_the_known_ones() {
        let refusal = refusal(r#"{"prompt":"a star","step":3}"#);
        assert_eq!(refusal.field, "step");
        assert!(refusal.limit.contains("`steps`"), "{}", refusal.limit);
    }

    #[test]
    fn a_field_given_twice_is_named() {
        let refusal = refusal(r#"{"seed":1,"seed":2}"#);
        assert_eq!((refusal.field.as_str(), refusal.limit.as_str()), ("seed", "given once"));
    }

    #[test]
    fn a_number_beyond_64_bits_is_refused_and_not_rounded() {
        assert_eq!(refusal(r#"{"seed":18446744073709551616}"#).field, "seed");
    }

    #[test]
    fn broken_json_is_named_with_its_place() {
        let refusal = refusal(r#"{"prompt": "a star" "steps": 3}"#);
        assert_eq!((refusal.field.as_str(), refusal.limit.as_str()), ("body", "valid JSON"));
        assert!(refusal.value.contains("at character 21"), "{}", refusal.value);
    }

    #[test]
    fn a_list_is_not_taken_for_an_object() {
        assert_eq!(refusal(r#"["image_generation"]"#).limit, "a JSON object");
    }

    #[test]
    fn what_follows_the_object_is_refused() {
        assert_eq!(refusal(r#"{"prompt":"a star"} {}"#).field, "body");
    }

    #[test]
    fn an_empty_text_is_refused() {
        assert_eq!(refusal("").limit, "valid JSON");
    }

    #[test]
    fn a_long_value_is_shortened() {
        assert_eq!(refuse("prompt", "short", "ä".repeat(500)).value.chars().count(), VALUE_CHARACTERS + 1);
    }
}
