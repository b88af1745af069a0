//! Puts the configuration together. Later layers win: defaults, the Hugging Face tools' variables,
//! the TOML file, Kiln's own variables.

use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::Config;
use super::environment::Environment;
use super::keys::{Key, Kind, keys};
use crate::spec::ValidationError;

/// Variables with our prefix that are no keys of the configuration.
const OTHER_VARIABLES: [&str; 5] = ["KILN_CONFIG", "KILN_LOG", "KILN_LOG_FORMAT", "KILN_API_KEY", "KILN_API_URL"];

/// Prefixes of variables that the project's own scripts and tests read.
const OTHER_PREFIXES: [&str; 3] = ["KILN_TEST_", "KILN_SERVICES_", "KILN_S3_SERVER"];

/// Why there is no configuration. Every message names the file, key or variable at fault.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("the configuration file {} cannot be read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not a configuration.
    #[error("the configuration file {} is not right: {message}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Where and why.
        message: String,
    },
    /// An environment variable does not hold what its key needs.
    #[error("the variable {name} must be {expected}, but is `{value}`")]
    Variable {
        /// The variable.
        name: String,
        /// What it must hold.
        expected: String,
        /// What it holds; hidden if it may be a secret.
        value: String,
    },
    /// A value that no part of the farm can work with.
    #[error("the configuration's {0}")]
    Value(#[from] ValidationError),
}

/// A configuration and how it came about.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The configuration, checked, its data folder filled in.
    pub config: Config,
    /// The file that was read, if any.
    pub file: Option<PathBuf>,
    /// What looks like a mistake but stops nothing.
    pub warnings: Vec<String>,
}

/// Reads the file (`explicit`, else `KILN_CONFIG`, else `kiln.toml` here, else
/// `$XDG_CONFIG_HOME/kiln/config.toml`; the last two may be missing) and the environment.
pub fn load(explicit: Option<&Path>, environment: &Environment) -> Result<Loaded, ConfigError> {
    let file = find_file(explicit, environment);
    let mut layers = outer_defaults(environment);
    if let Some(path) = &file {
        merge(&mut layers, read_file(path)?);
    }
    for key in keys() {
        if let Some(text) = environment.get(&key.variable()) {
            apply_variable(&mut layers, &key, text)?;
        }
    }
    let config: Config = Value::Table(layers).try_into().map_err(|error: toml::de::Error| ConfigError::File {
        path: file.clone().unwrap_or_default(),
        message: error.to_string(),
    })?;
    config.check()?;
    Ok(Loaded { config, file, warnings: unknown_variables(environment) })
}

fn find_file(explicit: Option<&Path>, environment: &Environment) -> Option<PathBuf> {
    if let Some(path) = explicit.map(Path::to_owned).or_else(|| environment.get("KILN_CONFIG").map(PathBuf::from)) {
        return Some(path);
    }
    let home = environment.get("HOME").map(|home| Path::new(home).join(".config"));
    let user = environment.get("XDG_CONFIG_HOME").map(PathBuf::from).or(home);
    let places = [Some(PathBuf::from("kiln.toml")), user.map(|folder| folder.join("kiln/config.toml"))];
    places.into_iter().flatten().find(|path| path.is_file())
}

/// What lies below the file: the data folder's usual place, and what the Hugging Face tools read.
fn outer_defaults(environment: &Environment) -> Table {
    let text = |value: &str| Value::String(value.to_owned());
    let mut all = Table::new();
    let home = environment.get("HOME").map(|home| Path::new(home).join(".local/share"));
    if let Some(data) = environment.get("XDG_DATA_HOME").map(PathBuf::from).or(home) {
        all.insert("data_dir".into(), text(&data.join("kiln").to_string_lossy()));
    }
    let mut worker = Table::new();
    for (variable, key) in [("HF_ENDPOINT", "hub_endpoint"), ("HF_HOME", "hub_cache"), ("HF_TOKEN", "hub_token")] {
        if let Some(value) = environment.get(variable) {
            worker.insert(key.into(), text(value));
        }
    }
    if environment.is_on("HF_HUB_OFFLINE") {
        worker.insert("offline".into(), Value::Boolean(true));
    }
    all.insert("worker".into(), Value::Table(worker));
    all
}

fn read_file(path: &Path) -> Result<Table, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    let wrong = |error: toml::de::Error| ConfigError::File { path: path.to_owned(), message: explain(&error) };
    // Read as a configuration too: that error shows the line, and the file alone is at fault.
    toml::from_str::<Config>(&text).map_err(wrong)?;
    toml::from_str(&text).map_err(wrong)
}

