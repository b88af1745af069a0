//! The process's environment, read at one place and handed on as a value.

use std::collections::BTreeMap;

/// Environment variables by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Environment(pub BTreeMap<String, String>);

impl Environment {
    /// This process's variables. Text that is not UTF-8 is read with replacement characters.
    #[allow(clippy::disallowed_methods, reason = "the one place where the environment is read")]
    pub fn of_this_process() -> Self {
        let text = |value: std::ffi::OsString| value.to_string_lossy().into_owned();
        Self(std::env::vars_os().map(|(name, value)| (text(name), text(value))).collect())
    }

    /// The variable's value; an empty one counts as not set.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// True for `1`, `true`, `yes` and `on`, in any case: how switches of the Hugging Face tools are
    /// written.
    pub fn is_on(&self, name: &str) -> bool {
        self.get(name)
            .is_some_and(|value| ["1", "true", "yes", "on"].iter().any(|word| value.eq_ignore_ascii_case(word)))
    }
}

impl<const N: usize> From<[(&str, &str); N]> for Environment {
    fn from(variables: [(&str, &str); N]) -> Self {
        Self(variables.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
    }
}
