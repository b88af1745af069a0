//! The project as a whole: its layers and pages, and the commands that need no farm.

mod bench;
mod commands;
mod documents;
mod layering;
