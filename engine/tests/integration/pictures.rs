//! Whole pictures against diffusers': the same seed gives the same picture.

use std::collections::BTreeMap;

use crate::golden::{self, Golden};
use crate::support::{CHECKPOINTS, checkpoint, fixtures};

/// Those of `pictures.json` and of the families' lists in `pictures/`.
pub fn goldens() -> Vec<Golden> {
    let listed = std::fs::read_dir(fixtures().join("pictures")).unwrap().map(|entry| entry.unwrap().path());
    let lists = listed.filter(|path| path.extension().is_some_and(|extension| extension == "json"));
    lists.chain([fixtures().join("pictures.json")]).flat_map(|list| golden::read(&list)).collect()
}

#[test]
fn every_picture_is_at_most_one_level_off_diffusers() {
    let goldens = goldens();
    let mut worst: BTreeMap<&str, (u8, usize)> = BTreeMap::new();
    let mut off = Vec::new();
    for golden in &goldens {
        let difference = golden.difference(&checkpoint(&golden.checkpoint));
        let entry = worst.entry(&golden.checkpoint).or_default();
        *entry = (entry.0.max(difference), entry.1 + 1);
        if difference > 1 {
            off.push(format!("{} by {difference}", golden.file));
        }
    }
    println!("largest difference and number of pictures per checkpoint: {worst:?}");
    assert!(off.is_empty(), "more than one level off: {off:?}");
    assert!(CHECKPOINTS.iter().all(|name| worst.contains_key(name)), "a checkpoint has no pictures: {worst:?}");
}
