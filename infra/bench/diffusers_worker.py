"""diffusers as one side of a comparison: a process of its own that loads, says so, and does one timed run for each line `run` on its
standard input, as `kiln bench engine --on-demand` does. Between runs it waits and uses no processor time."""

import argparse
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path

# What they advise on is not what is measured here.
logging.disable(logging.WARNING)
warnings.simplefilter("ignore")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch  # noqa: E402
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel  # noqa: E402

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
TOKENS, LATENT_CHANNELS, VAE_FACTOR = 77, 4, 8
# As in `kiln bench engine`.
PROMPT, GUIDANCE_SCALE = "a large red star on a blue background", 7.5
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--precision", choices=DTYPES, required=True)
    parser.add_argument("--layout", choices=LAYOUTS, required=True)
    parser.add_argument("--part", choices=["unet", "vae", "picture"], required=True)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1, help="pictures at once; a guided step calls the U-Net with twice as many rows")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20, help="of a whole picture")
    parser.add_argument("--out", type=Path, help="where the first whole picture of the latest run is written")
    return parser.parse_args()


class Part:
    """The U-Net or the decoder by itself, with its inputs ready."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.dtype, self.layout = args, DTYPES[args.precision], LAYOUTS[args.layout]
        generator = torch.Generator().manual_seed(7)
        side = args.size // VAE_FACTOR
        self.latents = torch.randn(args.batch, LATENT_CHANNELS, side, side, generator=generator)
        kind, folder = (UNet2DConditionModel, "unet") if args.part == "unet" else (AutoencoderKL, "vae")
        model = kind.from_pretrained(args.checkpoint / folder, torch_dtype=self.dtype, use_safetensors=True)
        self.model = model.eval().to(memory_format=self.layout)
        if args.part == "unet":
            width = self.model.config.cross_attention_dim
            self.context = torch.randn(2 * args.batch, TOKENS, width, generator=generator).to(self.dtype)

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.dtype).contiguous(memory_format=self.layout)

    def work(self) -> torch.Tensor:
        """One guided denoising step (the U-Net over negative and positive rows), or one decoding."""
        if self.args.part == "unet":
            rows = self.place(torch.cat([self.latents, self.latents]))
            return self.model(rows, torch.tensor(500), self.context).sample.float()
        latents = self.place(self.latents / self.model.config.scaling_factor)
        # One at a time, as a pipeline that minds its memory does; more at once gain nothing on a processor.
        return torch.cat([self.model.decode(row[None]).sample.float() for row in latents])

    def run(self) -> float:
        started = time.perf_counter()
        output = self.work()
        seconds = time.perf_counter() - started
        if not output.isfinite().all():
            sys.exit("diffusers' output is not finite")
        return seconds


class Picture:
    """Whole pictures, as `kiln bench engine --on-demand --part picture` renders them."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        parts = absent_parts(args.checkpoint) | quantised_parts(args.checkpoint, DTYPES[args.precision])
        pipe = DiffusionPipeline.from_pretrained(args.checkpoint, torch_dtype=DTYPES[args.precision], use_safetensors=True, **parts)
        denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
        denoiser.to(memory_format=LAYOUTS[args.layout])
        pipe.vae.to(memory_format=LAYOUTS[args.layout])
        pipe.vae.enable_slicing()
        pipe.set_progress_bar_config(disable=True)
        self.pipe = pipe

    def run(self) -> float:
        args = self.args
        started = time.perf_counter()
        pictures = self.pipe(
            PROMPT, width=args.size, height=args.size, num_inference_steps=args.steps, guidance_scale=GUIDANCE_SCALE,
            num_images_per_prompt=args.batch, generator=[torch.Generator().manual_seed(seed) for seed in range(args.batch)],
        ).images
        seconds = time.perf_counter() - started
        if args.out:
            pictures[0].save(args.out)
        return seconds


def absent_parts(checkpoint: Path) -> dict:
    """What the checkpoint says that it does without: diffusers wants to be told so."""
    index = json.loads((checkpoint / "model_index.json").read_text())
    return {name: None for name, part in index.items() if part == [None, None]}


def quantised_parts(checkpoint: Path, dtype: torch.dtype) -> dict:
    """FLUX's transformer and T5 from GGUF files in their folders. diffusers keeps the transformer's blocks and makes numbers of them at each use;
    of T5's, numbers are made here, since transformers would make all of them in f32 first."""
    parts = {}
    for file in checkpoint.glob("transformer/*.gguf"):
        from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig

        parts["transformer"] = FluxTransformer2DModel.from_single_file(
            str(file), config=str(file.parent), quantization_config=GGUFQuantizationConfig(compute_dtype=dtype), torch_dtype=dtype,
        )
    for file in checkpoint.glob("text_encoder_2/*.gguf"):
        import gguf
        from transformers import T5Config, T5EncoderModel

        config = T5Config.from_pretrained(file.parent)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, config.num_layers)
        stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
        with torch.device("meta"):
            encoder = T5EncoderModel(config)
        state = {}
        for name, parameter in encoder.named_parameters():
            tensor = stored[names.get_name(name, (".weight",))]
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            state[name] = torch.from_numpy(values).to(dtype).reshape(parameter.shape)
        encoder.load_state_dict(state, assign=True, strict=False)
        encoder.tie_weights()
        parts["text_encoder_2"] = encoder.eval()
    return parts


@torch.inference_mode()
def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    subject = Picture(args) if args.part == "picture" else Part(args)
    say({"ready": True, "load_seconds": time.perf_counter() - started})
    for line in sys.stdin:
        if line.strip() != "run":
            sys.exit(f"a line on standard input must be `run`, but is `{line.strip()}`")
        say({"seconds": subject.run()})


def say(value: dict) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main()
