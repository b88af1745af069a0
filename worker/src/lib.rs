//! One device's process: takes jobs in, renders them in a running batch, delivers the pictures.
//!
//! Reading order: [`run`] is a worker's life; `affinity` decides which checkpoint it serves; `intake`
//! claims windows of jobs (over a `subscription` to each lane) and has `inputs` fetch what they start from; `device` is the one thread that renders,
//! with the `batcher`'s plan for each step of its `rows`; `deliver` stores what comes out as `picture`
//! writes it; `settle` tells the store how a job ended and `heartbeat` that it has not; `holdings` is
//! what all of them agree on. [`resolve`] finds a checkpoint's folder, with `hub` behind it.
//!
//! Invariant: the device thread never waits for a network, a disk or a PNG, and nothing in here listens
//! for connections.

pub mod resolve;

mod affinity;
mod announce;
mod batcher;
mod context;
mod deliver;
mod device;
mod heartbeat;
mod holdings;
mod hub;
mod inputs;
mod intake;
mod picture;
mod renderer;
mod rows;
mod run;
mod settle;
mod subscription;

pub use renderer::{EngineRenderer, RenderError, Renderer, RowBatch, Stepped, open_device, row_request};
pub use run::{Worker, WorkerSummary, run, run_with};
