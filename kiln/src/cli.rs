//! What can be typed: the commands, their arguments, their help.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::bench::BenchArgs;

/// A batch image render farm: enqueue prompts by the thousand, collect every picture once.
#[derive(Debug, Parser)]
#[command(name = "kiln", version, arg_required_else_help = true, propagate_version = true)]
#[command(after_help = "Examples:
  kiln render \"a large red star on a blue background\"     render here and now, no server needed
  kiln up                                                 a whole farm in one process, API on port 8600
  kiln submit prompts.jsonl --wait                        enqueue a file of jobs and wait for them
  kiln fetch SUBMISSION --out pictures                    collect the pictures

Exit status: 0 all went well; 1 something failed; 2 the command line is wrong; 130 interrupted.
Log lines go to standard error: KILN_LOG=debug shows more, KILN_LOG_FORMAT=json is for machines.")]
pub struct Cli {
    /// The configuration file [default: $KILN_CONFIG, ./kiln.toml, ~/.config/kiln/config.toml]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Render a prompt on this machine, no server needed
    Render(Box<RenderArgs>),
    /// Run a whole farm in this process: store, broker, artifacts, scheduler and worker
    Up(UpArgs),
    /// Run the scheduler of a farm: the API and the loops that keep the jobs moving
    Scheduler(SchedulerArgs),
    /// Run a worker of a farm: one device that renders jobs
    Worker(WorkerArgs),
    /// Enqueue a file of jobs
    Submit(SubmitArgs),
    /// Show how submissions are doing
    Status(StatusArgs),
    /// Download a submission's pictures
    Fetch(FetchArgs),
    /// List the checkpoints that jobs can name
    Models(ModelsArgs),
    /// Print the effective configuration, secrets hidden
    Config(ConfigArgs),
    /// Make an API key and print the line that lets it in
    Key(KeyArgs),
    /// Bring the store's tables to this build's version
    Migrate(MigrateArgs),
    /// Measure how fast this build is on this machine
    Bench(BenchArgs),
}

/// How to reach a scheduler.
#[derive(Clone, Debug, Args)]
pub struct ApiArgs {
    /// The scheduler's address [default: the configuration's api.listen]
    #[arg(long, value_name = "URL", env = "KILN_API_URL")]
    pub api: Option<String>,
    /// The API key, where the scheduler wants one
    #[arg(long, value_name = "KEY", env = "KILN_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
}

/// `kiln render`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  kiln render \"a large red star on a blue background\"
  kiln render \"a small cyan ring\" --seed 7 --steps 25 --sampler euler --out ring.png
  kiln render \"a blue heart above a green square on a white background\" --count 8 --out hearts/
  kiln render \"a red star\" --init photo.jpg --mask sky.png --strength 0.6
  kiln render \"a lighthouse\" --model ./sdxl-base --refiner ./sdxl-refiner --switch-at 0.8
  kiln render \"a lighthouse at dusk\" --model ./stable-diffusion-v1-5 --dtype f16

