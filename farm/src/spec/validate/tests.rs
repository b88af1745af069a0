use std::collections::BTreeMap;

use serde_json::json;

use super::*;
use crate::spec::{InitImage, Mask, MaskedContent, MicroConditioning};

fn catalog() -> Catalog {
    let small =
        ModelFacts { width: 128, height: 64, steps: 20, sampler: Some(Sampler::Ddim), ..ModelFacts::assumed("here") };
    let models = BTreeMap::from([("demo".to_owned(), small), ("sd15".to_owned(), ModelFacts::assumed("hub/sd15"))]);
    Catalog::new(models, "demo").unwrap()
}

/// A request from JSON, with a prompt unless it has one.
fn request(mut json: Value) -> RenderRequest {
    let map = json.as_object_mut().unwrap();
    map.entry("prompt").or_insert("a star".into());
    serde_json::from_value(json).unwrap()
}

fn validate(json: Value) -> Result<RenderSpec, ValidationError> {
    request(json).validate(&catalog(), &Limits::default(), Lane::Bulk, || 7)
}

/// What a refused request is told.
fn refusal(json: Value) -> String {
    validate(json.clone()).map(|_| format!("{json} was let through")).unwrap_or_else(|error| error.to_string())
}

#[test]
fn only_the_prompt_is_required() {
    let spec = validate(json!({})).unwrap();
    assert_eq!((spec.model.as_str(), spec.prompt.as_str(), spec.negative_prompt.as_str()), ("demo", "a star", ""));
    assert_eq!((spec.width, spec.height, spec.steps, spec.guidance_scale), (128, 64, 20, 7.5));
    assert_eq!((spec.sampler, spec.schedule, spec.seed, spec.lane), (Some(Sampler::Ddim), None, 7, Lane::Bulk));
    let missing = RenderRequest::default().validate(&catalog(), &Limits::default(), Lane::Bulk, || 7).unwrap_err();
    assert_eq!(missing.to_string(), "`prompt` must be present, but is missing");
}

#[test]
fn pndm_is_refused_steps_that_it_cannot_take_whoever_chose_it() {
    let refused = |facts: ModelFacts, json: Value| {
        let catalog = Catalog::new(BTreeMap::from([("m".to_owned(), facts)]), "m").unwrap();
        let checked = request(json).validate(&catalog, &Limits::default(), Lane::Bulk, || 7);
        checked.err().map(|error| error.to_string())
    };
    let whole = ModelFacts { least_pndm_steps: 4, ..ModelFacts::assumed("here") };
    let own = ModelFacts { samples_by_pndm: true, ..whole.clone() };
    let configured = ModelFacts { sampler: Some(Sampler::Pndm), ..whole.clone() };
    let text = "`steps` must be at least 4 for pndm, whose Runge-Kutta steps this checkpoint does not skip, but is 3";
    let (named, open) = (json!({"sampler": "pndm", "steps": 3}), json!({"steps": 3}));
    assert_eq!(refused(whole.clone(), named.clone()).as_deref(), Some(text));
    assert_eq!(refused(own.clone(), open.clone()).as_deref(), Some(text));
    assert_eq!(refused(configured, open.clone()).as_deref(), Some(text));
    let fine = [
        (whole.clone(), json!({"sampler": "pndm", "steps": 4})),
        (whole, open),
        (own, json!({"sampler": "euler", "steps": 3})),
        (ModelFacts { samples_by_pndm: true, ..ModelFacts::assumed("here") }, named),
    ];
    for (facts, json) in fine {
        assert_eq!(refused(facts, json), None);
    }
}

/// What a request to a checkpoint of `family` becomes.
fn validate_for(family: &str, json: Value) -> Result<RenderSpec, ValidationError> {
    let facts = ModelFacts { family: Some(family.to_owned()), ..ModelFacts::assumed("here") };
    let catalog = Catalog::new(BTreeMap::from([("m".to_owned(), facts)]), "m").unwrap();
    request(json).validate(&catalog, &Limits::default(), Lane::Bulk, || 7)
}

