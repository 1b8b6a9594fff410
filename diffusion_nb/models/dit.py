"""Diffusion transformers from elsewhere: the published files of DiT, and diffusers' `DiTTransformer2DModel`."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from diffusion_nb.denoisers import NetDenoiser, step_index
from diffusion_nb.models.diffusers import WEIGHTS, betas_of
from diffusion_nb.models.model import fill
from diffusion_nb.nets.dit import DiT
from diffusion_nb.nets.unet import cos_first_embedding, time_embedding
from diffusion_nb.schedules import DDPMSchedule, linear_betas
from diffusion_nb.util.storage import own_tensors, read_weights

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of the published widths
ENDS = {"stem": "x_embedder.proj", "time.0": "t_embedder.mlp.0", "time.2": "t_embedder.mlp.2",
        "modulation.linear": "final_layer.adaLN_modulation.1", "head": "final_layer.linear"}  # fmt: skip
INSIDE = {"attention.qkv": "attn.qkv", "attention.out": "attn.proj", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2", "modulation.linear": "adaLN_modulation.1"}  # fmt: skip
THEIR_ENDS = {"stem": "pos_embed.proj", "modulation.linear": "proj_out_1", "head": "proj_out_2"}
THEIR_INSIDE = {"attention.out": "attn1.to_out.0", "mlp.0": "ff.net.0.proj", "mlp.2": "ff.net.2", "modulation.linear": "norm1.linear"}  # fmt: skip
TOLD = {"time.0.weight": "timestep_embedder.linear_1.weight", "time.0.bias": "timestep_embedder.linear_1.bias", "time.2.weight": "timestep_embedder.linear_2.weight",
        "time.2.bias": "timestep_embedder.linear_2.bias", "label.weight": "class_embedder.embedding_table.weight"}  # fmt: skip
FIXED = dict(
    norm_type="ada_norm_zero",
    activation_fn="gelu-approximate",
    attention_bias=True,
    norm_elementwise_affine=False,
    dropout=0.0,
)


def diffusers_time(t: Tensor, dim: int) -> Tensor:
    "The time as diffusers' DiT is told it, cosines first, and unlike in the published program at frequencies that reach 1e-4 itself; always in float32."
    return time_embedding(t.float(), dim).roll(dim // 2, dims=1)


def check_kind(net: DiT) -> None:
    "Raise ValueError for a network that DiT's programs do not have."
    if net.modulation is None or net.label is None or net.waves != 256:
        raise ValueError("expected a transformer with blocks of the kind AdaLNZero, with classes, and with 256 waves for the time")  # fmt: skip


def convolution(net: DiT, weight: Tensor) -> Tensor:
    "The weight of `stem` as that of a convolution over patches."
    return rearrange(weight, "d (p q c) -> d c p q", p=net.patch, q=net.patch)


def linear(weight: Tensor) -> Tensor:
    "The weight of a convolution over patches as that of `stem`."
    return rearrange(weight, "d c p q -> d (p q c)")


# the published program


def published_names(depth: int) -> dict[str, str]:
    "Our parameters ↦ theirs; their `pos_embed` is computed here."
    layers = ENDS | {f"blocks.{n}.{a}": f"blocks.{n}.{b}" for n in range(depth) for a, b in INSIDE.items()}
    table = {f"{a}.{p}": f"{b}.{p}" for a, b in layers.items() for p in ("weight", "bias")}
    return table | {"label.weight": "y_embedder.embedding_table.weight"}


def shape_of(tensors: dict[str, Tensor], heads: int | None) -> dict:
    "The arguments of `DiT` that published weights ask for. Raises ValueError where they are of something else."
    if (
        missing := {
            "pos_embed",
            "x_embedder.proj.weight",
            "y_embedder.embedding_table.weight",
            "final_layer.linear.weight",
        }
        - tensors.keys()
    ):
        raise ValueError(f"these are no weights of DiT: there is no {', '.join(sorted(missing))}")
    width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    if heads is None and width not in HEADS:
        raise ValueError(
            f"heads: say how many; a width of {width} is none of those published, {', '.join(map(str, HEADS))}"
        )
    return dict(
        channels=channels, size=patch * math.isqrt(tensors["pos_embed"].shape[1]), patch=patch, width=width, heads=heads or HEADS[width],
        depth=len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}), classes=len(tensors["y_embedder.embedding_table.weight"]) - 1,
        channels_out=len(tensors["final_layer.linear.weight"]) // patch**2)  # fmt: skip


def dit_from_published(tensors: dict[str, Tensor], heads: int | None = None) -> DiT:
    "The network of published weights; heads: where it is not of a published width. Raises ValueError where names, shapes or positions differ."
    net, left = DiT(**shape_of(tensors, heads)), dict(tensors)
    gap = (left.pop("pos_embed")[0] - net.positions).abs().max().item()
    if gap > 1e-5:
        raise ValueError(
            f"pos_embed: expected sines and cosines of rows and columns; they differ by up to {gap:.2g}"
        )
    ours = {theirs: a for a, theirs in published_names(len(net.blocks)).items()}
    own = {ours.get(name, name): v for name, v in left.items()}
    fill(net, own | {"stem.weight": linear(own["stem.weight"])}, "this dictionary of weights")
    return net


def dit_to_published(net: DiT) -> dict[str, Tensor]:
    "The weights under the published program's names. Raises ValueError where it has no such network."
    check_kind(net)
    if net.time_embedding is not cos_first_embedding:
        raise ValueError("expected a network that is told the time by `cos_first_embedding`, as in the published program")  # fmt: skip
    table, own = published_names(len(net.blocks)), own_tensors(net)
    found = {theirs: own[a] for a, theirs in table.items()}
    return found | {
        "x_embedder.proj.weight": convolution(net, own["stem.weight"]),
        "pos_embed": net.positions[None],
    }


def load_dit(path: Path | str) -> NetDenoiser:
    """The denoiser of a published file, such as DiT-XL-2-256x256.pt, or of a folder with transformer/ and scheduler/, as `DiTPipeline.save_pretrained` writes it.

    It denoises latents of Stable Diffusion's autoencoder, scaled by 0.18215, in 1000 steps; `extra` says where the variance lies (`learned_variance`). In eval mode, without
    gradients; a file is read without running code. Raises ValueError where it holds something else.
    """
    path = Path(path)
    if path.is_dir():
        config, scheduler = (json.loads((path / part).read_text(encoding="utf-8")) for part in ("transformer/config.json", "scheduler/scheduler_config.json"))  # fmt: skip
        net, betas = dit_from_diffusers(config, read_weights(path / "transformer" / WEIGHTS)), betas_of(scheduler)
    else:
        net, betas = dit_from_published(read_weights(path, allow_pickle=True)), linear_betas()
    schedule = DDPMSchedule(betas)
    return NetDenoiser(net, schedule, c_noise=step_index(schedule.T)).eval().requires_grad_(False)


# diffusers


def their_names(depth: int) -> Iterator[tuple[str, list[str]]]:
    "(our parameter, theirs) in diffusers; queries, keys and values are three, and each block holds its own copy of what embeds time and label."
    places = [f"transformer_blocks.{n}" for n in range(depth)]
    layers = THEIR_ENDS | {f"blocks.{n}.{a}": f"{place}.{b}" for n, place in enumerate(places) for a, b in THEIR_INSIDE.items()}  # fmt: skip
    for p in ("weight", "bias"):
        yield from ((f"{a}.{p}", [f"{b}.{p}"]) for a, b in layers.items())
        yield from ((f"blocks.{n}.attention.qkv.{p}", [f"{place}.attn1.to_{x}.{p}" for x in "qkv"]) for n, place in enumerate(places))  # fmt: skip
    yield from ((a, [f"{place}.norm1.emb.{b}" for place in places]) for a, b in TOLD.items())


def dit_from_diffusers(config: dict, tensors: dict[str, Tensor]) -> DiT:
    "Our network that computes what a `DiTTransformer2DModel` does, of its config and weights. Raises ValueError where it cannot."
    if other := {k: config[k] for k, v in FIXED.items() if config.get(k, v) != v}:
        raise ValueError(
            f"config.json: a transformer of another kind, with {other}; expected { ({k: FIXED[k] for k in other}) }"
        )
    heads, channels = config.get("num_attention_heads", 16), config.get("in_channels", 4)
    net = DiT(channels, config.get("sample_size", 32), config.get("patch_size", 2), heads * config.get("attention_head_dim", 72), config.get("num_layers", 28), heads,
              config.get("num_embeds_ada_norm", 1000), channels_out=config.get("out_channels") or channels, time_embedding=diffusers_time)  # fmt: skip
    table, found = dict(their_names(len(net.blocks))), {}
    if differ := sorted({b for group in table.values() for b in group} ^ tensors.keys()):
        raise ValueError(f"these weights do not fit their config.json: {', '.join(differ[:5])}")
    for ours, group in table.items():
        parts = [tensors[b] for b in group]
        if ours in TOLD and any(not torch.equal(parts[0], part) for part in parts):
            raise ValueError(f"{group[0]}: expected the same in every block, as in weights converted from DiT's")
        found[ours] = parts[0] if ours in TOLD else torch.cat(parts)
    fill(net, found | {"stem.weight": linear(found["stem.weight"])}, "this dictionary of weights")
    for block in net.blocks:
        block.norm2.eps = config.get("norm_eps", 1e-5)
    return net


def dit_to_diffusers(net: DiT) -> tuple[dict, dict[str, Tensor]]:
    "(config, weights) of the `DiTTransformer2DModel` that computes what our network does. Raises ValueError where there is none."
    check_kind(net)
    if net.time_embedding is not diffusers_time:
        raise ValueError("diffusers tells its DiT the time at other frequencies than the published program: expected a network with time_embedding=diffusers_time")  # fmt: skip
    own, found, heads = own_tensors(net), {}, net.blocks[0].attention.heads
    own = own | {"stem.weight": convolution(net, own["stem.weight"])}
    for ours, group in their_names(len(net.blocks)):
        found |= {b: own[ours] for b in group} if ours in TOLD else dict(zip(group, own[ours].chunk(len(group)), strict=True))  # fmt: skip
    width = net.stem.out_features
    config = FIXED | dict(
        _class_name="DiTTransformer2DModel", num_attention_heads=heads, attention_head_dim=width // heads, in_channels=net.channels, sample_size=net.size,
        out_channels=net.head.out_features // net.patch**2, num_layers=len(net.blocks), patch_size=net.patch, num_embeds_ada_norm=net.label.num_embeddings - 1,
        norm_eps=net.blocks[0].norm2.eps)  # fmt: skip
    return config, found
