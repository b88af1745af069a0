//! `prompts` or `jobs` times `sweep`, one job at a time.
//!
//! Job `i` of the product is a pure function of the request and `i`: the base (`prompts`, `jobs` or `defaults`)
//! varies slowest, the last field of the sweep fastest.

use farm::spec::{RenderRequest, ValidationError};
use serde_json::{Map, Value};

use super::request::{SubmissionRequest, SweepValues};
use crate::refusal::{explain_mismatch, refuse};

/// A submission's product, not yet multiplied out.
#[derive(Debug)]
pub(crate) struct Expansion {
    bases: Bases,
    defaults: RenderRequest,
    sweep: Vec<(String, SweepValues)>,
    combinations: u64,
    jobs: u64,
}

#[derive(Debug)]
enum Bases {
    Prompts(Vec<String>),
    Jobs(Vec<RenderRequest>),
    Defaults,
}

impl Expansion {
    /// Checks the request's shape and size; `max_jobs` bounds the product, which is not built.
    pub(crate) fn new(request: SubmissionRequest, max_jobs: u64) -> Result<Self, ValidationError> {
        let sweep = request.sweep.map(|sweep| sweep.0).unwrap_or_default();
        let (bases, count) = match (request.prompts, request.jobs) {
            (Some(_), Some(_)) => return Err(refuse("jobs", "absent where `prompts` is present", "present")),
            (Some(prompts), None) => {
                let count = count_of("prompts", prompts.len())?;
                (Bases::Prompts(prompts), count)
            }
            (None, Some(jobs)) => {
                let count = count_of("jobs", jobs.len())?;
                (Bases::Jobs(jobs), count)
            }
            (None, None) if sweep.is_empty() => {
                return Err(refuse("jobs", "present, or `prompts` or `sweep`", "missing"));
            }
            (None, None) => (Bases::Defaults, 1),
        };
        for (field, values) in &sweep {
            check_values(field, values)?;
            check_not_set_twice(field, &bases)?;
        }
        let combinations = sweep.iter().try_fold(1u64, |product, (_, values)| product.checked_mul(len(values)));
        let jobs = combinations.and_then(|combinations| combinations.checked_mul(count));
        match (combinations, jobs) {
            (Some(combinations), Some(jobs)) if jobs <= max_jobs => {
                Ok(Self { bases, defaults: request.defaults.unwrap_or_default(), sweep, combinations, jobs })
            }
            (_, jobs) => {
                let field = if sweep.is_empty() { "jobs" } else { "sweep" };
                let value = jobs.map_or_else(|| format!("more than {} jobs", u64::MAX), |jobs| format!("{jobs} jobs"));
                Err(refuse(field, format!("a product of at most {max_jobs} jobs"), value))
            }
        }
    }

    /// How many jobs the product has.
    pub(crate) fn jobs(&self) -> u64 {
        self.jobs
    }

    /// Job `index` of the product, `index < self.jobs()`.
    pub(crate) fn job(&self, index: u64) -> RenderRequest {
        let base = (index / self.combinations) as usize;
        let mut rest = index % self.combinations;
        let mut fields = Map::new();
        for (field, values) in self.sweep.iter().rev() {
            let place = rest % len(values);
            rest /= len(values);
            let value = match values {
                SweepValues::List(list) => list[place as usize].clone(),
                SweepValues::Range(range) => Value::from(range.start + place as i64),
            };
            fields.insert(field.clone(), value);
        }
        let swept: RenderRequest =
            serde_json::from_value(Value::Object(fields)).expect("every value was checked to fit its field");
        match &self.bases {
            Bases::Prompts(prompts) => RenderRequest { prompt: Some(prompts[base].clone()), ..swept },
            Bases::Jobs(jobs) => swept.or(&jobs[base]),
            Bases::Defaults => swept,
        }
        .or(&self.defaults)
    }
}

fn count_of(field: &str, entries: usize) -> Result<u64, ValidationError> {
    match entries {
        0 => Err(refuse(field, "at least one entry", "an empty list")),
        entries => Ok(entries as u64),
    }
}

fn len(values: &SweepValues) -> u64 {
    match values {
        SweepValues::List(list) => list.len() as u64,
        SweepValues::Range(range) => range.count as u64,
    }
}