/// The error with the nearest known word, where it lists the known ones.
fn explain(error: &toml::de::Error) -> String {
    let text = error.to_string();
    let words: Vec<&str> = error.message().split('`').skip(1).step_by(2).collect();
    match words.split_first() {
        Some((unknown, known)) if error.message().starts_with("unknown field") => match nearest(unknown, known) {
            Some(word) => format!("{}\ndid you mean `{word}`?", text.trim_end()),
            None => text,
        },
        _ => text,
    }
}

fn merge(below: &mut Table, above: Table) {
    for (name, value) in above {
        match (below.get_mut(&name), value) {
            (Some(Value::Table(below)), Value::Table(above)) => merge(below, above),
            (_, value) => drop(below.insert(name, value)),
        }
    }
}

/// Lays one variable over the layers, and sees at once whether a configuration still comes out, so
/// that the error names the variable.
fn apply_variable(layers: &mut Table, key: &Key, text: &str) -> Result<(), ConfigError> {
    let wrong = |expected: String| ConfigError::Variable {
        name: key.variable(),
        expected,
        value: if may_be_secret(key) { "***".into() } else { text.chars().take(120).collect() },
    };
    let mut value = parse(key.kind, text).ok_or_else(|| wrong(key.kind.describe().to_owned()))?;
    for name in key.path.iter().rev() {
        value = Value::Table(Table::from_iter([(name.clone(), value)]));
    }
    let Value::Table(above) = value else { unreachable!("every key has a name") };
    merge(layers, above);
    let outcome: Result<Config, toml::de::Error> = Value::Table(layers.clone()).try_into();
    match outcome {
        Ok(_) => Ok(()),
        Err(error) => Err(wrong(error.message().to_owned())),
    }
}

fn may_be_secret(key: &Key) -> bool {
    ["url", "secret", "token", "hash"].iter().any(|word| key.name().contains(word))
}

fn parse(kind: Kind, text: &str) -> Option<Value> {
    match kind {
        Kind::Text => Some(Value::String(text.to_owned())),
        Kind::Whole => text.trim().parse().ok().map(Value::Integer),
        Kind::Number => text.trim().parse().ok().filter(|number: &f64| number.is_finite()).map(Value::Float),
        Kind::Switch => match text.trim().to_ascii_lowercase().as_str() {
            "true" | "1" | "yes" | "on" => Some(Value::Boolean(true)),
            "false" | "0" | "no" | "off" => Some(Value::Boolean(false)),
            _ => None,
        },
        Kind::Pairs => pairs(text, |value| Value::String(value.to_owned())),
        Kind::Models => {
            pairs(text, |value| Value::Table(Table::from_iter([("source".into(), Value::String(value.to_owned()))])))
        }
    }
}

fn pairs(text: &str, value: impl Fn(&str) -> Value) -> Option<Value> {
    let pair = |part: &str| {
        let (name, given) = part.split_once('=')?;
        let (name, given) = (name.trim(), given.trim());
        (!name.is_empty() && !given.is_empty()).then(|| (name.to_owned(), value(given)))
    };
    text.split(',').filter(|part| !part.trim().is_empty()).map(pair).collect::<Option<Table>>().map(Value::Table)
}

/// Variables with our prefix that nothing reads. Not errors: some hosts set such names by
/// themselves (Kubernetes sets `KILN_SCHEDULER_PORT` for a service named `kiln-scheduler`).
fn unknown_variables(environment: &Environment) -> Vec<String> {
    let known: Vec<String> = keys().iter().map(Key::variable).chain(OTHER_VARIABLES.map(str::to_owned)).collect();
    let is_known = |name: &str| {
        known.iter().any(|known| known == name) || OTHER_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
    };
    let unknown = environment.0.keys().filter(|name| name.starts_with("KILN_") && !is_known(name));
    unknown
        .map(|name| match nearest(name, &known) {
            Some(word) => format!("the variable {name} means nothing to kiln; did you mean {word}?"),
            None => format!("the variable {name} means nothing to kiln; `kiln config --variables` lists those that do"),
        })
        .collect()
}

/// The word that takes the fewest edits, if those are few.
fn nearest<'a, S: AsRef<str>>(word: &str, known: &'a [S]) -> Option<&'a str> {
    let closest = known.iter().map(|candidate| (edits(word, candidate.as_ref()), candidate.as_ref())).min()?;
    (closest.0 <= word.len().div_ceil(4)).then_some(closest.1)
}

