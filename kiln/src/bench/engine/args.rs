//! What can be asked of `kiln bench engine`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

/// `kiln bench engine`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  kiln bench engine                                       operations and the demo checkpoint
  kiln bench engine --model ./sd15 --dtype bf16 --json -  the whole model as well, every sample as JSON
  kiln bench engine --model ./sd15 --only load --cold     how fast weights are loaded from the disk
  kiln bench engine --model ./flux --only pictures --device cuda:0   pictures per second of any family
  kiln bench engine --model ./sd15 --on-demand --part unet

With --on-demand it loads, prints a line of JSON that says `ready`, and then, for each line `run` on
standard input, does one timed run and prints how many seconds it took, until the input ends. A script
can so let it take turns with something else. Figures are only worth something from a release build on
an otherwise idle machine; RAYON_NUM_THREADS limits the threads.")]
pub struct EngineArgs {
    /// A checkpoint's folder in diffusers layout; without it, only operations and the demo are measured
    #[arg(long, value_name = "FOLDER")]
    pub model: Option<PathBuf>,
    /// cpu, cuda, cuda:N or metal [default: the configuration's worker.device, then the best there is]
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// f32, f16 or bf16 [default: the configuration's worker.dtype, then f32 on a CPU, bf16 on a GPU]
    #[arg(long, value_name = "DTYPE")]
    pub dtype: Option<String>,
    /// Use at best these, to see what a lesser processor does: portable, avx2, avx512, avx512-bf16, amx-bf16
    #[arg(long, value_name = "NAME")]
    pub instructions: Option<String>,
    /// Width and height of the pictures in pixels [default: the checkpoint's]
    #[arg(long, value_name = "PIXELS", value_parser = clap::value_parser!(u32).range(1..=16_384))]
    pub size: Option<u32>,
    /// Pictures at once
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub batch: u32,
    /// Timed runs of everything, after one that is not counted
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: u32,
    /// Measure only these
    #[arg(long, value_name = "WHAT,…", value_delimiter = ',', value_enum)]
    pub only: Vec<Measurement>,
    /// Load from the disk as well, with the system's file cache emptied first (needs root)
    #[arg(long)]
    pub cold: bool,
    /// Write a JSON object with every sample to a file; - prints it, and the tables on standard error
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Do one timed run for each line `run` on standard input
    #[arg(long, requires = "model", conflicts_with_all = ["only", "cold", "json", "runs"])]
    pub on_demand: bool,
    /// What a run on demand is
    #[arg(long, value_enum, default_value_t = Part::Unet, requires = "on_demand")]
    pub part: Part,
    /// Denoising steps of whole pictures
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub steps: u32,
    /// Where the first picture of the latest run is written
    #[arg(long, value_name = "FILE.png", requires = "on_demand")]
    pub out: Option<PathBuf>,
}

/// What `kiln bench engine` can measure, besides the machine's ceilings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Measurement {
    /// Each operation by itself, at the shapes of Stable Diffusion 1.5
    Ops,
    /// A guided denoising step and a decoding of --model, if it has a U-Net
    Model,
    /// Whole pictures of --model, 1, 4 and 16 at once; only if asked for
    Pictures,
    /// A small picture: the demo checkpoint's
    Small,
    /// Loading of --model against plain reading of its files
    Load,
}

/// What one run on demand is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// A denoising step with guidance
    Unet,
    /// The decoding of latents
    Vae,
    /// Whole pictures: text, steps, decoding
    Picture,
}
