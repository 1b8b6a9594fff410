"""The published weights of score SDE: DDPM++ and NCSN++ for CIFAR-10, under the numbers of its program."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffusion_nb.denoisers import NetDenoiser, predict_eps
from diffusion_nb.models.model import fill
from diffusion_nb.nets.song import SongUNet
from diffusion_nb.nets.unet import Attention, ResBlock
from diffusion_nb.schedules import Schedule, SubVPSchedule, VESchedule, VPSchedule

RES = {"norm1": "GroupNorm_0", "conv1": "Conv_0", "time": "Dense_0", "norm2": "GroupNorm_1", "conv2": "Conv_1", "skip": "Conv_2"}  # fmt: skip


class Published(NamedTuple):
    "A published network: residual blocks a level, whether it is NCSN++, and the schedule that it was trained on."

    blocks: int
    ncsn: bool
    schedule: type[Schedule]


PUBLISHED = {  # by the name of its configuration
    "cifar10_ncsnpp_continuous": Published(4, True, VESchedule),
    "cifar10_ncsnpp_deep_continuous": Published(8, True, VESchedule),
    **{
        f"cifar10_ddpmpp_{deep}continuous_{name}": Published(blocks, False, schedule)
        for deep, blocks in (("", 4), ("deep_", 8))
        for name, schedule in (("vp", VPSchedule), ("subvp", SubVPSchedule))
    },
}


def in_their_order(net: SongUNet) -> Iterator[tuple[str, nn.Module]]:
    "(our name, ours) of the parts in the order in which their program numbers them."
    if net.fourier is not None:
        yield "fourier", net.fourier
    yield from (("embed.0", net.embed[0]), ("embed.2", net.embed[2]), ("stem", net.stem))
    pyramid = iter(range(len(net.pyramid)))
    for room, layers in (("down", net.down), ("middle", net.middle), ("up", net.up)):
        for i, layer in enumerate(layers):
            parts = [(f"{room}.{i}", layer)] if isinstance(layer, ResBlock) else [(f"{room}.{i}.{k}", part) for k, part in enumerate(layer)]  # fmt: skip
            yield from ((name, part) for name, part in parts if not isinstance(part, nn.Identity))
            if room == "down" and isinstance(layer, ResBlock) and len(net.pyramid):
                k = next(pyramid)
                yield f"pyramid.{k}.0", net.pyramid[k][0]
    yield from (("head.0", net.head[0]), ("head.2", net.head[2]))


def from_score_sde(net: SongUNet, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    "Their tensors under our names: matrices of 1×1 convolutions turned over, and queries, keys and values in one."
    found = {}
    for k, (name, part) in enumerate(in_their_order(net)):
        at = f"all_modules.{k}."
        if name == "fourier":
            found["fourier.freqs"] = theirs[f"{at}W"]
        elif isinstance(part, ResBlock):
            for ours, name_there in RES.items():
                if ours != "skip" or not isinstance(part.skip, nn.Identity):
                    found |= {f"{name}.{ours}.{p}": theirs[f"{at}{name_there}.{p}"] for p in ("weight", "bias")}
        elif isinstance(part, Attention):
            found |= {f"{name}.norm.{p}": theirs[f"{at}GroupNorm_0.{p}"] for p in ("weight", "bias")}
            found[f"{name}.qkv.weight"] = torch.cat([theirs[f"{at}NIN_{i}.W"].T for i in range(3)])
            found[f"{name}.qkv.bias"] = torch.cat([theirs[f"{at}NIN_{i}.b"] for i in range(3)])
            found |= {f"{name}.out.weight": theirs[f"{at}NIN_3.W"].T, f"{name}.out.bias": theirs[f"{at}NIN_3.b"]}
        else:
            inner = "Conv2d_0." if name.startswith("pyramid") else ""
            found |= {f"{name}.{p}": theirs[f"{at}{inner}{p}"] for p in ("weight", "bias")}
    return found


def minus_eps(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    "(c_skip, c_out) for a network that predicts the score times sigma, which is minus the noise."
    return 1 / alpha, sigma / alpha


def score_sde_denoiser(net: SongUNet, schedule: Schedule) -> NetDenoiser:
    """The network as their program uses it, for pictures in [-1, 1].

    NCSN++ was trained on pictures in [0, 1], to which noise from 0.01 to 50 was added: of ours, in [-1, 1], that is 0.02 to 100, and it is told the logarithm of half.
    """
    if net.fourier is not None:
        return NetDenoiser(net, schedule, minus_eps, c_noise=lambda t: (schedule(t)[1] / 2).log())
    return NetDenoiser(net, schedule, predict_eps, c_noise=lambda t: 999 * t)


def averaged(checkpoint: dict) -> dict[str, Tensor]:
    "The averaged weights of one of their checkpoints, by name: they keep them as a list, in the order of the parameters that are trained."
    model = {name.removeprefix("module."): v for name, v in checkpoint["model"].items()}
    fixed = [name for name in model if name.endswith(".W") and model[name].ndim == 1 or name == "sigmas"]
    trained = [name for name in model if name not in fixed]
    shadow = checkpoint["ema"]["shadow_params"]
    if len(shadow) != len(trained):
        raise ValueError(f"expected as many averages as trained tensors, {len(trained)}; got {len(shadow)}")
    return model | dict(zip(trained, shadow, strict=True))


def load_score_sde(file: Path | str, name: str) -> NetDenoiser:
    """The published model of this configuration, such as 'cifar10_ncsnpp_deep_continuous', with its averaged weights, in eval mode, from its checkpoint.

    The file is a pickle, of which only tensors are read. Raises ValueError for an unknown name, and for a file that is damaged or another network's.
    """
    if name not in PUBLISHED:
        raise ValueError(f"no published network {name!r}; there are {', '.join(PUBLISHED)}")
    blocks, ncsn, schedule = PUBLISHED[name]
    net = SongUNet(3, 128, (1, 2, 2, 2), blocks, (1,), ncsn=ncsn)
    try:
        theirs = averaged(torch.load(file, map_location="cpu", weights_only=True))
        found = from_score_sde(net, theirs)
    except FileNotFoundError:
        raise
    except Exception as e:  # whatever a damaged or hostile file can cause
        raise ValueError(f"{file} is damaged, or no checkpoint of {name}: {e!r}") from e
    fill(net, found, str(file))
    made = schedule(0.02, 100.0) if ncsn else schedule()
    return score_sde_denoiser(net.requires_grad_(False), made).eval()
