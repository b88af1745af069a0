"""FLUX.1 dev at its real size with random weights: transformer and T5 encoder as Q4_0 in GGUF files, which are small enough for a desk's memory.

    python infra/bench/real_flux.py
    python infra/bench/compare_diffusers.py --checkpoint ~/.cache/kiln/bench/flux-dev-random-q4 --part picture --size 1024 --steps 2 --layout nchw --precision bf16 --rounds 1 --alone --no-pictures

Any bytes are blocks of numbers: quants are drawn, and a block's scale is what keeps the signal's size. See `real_sizes.py`, whose other parts it uses."""

import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from real_sizes import CLIP_L, VAE, folder_of, tokens, write  # also finds the fixtures' modules

import flux
import t5
from checkpoints import Recipe, write_json, write_tokenizer

VALUES, BYTES = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q4_0]
# Two quants of a byte, each from -7 to 7 (stored as 1 to 15), so that they are 0 in the middle.
PAIRS = numpy.array([low | high << 4 for high in range(1, 16) for low in range(1, 16)], dtype=numpy.uint8)
DEVIATION = math.sqrt(sum(quant * quant for quant in range(-7, 8)) / 15)
SCHEDULER = {**flux.FLOW, **flux.SHIFTS, "shift": 3.0, "use_dynamic_shifting": True}


def blocks(shape: tuple, gain: float, generator: numpy.random.Generator) -> numpy.ndarray:
    """A matrix of Q4_0 blocks, (outputs, bytes)."""
    outputs, inputs = shape
    stored = numpy.empty((outputs, inputs // VALUES, BYTES), dtype=numpy.uint8)
    scale = numpy.array([gain / DEVIATION / math.sqrt(inputs)], dtype=numpy.float16)
    stored[..., :2] = scale.view(numpy.uint8)
    stored[..., 2:] = PAIRS[generator.integers(0, len(PAIRS), stored[..., 2:].shape, dtype=numpy.uint8)]
    return stored.reshape(outputs, -1)


def flux_gain(name: str) -> float:
    if "mod" in name:
        return 0.7
    return 0.5 if name.endswith(("proj.weight", "mlp.2.weight", "linear2.weight")) else 1.0


def t5_gain(name: str) -> float:
    # T5 does not divide its scores by the root of a head's width.
    return 0.125 if name.endswith("attn_q.weight") else 0.5 if name.endswith(("attn_o.weight", "ffn_down.weight")) else 1.0


def write_gguf(path: Path, kind: str, shapes: dict[str, tuple], gain: Callable[[str], float]) -> None:
    """Writes one tensor after the other, so that the file is never in memory: matrices in blocks, what is left in f32."""
    generator, writer = numpy.random.default_rng(5), gguf.GGUFWriter(path, kind)
    packed = {name: len(shape) == 2 and shape[1] % VALUES == 0 for name, shape in shapes.items()}
    for name, shape in shapes.items():
        stored = (*shape[:-1], shape[-1] // VALUES * BYTES) if packed[name] else shape
        dtype, raw = (numpy.uint8, gguf.GGMLQuantizationType.Q4_0) if packed[name] else (numpy.float32, None)
        writer.add_tensor_info(name, stored, numpy.dtype(dtype), math.prod(stored) * numpy.dtype(dtype).itemsize, raw)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape in shapes.items():
        if packed[name]:
            writer.write_tensor_data(blocks(shape, gain(name), generator))
        else:
            noise = generator.standard_normal(shape, dtype=numpy.float32)
            writer.write_tensor_data(1 + 0.2 * noise if "norm" in name or name.endswith("scale") else 0.1 * noise)
    writer.close()
    print(f"  {path.name}: {sum(map(math.prod, shapes.values())) / 1e6:.0f} million weights", file=sys.stderr)


def flux_shapes(transformer: FluxTransformer2DModel) -> dict[str, tuple]:
    """The transformer's tensors under their makers' names."""
    state, shapes = transformer.state_dict(), {}
    for theirs, ours in flux.original_names(transformer.config.num_layers, transformer.config.num_single_layers).items():
        for suffix in ("weight", "bias"):
            parts = [state[f"{name}.{suffix}"].shape for name in ours if f"{name}.{suffix}" in state]
            if parts:
                name = f"{theirs}.scale" if "_norm" in theirs else f"{theirs}.{suffix}"
                shapes[name] = (sum(part[0] for part in parts), *parts[0][1:])
    return shapes


@torch.no_grad()
def build() -> Path:
    folder = folder_of("flux-dev").with_name("flux-dev-random-q4")
    if (folder / "model_index.json").exists():
        return folder
    print(f"making random weights of the real size in {folder} (once, 9.5 GB)", file=sys.stderr)
    config = T5Config(
        d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, vocab_size=32128, feed_forward_proj="gated-gelu",
        is_encoder_decoder=False, use_cache=False, tie_word_embeddings=False, decoder_start_token_id=0,
    )
    with torch.device("meta"):
        vae = AutoencoderKL(**VAE, latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, sample_size=1024, force_upcast=True, use_quant_conv=False, use_post_quant_conv=False)
        transformer = FluxTransformer2DModel(guidance_embeds=True)
        text, text_2 = CLIPTextModel(CLIPTextConfig(**CLIP_L, **tokens())), T5EncoderModel(config)
    generator = torch.Generator().manual_seed(3)
    write(vae, folder / "vae", "diffusion_pytorch_model.safetensors", generator)
    write(text, folder / "text_encoder", "model.safetensors", generator)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, config.num_layers)
    t5_shapes = {names.get_name(name, (".weight",)): tuple(parameter.shape) for name, parameter in text_2.named_parameters()}
    for part, network, kind, file, shapes, gain in (
        ("transformer", transformer, "flux", "flux1-dev-Q4_0.gguf", flux_shapes(transformer), flux_gain),
        ("text_encoder_2", text_2, "t5encoder", "t5-v1_1-xxl-encoder-Q4_0.gguf", t5_shapes, t5_gain),
    ):
        (folder / part).mkdir(parents=True, exist_ok=True)
        network.save_config(folder / part) if hasattr(network, "save_config") else network.config.save_pretrained(folder / part)
        write_gguf(folder / part / file, kind, shapes, gain)
    if not (folder / "tokenizer").exists():
        write_tokenizer(Recipe("flux", 0, torch.float16, {}, {}, {}, {}, "pair"), folder / "tokenizer")
    shutil.copytree(t5.FOLDER / "tokenizer", folder / "tokenizer_2", dirs_exist_ok=True)
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler/scheduler_config.json", SCHEDULER)
    # Written last: a folder that has it is whole.
    write_json(folder / "model_index.json", {
        "_class_name": "FluxPipeline", "_diffusers_version": "0.42.1", "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"], "text_encoder_2": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"], "transformer": ["diffusers", "FluxTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"],
    })
    return folder


if __name__ == "__main__":
    print(build())
