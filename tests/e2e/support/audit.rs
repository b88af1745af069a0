//! What must hold when the dust has settled, whatever went wrong before.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use farm::artifact::SharedArtifacts;
use farm::config::Environment;
use farm::job::Lane;
use farm::message::QueueKey;
use sqlx::Row;

use super::{Farm, eventually};

/// Each job of the submission is done exactly once, with one image and one sidecar, the counters say
/// so, and no queue holds anything.
pub async fn audit(farm: &Farm, submission: &str, jobs: u64) {
    counters_are_right(farm, submission, jobs).await;
    let keys = every_job_is_done(farm, submission, jobs).await;
    one_object_each(farm, submission, keys).await;
    queues_are_empty(farm).await;
}

async fn counters_are_right(farm: &Farm, submission: &str, jobs: u64) {
    let view = farm.client.get(&format!("/v1/submissions/{submission}")).await;
    let expected = serde_json::json!({
        "pending": 0, "queued": 0, "leased": 0, "done": jobs, "failed": 0, "cancelled": 0
    });
    assert_eq!(view["counters"], expected, "the counters of the submission");
    assert!(view["finished_at"].is_string(), "the submission is finished: {view}");
}

/// Reads the documented view, as a user of the status table would.
async fn every_job_is_done(farm: &Farm, submission: &str, jobs: u64) -> BTreeSet<String> {
    let rows = sqlx::query("SELECT state, image_key, attempts FROM job_status WHERE submission_id = $1::uuid")
        .bind(submission)
        .fetch_all(&mut farm.database().await)
        .await
        .expect("the status view can be read");
    assert_eq!(rows.len() as u64, jobs, "rows of the status view");
    let mut keys = BTreeSet::new();
    for row in &rows {
        assert_eq!(row.get::<String, _>("state"), "done");
        assert!(row.get::<i32, _>("attempts") >= 1);
        keys.insert(row.get::<String, _>("image_key"));
    }
    assert_eq!(keys.len() as u64, jobs, "each job has an image of its own");
    keys
}

async fn one_object_each(farm: &Farm, submission: &str, keys: BTreeSet<String>) {
    let artifacts = open_artifacts(farm);
    let prefix = format!("submissions/{submission}/");
    let jobs = keys.len();
    // What lost attempts left behind is deleted after a grace time.
    let paths = eventually("leftovers of lost attempts are deleted", Duration::from_secs(60), || async {
        let paths = artifacts.list(&prefix).await.expect("objects can be listed");
        (paths.len() <= 2 * jobs).then_some(paths)
    })
    .await;
    let (images, sidecars): (Vec<_>, Vec<_>) = paths.into_iter().partition(|path| path.ends_with(".png"));
    assert_eq!(images.into_iter().collect::<BTreeSet<_>>(), keys, "the images are those that the rows name");
    assert_eq!(sidecars.len(), jobs, "one sidecar each");
}

/// As the farm's own processes open it.
fn open_artifacts(farm: &Farm) -> SharedArtifacts {
    let environment = Environment(farm.environment.iter().cloned().collect());
    let loaded = farm::config::load(None, &environment).expect("the farm's processes read the same variables");
    farm::artifact::open(&loaded.config.artifacts, Path::new("unused")).expect("the bucket can be opened")
}

async fn queues_are_empty(farm: &Farm) {
    let broker = farm::broker::connect(&farm.services.broker_url, &farm.prefix).expect("RabbitMQ answers");
    for model in ["demo", "tiny"] {
        for lane in Lane::ALL {
            let queue = QueueKey { model: model.into(), lane };
            eventually("stale deliveries are acked away", Duration::from_secs(30), || async {
                (broker.depth(&queue).await.expect("a depth") == 0).then_some(())
            })
            .await;
        }
    }
}
