//! A checkpoint's `scheduler_config.json`, and what becomes of it when a request names another sampler or
//! schedule. The rules are those of diffusers (`configuration_utils.py`, `ConfigMixin.from_config`) and of
//! its Stable Diffusion pipeline (`pipeline_stable_diffusion.py`, `__init__`), because the pictures must be:
//!
//! - Without a choice, the file is read with the defaults of the class it names.
//! - The pipeline takes `steps_offset` as 1 and `clip_sample` as false, whatever the file says; those of
//!   later families take the file as it is.
//! - Another sampler, or another schedule than the file's, reads the same file with its own class's
//!   defaults for what the file leaves out; those defaults the pipeline does not touch.
//!
//! The schedules `karras`, `exponential` and `beta` are for samplers that work on noise levels. diffusers
//! has them for Euler and DPM-Solver; Euler ancestral takes Euler's, as k-diffusion's users know it. DDIM and
//! PNDM step over whole timesteps and refuse them.

use serde_json::{Map, Value};

use super::options::{CONFIG_FILE, Options, refuse};
use super::{SamplerKind, ScheduleKind};
use crate::{Error, Result};

/// Every class that diffusers counts as interchangeable, and the one that we have for it; and that of models
/// trained by flow matching, which is interchangeable with no other.
const CLASSES: [(&str, Option<SamplerKind>); 17] = [
    ("DDIMScheduler", Some(SamplerKind::Ddim)),
    ("EulerDiscreteScheduler", Some(SamplerKind::Euler)),
    ("EulerAncestralDiscreteScheduler", Some(SamplerKind::EulerAncestral)),
    ("DPMSolverMultistepScheduler", Some(SamplerKind::Dpmpp2m)),
    ("PNDMScheduler", Some(SamplerKind::Pndm)),
    ("DDPMScheduler", None),
    ("DEISMultistepScheduler", None),
    ("DPMSolverSDEScheduler", None),
    ("DPMSolverSinglestepScheduler", None),
    ("EDMEulerScheduler", None),
    ("HeunDiscreteScheduler", None),
    ("KDPM2AncestralDiscreteScheduler", None),
    ("KDPM2DiscreteScheduler", None),
    ("LCMScheduler", None),
    ("LMSDiscreteScheduler", None),
    ("UniPCMultistepScheduler", None),
    ("FlowMatchEulerDiscreteScheduler", Some(SamplerKind::FlowMatchEuler)),
];

/// The flags by which a configuration names its schedule.
const SCHEDULE_FLAGS: [(&str, ScheduleKind); 3] = [
    ("use_karras_sigmas", ScheduleKind::Karras),
    ("use_exponential_sigmas", ScheduleKind::Exponential),
    ("use_beta_sigmas", ScheduleKind::Beta),
];

/// What a checkpoint says about sampling: the content of its `scheduler/scheduler_config.json`.
#[derive(Clone, Debug)]
pub struct SamplerConfig {
    class: String,
    /// The sampler that the checkpoint names, if it is one of ours.
    kind: Option<SamplerKind>,
    values: Map<String, Value>,
    /// Whether it is read by Stable Diffusion's pipeline, which overrules two of its values.
    overruled: bool,
}

impl SamplerConfig {
    /// The same for a pipeline that takes it as it is written.
    pub fn taken_as_written(self) -> Self {
        Self { overruled: false, ..self }
    }

    /// Reads the file's text. It may hold `Infinity` and `NaN`, which Python writes and JSON has not.
    ///
    /// # Errors
    /// As [`SamplerConfig::from_json`], and where the text is not JSON.
    #[cfg(test)]
    pub fn parse(text: &str) -> Result<Self> {
        let value = serde_json::from_str(&quote_infinities(text))
            .map_err(|error| Error::checkpoint(CONFIG_FILE, format!("not JSON: {error}")))?;
        Self::from_json(&value)
    }

    /// Reads the file's value.
    ///
    /// # Errors
    /// Where it is no object or names no class of the samplers of Stable Diffusion or of flow matching. A class that Kiln lacks is
    /// accepted here, since a request may name another sampler.
    pub fn from_json(value: &Value) -> Result<Self> {
        let values = value.as_object().ok_or_else(|| Error::checkpoint(CONFIG_FILE, "not a JSON object"))?;
        let class = match values.get("_class_name") {
            Some(Value::String(class)) => class.clone(),
            other => return Err(refuse("_class_name", "a string", other)),
        };
        let Some((_, kind)) = CLASSES.iter().find(|(name, _)| *name == class) else {
            let known = CLASSES.map(|(name, _)| name).join(", ");
            return Err(refuse("_class_name", format!("one of {known}"), values.get("_class_name")));
        };
        Ok(Self { kind: *kind, class, values: values.clone(), overruled: true })
    }