#[test]
fn options_of_a_family_reach_it_and_others_refuse_them() {
    let sizes = json!({"micro_conditioning": {"original_size": [1024, 512], "crop": [3, 4]}});
    let spec = validate_for("sdxl_turbo", sizes.clone()).unwrap();
    let wanted = MicroConditioning { original_size: Some((1024, 512)), crop: (3, 4), target_size: None };
    assert_eq!(spec.options.micro_conditioning, Some(wanted));
    assert_eq!(serde_json::from_value::<RenderSpec>(serde_json::to_value(&spec).unwrap()).unwrap(), spec);
    let refused = validate_for("flux_dev", sizes.clone()).unwrap_err().to_string();
    assert_eq!(refused, "`micro_conditioning` must be absent for a checkpoint of the family flux_dev, but is present");
    assert!(validate(sizes).is_ok(), "a family that nobody knows yet may read it");

    let flux = validate_for("flux_dev", json!({"max_sequence_length": 256, "true_cfg_scale": 4})).unwrap().options;
    assert_eq!((flux.max_sequence_length, flux.true_cfg_scale), (Some(256), Some(4.0)));
    let skips = json!({"skip_layer_guidance": {"layers": [7, 8, 9]}});
    let guidance = validate_for("sd35_medium", skips).unwrap().options.skip_layer_guidance.unwrap();
    assert_eq!((guidance.layers, guidance.scale, guidance.start, guidance.stop), (vec![7, 8, 9], 2.8, 0.01, 0.2));

    let plain = validate(json!({})).unwrap();
    assert!(serde_json::to_value(plain).unwrap().get("options").is_none(), "what nobody asked for is not written");
}

#[test]
fn sides_are_multiples_of_what_the_denoiser_takes_as_one() {
    let facts = ModelFacts { patch: 2, ..ModelFacts::assumed("here") };
    let catalog = Catalog::new(BTreeMap::from([("m".to_owned(), facts)]), "m").unwrap();
    let asked = |width: i64| request(json!({"width": width})).validate(&catalog, &Limits::default(), Lane::Bulk, || 7);
    assert!(asked(1040).is_ok());
    let refused = asked(1032).unwrap_err().to_string();
    assert_eq!(refused, "`width` must be 16 to 4096 and a multiple of 16, but is 1032");
}

#[test]
fn options_of_a_family_have_limits_too() {
    let table = [
        (
            json!({"micro_conditioning": {"original_size": [0, 5]}}),
            "`micro_conditioning.original_size` must be two sides of 1 to 65536, but is (0, 5)",
        ),
        (
            json!({"micro_conditioning": {"crop": [1, 70000]}}),
            "`micro_conditioning.crop` must be two numbers of 0 to 65536, but is (1, 70000)",
        ),
        (json!({"max_sequence_length": 0}), "`max_sequence_length` must be 1 to 512, but is 0"),
        (json!({"max_sequence_length": 4096}), "`max_sequence_length` must be 1 to 512, but is 4096"),
        (json!({"true_cfg_scale": -1}), "`true_cfg_scale` must be 0 to 100, but is -1"),
        (
            json!({"skip_layer_guidance": {"layers": []}}),
            "`skip_layer_guidance.layers` must be 1 to 256 layers, but is 0 layers",
        ),
        (
            json!({"skip_layer_guidance": {"layers": [1], "stop": 1.5}}),
            "`skip_layer_guidance.stop` must be 0 to 1, but is 1.5",
        ),
    ];
    for (json, expected) in table {
        assert_eq!(refusal(json), expected);
    }
}

