//! A whole farm in this process: scheduler and worker as tasks, over whatever ports they are given.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use farm::catalog::Catalog;
use farm::config::Config;
use scheduler::Scheduler;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use worker::Worker;

use crate::ports::Ports;

/// The scheduler as the configuration wants it.
pub fn scheduler(config: &Config, ports: &Ports, catalog: &Arc<Catalog>) -> Scheduler {
    Scheduler {
        store: Arc::clone(&ports.store),
        broker: Arc::clone(&ports.broker),
        artifacts: Arc::clone(&ports.artifacts),
        catalog: Arc::clone(catalog),
        limits: config.limits.clone(),
        api: config.api.clone(),
        config: config.scheduler.clone(),
        clock: Arc::clone(&ports.clock),
    }
}

/// The worker as the configuration wants it.
pub fn worker(config: &Config, ports: &Ports, catalog: &Arc<Catalog>) -> Worker {
    Worker {
        store: Arc::clone(&ports.store),
        broker: Arc::clone(&ports.broker),
        artifacts: Arc::clone(&ports.artifacts),
        catalog: Arc::clone(catalog),
        config: config.worker.clone(),
        limits: config.limits.clone(),
        clock: Arc::clone(&ports.clock),
    }
}

/// A farm that runs in this process.
pub struct Farm {
    /// Where its API listens.
    pub address: SocketAddr,
    parts: JoinSet<(&'static str, Result<()>)>,
    stop: CancellationToken,
}

impl Farm {
    /// Starts scheduler and worker.
    pub fn start(config: &Config, ports: &Ports, catalog: &Arc<Catalog>, listener: TcpListener) -> Result<Self> {
        let address = listener.local_addr().context("the listening socket has no address")?;
        let stop = CancellationToken::new();
        let mut parts = JoinSet::new();
        let (scheduler, ended) = (scheduler(config, ports, catalog), stop.clone().cancelled_owned());
        parts.spawn(async move { ("scheduler", scheduler::run(scheduler, listener, ended).await) });
        let (worker, ended) = (worker(config, ports, catalog), stop.clone().cancelled_owned());
        parts.spawn(async move { ("worker", worker::run(worker, ended).await.map(drop)) });
        Ok(Self { address, parts, stop })
    }

    /// Resolves when a part ends although nobody asked it to; says which and why.
    pub async fn broken(&mut self) -> anyhow::Error {
        match self.parts.join_next().await {
            Some(Ok((part, Err(error)))) => error.context(format!("the {part} ended")),
            Some(Ok((part, Ok(())))) => anyhow!("the {part} ended by itself"),
            Some(Err(panic)) => anyhow!(panic).context("a part of the farm broke; this is a bug"),
            None => anyhow!("the farm has ended"),
        }
    }

    /// Lets both parts finish what they hold, and waits for that.
    pub async fn stop(mut self) -> Result<()> {
        self.stop.cancel();
        let mut outcome = Ok(());
        while let Some(ended) = self.parts.join_next().await {
            let failure = match ended {
                Ok((_, Ok(()))) => continue,
                Ok((part, Err(error))) => error.context(format!("the {part} did not stop cleanly")),
                Err(panic) => anyhow!(panic).context("a part of the farm broke; this is a bug"),
            };
            outcome = outcome.and(Err(failure));
        }
        outcome
    }
}
