"""Checkpoints of the real sizes of later families with random weights, in diffusers layout, f16 on disk.

    python infra/bench/real_sizes.py sdxl
    python infra/bench/compare_diffusers.py --checkpoint ~/.cache/kiln/bench/sdxl-random-f16 --part picture --size 1024 --steps 2 --rounds 1 --layout nhwc --no-pictures

Models are never whole in f32: their shapes come from diffusers on torch's meta device, and each tensor is drawn in f16 by the rules of the
engine's test checkpoints, so that signals keep their size on their way through all layers."""

import math
import os
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "engine/tests/fixtures"))
from checkpoints import (  # noqa: E402
    CROSS_DOWN, CROSS_UP, END, SD_BETAS, START, Recipe, gain, tokenizer_vocabulary, write_json, write_tokenizer,
)

CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12, "hidden_act": "quick_gelu", "projection_dim": 768}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32, "hidden_act": "gelu", "projection_dim": 1280}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23, "hidden_act": "gelu", "projection_dim": 512}
VAE = {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}
LEADING = {
    "_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0", **SD_BETAS, "interpolation_type": "linear", "prediction_type": "epsilon",
    "steps_offset": 1, "timestep_spacing": "leading", "use_karras_sigmas": False,
}
DDIM_V = {
    "_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0", **SD_BETAS, "clip_sample": False, "prediction_type": "v_prediction",
    "set_alpha_to_one": False, "steps_offset": 1,
}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.31.0", "num_train_timesteps": 1000, "shift": 3.0}

# The configuration files of the published checkpoints; Stable Diffusion 3.5 medium without T5.
MODELS = {
    "sd21": {
        "pipeline": "StableDiffusionPipeline", "scheduler": DDIM_V, "texts": {"text_encoder": (CLIPTextModel, CLIP_H)},
        "vae": {**VAE, "latent_channels": 4, "scaling_factor": 0.18215, "sample_size": 768},
        "unet": {
            "sample_size": 96, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024, "use_linear_projection": True, "down_block_types": [CROSS_DOWN] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + [CROSS_UP] * 3,
        },
    },
    "sdxl": {
        "pipeline": "StableDiffusionXLPipeline", "scheduler": LEADING,
        "texts": {"text_encoder": (CLIPTextModel, CLIP_L), "text_encoder_2": (CLIPTextModelWithProjection, CLIP_G)},
        "vae": {**VAE, "latent_channels": 4, "scaling_factor": 0.13025, "sample_size": 1024, "force_upcast": True},
        "unet": {
            "sample_size": 128, "block_out_channels": [320, 640, 1280], "layers_per_block": 2, "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048, "use_linear_projection": True, "transformer_layers_per_block": [1, 2, 10],
            "down_block_types": ["DownBlock2D", CROSS_DOWN, CROSS_DOWN], "up_block_types": [CROSS_UP, CROSS_UP, "UpBlock2D"],
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
        },
    },
    "sd35_medium": {
        "pipeline": "StableDiffusion3Pipeline", "scheduler": FLOW,
        "texts": {"text_encoder": (CLIPTextModelWithProjection, CLIP_L), "text_encoder_2": (CLIPTextModelWithProjection, CLIP_G)},
        "vae": {
            **VAE, "latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609, "sample_size": 1024, "force_upcast": True,
            "use_quant_conv": False, "use_post_quant_conv": False,
        },
        "transformer": {
            "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24,
            "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "out_channels": 16, "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
        },
    },
}


def folder_of(name: str) -> Path:
    """Where a checkpoint is kept between runs."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / f"kiln/bench/{name}-random-f16"


def drawn(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """By the rules of `checkpoints.randomise`."""
    noise = torch.randn(shape, generator=generator, dtype=torch.float32)
    if "norm" in name:
        return 1 + 0.2 * noise if name.endswith("weight") else 0.1 * noise
    if "embedding" in name and len(shape) == 2 and "time" not in name:
        return 0.7 * noise
    if len(shape) < 2:
        return 0.1 * noise
    return noise * gain(name) / math.sqrt(math.prod(shape[1:]))


def tokens() -> dict:
    """Of a CLIP text encoder's configuration: the published vocabulary's size, and the fixtures' marks."""
    vocabulary, _ = tokenizer_vocabulary()
    return {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": vocabulary[START], "eos_token_id": vocabulary[END], "pad_token_id": vocabulary[END]}


def write(model: torch.nn.Module, folder: Path, file: str, generator: torch.Generator) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "save_config"):
        model.save_config(folder)
    else:
        model.config.save_pretrained(folder)
    tensors = {name: drawn(name, parameter.shape, generator).half() for name, parameter in model.named_parameters()}
    save_file(tensors, folder / file, metadata={"format": "pt"})
    print(f"  {folder.name}: {sum(tensor.numel() for tensor in tensors.values()) / 1e6:.0f} million weights", file=sys.stderr)


@torch.no_grad()
def build(name: str) -> Path:
    model, folder = MODELS[name], folder_of(name)
    if (folder / "model_index.json").exists():
        return folder
    print(f"making random weights of the real size in {folder} (once, several GB)", file=sys.stderr)
    generator = torch.Generator().manual_seed(3)
    index = {"_class_name": model["pipeline"], "_diffusers_version": "0.42.1", "scheduler": ["diffusers", model["scheduler"]["_class_name"]]}
    weights = "diffusion_pytorch_model.safetensors"
    with torch.device("meta"):
        parts = {"vae": AutoencoderKL(**model["vae"])}
        if "unet" in model:
            parts["unet"] = UNet2DConditionModel(**model["unet"])
        else:
            parts["transformer"] = SD3Transformer2DModel(**model["transformer"])
        texts = {part: kind(CLIPTextConfig(**config, **tokens())) for part, (kind, config) in model["texts"].items()}
    for part, network in parts.items():
        write(network, folder / part, weights, generator)
        index[part] = ["diffusers", type(network).__name__]
    for part, network in texts.items():
        write(network, folder / part, "model.safetensors", generator)
        tokenizer = part.replace("text_encoder", "tokenizer")
        if not (folder / tokenizer).exists():
            write_tokenizer(Recipe(name, 0, torch.float16, {}, {}, {}, {}, "pair"), folder / tokenizer)
        index |= {part: ["transformers", type(network).__name__], tokenizer: ["transformers", "CLIPTokenizer"]}
    absent = {
        "StableDiffusionPipeline": {"feature_extractor": [None, None], "image_encoder": [None, None], "safety_checker": [None, None], "requires_safety_checker": False},
        "StableDiffusionXLPipeline": {"feature_extractor": [None, None], "image_encoder": [None, None], "force_zeros_for_empty_prompt": True},
        "StableDiffusion3Pipeline": {"feature_extractor": [None, None], "image_encoder": [None, None], "text_encoder_3": [None, None], "tokenizer_3": [None, None]},
    }
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler/scheduler_config.json", model["scheduler"])
    # Written last: a folder that has it is whole.
    write_json(folder / "model_index.json", index | absent[model["pipeline"]])
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in MODELS:
        sys.exit(f"usage: real_sizes.py {'|'.join(MODELS)}")
    print(build(sys.argv[1]))
