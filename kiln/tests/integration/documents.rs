//! The written pages say what the code does.

use std::path::{Path, PathBuf};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the repository").to_owned()
}

fn page(path: &str) -> String {
    std::fs::read_to_string(repository().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

#[test]
fn the_configuration_page_names_every_key_with_its_default() {
    let page = page("docs/configuration.md");
    let defaults = toml::Value::try_from(farm::config::Config::default()).expect("a configuration is TOML");
    for key in farm::config::keys() {
        let row = page.lines().find(|line| line.starts_with(&format!("| `{}` |", key.name())));
        let row = row.unwrap_or_else(|| panic!("docs/configuration.md lacks `{}`", key.name()));
        let default = key.path.iter().try_fold(&defaults, |value, name| value.get(name));
        if let Some(number) =
            default.and_then(|value| value.as_float().or(value.as_integer().map(|whole| whole as f64)))
        {
            assert!(row.contains(&format!("| {number} |")), "the default of `{}` is {number}: {row}", key.name());
        }
    }
}

#[test]
fn the_configuration_page_names_every_family() {
    let page = page("docs/configuration.md");
    for facts in &engine::FAMILIES {
        assert!(page.contains(&format!("`{}`", facts.word)), "docs/configuration.md lacks `{}`", facts.word);
    }
}

#[test]
fn every_variable_that_a_page_names_exists() {
    let known: Vec<String> = farm::config::keys().iter().map(farm::config::Key::variable).collect();
    let others =
        ["KILN_CONFIG", "KILN_LOG", "KILN_LOG_FORMAT", "KILN_API_URL", "KILN_API_KEY", "KILN_S3_SERVER", "KILN_"];
    for path in ["README.md", "docs/configuration.md", "CONTRIBUTING.md", "infra/compose.yaml"] {
        for word in page(path).split(|c: char| !c.is_ascii_alphanumeric() && c != '_') {
            let fine = !word.starts_with("KILN_")
                || others.contains(&word)
                || word.starts_with("KILN_SERVICES_")
                || word.starts_with("KILN_TEST_")
                || known.iter().any(|known| known == word);
            assert!(fine, "{path} names {word}, which nothing reads");
        }
    }
}

#[test]
fn every_link_of_the_readme_leads_somewhere() {
    for path in ["README.md", "CONTRIBUTING.md", "docs/configuration.md", "demo/README.md"] {
        let folder = repository().join(path).parent().expect("a file lies in a folder").to_owned();
        for target in page(path).split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if !target.contains("://") && !target.starts_with('#') {
                assert!(folder.join(target).exists(), "{path} links to {target}");
            }
        }
    }
}
