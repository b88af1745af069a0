//! The project as a whole: its layers, and the commands that need no farm.

mod commands;
mod layering;
