//! The switches of the ports, and what the worker asked of them.

use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use tokio::sync::watch;

use super::ports::Gate;

pub struct Faults {
    pub store_down: AtomicBool,
    /// The next `finish` commits, and its answer gets lost.
    pub lose_next_answer: AtomicBool,
    pub disk_full: AtomicBool,
    /// Objects cannot be read.
    pub reads_fail: AtomicBool,
    pub disk: Gate,
    pub broker_down: watch::Sender<bool>,
    log: Mutex<Vec<String>>,
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            store_down: AtomicBool::default(),
            lose_next_answer: AtomicBool::default(),
            disk_full: AtomicBool::default(),
            reads_fail: AtomicBool::default(),
            disk: Gate::default(),
            broker_down: watch::Sender::new(false),
            log: Mutex::default(),
        }
    }
}

impl Faults {
    pub fn note(&self, what: impl Into<String>) {
        self.log.lock().unwrap().push(what.into());
    }

    /// What was asked of the ports, in order: those that begin with `what`.
    pub fn noted(&self, what: &str) -> Vec<String> {
        self.log.lock().unwrap().iter().filter(|line| line.starts_with(what)).cloned().collect()
    }

    /// Where in the log a line stands.
    pub fn place_of(&self, line: &str) -> Option<usize> {
        self.log.lock().unwrap().iter().position(|known| known == line)
    }

    pub async fn disk_is_open(&self) {
        self.disk.pass().await;
    }
}