    /// The sampler that a request gets and the options it reads, by the rules above.
    ///
    /// # Errors
    /// Where the sampler is left to a checkpoint that names one Kiln lacks, or does not go with the schedule.
    pub(super) fn choose(
        &self,
        kind: Option<SamplerKind>,
        schedule: Option<ScheduleKind>,
    ) -> Result<(SamplerKind, Options)> {
        let chosen = kind.or(self.kind).ok_or_else(|| {
            let known = self.possible().join(", ");
            let value = format!("left to the checkpoint, which names `{}`", self.class);
            Error::request("sampler", format!("one of {known}"), value)
        })?;
        if !self.possible().contains(&chosen.as_str()) {
            let limit = format!("{} for this checkpoint, which names `{}`", one_of(&self.possible()), self.class);
            return Err(Error::request("sampler", limit, chosen));
        }
        let on_timesteps = matches!(chosen, SamplerKind::Ddim | SamplerKind::Pndm);
        if on_timesteps && let Some(schedule) = schedule.filter(|schedule| *schedule != ScheduleKind::Normal) {
            return Err(Error::request("schedule", format!("normal for the sampler {chosen}"), schedule));
        }
        let own = self.kind == Some(chosen) && schedule.is_none_or(|schedule| self.says(chosen, schedule));
        let mut values = self.values.clone();
        let mut overrule = |name: &str, value: Value| {
            if own || values.contains_key(name) {
                values.insert(name.to_owned(), value);
            }
        };
        if self.overruled {
            overrule("steps_offset", 1.into());
            overrule("clip_sample", false.into());
        }
        if let Some(schedule) = schedule {
            for (flag, named) in SCHEDULE_FLAGS {
                values.insert(flag.to_owned(), (named == schedule).into());
            }
        }
        if chosen == SamplerKind::EulerAncestral && schedule.is_none_or(|schedule| schedule == ScheduleKind::Normal) {
            // diffusers' class knows the training schedule's levels only.
            for name in EULER_ONLY.into_iter().chain(SCHEDULE_FLAGS.map(|(flag, _)| flag)) {
                values.remove(name);
            }
        }
        Ok((chosen, Options::new(values)))
    }

    /// Of a schedule of so many steps, how many calls a row leaves out that starts from a picture with this
    /// strength: diffusers' `get_timesteps`, which cuts the steps that are left to whole ones, or with flow matching
    /// those that are left out.
    pub fn skipped_calls(&self, steps: usize, strength: f64) -> usize {
        let left = (steps as f64 * strength).min(steps as f64);
        match self.kind {
            Some(SamplerKind::FlowMatchEuler) => (steps as f64 - left) as usize,
            _ => steps - left as usize,
        }
    }

    /// Timesteps of the training schedule, whichever sampler goes through them.
    pub fn training_timesteps(&self) -> Result<usize> {
        Options::new(self.values.clone()).count("num_train_timesteps", 1000)
    }

    /// The samplers that fit what the checkpoint was trained for.
    fn possible(&self) -> Vec<&'static str> {
        let flow = self.kind == Some(SamplerKind::FlowMatchEuler);
        let fits = |kind: &SamplerKind| (*kind == SamplerKind::FlowMatchEuler) == flow;
        SamplerKind::ALL.into_iter().filter(fits).map(SamplerKind::as_str).collect()
    }

    /// Whether the file alone gives this sampler this schedule.
    fn says(&self, chosen: SamplerKind, schedule: ScheduleKind) -> bool {
        match chosen {
            SamplerKind::Euler | SamplerKind::Dpmpp2m | SamplerKind::FlowMatchEuler => SCHEDULE_FLAGS
                .iter()
                .all(|(flag, named)| (self.values.get(*flag) == Some(&Value::Bool(true))) == (*named == schedule)),
            _ => schedule == ScheduleKind::Normal,
        }
    }
}

fn one_of(words: &[&str]) -> String {
    match words {
        [only] => (*only).to_owned(),
        several => format!("one of {}", several.join(", ")),
    }
}

/// What shapes the noise levels of diffusers' Euler but not of its Euler ancestral.
const EULER_ONLY: [&str; 5] = ["interpolation_type", "timestep_type", "sigma_min", "sigma_max", "final_sigmas_type"];

/// The schedule that the options' flags name.
///
/// # Errors
/// Where more than one is set.
pub(super) fn schedule(options: &Options) -> Result<ScheduleKind> {
    let mut found = ScheduleKind::Normal;
    for (flag, named) in SCHEDULE_FLAGS {
        if options.flag(flag, false)? {
            if found != ScheduleKind::Normal {
                return Err(refuse(flag, "false beside another schedule", Some(&true.into())));
            }
            found = named;
        }
    }
    Ok(found)
}

