//! Progress bars, on standard error and only where that is a terminal.

use std::time::Duration;

use farm::job::Counters;
use indicatif::{ProgressBar, ProgressStyle};

/// A bar of denoising steps, with the pictures done so far.
pub fn steps(total: u64) -> ProgressBar {
    bar(total, "{wide_bar} {pos}/{len} steps  {msg}")
}

/// A bar of jobs.
pub fn jobs(total: u64) -> ProgressBar {
    bar(total, "{wide_bar} {pos}/{len}  {msg}")
}

/// A bar of bytes.
pub fn bytes(total: u64) -> ProgressBar {
    bar(total, "{wide_bar} {bytes}/{total_bytes}  {msg}")
}

/// Something that goes on for no one knows how long.
pub fn spinner(message: &str) -> ProgressBar {
    let spinner = ProgressBar::new_spinner().with_message(message.to_owned());
    spinner.enable_steady_tick(Duration::from_millis(120));
    spinner
}

fn bar(total: u64, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).expect("the template is right");
    let bar = ProgressBar::new(total).with_style(style.progress_chars("━╸ "));
    bar.enable_steady_tick(Duration::from_millis(500));
    bar
}

/// Shows a submission's counters on its bar.
pub fn show(bar: &ProgressBar, counters: &Counters, rate: Option<f64>, eta_seconds: Option<f64>) {
    bar.set_length(counters.total());
    bar.set_position(counters.finished());
    bar.set_message(summary(counters, rate, eta_seconds));
}

/// A submission in one line: `120 done, 3 failed, 8 rendering; 4.1/s, 2 min left`.
pub fn summary(counters: &Counters, rate: Option<f64>, eta_seconds: Option<f64>) -> String {
    let waiting = counters.pending + counters.queued;
    let parts = [
        (counters.done, "done"),
        (counters.failed, "failed"),
        (counters.cancelled, "cancelled"),
        (counters.leased, "rendering"),
        (waiting, "waiting"),
    ];
    let mut line =
        parts.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}")).collect::<Vec<_>>();
    if line.is_empty() {
        line.push("no jobs".into());
    }
    let mut line = line.join(", ");
    if counters.finished() < counters.total() {
        if let Some(rate) = rate {
            line.push_str(&format!("; {rate:.1}/s"));
        }
        if let Some(seconds) = eta_seconds {
            line.push_str(&format!(", {} left", duration(seconds)));
        }
    }
    line
}

/// Seconds as people say them.
pub fn duration(seconds: f64) -> String {
    let seconds = seconds.clamp(0.0, 1e9).round() as u64;
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds.div_ceil(60)),
        7200..=172_799 => format!("{} h", seconds.div_ceil(3600)),
        _ => format!("{} days", seconds.div_ceil(86_400)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_running_submission_shows_rate_and_time_left() {
        let counters = Counters { pending: 5, queued: 5, leased: 8, done: 120, failed: 3, cancelled: 0 };
        let line = summary(&counters, Some(4.13), Some(300.0));
        assert_eq!(line, "120 done, 3 failed, 8 rendering, 10 waiting; 4.1/s, 5 min left");
    }

    #[test]
    fn a_finished_submission_shows_only_what_became_of_its_jobs() {
        let counters = Counters { done: 7, ..Counters::default() };
        assert_eq!(summary(&counters, Some(4.0), Some(0.0)), "7 done");
    }

    #[test]
    fn durations_read_as_people_say_them() {
        let all = [0.4, 119.0, 120.0, 7000.0, 7300.0, 1e6].map(duration);
        assert_eq!(all, ["0 s", "119 s", "2 min", "117 min", "3 h", "12 days"]);
    }
}
