//! Pictures that start from pictures, through the API, the queue and the bucket.

use std::io::Cursor;
use std::sync::Arc;
use std::time::Duration;

use engine::{Checkpoint, Device, DeviceChoice, InitContent, InitImage, Mask, MaskedContent, Precision, RowRequest};
use image::{GrayImage, ImageFormat, Luma, Rgb, RgbImage};
use serde_json::{Value, json};

use crate::support::{Farm, kiln, services, tiny_checkpoint};

const LIMIT: Duration = Duration::from_secs(120);

/// A sky over a meadow.
fn scene() -> RgbImage {
    RgbImage::from_fn(64, 64, |x, y| if y < 40 { Rgb([90 + x as u8, 150, 230]) } else { Rgb([60, 140, 50 + y as u8]) })
}

/// The upper half is painted anew.
fn mask() -> GrayImage {
    GrayImage::from_fn(64, 64, |_, y| Luma([if y < 32 { 255 } else { 0 }]))
}

fn png<P: image::PixelWithColorType<Subpixel = u8>>(picture: &image::ImageBuffer<P, Vec<u8>>) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    picture.write_to(&mut bytes, ImageFormat::Png).expect("a PNG can be written");
    bytes.into_inner()
}

/// What the engine makes of it alone.
fn alone(request: &RowRequest) -> RgbImage {
    let device = Device::open(DeviceChoice::Cpu).expect("a processor");
    let checkpoint = Checkpoint::load(&tiny_checkpoint(), &device, Precision::F32).expect("a checkpoint");
    engine::render(&Arc::new(checkpoint), request, |_, _| {}).expect("a picture")
}

async fn image(farm: &Farm, job: &Value) -> RgbImage {
    let id = job["job_id"].as_str().expect("an id");
    let bytes = farm.client.bytes(&format!("/v1/jobs/{id}/image")).await;
    image::load_from_memory(&bytes).expect("a PNG").into_rgb8()
}

#[tokio::test(flavor = "multi_thread")]
async fn uploaded_pictures_and_masks_are_rendered_among_other_jobs_as_the_engine_does_alone() {
    let farm = Farm::start(services().await, 1).await;
    let (scene_key, mask_key) = (farm.client.upload(png(&scene())).await, farm.client.upload(png(&mask())).await);
    let base = json!({"model": "tiny", "prompt": "a red star", "steps": 6, "width": 64, "height": 64, "seed": 5});
    let with = |more: Value| {
        let mut job = base.clone();
        job.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        job
    };
    let jobs = vec![
        with(json!({})),
        with(json!({"init_image": scene_key, "strength": 0.5})),
        with(json!({"init_image": scene_key, "mask_image": mask_key, "strength": 0.7, "mask_blur": 3})),
        with(json!({"init_image": scene_key, "mask_image": mask_key, "masked_content": "noise", "strength": 0.7})),
    ];
    let submission = farm.client.submit(jobs).await;
    farm.wait_for(&submission, "done", 4, LIMIT).await;

    let page = farm.client.get(&format!("/v1/jobs?submission_id={submission}")).await;
    let rendered = page["jobs"].as_array().expect("a list of jobs");
    let painted = |blur, content| Some(Mask { picture: Arc::new(mask()), blur, content });
    let init = |strength, mask| Some(InitImage { content: InitContent::Picture(Arc::new(scene())), strength, mask });
    let expected = [
        None,
        init(0.5, None),
        init(0.7, painted(3.0, MaskedContent::Original)),
        init(0.7, painted(0.0, MaskedContent::Noise)),
    ];
    for (job, init_image) in rendered.iter().zip(expected) {
        let (width, height, steps, seed) = (64, 64, 6, 5);
        let spec = &job["spec"];
        let request = RowRequest {
            prompt: "a red star".into(),
            width,
            height,
            steps,
            guidance_scale: spec["guidance_scale"].as_f64().expect("a number"),
            sampler: spec["sampler"].as_str().map(|word| word.parse().expect("a sampler")),
            schedule: spec["schedule"].as_str().map(|word| word.parse().expect("a schedule")),
            seed,
            init_image,
            ..RowRequest::default()
        };
        assert_eq!(image(&farm, job).await, alone(&request), "{spec}");
    }
    let sidecar = farm.client.get(&format!("/v1/jobs/{}/sidecar", rendered[2]["job_id"].as_str().unwrap())).await;
    let init = &sidecar["spec"]["init_image"];
    assert_eq!((&init["key"], &init["mask"]["key"]), (&scene_key.into(), &mask_key.into()));
    assert_eq!((&init["strength"], &init["mask"]["blur"]), (&0.7.into(), &3.0.into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_may_start_from_a_picture_that_the_farm_has_rendered() {
    let farm = Farm::start(services().await, 1).await;
    let job = |more: Value| {
        let mut job = json!({"model": "tiny", "prompt": "a ring", "steps": 4, "width": 64, "height": 64, "seed": 1});
        job.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        vec![job]
    };
    let first = farm.client.submit(job(json!({}))).await;
    farm.wait_for(&first, "done", 1, LIMIT).await;
    let page = farm.client.get(&format!("/v1/jobs?submission_id={first}")).await;
    let key = page["jobs"][0]["image_key"].as_str().expect("a key").to_owned();
    let bucket = farm.environment.iter().find(|(name, _)| name == "KILN_ARTIFACTS_URL").expect("a bucket").1.clone();
    let mut pictures = Vec::new();
    for address in [key.clone(), format!("{bucket}/{key}")] {
        let next = farm.client.submit(job(json!({"init_image": address, "strength": 0.5}))).await;
        farm.wait_for(&next, "done", 1, LIMIT).await;
        let page = farm.client.get(&format!("/v1/jobs?submission_id={next}")).await;
        assert_eq!(page["jobs"][0]["spec"]["init_image"]["key"], key.as_str());
        pictures.push(image(&farm, &page["jobs"][0]).await);
    }
    assert_eq!(pictures[0], pictures[1], "one object under two names");
}

#[test]
fn render_starts_from_files() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| folder.path().join(name);
    scene().save(path("scene.jpg")).expect("a JPEG");
    mask().save(path("mask.png")).expect("a PNG");
    let render = |out: &str, arguments: &[&str]| {
        let mut command = kiln(&[("KILN_DATA_DIR".into(), path("data").display().to_string())]);
        command.args(["render", "a large red circle on a blue background", "--seed", "3", "--steps", "8"]);
        command.args(["--width", "64", "--height", "64", "--init"]).arg(path("scene.jpg"));
        command.args(arguments).arg("--out").arg(path(out));
        command.output().expect("the binary can be run")
    };
    let mask_path = path("mask.png").display().to_string();
    let output = render("painted.png", &["--mask", &mask_path, "--strength", "0.9"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let picture = image::open(path("painted.png")).expect("a PNG").into_rgb8();
    // The meadow stays, as far as the VAE can tell; the sky does not.
    let apart = |x, y| {
        let (got, was) = (picture.get_pixel(x, y).0, scene().get_pixel(x, y).0);
        (0..3).map(|channel| u32::from(got[channel].abs_diff(was[channel]))).sum::<u32>()
    };
    assert!((0..64).map(|x| apart(x, 8)).sum::<u32>() > 2 * (0..64).map(|x| apart(x, 60)).sum::<u32>());
    let output = render("x.png", &["--strength", "7"]);
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && complaint.contains("strength") && complaint.contains('7'), "{complaint}");
}
