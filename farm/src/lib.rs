//! What the farm's two processes agree on.
//!
//! Reading order: the words ([`id`], [`spec`], [`catalog`], [`job`], [`batch_key`], [`message`], [`fleet`],
//! [`latent`]), the decisions ([`placement`], [`clock`]), then the three ports with their implementations ([`store`],
//! [`broker`], [`artifact`]), then [`config`] and [`telemetry`].
//!
//! Invariant: nothing here knows tensors (candle) or HTTP routing (axum), and the pure modules never
//! import `store`, `broker` or `artifact`.

pub mod artifact;
pub mod batch_key;
pub mod broker;
pub mod catalog;
pub mod clock;
pub mod config;
pub mod fleet;
pub mod id;
pub mod job;
pub mod latent;
pub mod message;
pub mod placement;
pub mod spec;
pub mod store;
pub mod telemetry;