/// Puts quotes around the numbers that Python writes and JSON has not; text inside strings stays.
pub(crate) fn quote_infinities(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len());
    let mut rest = text;
    let mut in_string = false;
    while let Some(first) = rest.chars().next() {
        let word = ["-Infinity", "Infinity", "NaN"].into_iter().find(|word| !in_string && rest.starts_with(word));
        let taken = match (word, first) {
            (Some(word), _) => {
                quoted.extend(["\"", word, "\""]);
                word.len()
            }
            (None, '\\') if in_string => {
                let taken = first.len_utf8() + rest[1..].chars().next().map_or(0, char::len_utf8);
                quoted.push_str(&rest[..taken]);
                taken
            }
            (None, _) => {
                in_string ^= first == '"';
                quoted.push(first);
                first.len_utf8()
            }
        };
        rest = &rest[taken..];
    }
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config(value: Value) -> SamplerConfig {
        SamplerConfig::from_json(&value).expect("a good configuration")
    }

    #[test]
    fn infinities_as_python_writes_them_are_read() {
        let text = r#"{"_class_name": "DPMSolverMultistepScheduler", "note": "\"Infinity\\", "lambda_min_clipped": -Infinity}"#;
        let config = SamplerConfig::parse(text).expect("python's JSON");
        assert_eq!(config.values["note"], "\"Infinity\\");
        let (_, options) = config.choose(None, None).expect("its own sampler");
        assert_eq!(options.number("lambda_min_clipped", 0.0).ok(), Some(f64::NEG_INFINITY));
    }

    #[test]
    fn text_that_is_no_json_object_is_refused() {
        assert!(SamplerConfig::parse("{").is_err());
        assert!(SamplerConfig::parse("[]").is_err());
        assert!(SamplerConfig::parse("{}").is_err());
    }

    #[test]
    fn a_class_that_we_lack_needs_a_request_that_names_another() {
        let config = config(json!({"_class_name": "UniPCMultistepScheduler"}));
        assert!(config.choose(Some(SamplerKind::Euler), None).is_ok());
        let error = config.choose(None, None).expect_err("not ours").to_string();
        assert!(error.contains("`sampler`") && error.contains("UniPCMultistepScheduler"), "{error}");
    }

    #[test]
    fn a_class_of_another_family_is_refused_by_name() {
        let value = json!({"_class_name": "FlowMatchHeunDiscreteScheduler"});
        let error = SamplerConfig::from_json(&value).expect_err("not ours").to_string();
        assert!(error.contains("_class_name") && error.contains("FlowMatchHeunDiscreteScheduler"), "{error}");
    }

    #[test]
    fn what_was_trained_by_flow_matching_takes_its_own_sampler_and_nothing_else_does() {
        let flow = config(json!({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}));
        assert_eq!(flow.choose(None, None).ok().map(|(kind, _)| kind), Some(SamplerKind::FlowMatchEuler));
        assert!(flow.choose(Some(SamplerKind::FlowMatchEuler), Some(ScheduleKind::Beta)).is_ok());
        let error = flow.choose(Some(SamplerKind::Dpmpp2m), None).expect_err("of another kind").to_string();
        let expected = "`sampler` must be flow_match_euler for this checkpoint, which names \
                        `FlowMatchEulerDiscreteScheduler`, but is dpmpp_2m";
        assert_eq!(error, expected);
        let other = config(json!({"_class_name": "DDIMScheduler"}));
        let error = other.choose(Some(SamplerKind::FlowMatchEuler), None).expect_err("of another kind").to_string();
        let expected = "`sampler` must be one of ddim, euler, euler_ancestral, dpmpp_2m, pndm for this checkpoint, which \
                        names `DDIMScheduler`, but is flow_match_euler";
        assert_eq!(error, expected);
    }

    #[test]
    fn samplers_over_whole_timesteps_refuse_schedules_of_noise_levels() {
        let config = config(json!({"_class_name": "DDIMScheduler"}));
        for kind in [SamplerKind::Ddim, SamplerKind::Pndm] {
            assert!(config.choose(Some(kind), Some(ScheduleKind::Normal)).is_ok());
            let error = config.choose(Some(kind), Some(ScheduleKind::Karras)).expect_err("no such schedule");
            assert_eq!(error.to_string(), format!("`schedule` must be normal for the sampler {kind}, but is karras"));
        }
    }

    #[test]
    fn strength_cuts_the_steps_as_in_diffusers() {
        let skipped = |class: &str, strength| config(json!({"_class_name": class})).skipped_calls(10, strength);
        for (strength, cut, flow) in [(1.0, 0, 0), (0.25, 8, 7), (0.6, 4, 4), (0.05, 10, 9)] {
            assert_eq!(skipped("DDIMScheduler", strength), cut, "{strength}");
            assert_eq!(skipped("FlowMatchEulerDiscreteScheduler", strength), flow, "{strength}");
        }
    }

    #[test]
    fn two_schedules_at_once_are_refused() {
        let flags =
            json!({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": true, "use_beta_sigmas": true});
        let (_, options) = config(flags.clone()).choose(None, None).expect("flags are read later");
        assert!(schedule(&options).is_err());
        let (_, options) = config(flags).choose(None, Some(ScheduleKind::Beta)).expect("the request decides");
        assert_eq!(schedule(&options).ok(), Some(ScheduleKind::Beta));
    }
}
