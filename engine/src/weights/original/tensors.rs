//! One part's tensors under their original names, and what their shapes tell.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use super::names::number;
use crate::weights::Stored;
use crate::{Error, Result};

/// The tensors below one prefix of a single file.
pub(super) struct Tensors<'a> {
    /// The file, and the part as if it were a folder in it.
    pub path: PathBuf,
    /// By name without the prefix.
    pub stored: BTreeMap<&'a str, &'a Stored>,
}

impl Tensors<'_> {
    pub fn has(&self, name: &str) -> bool {
        self.stored.contains_key(name)
    }

    /// One number of a tensor's shape.
    pub fn dim(&self, name: &str, axis: usize) -> Result<usize> {
        let stored = self.stored.get(name).ok_or_else(|| self.refuse(format!("has no tensor `{name}`")))?;
        let dim = stored.shape.get(axis).copied();
        dim.ok_or_else(|| self.refuse(format!("tensor `{name}` has too few dimensions: {:?}", stored.shape)))
    }

    /// How many different numbers follow `prefix`.
    pub fn count(&self, prefix: &str) -> usize {
        let rest = self.stored.range(prefix..).map_while(|(name, _)| name.strip_prefix(prefix));
        rest.filter_map(|rest| number(rest).map(|(number, _)| number)).collect::<BTreeSet<_>>().len()
    }

    /// The shape of the first tensor whose name ends so.
    pub fn find(&self, suffix: &str) -> Option<&[usize]> {
        self.stored.iter().find(|(name, _)| name.ends_with(suffix)).map(|(_, stored)| stored.shape.as_slice())
    }

    /// An error about this part.
    pub fn refuse(&self, problem: String) -> Error {
        Error::checkpoint(&self.path, problem)
    }
}
