//! The farm end to end: real processes over real Postgres, RabbitMQ and S3, rendering real pictures.
//!
//! `support` starts a farm with a database, queue prefix and object prefix of its own and audits it at
//! the end: each job done exactly once, one object each, counters right, nothing left in queues.
//! The tests run one after another: they share two cores, and some restart the servers.

mod support;

mod command_line;
mod families;
mod faults;
mod init_images;
mod refiner;
mod throughput;
