//! Implementation.
