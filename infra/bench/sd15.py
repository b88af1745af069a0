"""A checkpoint of Stable Diffusion 1.5's real size with random weights, in diffusers layout, f16 on disk (2 GB).

Speed does not depend on what weights say, but a wrong answer must be noticed: they are drawn as the engine's test checkpoints are, so
that signals keep their size on their way through all layers."""

import os
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "engine/tests/fixtures"))
from checkpoints import (  # noqa: E402
    CROSS_DOWN, CROSS_UP, END, SD_BETAS, START, Recipe, randomise, save_part, scale_vae_output, text_tensors, tokenizer_vocabulary,
    write_json, write_tokenizer,
)

WEIGHTS = "diffusion_pytorch_model.safetensors"
# The configuration files of Stable Diffusion 1.5.
RECIPE = Recipe(
    name="sd15",
    seed=1515,
    dtype=torch.float16,
    unet={
        "sample_size": 64, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "attention_head_dim": 8,
        "cross_attention_dim": 768, "norm_num_groups": 32,
        "down_block_types": [CROSS_DOWN] * 3 + ["DownBlock2D"], "up_block_types": ["UpBlock2D"] + [CROSS_UP] * 3,
    },
    vae={
        "sample_size": 512, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 32,
        "scaling_factor": 0.18215, "force_upcast": False,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    text={
        "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12, "vocab_size": 49408,
        "max_position_embeddings": 77, "projection_dim": 768, "hidden_act": "quick_gelu",
    },
    scheduler={
        "_class_name": "DDIMScheduler", "_diffusers_version": "0.6.0", **SD_BETAS, "trained_betas": None, "clip_sample": False,
        "prediction_type": "epsilon", "set_alpha_to_one": False, "steps_offset": 1,
    },
    tokenizer_files="pair",
)


def default_folder() -> Path:
    """Where the checkpoint is kept between runs."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "kiln/bench/sd15-random-f16"


def ensure(folder: Path) -> Path:
    """Makes the checkpoint, unless it is there and whole."""
    if not (folder / "model_index.json").exists():
        print(f"making random weights of Stable Diffusion 1.5's size in {folder} (once, 2 GB)", file=sys.stderr)
        build(folder)
    return folder


@torch.no_grad()
def build(folder: Path) -> None:
    generator = torch.Generator().manual_seed(RECIPE.seed)
    vocabulary, _ = tokenizer_vocabulary()
    unet = UNet2DConditionModel(**RECIPE.unet).eval()
    vae = AutoencoderKL(**RECIPE.vae).eval()
    text = CLIPTextModel(CLIPTextConfig(
        bos_token_id=vocabulary[START], eos_token_id=vocabulary[END], pad_token_id=vocabulary[END], **RECIPE.text,
    )).eval()
    for model in (unet, vae, text):
        randomise(model, generator)
    scale_vae_output(vae, generator)

    save_part(unet, folder / "unet", WEIGHTS, RECIPE.dtype)
    save_part(vae, folder / "vae", WEIGHTS, RECIPE.dtype)
    save_part(text, folder / "text_encoder", "model.safetensors", RECIPE.dtype, lambda tensors: text_tensors(RECIPE, tensors))
    if not (folder / "tokenizer").exists():
        write_tokenizer(RECIPE, folder / "tokenizer")
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler/scheduler_config.json", RECIPE.scheduler)
    # Written last: a folder that has it is whole.
    write_json(folder / "model_index.json", {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1", "feature_extractor": [None, None], "image_encoder": [None, None],
        "requires_safety_checker": False, "safety_checker": [None, None], "scheduler": ["diffusers", RECIPE.scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
    })