#[test]
fn what_is_asked_for_is_what_one_gets() {
    let spec = validate(json!({
        "operation": "image_generation", "model": "sd15", "negative_prompt": "blur", "width": 640, "height": 8,
        "steps": 1, "guidance_scale": 0, "sampler": "dpmpp_2m", "schedule": "karras", "seed": 9223372036854775807u64,
        "lane": "interactive", "tags": ["a"], "metadata": {"sku": 1}
    }))
    .unwrap();
    assert_eq!((spec.model.as_str(), spec.width, spec.height, spec.steps), ("sd15", 640, 8, 1));
    assert_eq!((spec.sampler, spec.schedule), (Some(Sampler::Dpmpp2m), Some(Schedule::Karras)));
    assert_eq!((spec.seed, spec.lane, spec.guidance_scale), (i64::MAX as u64, Lane::Interactive, 0.0));
    assert_eq!((spec.tags, spec.metadata["sku"].clone()), (vec!["a".to_owned()], json!(1)));
}

#[test]
fn an_init_image_brings_its_strength_and_a_mask_its_edges() {
    let spec = validate(json!({"init_image": "uploads/ab12.png"})).unwrap();
    let expected = InitImage { key: "uploads/ab12.png".into(), strength: Some(0.8), mask: None };
    assert_eq!(spec.init_image, Some(expected));
    let mask = |more: Value| {
        let mut json = json!({"init_image": "submissions/a/images/b.1.png", "mask_image": "uploads/m.webp"});
        json.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        validate(json).unwrap().init_image.unwrap()
    };
    let init = mask(json!({}));
    let plain = Mask { key: "uploads/m.webp".into(), blur: 0.0, content: MaskedContent::Original };
    assert_eq!((init.strength, init.mask), (Some(1.0), Some(plain.clone())));
    let init = mask(json!({"strength": 0.5, "mask_blur": 4, "masked_content": "noise"}));
    assert_eq!(
        (init.strength, init.mask),
        (Some(0.5), Some(Mask { blur: 4.0, content: MaskedContent::Noise, ..plain }))
    );
    assert_eq!(validate(json!({})).unwrap().init_image, None);
}

#[test]
fn a_strength_that_leaves_no_step_is_refused_where_steps_are_cut() {
    let of = |prediction: &str, strength: f64| {
        let facts = ModelFacts { prediction: Some(prediction.into()), ..ModelFacts::assumed("here") };
        let catalog = Catalog::new(BTreeMap::from([("demo".to_owned(), facts)]), "demo").unwrap();
        request(json!({"init_image": "uploads/a.png", "strength": strength, "steps": 4})).validate(
            &catalog,
            &Limits::default(),
            Lane::Bulk,
            || 7,
        )
    };
    let error = of("epsilon", 0.2).unwrap_err().to_string();
    assert_eq!(error, "`strength` must be so much that of 4 steps at least one is left, but is 0.2");
    assert!(of("epsilon", 0.25).is_ok() && of("flow", 0.2).is_ok());
}

#[test]
fn what_belongs_to_an_init_image_is_refused_without_one_and_out_of_its_limits() {
    let table = [
        (json!({"strength": 0.5}), "`strength` must be absent without `init_image`, but is present"),
        (json!({"mask_image": "uploads/m.png"}), "`mask_image` must be absent without `init_image`, but is present"),
        (json!({"mask_blur": 1}), "`mask_blur` must be absent without `mask_image`, but is present"),
        (
            json!({"init_image": "uploads/a.png", "masked_content": "noise"}),
            "`masked_content` must be absent without `mask_image`, but is present",
        ),
        (json!({"init_image": "uploads/a.png", "strength": 0}), "`strength` must be above 0 and at most 1, but is 0"),
        (
            json!({"init_image": "uploads/a.png", "strength": 1.1}),
            "`strength` must be above 0 and at most 1, but is 1.1",
        ),
        (
            json!({"init_image": "uploads/a.png", "mask_image": "uploads/m.png", "mask_blur": 300}),
            "`mask_blur` must be 0 to 256, but is 300",
        ),
        (
            json!({"init_image": "uploads/a.png", "mask_image": "uploads/m.png", "masked_content": "fill"}),
            "`masked_content` must be one of original, noise, but is `fill`",
        ),
    ];
    for (json, message) in table {
        assert_eq!(refusal(json), message);
    }
    for key in [
        "",
        "a.exe",
        "../a.png",
        "/etc/a.png",
        "a/../b.png",
        "a//b.png",
        ".hidden.png",
        "data:image/png;base64,AA",
        "s3://b/a.png",
        "a b.png",
    ] {
        let text = refusal(json!({"init_image": key}));
        assert!(text.starts_with("`init_image` must be the key of a picture in the farm's artifact store"), "{text}");
    }
}

