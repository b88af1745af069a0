//! The worker on SQLite, the in-process broker and a folder, with a renderer whose pace, memory and
//! faults the tests decide; and with the real engine at the end.

mod support;

mod delivering;
mod engine;
mod failing;
mod hub;
mod moving;
mod outages;
mod rendering;
mod starting;
mod stopping;