Without --model it draws with the demo checkpoint, which knows coloured shapes on coloured backgrounds.
The paths of the pictures are printed on standard output.")]
pub struct RenderArgs {
    /// What to draw
    pub prompt: String,
    /// What to steer away from
    #[arg(long, value_name = "PROMPT")]
    pub negative: Option<String>,
    /// A checkpoint: a name from `kiln models`, a folder in diffusers layout, a single file, or a hub id (`org/name@revision`)
    #[arg(long, value_name = "MODEL")]
    pub model: Option<String>,
    /// Denoising steps [default: the checkpoint's]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub steps: Option<i64>,
    /// Guidance scale; 1 turns guidance off [default: the checkpoint's]
    #[arg(long, value_name = "SCALE", allow_negative_numbers = true)]
    pub guidance: Option<f64>,
    /// ddim, euler, euler_ancestral, dpmpp_2m or pndm [default: the checkpoint's]
    #[arg(long, value_name = "SAMPLER")]
    pub sampler: Option<String>,
    /// normal, karras, exponential or beta [default: the checkpoint's]
    #[arg(long, value_name = "SCHEDULE")]
    pub schedule: Option<String>,
    /// Seed of the first picture; the others count up from it [default: drawn at random]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub seed: Option<i64>,
    /// Width in pixels [default: the checkpoint's]
    #[arg(long, value_name = "PIXELS", allow_negative_numbers = true)]
    pub width: Option<i64>,
    /// Height in pixels [default: the checkpoint's]
    #[arg(long, value_name = "PIXELS", allow_negative_numbers = true)]
    pub height: Option<i64>,
    /// A second checkpoint that goes on where the first one ends, as Stable Diffusion XL's refiner does
    #[arg(long, value_name = "MODEL", conflicts_with_all = ["denoising_start", "denoising_end"])]
    pub refiner: Option<String>,
    /// The share of the way from noise after which the refiner takes over, above 0 and below 1
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true, default_value_t = 0.8, requires = "refiner")]
    pub switch_at: f64,
    /// The share of the way from noise that lies behind the init image, above 0 and below 1; in place of a strength
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true, requires = "init", conflicts_with = "strength")]
    pub denoising_start: Option<f64>,
    /// End after this share of the way from noise, above 0 and below 1: with a latent in place of a picture
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true)]
    pub denoising_end: Option<f64>,
    /// A picture to start from: PNG, JPEG or WebP; or a latent (.safetensors) that --denoising-end made
    #[arg(long, value_name = "FILE")]
    pub init: Option<PathBuf>,
    /// What of the init image is painted anew: white is, black stays
    #[arg(long, value_name = "FILE", requires = "init")]
    pub mask: Option<PathBuf>,
    /// How much of the way from noise to go, above 0 and at most 1 [default: 0.8, with a mask 1]
    #[arg(long, value_name = "SHARE", allow_negative_numbers = true, requires = "init")]
    pub strength: Option<f64>,
    /// Pixels by which the mask's edges are blurred [default: 0]
    #[arg(long, value_name = "PIXELS", allow_negative_numbers = true, requires = "mask")]
    pub mask_blur: Option<f64>,
    /// What the painted part starts from, original or noise [default: original]
    #[arg(long, value_name = "CONTENT", requires = "mask")]
    pub masked_content: Option<String>,
    /// How many pictures, each with a seed of its own
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub count: u32,
    /// f32, f16 or bf16 [default: f32 on a CPU, bf16 on a GPU]
    #[arg(long, value_name = "DTYPE")]
    pub dtype: Option<String>,
    /// cpu, cuda, cuda:N or metal [default: the best there is]
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// Where to put the pictures: FILE.png for one (FILE.safetensors for a latent), a folder for many
    #[arg(long, value_name = "PATH", default_value = "kiln-out")]
    pub out: PathBuf,
    /// Print a JSON object with the pictures' paths, seeds and settings
    #[arg(long)]
    pub json: bool,
}

/// `kiln up`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  kiln up                                    then, in another terminal: kiln submit prompts.jsonl --wait
  kiln up --listen 127.0.0.1:9000
  kiln up --data-dir /srv/kiln --device cuda:0

Everything lives in the data folder and survives a crash. The configuration may point at a Postgres
store or an S3 artifact store instead; what it leaves open is embedded.")]
pub struct UpArgs {
    /// Where the API listens [default: the configuration's api.listen, 127.0.0.1:8600]
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen: Option<SocketAddr>,
    /// Where everything is kept [default: ~/.local/share/kiln]
    #[arg(long, value_name = "FOLDER")]
    pub data_dir: Option<PathBuf>,
    /// cpu, cuda, cuda:N or metal [default: the best there is]
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// f32, f16 or bf16 [default: f32 on a CPU, bf16 on a GPU]
    #[arg(long, value_name = "DTYPE")]
    pub dtype: Option<String>,
}

/// `kiln scheduler`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  eval \"$(infra/services.sh env)\"; kiln scheduler
  kiln scheduler --config /etc/kiln.toml --listen 127.0.0.1:8600

It needs a Postgres store, a RabbitMQ broker and an S3 artifact store in the configuration, and brings
the store's tables to its version when it starts. Several schedulers may serve one farm.")]
pub struct SchedulerArgs {
    /// Where the API listens [default: the configuration's api.listen, 127.0.0.1:8600]
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen: Option<SocketAddr>,
}

/// `kiln worker`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  eval \"$(infra/services.sh env)\"; kiln worker
  kiln worker --device cuda:1 --name night-shift

One worker serves one device; start one for each. SIGTERM or Ctrl-C lets it finish what runs and
gives the rest back; a second Ctrl-C ends it at once.")]
pub struct WorkerArgs {
    /// Its name in `GET /v1/workers` [default: the host's name]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// cpu, cuda, cuda:N or metal [default: the best there is]
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// f32, f16 or bf16 [default: f32 on a CPU, bf16 on a GPU]
    #[arg(long, value_name = "DTYPE")]
    pub dtype: Option<String>,
}

/// `kiln submit`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  kiln submit prompts.jsonl
  kiln submit prompts.jsonl --wait --name \"catalogue, spring\"
  generate-prompts | kiln submit - --json