fn check_values(field: &str, values: &SweepValues) -> Result<(), ValidationError> {
    let path = format!("sweep.{field}");
    match values {
        SweepValues::List(list) => {
            count_of(&path, list.len())?;
            for (place, value) in list.iter().enumerate() {
                check_value(field, value).map_err(|refusal| match refusal.field == *field {
                    true => ValidationError { field: format!("{path}[{place}]"), ..refusal },
                    false => refusal,
                })?;
            }
            Ok(())
        }
        SweepValues::Range(_) if field != "seed" => {
            Err(refuse(path, "a list of values", "a range, which only `seed` can be"))
        }
        SweepValues::Range(range) if range.start < 0 => {
            Err(refuse(format!("{path}.start"), "0 to 9223372036854775807", range.start))
        }
        SweepValues::Range(range) if range.count < 1 => Err(refuse(format!("{path}.count"), "at least 1", range.count)),
        SweepValues::Range(range) if range.start.checked_add(range.count - 1).is_none() => {
            let limit = format!("at most {}, so that no seed is above 9223372036854775807", i64::MAX - range.start);
            Err(refuse(format!("{path}.count"), limit, range.count))
        }
        SweepValues::Range(_) => Ok(()),
    }
}

fn check_value(field: &str, value: &Value) -> Result<(), ValidationError> {
    if value.is_null() {
        return Err(refuse(field, "a value", "null"));
    }
    let alone = Map::from_iter([(field.to_owned(), value.clone())]);
    match serde_json::from_value::<RenderRequest>(Value::Object(alone)) {
        Ok(_) => Ok(()),
        Err(error) => {
            let refusal = explain_mismatch(field, &error.to_string());
            match error.to_string().starts_with("unknown field") {
                true => Err(ValidationError { field: format!("sweep.{field}"), ..refusal }),
                false => Err(refusal),
            }
        }
    }
}