#[test]
fn each_field_out_of_its_limit_is_named_with_limit_and_value() {
    let table = [
        (json!({"operation": "upscale"}), "`operation` must be `image_generation`, but is `upscale`"),
        (json!({"model": "sdxl"}), "`model` must be one of demo, sd15, but is `sdxl`"),
        (json!({"prompt": "x".repeat(10_001)}), "`prompt` must be at most 10000 bytes, but is 10001 bytes"),
        (json!({"prompt": "a\0b"}), "`prompt` must be without NUL characters, but is text with one"),
        (
            json!({"negative_prompt": "é".repeat(5001)}),
            "`negative_prompt` must be at most 10000 bytes, but is 10002 bytes",
        ),
        (json!({"negative_prompt": "\0"}), "`negative_prompt` must be without NUL characters, but is text with one"),
        (json!({"width": 100}), "`width` must be 8 to 4096 and a multiple of 8, but is 100"),
        (json!({"width": 0}), "`width` must be 8 to 4096 and a multiple of 8, but is 0"),
        (json!({"height": -8}), "`height` must be 8 to 4096 and a multiple of 8, but is -8"),
        (json!({"height": 4104}), "`height` must be 8 to 4096 and a multiple of 8, but is 4104"),
        (json!({"steps": 0}), "`steps` must be 1 to 1000, but is 0"),
        (json!({"steps": 1_000_000_000}), "`steps` must be 1 to 1000, but is 1000000000"),
        (json!({"guidance_scale": -0.5}), "`guidance_scale` must be 0 to 100, but is -0.5"),
        (json!({"guidance_scale": 100.5}), "`guidance_scale` must be 0 to 100, but is 100.5"),
        (
            json!({"sampler": "heun"}),
            "`sampler` must be one of ddim, euler, euler_ancestral, dpmpp_2m, pndm, flow_match_euler, but is `heun`",
        ),
        (json!({"schedule": "linear"}), "`schedule` must be one of normal, karras, exponential, beta, but is `linear`"),
        (json!({"seed": -1}), "`seed` must be 0 to 9223372036854775807, but is -1"),
        (json!({"lane": "fast"}), "`lane` must be one of interactive, bulk, but is `fast`"),
        (json!({"tags": vec!["t"; 33]}), "`tags` must be at most 32 tags, but is 33 tags"),
        (json!({"tags": ["ok", ""]}), "`tags` must be each 1 to 128 bytes without NUL, but is ``"),
        (
            json!({"metadata": {"a": "x".repeat(16384)}}),
            "`metadata` must be at most 16384 bytes of JSON, but is 16392 bytes",
        ),
        (json!({"metadata": {"a": ["\0"]}}), "`metadata` must be without NUL characters, but is text with one"),
        (json!({"metadata": {"\0": 1}}), "`metadata` must be without NUL characters, but is text with one"),
    ];
    for (json, expected) in table {
        assert_eq!(refusal(json), expected);
    }
}