Each line is a job: {\"prompt\": \"a red star\", \"seed\": 7, \"steps\": 20, \"model\": \"demo\", \"tags\": [\"night\"]}.
Only the prompt is required. All lines are accepted or none; an error names the line. Sent again
after a broken connection, a submission still counts once.")]
pub struct SubmitArgs {
    /// A file of JSON Lines, one job each; - reads standard input
    pub file: PathBuf,
    /// Wait until every job is done; exit status 1 if one failed
    #[arg(long)]
    pub wait: bool,
    /// A name for people, shown by `kiln status`
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// How long to go on trying while the scheduler does not answer
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub retry_seconds: u64,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub api: ApiArgs,
}

/// `kiln status`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  kiln status                       the latest submissions
  kiln status SUBMISSION            one of them: counters, rate, time left, what failed and why
  kiln status SUBMISSION --watch    until it is finished")]
pub struct StatusArgs {
    /// A submission's id [default: the latest submissions]
    pub submission: Option<String>,
    /// Show it again and again, until the submission is finished
    #[arg(long)]
    pub watch: bool,
    /// Print JSON, one object a line
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub api: ApiArgs,
}

/// `kiln fetch`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  kiln fetch SUBMISSION --out pictures
  kiln fetch SUBMISSION --out pictures          again: brings only what is missing or damaged

Each picture NUMBER-SEED.png (or latent NUMBER-SEED.safetensors) comes with NUMBER-SEED.json, which holds its prompt
and settings.")]
pub struct FetchArgs {
    /// The submission's id
    pub submission: String,
    /// The folder for the pictures; made if it does not exist
    #[arg(long, value_name = "FOLDER")]
    pub out: PathBuf,
    /// Downloads at once
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub parallel: u16,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub api: ApiArgs,
}

/// `kiln models`.
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:
  kiln models                                what this machine's configuration names
  kiln models --api http://127.0.0.1:8600    what a running scheduler knows
  kiln models inspect x.safetensors          what a file or folder is

A checkpoint is added in the configuration: [models.NAME] source = \"FOLDER, FILE or org/name\", or by
the variable KILN_MODELS=\"NAME=SOURCE,NAME2=SOURCE2\"."
)]
pub struct ModelsArgs {
    /// What else to do
    #[command(subcommand)]
    pub command: Option<ModelsCommand>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub api: ApiArgs,
}

/// The commands below `kiln models`.
#[derive(Debug, Subcommand)]
pub enum ModelsCommand {
    /// Tell what a checkpoint's file or folder is: family, parts, formats, hashes
    Inspect(InspectArgs),
}

/// `kiln models inspect`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  kiln models inspect juggernautXL_v9.safetensors
  kiln models inspect ./stable-diffusion-v1-5 --tensors
  kiln models inspect org/name --json             from the hub's cache, if it is there

The hash autov2 is the one that CivitAI shows. Pickles (.ckpt) are never read.")]
pub struct InspectArgs {
    /// A safetensors or GGUF file, a folder in diffusers layout, or a hub id in the cache
    #[arg(value_name = "PATH")]
    pub path: String,
    /// List every tensor with its shape and number format
    #[arg(long)]
    pub tensors: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `kiln config`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  kiln config                 the effective configuration, as TOML that can be a file's beginning
  kiln config --variables     every key with its environment variable")]
pub struct ConfigArgs {
    /// List every key with its environment variable and kind of value
    #[arg(long)]
    pub variables: bool,
}

/// `kiln key`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  kiln key ann     prints a new key for ann, and the line for the scheduler's configuration

The key itself is stored nowhere: hand it over and forget it. Clients send it as KILN_API_KEY or with
--api-key.")]
pub struct KeyArgs {
    /// Whose key it is: shown in logs
    #[arg(default_value = "client")]
    pub name: String,
}

/// `kiln migrate`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  KILN_STORE_URL=postgres://kiln@db/kiln kiln migrate

Every process of a farm does this when it starts; by hand it is for an upgrade in a quiet hour.")]
pub struct MigrateArgs {}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_shows_examples() {
        for command in Cli::command().get_subcommands() {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.starts_with("Examples:"), "{}", command.get_name());
        }
    }

    #[test]
    fn a_negative_number_is_a_value_and_not_an_option() {
        let cli = Cli::try_parse_from(["kiln", "render", "x", "--guidance", "-3"]).unwrap();
        let Command::Render(args) = cli.command else { panic!("it is `render`") };
        assert_eq!(args.guidance, Some(-3.0));
    }
}
