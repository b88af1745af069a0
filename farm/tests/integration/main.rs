//! Integration tests.

/// The artifact store: one suite for every implementation.
mod artifact;
/// The artifact stores when disks, servers or keys fail.
mod artifact_faults;
/// The broker: one suite for every implementation.
mod broker;
/// The broker when connections, servers or messages fail.
mod broker_amqp;
/// Where the real servers are.
mod services;
/// The store: one suite for every implementation.
mod store;
