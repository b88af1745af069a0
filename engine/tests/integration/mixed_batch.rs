//! A row of a mixed batch equals the job rendered alone, bit for bit.

use std::sync::Arc;

use engine::{MicroConditioning, RowId, RowRequest, RunningBatch, SamplerKind, ScheduleKind, render};

use crate::company::{Finished, alone, decode, drain, step, step_all};
use crate::support::{checkpoint, request};

/// Rows that differ in everything that may differ within a batch.
fn rows(width: usize, height: usize) -> Vec<RowRequest> {
    let base = |prompt: &str, steps, seed| RowRequest { width, height, steps, seed, ..request(prompt) };
    vec![
        base("a small red star on a blue background", 6, 1),
        RowRequest { guidance_scale: 1.0, sampler: Some(SamplerKind::Euler), ..base("a green ring", 3, 2) },
        RowRequest {
            sampler: Some(SamplerKind::EulerAncestral),
            negative_prompt: "a black square".to_owned(),
            micro_conditioning: MicroConditioning {
                original_size: Some((512, 300)),
                crop: (7, 9),
                target_size: Some((64, 32)),
            },
            ..base("a large pink heart left of a cyan cross", 5, 3)
        },
        RowRequest {
            sampler: Some(SamplerKind::Dpmpp2m),
            schedule: Some(ScheduleKind::Karras),
            guidance_scale: 9.5,
            ..base("", 7, 4)
        },
        RowRequest { sampler: Some(SamplerKind::Pndm), guidance_scale: 0.0, ..base("a white diamond", 5, 5) },
        RowRequest { sampler: Some(SamplerKind::Ddim), guidance_scale: 2.0, ..base("a white diamond", 1, 5) },
    ]
}

fn rows_that_join_late_equal_rows_alone(name: &str, width: usize, height: usize) {
    let checkpoint = checkpoint(name);
    let requests = rows(width, height);
    let mut batch = RunningBatch::new(Arc::clone(&checkpoint), width, height);
    let mut finished = Finished::new();
    for (id, request) in (0..).zip(&requests) {
        batch.join(id, request).unwrap();
        step_all(&mut batch, &mut finished);
        // Every other row sits out a step that its mates take.
        let waiting: Vec<RowId> = batch.rows().into_iter().filter(|row| row % 2 == id % 2).collect();
        step(&mut batch, &waiting, &mut finished);
    }
    drain(&mut batch, &mut finished);
    assert_eq!(finished.len(), requests.len());
    for (id, request) in (0..).zip(&requests) {
        assert!(finished[&id].1 == alone(&checkpoint, id, request), "{name}: row {id} differs from the job alone");
    }

    for ((id, request), picture) in (0..).zip(&requests).zip(decode(&checkpoint, finished)) {
        let (own, mut steps) = (&picture, Vec::new());
        let rendered = render(&checkpoint, request, |step, total| steps.push((step, total))).unwrap();
        assert!(own == &rendered, "{name}: the picture of row {id} differs from the job alone");
        assert!(steps.iter().map(|step| step.0).eq(1..=steps.len()) && steps.iter().all(|step| step.1 == steps.len()));
    }
}

#[test]
fn rows_that_join_late_equal_rows_alone_on_tiny_checkpoints() {
    rows_that_join_late_equal_rows_alone("sd1", 64, 64);
    rows_that_join_late_equal_rows_alone("sd2", 72, 40);
    rows_that_join_late_equal_rows_alone("one_layer", 36, 68);
}

#[test]
fn rows_that_join_late_equal_rows_alone_in_every_family() {
    rows_that_join_late_equal_rows_alone("sdxl", 64, 40);
}

#[test]
fn rows_that_join_late_equal_rows_alone_on_the_demo_checkpoint() {
    rows_that_join_late_equal_rows_alone("demo", 128, 128);
}

#[test]
fn a_row_that_leaves_changes_nothing_for_the_others() {
    let checkpoint = checkpoint("sd2");
    let requests = rows(64, 64);
    let mut batch = RunningBatch::new(Arc::clone(&checkpoint), 64, 64);
    for (id, request) in (0..).zip(&requests[..4]) {
        batch.join(id, request).unwrap();
    }
    let mut finished = Finished::new();
    step_all(&mut batch, &mut finished);
    assert!(batch.leave(2));
    assert!(!batch.leave(2));
    assert_eq!(batch.rows(), [0, 1, 3]);
    drain(&mut batch, &mut finished);
    assert_eq!(finished.keys().copied().collect::<Vec<_>>(), [0, 1, 3]);
    for (id, (_, latent)) in finished {
        assert!(latent == alone(&checkpoint, id, &requests[id as usize]), "row {id}");
    }
}

#[test]
fn the_same_job_gives_the_same_picture_and_another_seed_another() {
    let checkpoint = checkpoint("sd1");
    let first = render(&checkpoint, &request("a star"), |_, _| {}).unwrap();
    assert!(first == render(&checkpoint, &request("a star"), |_, _| {}).unwrap());
    assert!(first != render(&checkpoint, &RowRequest { seed: 2, ..request("a star") }, |_, _| {}).unwrap());
}

#[test]
fn a_step_that_fails_advances_no_row() {
    let checkpoint = checkpoint("sd1");
    let mut batch = RunningBatch::new(Arc::clone(&checkpoint), 64, 64);
    batch.join(1, &request("a star")).unwrap();
    batch.step(&[1]).unwrap();
    // So much guidance that the step leaves the range of finite numbers.
    batch.join(2, &RowRequest { guidance_scale: 1e39, seed: 9, ..request("a ring") }).unwrap();
    let error = batch.step(&[1, 2]).unwrap_err();
    assert!(matches!(error, engine::Error::NotFinite { row: 2 }), "{error}");
    assert_eq!(batch.rows(), [1, 2]);
    assert_eq!(batch.step(&[1]).unwrap()[0].step, 2);
    assert!(matches!(batch.step(&[2]).unwrap_err(), engine::Error::NotFinite { row: 2 }));
    assert!(batch.leave(2));
    let mut finished = Finished::new();
    drain(&mut batch, &mut finished);
    assert!(finished[&1].1 == alone(&checkpoint, 1, &request("a star")));
}

#[test]
fn a_batch_moves_between_threads() {
    let checkpoint = checkpoint("sd1");
    let mut batch = RunningBatch::new(Arc::clone(&checkpoint), 64, 64);
    batch.join(7, &request("a star")).unwrap();
    let latent = std::thread::spawn(move || {
        let mut finished = Finished::new();
        drain(&mut batch, &mut finished);
        finished.remove(&7).unwrap().1
    });
    assert!(latent.join().unwrap() == alone(&checkpoint, 7, &request("a star")));
}
