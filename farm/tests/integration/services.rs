//! Real servers, by the variables that `infra/services.sh env` prints.

/// What a server's variable says. Without it the test fails and says what to do, or, with
/// `KILN_TEST_SKIP_SERVICES=1`, skips and says so.
pub fn variable(name: &str) -> Option<String> {
    if let Ok(value) = std::env::var(name) {
        return Some(value);
    }
    if std::env::var("KILN_TEST_SKIP_SERVICES").is_ok_and(|skip| skip == "1") {
        eprintln!("skipped: {name} is not set");
        return None;
    }
    panic!("{name} is not set: run `infra/services.sh up` and `eval \"$(infra/services.sh env)\"` first");
}