/// Levenshtein's distance.
fn edits(from: &str, to: &str) -> usize {
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in to.bytes().enumerate() {
            let replaced = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_file(text: &str, environment: &Environment) -> Result<Loaded, ConfigError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kiln.toml");
        std::fs::write(&path, text).unwrap();
        load(Some(&path), environment)
    }

    fn from_environment<const N: usize>(variables: [(&str, &str); N]) -> Result<Loaded, ConfigError> {
        from_file("", &variables.into())
    }

    #[test]
    fn without_file_and_variables_everything_has_its_default() {
        let config = from_environment([]).unwrap().config;
        assert_eq!(config, Config::default());
    }

    #[test]
    fn a_variable_wins_over_the_file_and_the_file_over_the_hub_tools() {
        let text = "[worker]\nmax_batch = 3\nwindow = 5\nhub_endpoint = \"http://file\"";
        let variables = [
            ("KILN_WORKER_MAX_BATCH", "9"),
            ("HF_ENDPOINT", "http://hub"),
            ("HF_TOKEN", "hf_x"),
            ("HF_HUB_OFFLINE", "1"),
        ];
        let worker = from_file(text, &variables.into()).unwrap().config.worker;
        assert_eq!((worker.max_batch, worker.window), (9, 5));
        assert_eq!(worker.hub_endpoint.as_deref(), Some("http://file"));
        assert_eq!(worker.hub_token.unwrap().0, "hf_x");
        assert!(worker.offline);
    }

    #[test]
    fn a_switch_set_by_hand_wins_over_the_hub_tools_switch() {
        let config = from_environment([("HF_HUB_OFFLINE", "1"), ("KILN_WORKER_OFFLINE", "no")]).unwrap().config;
        assert!(!config.worker.offline);
    }

    #[test]
    fn models_and_key_hashes_come_as_pairs() {
        let hash = "0".repeat(64);
        let variables =
            [("KILN_MODELS", "a=/weights/a, b=org/b@main"), ("KILN_API_KEY_HASHES", &format!("ann={hash}"))];
        let config = from_environment(variables).unwrap().config;
        assert_eq!(config.models["b"].source, "org/b@main");
        assert_eq!(config.api.key_hashes["ann"], hash);
    }

    #[test]
    fn a_models_source_from_a_variable_keeps_the_files_other_facts() {
        let text = "[models.a]\nsource = \"/old\"\nsteps = 12";
        let config = from_file(text, &[("KILN_MODELS", "a=/new")].into()).unwrap().config;
        assert_eq!((config.models["a"].source.as_str(), config.models["a"].steps), ("/new", Some(12)));
    }

    #[test]
    fn a_variable_of_the_wrong_type_is_named_with_what_it_must_be() {
        let error = from_environment([("KILN_WORKER_MAX_BATCH", "many")]).unwrap_err().to_string();
        assert_eq!(error, "the variable KILN_WORKER_MAX_BATCH must be a whole number, but is `many`");
        let error = from_environment([("KILN_API_LISTEN", "8600")]).unwrap_err().to_string();
        assert!(error.starts_with("the variable KILN_API_LISTEN must be invalid socket address"), "{error}");
    }

    #[test]
    fn a_wrong_type_in_the_file_shows_the_line() {
        let error = from_file("[worker]\nmax_batch = \"x\"", &Environment::default()).unwrap_err().to_string();
        assert!(
            error.contains("line 2") && error.contains("max_batch = \"x\"") && error.contains("expected u32"),
            "{error}"
        );
    }

    #[test]
    fn an_unknown_key_in_the_file_is_an_error_that_names_the_nearest() {
        let error = from_file("[worker]\nmax_bach = 3", &Environment::default()).unwrap_err().to_string();
        assert!(error.contains("unknown field `max_bach`") && error.contains("did you mean `max_batch`?"), "{error}");
    }

    #[test]
    fn an_unknown_variable_is_a_warning_that_names_the_nearest() {
        let warnings = from_environment([("KILN_WORKER_MAX_BACH", "3"), ("KILN_TEST_X", "1")]).unwrap().warnings;
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].contains("did you mean KILN_WORKER_MAX_BATCH?"), "{warnings:?}");
    }

    #[test]
    fn a_value_out_of_range_names_key_limit_and_value() {
        let error = from_environment([("KILN_WORKER_MAX_BATCH", "0")]).unwrap_err().to_string();
        assert_eq!(error, "the configuration's `worker.max_batch` must be 1 to 1024, but is 0");
    }

    #[test]
    fn a_file_that_was_asked_for_must_exist() {
        let error = load(Some(Path::new("/nowhere/kiln.toml")), &Environment::default()).unwrap_err();
        assert!(matches!(error, ConfigError::Read { .. }));
    }

    #[test]
    fn the_data_folder_has_its_usual_place() {
        let config = from_environment([("HOME", "/home/ann")]).unwrap().config;
        assert_eq!(config.data_dir.unwrap(), Path::new("/home/ann/.local/share/kiln"));
        let config = from_environment([("HOME", "/home/ann"), ("XDG_DATA_HOME", "/data")]).unwrap().config;
        assert_eq!(config.data_dir.unwrap(), Path::new("/data/kiln"));
    }
}
