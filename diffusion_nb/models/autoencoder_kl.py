"""Autoencoders of latent diffusion from the folders of Hugging Face's diffusers: its `AutoencoderKL`, such as Stable Diffusion's."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion_nb.models.diffusers import WEIGHTS, by_new_names
from diffusion_nb.models.model import fill
from diffusion_nb.nets.autoencoder import KLAutoencoder, PlainBlock
from diffusion_nb.nets.unet import Down, Up
from diffusion_nb.util.storage import own_tensors, read_weights

FIXED = dict(act_fn="silu", norm_num_groups=32, mid_block_add_attention=True, use_quant_conv=True, use_post_quant_conv=True)  # fmt: skip
LAYERS = ("norm1", "conv1", "norm2", "conv2", "skip")


def layers(net: KLAutoencoder) -> Iterator[tuple[str, str]]:
    "(our layer, theirs) of every convolution and normalisation; of attention, several of theirs, with a space between them."
    for part, side in (("encoder", "down"), ("decoder", "up")):
        rest, level, k, middle_seen = [], 0, 0, False
        for i, layer in enumerate(getattr(net, part)):
            ours = f"{part}.{i}"
            if isinstance(layer, PlainBlock):
                yield from block(ours, f"{part}.{side}_blocks.{level}.resnets.{k}")
                k += 1
            elif isinstance(layer, Down | Up):
                yield f"{ours}.conv", f"{part}.{side}_blocks.{level}.{side}samplers.0.conv"
                level, k = level + 1, 0
            elif isinstance(layer, nn.Sequential):
                middle_seen = True
                for j, n in ((0, 0), (2, 1)):
                    yield from block(f"{ours}.{j}", f"{part}.mid_block.resnets.{n}")
                there = f"{part}.mid_block.attentions.0"
                yield from ((f"{ours}.1.norm", f"{there}.group_norm"), (f"{ours}.1.out", f"{there}.to_out.0"))
                yield f"{ours}.1.qkv", f"{there}.to_q {there}.to_k {there}.to_v"
            elif isinstance(layer, nn.GroupNorm):
                yield ours, f"{part}.conv_norm_out"
            elif isinstance(layer, nn.Conv2d):
                rest.append((ours, middle_seen))
        first, last = [a for a, after in rest if not after], [a for a, after in rest if after]
        yield from zip(first + last, ENDS[part], strict=True)


ENDS = {
    "encoder": ("encoder.conv_in", "encoder.conv_out", "quant_conv"),
    "decoder": ("post_quant_conv", "decoder.conv_in", "decoder.conv_out"),
}


def block(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    yield from ((f"{ours}.{a}", f"{theirs}.{'conv_shortcut' if a == 'skip' else a}") for a in LAYERS)


def from_diffusers(net: KLAutoencoder, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    "Their tensors under our names; queries, keys and values in one."
    found, left, own = {}, dict(theirs), own_tensors(net)
    for a, b in layers(net):
        for p in ("weight", "bias"):
            if f"{a}.{p}" in own:
                parts = [left.pop(f"{name}.{p}") for name in b.split()]
                found[f"{a}.{p}"] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return found | left


def autoencoder_of(config: dict) -> KLAutoencoder:
    "The fresh network of an `AutoencoderKL`'s config.json. Raises ValueError for options that ours has not."
    if other := {k: config[k] for k, v in FIXED.items() if config.get(k, v) != v}:
        raise ValueError(f"config.json: an autoencoder of another kind, with {other}; expected { ({k: FIXED[k] for k in other}) }")  # fmt: skip
    widths = config["block_out_channels"]
    mults = [w // widths[0] for w in widths]
    if [m * widths[0] for m in mults] != list(widths) or widths[0] % 32 or widths[0] < 128:
        raise ValueError(f"config.json: expected block_out_channels that are multiples of the first, a multiple of 32 from 128 on; got {widths}")  # fmt: skip
    return KLAutoencoder(config["in_channels"], config["latent_channels"], widths[0], mults, config["layers_per_block"])  # fmt: skip


def load_autoencoder(folder: Path | str) -> tuple[KLAutoencoder, float]:
    """(the autoencoder of a folder that diffusers wrote, in eval mode; the number by which latents are multiplied before a diffusion model sees them).

    Raises ValueError for an autoencoder of another kind, and where files are missing or damaged.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        net = autoencoder_of(config)
    except (OSError, KeyError, json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{folder} holds no config.json of an AutoencoderKL: {e!r}") from e
    try:
        found = from_diffusers(net, by_new_names(read_weights(folder / WEIGHTS)))
    except KeyError as e:
        raise ValueError(f"{folder / WEIGHTS}: the weights lack {e}") from e
    fill(net, found, str(folder / WEIGHTS))
    return net.eval().requires_grad_(False), float(config.get("scaling_factor", 0.18215))
