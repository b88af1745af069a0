//! Real servers, by the variables that `infra/services.sh env` prints.

use farm::config::Environment;

/// What a server's variable says. Without it the test fails and says what to do, or, with
/// `KILN_TEST_SKIP_SERVICES=1`, skips and says so.
pub fn variable(name: &str) -> Option<String> {
    let environment = Environment::of_this_process();
    if let Some(value) = environment.get(name) {
        return Some(value.to_owned());
    }
    if environment.is_on("KILN_TEST_SKIP_SERVICES") {
        eprintln!("skipped: {name} is not set");
        return None;
    }
    panic!("{name} is not set: run `infra/services.sh up` and `eval \"$(infra/services.sh env)\"` first");
}
