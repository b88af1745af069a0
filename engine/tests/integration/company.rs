//! Rows in company, each somewhere else on its way, and rows alone.

use std::collections::BTreeMap;
use std::sync::Arc;

use engine::{Checkpoint, Latent, RowId, RowRequest, RunningBatch};
use image::RgbImage;

/// How many denoiser calls each row has taken in all, and the latent that it has ended in.
pub type Finished = BTreeMap<RowId, (usize, Latent)>;

/// The rows of one batch of their size, with their places as ids. After a row for which `steps_after` holds has joined,
/// all take a step before the next one joins.
pub fn in_company(
    checkpoint: &Arc<Checkpoint>,
    requests: &[RowRequest],
    steps_after: impl Fn(RowId) -> bool,
) -> Finished {
    let mut batch = RunningBatch::new(Arc::clone(checkpoint), requests[0].width, requests[0].height);
    let mut finished = Finished::new();
    for (id, request) in (0..).zip(requests) {
        batch.join(id, request).unwrap();
        if steps_after(id) {
            step_all(&mut batch, &mut finished);
        }
    }
    drain(&mut batch, &mut finished);
    assert_eq!(finished.len(), requests.len());
    finished
}

/// The row's final latent, computed with nobody beside it; the id is part of a latent.
pub fn alone(checkpoint: &Arc<Checkpoint>, id: RowId, request: &RowRequest) -> Latent {
    let mut batch = RunningBatch::new(Arc::clone(checkpoint), request.width, request.height);
    let mut finished = Finished::new();
    batch.join(id, request).unwrap();
    drain(&mut batch, &mut finished);
    finished.remove(&id).unwrap().1
}

/// Steps the whole batch until it is empty.
pub fn drain(batch: &mut RunningBatch, finished: &mut Finished) {
    while !batch.is_empty() {
        step_all(batch, finished);
    }
}

pub fn step_all(batch: &mut RunningBatch, finished: &mut Finished) {
    step(batch, &batch.rows(), finished);
}

/// Steps some rows of the batch; those that are finished have then left it.
pub fn step(batch: &mut RunningBatch, ids: &[RowId], finished: &mut Finished) {
    let steps = batch.step(ids).unwrap();
    assert_eq!(steps.iter().map(|step| step.id).collect::<Vec<_>>(), ids);
    let left = batch.rows();
    for step in steps {
        assert_eq!(step.latent.is_some(), step.step == step.total);
        assert_eq!(step.latent.is_none(), left.contains(&step.id));
        finished.extend(step.latent.map(|latent| (step.id, (step.total, latent))));
    }
}

/// The pictures of finished rows, in the order of their ids.
pub fn decode(checkpoint: &Arc<Checkpoint>, finished: Finished) -> Vec<RgbImage> {
    let latents: Vec<Latent> = finished.into_values().map(|(_, latent)| latent).collect();
    checkpoint.decode(&latents).unwrap()
}
