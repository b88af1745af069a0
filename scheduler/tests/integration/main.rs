//! The scheduler over real HTTP: SQLite, the in-process broker and a folder beneath, a small worker of the tests' own
//! beside.

mod support;

mod artifacts;
mod auth;
mod health;
mod image;
mod jobs;
mod lines;
mod loops;
mod openapi;
mod shutdown;
mod stream;
mod submissions;
