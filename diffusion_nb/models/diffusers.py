"""To and from the folders of Hugging Face's diffusers: `UNet2DModel` with a scheduler, as in Ho et al.'s converted models."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion_nb.denoisers import NetDenoiser, predict_eps, predict_v, predict_x0, step_index
from diffusion_nb.models.model import fill
from diffusion_nb.nets.unet import Attention, Down, UNet, cos_first_embedding, time_embedding
from diffusion_nb.schedules import DDPMSchedule, cosine_betas, zero_terminal_snr
from diffusion_nb.util.storage import own_tensors, read_weights, save_tensors, write_json

RES = {"norm1": "norm1", "conv1": "conv1", "time": "time_emb_proj", "norm2": "norm2", "conv2": "conv2"}
ENDS = {"embed.0": "time_embedding.linear_1", "embed.2": "time_embedding.linear_2", "stem": "conv_in", "head.0": "conv_norm_out", "head.2": "conv_out"}  # fmt: skip
PREDICTS = {"epsilon": predict_eps, "v_prediction": predict_v, "sample": predict_x0}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def blocks(levels: int, layers: int, attention: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    "(our prefix, theirs) of every residual, attention, down and up block."
    n = 0
    for i in range(levels):
        for k in range(layers):
            yield f"down.{n}.0", f"down_blocks.{i}.resnets.{k}"
            if i in attention:
                yield f"down.{n}.1", f"down_blocks.{i}.attentions.{k}"
            n += 1
        if i + 1 < levels:
            yield f"down.{n}.conv", f"down_blocks.{i}.downsamplers.0.conv"
            n += 1
    yield from (("middle.0", "mid_block.resnets.0"), ("middle.1", "mid_block.attentions.0"), ("middle.2", "mid_block.resnets.1"))  # fmt: skip
    n = 0
    for i in range(levels):
        for k in range(layers + 1):
            yield f"up.{n}.0", f"up_blocks.{i}.resnets.{k}"
            if levels - 1 - i in attention:
                yield f"up.{n}.1", f"up_blocks.{i}.attentions.{k}"
            n += 1
        if i + 1 < levels:
            yield f"up.{n}.conv", f"up_blocks.{i}.upsamplers.0.conv"
            n += 1


def names(levels: int, layers: int, attention: tuple[int, ...], ours: set[str]) -> dict[str, list[str]]:
    "Our parameters ↦ theirs; more than one where ours is several of theirs, one after the other."
    layer = {a: [b] for a, b in ENDS.items()}
    for a, b in blocks(levels, layers, attention):
        if "resnets" in b:
            layer |= {f"{a}.{own}": [f"{b}.{them}"] for own, them in (RES | {"skip": "conv_shortcut"}).items()}
        elif "attentions" in b:
            layer |= {f"{a}.norm": [f"{b}.group_norm"], f"{a}.out": [f"{b}.to_out.0"], f"{a}.qkv": [f"{b}.to_q", f"{b}.to_k", f"{b}.to_v"]}  # fmt: skip
        else:
            layer[a] = [b]
    table = {f"{a}.{p}": [f"{them}.{p}" for them in b] for a, b in layer.items() for p in ("weight", "bias")}
    table["label.weight"] = ["class_embedding.weight"]
    return {a: b for a, b in table.items() if a in ours}


FIXED = dict(time_embedding_type="positional", center_input_sample=False, act_fn="silu", mid_block_scale_factor=1, downsample_type="conv",
             upsample_type="conv", resnet_time_scale_shift="default", mid_block_type="UNetMidBlock2D", add_attention=True, class_embed_type=None, norm_num_groups=32)  # fmt: skip


def check_groups(channels: list[int]) -> None:
    "Raise ValueError unless normalisations are in 32 groups here as there."
    if any(c % 32 or c < 128 for c in channels):
        raise ValueError(f"expected block_out_channels that are multiples of 32 from 128 on; got {channels}")


def unet_of(config: dict) -> UNet:
    "The fresh network of a `UNet2DModel`'s config.json. Raises ValueError for options that ours has not."
    if other := {k: config[k] for k, v in FIXED.items() if config.get(k, v) != v}:
        raise ValueError(
            f"config.json: a U-Net of another kind, with {other}; expected { ({k: FIXED[k] for k in other}) }"
        )
    channels, down = config["block_out_channels"], config["down_block_types"]
    width, head, classes = (
        channels[0],
        config.get("attention_head_dim", 8) or 0,
        config.get("num_class_embeds") or 0,
    )
    check_groups(channels)
    if (config.get("freq_shift", 0), config.get("flip_sin_to_cos", True)) not in ((1, False), (0, True)):
        raise ValueError("config.json: expected times embedded as by DDPM (freq_shift 1, flip_sin_to_cos false) or as by improved DDPM (0, true)")  # fmt: skip
    return UNet(config.get("in_channels", 3), width, [c / width for c in channels], config.get("layers_per_block", 2),
                [i for i, kind in enumerate(down) if kind == "AttnDownBlock2D"], head, classes, config.get("dropout", 0.0),
                channels_out=config.get("out_channels", 3), eps=config.get("norm_eps", 1e-5), symmetric=config.get("downsample_padding", 1) == 1,
                time_embedding=cos_first_embedding if config.get("flip_sin_to_cos", True) else time_embedding, label_after=True)  # fmt: skip


def config_of(net: UNet) -> dict:
    "The config.json with which `UNet2DModel` is this network. Raises ValueError for a network that it cannot be."
    pairs = [layer for layer in net.down if isinstance(layer, nn.ModuleList)]
    downs = [layer for layer in net.down if isinstance(layer, Down)]
    levels, first = len(downs) + 1, pairs[0][0]
    attending = [m for m in net.modules() if isinstance(m, Attention)]
    widths = {m.norm.num_channels // m.heads for m in attending}
    if net.patch > 1 or first.scale_shift or first.rescale or len(pairs) + len(downs) != len(net.down) or (net.label is not None and not net.label_after):  # fmt: skip
        raise ValueError("diffusers' UNet2DModel has no patches, none of ADM's changes, and no label in front of the layers that read the time")  # fmt: skip
    if len(widths) > 1 and any(m.heads > 1 for m in attending):
        raise ValueError("diffusers' UNet2DModel counts heads by their width: expected one head, or head_width")
    layers = len(pairs) // levels
    channels = [pairs[i * layers][0].conv1.out_channels for i in range(levels)]
    check_groups(channels)
    attends = [len(pairs[i * layers]) > 1 for i in range(levels)]
    return FIXED | dict(
        _class_name="UNet2DModel", sample_size=None, in_channels=net.stem.in_channels, out_channels=net.head[2].out_channels,
        block_out_channels=channels, layers_per_block=layers, dropout=first.dropout.p,
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attends], up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]],
        attention_head_dim=next(iter(widths)) if any(m.heads > 1 for m in attending) else None, norm_eps=net.head[0].eps, downsample_padding=int(sum(downs[0].pad) == 4) if downs else 1,
        num_class_embeds=None if net.label is None else net.label.num_embeddings,
        flip_sin_to_cos=net.time_embedding is cos_first_embedding, freq_shift=int(net.time_embedding is time_embedding))  # fmt: skip


def table_of(net: UNet, config: dict) -> dict[str, list[str]]:
    "Our parameters ↦ theirs."
    attention = tuple(i for i, kind in enumerate(config["down_block_types"]) if kind == "AttnDownBlock2D")
    return names(len(config["block_out_channels"]), config["layers_per_block"], attention, set(own_tensors(net)))


BEFORE_2023 = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def by_new_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    "The tensors with the layers of attention called as diffusers has called them since May 2023; 1×1 convolutions there as matrices."
    found = {}
    for name, v in tensors.items():
        *path, layer, kind = name.split(".")
        if layer in BEFORE_2023 and "attentions" in path:
            name, v = ".".join([*path, BEFORE_2023[layer], kind]), v.flatten(1) if v.ndim > 1 else v
        found[name] = v
    return found


def unet_from_diffusers(config: dict, tensors: dict[str, Tensor]) -> UNet:
    "Our U-Net that computes what a `UNet2DModel` does, of its config and weights. Raises ValueError where it cannot."
    net, tensors = unet_of(config), by_new_names(tensors)
    table, known = table_of(net, config), set(tensors)
    if missing := sorted({b for group in table.values() for b in group} ^ known):
        raise ValueError(f"these weights do not fit their config.json: {', '.join(missing[:5])}")
    fill(
        net,
        {a: torch.cat([tensors[b] for b in group]) for a, group in table.items()},
        "this dictionary of weights",
    )
    return net


def unet_to_diffusers(net: UNet) -> tuple[dict, dict[str, Tensor]]:
    "(config, weights) of the `UNet2DModel` that computes what our U-Net does. Raises ValueError where there is none."
    config, own, found = config_of(net), own_tensors(net), {}
    for ours, group in table_of(net, config).items():
        found |= dict(zip(group, own[ours].chunk(len(group)), strict=True))
    return config, found


def betas_of(config: dict) -> Tensor:
    "The betas of a scheduler_config.json. Raises ValueError for a schedule that is not known here."
    if config.get("rescale_betas_zero_snr"):
        return zero_terminal_snr(betas_of(config | {"rescale_betas_zero_snr": False}))
    kind, T = config.get("beta_schedule", "linear"), config.get("num_train_timesteps", 1000)
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float64)
    ends = torch.tensor([config.get("beta_start", 1e-4), config.get("beta_end", 0.02)], dtype=torch.float64)
    if kind == "linear":
        return torch.linspace(*ends.tolist(), T, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(*ends.sqrt().tolist(), T, dtype=torch.float64) ** 2
    if kind == "squaredcos_cap_v2":
        return cosine_betas(T)
    raise ValueError(
        f"scheduler_config.json: expected linear, scaled_linear or squaredcos_cap_v2 betas; got {kind}"
    )


def load_diffusers(folder: Path | str) -> NetDenoiser:
    """The denoiser of a diffusers pipeline in a folder: unet/ and scheduler/, as `DDPMPipeline.save_pretrained` writes them, or both in one; in eval mode, without gradients.

    Raises FileNotFoundError where there is none, ValueError where it holds something else, or weights that are not safetensors.
    """
    folder = Path(folder)
    network, chain = (folder / part if (folder / part).is_dir() else folder for part in ("unet", "scheduler"))
    unet, scheduler = (json.loads(file.read_text(encoding="utf-8")) for file in (network / "config.json", chain / "scheduler_config.json"))  # fmt: skip
    net = unet_from_diffusers(unet, read_weights(network / WEIGHTS))
    schedule, kind = DDPMSchedule(betas_of(scheduler)), scheduler.get("prediction_type", "epsilon")
    if kind not in PREDICTS:
        raise ValueError(f"scheduler_config.json: expected prediction_type {', '.join(PREDICTS)}; got {kind}")
    return NetDenoiser(net, schedule, PREDICTS[kind], c_noise=step_index(schedule.T)).eval().requires_grad_(False)


def save_diffusers(denoiser: NetDenoiser, folder: Path | str, size: int = 32) -> None:
    """Write a denoiser as a pipeline that `DDPMPipeline.from_pretrained(folder)` reads and draws with.

    size: of the pictures that the pipeline draws, in pixels. Its network must have been told the steps counted from 0 (`step_index(T)`), on a `DDPMSchedule`. Raises ValueError where diffusers has no such model.
    """
    schedule, kind = denoiser.schedule, {f: k for k, f in PREDICTS.items()}.get(denoiser.predict)
    if not isinstance(schedule, DDPMSchedule) or kind is None or denoiser.c_in is not None:
        raise ValueError(
            "expected a denoiser with a DDPMSchedule whose network predicts noise, velocity or picture"
        )
    told = denoiser.c_noise(torch.tensor([1, 2], dtype=torch.float64) / schedule.T)
    if not told.allclose(torch.arange(2.0, dtype=torch.float64), atol=1e-6):
        raise ValueError(f"expected a network that is told its steps from 0, c_noise=step_index({schedule.T}); this one is told {told.tolist()} first")  # fmt: skip
    config, tensors = unet_to_diffusers(denoiser.net)
    config, folder = config | dict(sample_size=size), Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty, and nothing in it is overwritten; name a new folder")
    save_tensors(folder / "unet" / WEIGHTS, tensors, {"format": "pt"})
    write_json(folder / "unet/config.json", config)
    write_json(folder / "scheduler/scheduler_config.json", dict(_class_name="DDPMScheduler", num_train_timesteps=schedule.T, trained_betas=(-schedule.log_abar.diff().expm1()).tolist(),
                                                                 prediction_type=kind, variance_type="fixed_small", clip_sample=True, timestep_spacing="leading"))  # fmt: skip
    write_json(folder / "model_index.json", {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDPMScheduler"]})  # fmt: skip