#[test]
fn a_value_at_its_limit_is_let_through() {
    let fine = [
        json!({"prompt": "x".repeat(10_000)}),
        json!({"prompt": ""}),
        json!({"width": 4096, "height": 4096}),
        json!({"steps": 1000}),
        json!({"guidance_scale": 100}),
        json!({"seed": 0}),
        json!({"tags": vec!["t".repeat(128); 32]}),
        json!({"metadata": {"a": "x".repeat(16376)}}),
    ];
    for json in fine {
        validate(json).unwrap();
    }
}

#[test]
fn a_picture_of_too_many_pixels_is_refused_though_its_sides_are_fine() {
    let limits = Limits { pixels: 128 * 128, ..Limits::default() };
    let large = request(json!({"width": 256, "height": 128}));
    let error = large.validate(&catalog(), &limits, Lane::Bulk, || 7).unwrap_err();
    assert_eq!(error.to_string(), "`width × height` must be at most 16384 pixels, but is 32768");
}

#[test]
fn a_long_tag_is_refused_and_shown_cut() {
    let error = validate(json!({"tags": ["t".repeat(1000)]})).unwrap_err();
    assert_eq!(error.value.chars().count(), 121, "{}", error.value);
    assert!(error.value.ends_with('…'));
}

#[test]
fn metadata_may_spell_a_nul_out() {
    let spec = validate(json!({"metadata": {"path": "C:\\u0000"}})).unwrap();
    assert_eq!(spec.metadata["path"], "C:\\u0000");
}

#[test]
fn metadata_is_only_so_deep() {
    let nested = |levels: usize| (1..levels).fold(json!({}), |inner, _| json!({ "a": inner }));
    assert_eq!(validate(json!({"metadata": nested(64)})).map(|_| ()), Ok(()));
    let expected = "`metadata` must be at most 64 levels deep, but is 65 levels";
    assert_eq!(refusal(json!({"metadata": nested(65)})), expected);
}

#[test]
fn a_drawn_seed_is_one_that_a_client_could_send() {
    let spec = request(json!({})).validate(&catalog(), &Limits::default(), Lane::Bulk, || u64::MAX).unwrap();
    assert_eq!(spec.seed, i64::MAX as u64);
}

#[test]
fn an_unknown_field_is_no_request() {
    let error = serde_json::from_value::<RenderRequest>(json!({"prompt": "x", "stepz": 3})).unwrap_err();
    assert!(error.to_string().contains("stepz"), "{error}");
}

#[test]
fn a_request_takes_from_the_defaults_what_it_leaves_open() {
    let defaults = request(json!({"prompt": "default", "steps": 5, "tags": ["d"], "metadata": {"d": 1}, "seed": 3}));
    let own = RenderRequest { steps: Some(9), tags: Some(vec![]), ..RenderRequest::default() };
    let merged = own.or(&defaults);
    assert_eq!((merged.prompt.as_deref(), merged.steps, merged.seed), (Some("default"), Some(9), Some(3)));
    assert_eq!((merged.tags, merged.metadata), (Some(vec![]), defaults.metadata.clone()));
}

#[test]
fn a_spec_is_read_back_as_it_was_written() {
    let spec = validate(json!({"sampler": "pndm", "tags": ["a"], "metadata": {"x": [1, 2.5, null]}})).unwrap();
    let text = serde_json::to_string(&spec).unwrap();
    assert_eq!(serde_json::from_str::<RenderSpec>(&text).unwrap(), spec);
    for sampler in Sampler::ALL {
        assert_eq!(Sampler::parse(sampler.as_str()), Some(sampler));
        assert_eq!(serde_json::to_value(sampler).unwrap(), sampler.as_str());
    }
    for schedule in Schedule::ALL {
        assert_eq!(Schedule::parse(schedule.as_str()), Some(schedule));
        assert_eq!(serde_json::to_value(schedule).unwrap(), schedule.as_str());
    }
}