/// A field cannot be both swept and set by the jobs: it would be unclear who wins.
fn check_not_set_twice(field: &str, bases: &Bases) -> Result<(), ValidationError> {
    let twice = match bases {
        Bases::Prompts(_) => (field == "prompt").then(|| "prompts".to_owned()),
        Bases::Jobs(jobs) => jobs
            .iter()
            .position(|job| serde_json::to_value(job).is_ok_and(|job| job.get(field).is_some()))
            .map(|place| format!("jobs[{place}].{field}")),
        Bases::Defaults => None,
    };
    match twice {
        Some(path) => Err(refuse(path, format!("absent where `sweep.{field}` is present"), "present")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::refusal::read_json;

    fn expand(text: &str) -> Result<Vec<RenderRequest>, ValidationError> {
        let request = read_json(text.as_bytes()).expect("the test's request is readable");
        let expansion = Expansion::new(request, 1000)?;
        Ok((0..expansion.jobs()).map(|index| expansion.job(index)).collect())
    }

    fn refusal(text: &str) -> ValidationError {
        expand(text).expect_err("it should be refused")
    }

    #[test]
    fn prompts_become_jobs_with_the_defaults() {
        let jobs = expand(r#"{"prompts":["a","b"],"defaults":{"steps":7,"prompt":"unused"}}"#).unwrap();
        assert_eq!(jobs.iter().map(|job| job.prompt.as_deref().unwrap()).collect::<Vec<_>>(), ["a", "b"]);
        assert!(jobs.iter().all(|job| job.steps == Some(7) && job.seed.is_none()));
    }

    #[test]
    fn a_job_keeps_what_it_says_itself() {
        let jobs = expand(r#"{"jobs":[{"prompt":"a","steps":3},{"prompt":"b"}],"defaults":{"steps":7}}"#).unwrap();
        assert_eq!(jobs.iter().map(|job| job.steps.unwrap()).collect::<Vec<_>>(), [3, 7]);
    }

    #[test]
    fn the_last_field_of_a_sweep_varies_fastest_and_the_jobs_slowest() {
        let jobs = expand(
            r#"{"prompts":["a","b"],"sweep":{"steps":[5,9],"seed":{"start":40,"count":3}},"defaults":{"steps":1}}"#,
        )
        .unwrap();
        let order: Vec<_> =
            jobs.iter().map(|job| (job.prompt.as_deref().unwrap(), job.steps.unwrap(), job.seed.unwrap())).collect();
        let once = [(5, 40), (5, 41), (5, 42), (9, 40), (9, 41), (9, 42)];
        let expected: Vec<_> =
            ["a", "b"].iter().flat_map(|prompt| once.map(|(steps, seed)| (*prompt, steps, seed))).collect();
        assert_eq!(order, expected);
    }

    #[test]
    fn a_sweep_alone_multiplies_the_defaults() {
        let jobs = expand(r#"{"defaults":{"prompt":"a"},"sweep":{"seed":[3,1,2]}}"#).unwrap();
        assert_eq!(jobs.iter().map(|job| job.seed.unwrap()).collect::<Vec<_>>(), [3, 1, 2]);
        assert_eq!(expand(r#"{"sweep":{"prompt":["a","b"]}}"#).unwrap().len(), 2);
    }

    #[test]
    fn the_size_of_a_product_is_checked_without_building_it() {
        let refused = refusal(r#"{"prompts":["a","b"],"sweep":{"seed":{"start":0,"count":501}}}"#);
        assert_eq!(refused.field, "sweep");
        assert_eq!((refused.limit.as_str(), refused.value.as_str()), ("a product of at most 1000 jobs", "1002 jobs"));
    }

    #[test]
    fn a_product_beyond_64_bits_is_refused_and_does_not_wrap() {
        let refused = refusal(
            r#"{"prompts":["a"],"sweep":{"seed":{"start":0,"count":9223372036854775807},"steps":[1,2],"width":[8,16]}}"#,
        );
        assert_eq!(refused.value, "more than 18446744073709551615 jobs");
    }

    #[test]
    fn a_range_may_end_at_the_last_seed_and_not_beyond() {
        let jobs = expand(r#"{"prompts":["a"],"sweep":{"seed":{"start":9223372036854775806,"count":2}}}"#).unwrap();
        assert_eq!(jobs[1].seed, Some(i64::MAX));
        let refused = refusal(r#"{"prompts":["a"],"sweep":{"seed":{"start":9223372036854775807,"count":2}}}"#);
        assert_eq!(refused.field, "sweep.seed.count");
        assert_eq!(refusal(r#"{"prompts":["a"],"sweep":{"seed":{"start":-1,"count":2}}}"#).field, "sweep.seed.start");
        assert_eq!(refusal(r#"{"prompts":["a"],"sweep":{"seed":{"start":0,"count":0}}}"#).field, "sweep.seed.count");
    }

    #[test]
    fn an_empty_submission_is_refused() {
        assert_eq!(refusal("{}").field, "jobs");
        assert_eq!(refusal(r#"{"prompts":[]}"#).field, "prompts");
        assert_eq!(refusal(r#"{"jobs":[],"defaults":{"prompt":"a"}}"#).field, "jobs");
        assert_eq!(refusal(r#"{"prompts":["a"],"sweep":{"seed":[]}}"#).field, "sweep.seed");
        assert_eq!(refusal(r#"{"defaults":{"prompt":"a"},"sweep":{}}"#).field, "jobs");
    }

    #[test]
    fn a_swept_value_that_does_not_fit_its_field_is_named_by_its_place() {
        let refused = refusal(r#"{"prompts":["a"],"sweep":{"steps":[20,"many"]}}"#);
        assert_eq!((refused.field.as_str(), refused.value.as_str()), ("sweep.steps[1]", "string \"many\""));
        assert_eq!(refusal(r#"{"prompts":["a"],"sweep":{"steps":[null]}}"#).field, "sweep.steps[0]");
        assert_eq!(refusal(r#"{"prompts":["a"],"sweep":{"colour":["red"]}}"#).field, "sweep.colour");
        assert_eq!(refusal(r#"{"prompts":["a"],"sweep":{"steps":{"start":1,"count":2}}}"#).field, "sweep.steps");
    }

    #[test]
    fn a_field_that_is_both_swept_and_set_is_refused() {
        assert_eq!(refusal(r#"{"prompts":["a"],"sweep":{"prompt":["b"]}}"#).field, "prompts");
        let refused = refusal(r#"{"jobs":[{"prompt":"a"},{"prompt":"b","seed":1}],"sweep":{"seed":[1]}}"#);
        assert_eq!(refused.field, "jobs[1].seed");
        assert_eq!(refusal(r#"{"prompts":["a"],"jobs":[{"prompt":"b"}]}"#).field, "jobs");
    }
}
