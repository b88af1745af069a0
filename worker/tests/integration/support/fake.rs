//! A renderer that paints each job in the colour of its seed. What it may do and how it fails is up to
//! the stage it performs on and to words in the prompts.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use engine::{InitContent, InitImage};
use farm::fleet::TextStatus;
use farm::latent::LatentFile;
use farm::spec::RenderSpec;
use image::{Rgb, RgbImage};
use worker::resolve::Located;
use worker::{RenderError, Renderer, RowBatch, Stepped};

/// What the test and the renderer share.
#[derive(Default)]
pub struct Stage {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
pub struct State {
    /// Passes that may still be made; `None`: as many as come.
    pub passes_left: Option<usize>,
    /// Rows that fit into memory in one pass, and pictures in one decode; `None`: any number.
    pub memory: Option<usize>,
    pub decode_memory: Option<usize>,
    /// The prompts of each pass that was tried, in the order of its rows.
    pub passes: Vec<Vec<String>>,
    /// The folders that were loaded.
    pub loads: Vec<String>,
    /// Who was to join and who waited, each time.
    pub prepared: Vec<[Vec<String>; 2]>,
    /// Why loading fails.
    pub load_error: Option<RenderError>,
}

impl Stage {
    /// One where each pass waits to be let through.
    pub fn held() -> Arc<Self> {
        let stage = Arc::new(Self::default());
        stage.set(|state| state.passes_left = Some(0));
        stage
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state());
        self.changed.notify_all();
    }

    /// Lets so many passes through.
    pub fn allow(&self, passes: usize) {
        self.set(|state| state.passes_left = Some(state.passes_left.unwrap_or(0) + passes));
    }

    /// Lets all passes through from now on.
    pub fn run_free(&self) {
        self.set(|state| state.passes_left = None);
    }

    fn begin_pass(&self, prompts: Vec<String>) {
        let state = self.state();
        // A renderer without a test waits no longer than a test may take.
        let waiting = |state: &mut State| state.passes_left == Some(0);
        let (mut state, timeout) = self.changed.wait_timeout_while(state, Duration::from_secs(60), waiting).unwrap();
        assert!(!timeout.timed_out(), "nobody let the pass through");
        if let Some(left) = &mut state.passes_left {
            *left -= 1;
        }
        state.passes.push(prompts);
    }
}

pub struct FakeRenderer(pub Arc<Stage>);

pub struct FakeBatch {
    stage: Arc<Stage>,
    rows: Vec<(u64, RenderSpec, u32)>,
}

impl Renderer for FakeRenderer {
    type Latent = RenderSpec;
    type Batch = FakeBatch;

    fn load(&mut self, located: &Located) -> Result<(), RenderError> {
        let mut state = self.0.state();
        state.loads.push(located.path.file_name().unwrap().to_string_lossy().into_owned());
        state.load_error.clone().map_or(Ok(()), Err)
    }

    fn batch(&self, _width: u32, _height: u32) -> FakeBatch {
        FakeBatch { stage: Arc::clone(&self.0), rows: Vec::new() }
    }

    fn prepare(&self, joining: &[&RenderSpec], waiting: &[&RenderSpec]) {
        let prompts = |specs: &[&RenderSpec]| specs.iter().map(|spec| spec.prompt.clone()).collect::<Vec<_>>();
        assert!(!joining.iter().any(|spec| spec.prompt.contains("unready")), "preparing fails");
        self.0.state().prepared.push([prompts(joining), prompts(waiting)]);
    }

    fn text(&self) -> TextStatus {
        let misses = self.0.state().prepared.iter().map(|[joining, _]| joining.len() as u64).sum();
        TextStatus { embedding_misses: misses, ..TextStatus::default() }
    }

    fn decode(&self, latents: &[RenderSpec]) -> Result<Vec<RgbImage>, RenderError> {
        if self.0.state().decode_memory.is_some_and(|memory| latents.len() > memory) {
            return Err(RenderError::OutOfMemory(format!("decoding {} pictures", latents.len())));
        }
        if latents.iter().any(|spec| spec.prompt.contains("undecodable")) {
            return Err(RenderError::Broken("a picture cannot be decoded".into()));
        }
        Ok(latents.iter().map(picture).collect())
    }

    fn hand_over(&self, spec: &RenderSpec) -> LatentFile {
        LatentFile { channels: 1, height: 1, width: 1, values: vec![spec.seed as f32] }
    }

    fn device(&self) -> String {
        "fake".into()
    }

    fn dtype(&self) -> String {
        "f32".into()
    }
}

/// The picture of a job: its size, its seed's colour.
pub fn picture(spec: &RenderSpec) -> RgbImage {
    let [red, green, blue, ..] = spec.seed.to_le_bytes();
    RgbImage::from_pixel(spec.width, spec.height, Rgb([red, green, blue]))
}

impl RowBatch for FakeBatch {
    type Latent = RenderSpec;

    fn join(&mut self, row: u64, spec: &RenderSpec, init: Option<&InitImage>) -> Result<(), RenderError> {
        if spec.prompt.contains("refused") {
            return Err(RenderError::Invalid("`prompt` must be acceptable, but is `refused`".into()));
        }
        let mut spec = spec.clone();
        if let Some(init) = init {
            // Painted in the colour that it starts from.
            spec.seed = match &init.content {
                InitContent::Picture(picture) => {
                    assert_eq!(picture.dimensions(), (spec.width, spec.height), "the picture of {}", spec.prompt);
                    let [red, green, blue] = picture.get_pixel(0, 0).0.map(u64::from);
                    red | green << 8 | blue << 16
                }
                InitContent::Latent(latent) => latent.values()[0] as u64,
            };
        }
        self.rows.push((row, spec, 0));
        Ok(())
    }

    fn leave(&mut self, row: u64) {
        self.rows.retain(|(id, ..)| *id != row);
    }

    fn step(&mut self, rows: &[u64]) -> Result<Vec<Stepped<RenderSpec>>, RenderError> {
        let prompt =
            |row: &u64| self.rows.iter().find(|(id, ..)| id == row).expect("the row has joined").1.prompt.clone();
        let prompts: Vec<_> = rows.iter().map(prompt).collect();
        self.stage.begin_pass(prompts.clone());
        let has = |word: &str| prompts.iter().any(|prompt| prompt.contains(word));
        if self.stage.state().memory.is_some_and(|memory| rows.len() > memory) {
            return Err(RenderError::OutOfMemory(format!("{} rows do not fit", rows.len())));
        }
        if has("huge") {
            return Err(RenderError::OutOfMemory("a huge row does not fit".into()));
        }
        if has("poison") {
            return Err(RenderError::Broken("a poisoned row".into()));
        }
        if has("panic") {
            // Half-done work: some rows have advanced, as a panic may leave them.
            self.rows.iter_mut().for_each(|(_, _, step)| *step += 1);
            panic!("a row that panics");
        }
        let mut stepped = Vec::new();
        for (row, spec, step) in self.rows.iter_mut().filter(|(id, ..)| rows.contains(id)) {
            *step += 1;
            let latent = (*step == spec.steps).then(|| spec.clone());
            stepped.push(Stepped { row: *row, step: *step, total: spec.steps, latent });
        }
        self.rows.retain(|(_, spec, step)| step < &spec.steps);
        Ok(stepped)
    }
}
