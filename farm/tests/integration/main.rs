//! Integration tests.

/// The broker: one suite for every implementation.
mod broker;
/// Where the real servers are.
mod services;
/// The store: one suite for every implementation.
mod store;