/// Validates a job for a checkpoint of this family.
fn of_family(family: &str, json: Value) -> Result<RenderSpec, String> {
    let facts = ModelFacts { family: Some(family.into()), ..ModelFacts::assumed("here") };
    let catalog = Catalog::new(BTreeMap::from([("demo".to_owned(), facts)]), "demo").unwrap();
    let spec = request(json).validate(&catalog, &Limits::default(), Lane::Bulk, || 7);
    spec.map_err(|error| error.to_string())
}

#[test]
fn a_job_may_end_in_a_latent_and_another_goes_on_from_it_at_its_size() {
    let base = of_family("sdxl", json!({"denoising_end": 0.8})).unwrap();
    assert_eq!((base.options.denoising_end, base.init_image), (Some(0.8), None));
    let key = "submissions/a/latents/b.1.24x16.safetensors";
    let refiner = json!({"init_image": key, "denoising_start": 0.8});
    let spec = of_family("sdxl_refiner", refiner.clone()).unwrap();
    assert_eq!((spec.width, spec.height, spec.options.denoising_start), (192, 128, Some(0.8)));
    assert_eq!(spec.init_image, Some(InitImage { key: key.into(), strength: None, mask: None }));
    let read: RenderSpec = serde_json::from_value(serde_json::to_value(&spec).unwrap()).unwrap();
    assert_eq!(read, spec);
    let mut sized = refiner.clone();
    sized["width"] = json!(192);
    assert!(of_family("sdxl_refiner", sized.clone()).is_ok());
    sized["height"] = json!(192);
    assert_eq!(
        of_family("sdxl_refiner", sized).unwrap_err(),
        "`width × height` must be 192 × 128, the size of the latent `init_image`, or absent, but is 192 × 192"
    );
    // A latent of another origin tells no size; and one may get noise again.
    let spec = of_family("sdxl", json!({"init_image": "theirs/x.safetensors", "strength": 0.5})).unwrap();
    assert_eq!((spec.width, spec.init_image.unwrap().strength), (512, Some(0.5)));
}

#[test]
fn jobs_that_cannot_begin_or_end_in_the_middle_of_the_way_are_refused_by_name() {
    let latent = "uploads/a.8x8.safetensors";
    for (family, json, expected) in [
        ("sd1", json!({"denoising_end": 0.8}), "`denoising_end` must be absent for a checkpoint of the family sd1"),
        (
            "flux_dev",
            json!({"denoising_start": 0.8}),
            "`denoising_start` must be absent for a checkpoint of the family",
        ),
        ("sdxl", json!({"denoising_end": 1}), "`denoising_end` must be above 0 and below 1, but is 1"),
        ("sdxl", json!({"denoising_start": 0}), "`denoising_start` must be above 0 and below 1, but is 0"),
        ("sdxl", json!({"denoising_start": 0.5}), "`denoising_start` must be absent without `init_image`"),
        (
            "sdxl",
            json!({"init_image": latent, "denoising_start": 0.5, "denoising_end": 0.5}),
            "`denoising_start` must be below `denoising_end`, which is 0.5, but is 0.5",
        ),
        (
            "sdxl",
            json!({"init_image": latent, "denoising_start": 0.5, "strength": 0.3}),
            "`strength` must be absent with `denoising_start`, but is 0.3",
        ),
        (
            "sdxl",
            json!({"init_image": "uploads/a.png", "mask_image": "uploads/m.png", "masked_content": "noise", "denoising_start": 0.5}),
            "`masked_content` must be `original` with `denoising_start`",
        ),
        ("sd2", json!({"init_image": latent}), "`init_image` must be a picture for a checkpoint of the family sd2"),
        (
            "sdxl_inpaint",
            json!({"init_image": latent}),
            "`init_image` must be a picture for a checkpoint of the family",
        ),
        (
            "sdxl",
            json!({"init_image": "uploads/a.png", "mask_image": latent}),
            "`mask_image` must be the key of a picture",
        ),
    ] {
        let text = of_family(family, json).unwrap_err();
        assert!(text.starts_with(expected), "{text}");
    }
}
