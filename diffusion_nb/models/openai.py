"""The published weights of improved DDPM, ADM and consistency models, under the names of their programs."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from diffusion_nb.denoisers import Consistency, NetDenoiser, edm_input, edm_time, predict_edm, step_index
from diffusion_nb.models.model import fill
from diffusion_nb.nets.classifier import EncoderUNet, NetClassifier
from diffusion_nb.nets.unet import ADM, IMPROVED, Attention, Down, ResBlock, UNet, Up
from diffusion_nb.schedules import DDPMSchedule, EDMSchedule, cosine_betas, linear_betas
from diffusion_nb.util.storage import read_weights

RES = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time": "emb_layers.1", "norm2": "out_layers.0", "conv2": "out_layers.3"}  # fmt: skip
ATTENTION = {"norm": "norm", "qkv": "qkv", "out": "proj_out"}
POOL = {"head.0": "out.0", "head.2.qkv": "out.2.qkv_proj", "head.2.out": "out.2.c_proj"}
ENDS = {"embed.0": "time_embed.0", "embed.2": "time_embed.2", "stem": "input_blocks.0.0", "head.0": "out.0", "head.2": "out.2"}  # fmt: skip


@dataclass(frozen=True)
class Published:
    "A published network: the options of its `UNet`, its chain of T steps, and whether the channels of a head lie together in its attention."

    options: dict = field(default_factory=dict)
    T: int = 1000
    betas: object = linear_betas
    scaled: bool = False  # whether it is told times from 0 to 1000, whatever T
    together: bool = True


ADM_256 = dict(width=256, mults=(1, 1, 2, 2, 4, 4), blocks=2, attention=(3, 4, 5), **ADM)
IMAGES_64 = dict(width=128, mults=(1, 2, 3, 4), blocks=3, attention=(2, 3), **IMPROVED)
CIFAR_10 = dict(width=128, mults=(1, 2, 2, 2), blocks=3, attention=(1, 2), **IMPROVED)
LSUN_256 = dict(width=128, mults=(1, 1, 2, 2, 4, 4), blocks=2, attention=(4,), **IMPROVED | dict(heads=1, scale_shift=False))  # fmt: skip
PUBLISHED = {  # by the name of the file
    "cifar10_uncond_50M_500K": Published(CIFAR_10, 4000, cosine_betas, scaled=True),
    "cifar10_uncond_vlb_50M_500K": Published(CIFAR_10, 4000, cosine_betas, scaled=True),
    "imagenet64_uncond_100M_1500K": Published(IMAGES_64, 4000, cosine_betas, scaled=True),
    "imagenet64_uncond_vlb_100M_1500K": Published(IMAGES_64, 4000, cosine_betas, scaled=True),
    "imagenet64_cond_270M_250K": Published(IMAGES_64 | dict(width=192, classes=1000), 4000, cosine_betas),
    "lsun_uncond_100M_1200K_bs128": Published(LSUN_256),
    "lsun_uncond_100M_2400K_bs64": Published(LSUN_256),
    "64x64_diffusion": Published(dict(width=192, mults=(1, 2, 3, 4), blocks=3, attention=(1, 2, 3), classes=1000, **ADM), 1000, cosine_betas, together=False),
    "128x128_diffusion": Published(dict(width=256, mults=(1, 1, 2, 3, 4), blocks=2, attention=(2, 3, 4), classes=1000, **ADM | dict(head_width=0, heads=4))),
    "256x256_diffusion": Published(ADM_256 | dict(classes=1000)),
    "256x256_diffusion_uncond": Published(ADM_256),
    "512x512_diffusion": Published(ADM_256 | dict(mults=(0.5, 1, 1, 2, 2, 4, 4), attention=(4, 5, 6), classes=1000)),
    "lsun_bedroom": Published(ADM_256),
    "lsun_cat": Published(ADM_256),
    "lsun_horse": Published(ADM_256),
    "lsun_horse_nodropout": Published(ADM_256),
    "64_256_upsampler": Published(dict(channels=6, width=192, mults=(1, 1, 2, 2, 4, 4), blocks=2, attention=(3, 4, 5), classes=1000, **ADM | dict(head_width=0, heads=4))),
    "128_512_upsampler": Published(dict(channels=6, width=192, mults=(1, 1, 2, 2, 4, 4), blocks=2, attention=(4, 5), classes=1000, **ADM)),
}  # fmt: skip


CLASSIFIERS = {  # by the name of the file
    "64x64_classifier": dict(size=64),
    "128x128_classifier": dict(size=128, mults=(1, 1, 2, 3, 4), blocks=2, attention=(2, 3, 4)),
    "256x256_classifier": dict(size=256, mults=(1, 1, 2, 2, 4, 4), blocks=2, attention=(3, 4, 5)),
    "512x512_classifier": dict(size=512, mults=(0.5, 1, 1, 2, 2, 4, 4), blocks=2, attention=(4, 5, 6)),
}
CONSISTENCY = {  # networks of consistency_models, by the end of the file's name
    "imagenet64": PUBLISHED["64x64_diffusion"].options,
    "bedroom256": ADM_256 | dict(scale_shift=False),
    "cat256": ADM_256 | dict(scale_shift=False),
}


def layers(net: UNet) -> Iterator[tuple[str, str, object]]:
    "(our name, theirs, the module) of every layer above a single one."
    for i, layer in enumerate(net.down, 1):
        nested = isinstance(layer, torch.nn.ModuleList)
        for k, part in enumerate(layer if nested else [layer]):
            yield f"down.{i - 1}.{k}" if nested else f"down.{i - 1}", f"input_blocks.{i}.{k}", part
    for k, part in enumerate(net.middle):
        yield f"middle.{k}", f"middle_block.{k}", part
    block, inside = -1, 0
    for i, layer in enumerate(getattr(net, "up", ())):
        if isinstance(layer, torch.nn.ModuleList):
            block, inside = block + 1, len(layer)
            for k, part in enumerate(layer):
                yield f"up.{i}.{k}", f"output_blocks.{block}.{k}", part
        else:
            yield f"up.{i}", f"output_blocks.{block}.{inside}", layer


def layer_names(net: UNet) -> dict[str, str]:
    "Our layers ↦ theirs, all but the ends."
    table = {}
    for ours, theirs, part in layers(net):
        if isinstance(part, ResBlock):
            own = RES | ({} if isinstance(part.skip, torch.nn.Identity) else {"skip": "skip_connection"})
        else:
            own = ATTENTION if isinstance(part, Attention) else {"conv": "op"} if isinstance(part, Down) else {"conv": "conv"} if isinstance(part, Up) else {}  # fmt: skip
        table |= {f"{ours}.{a}": f"{theirs}.{b}" for a, b in own.items()}
    return table


def names(net: UNet | EncoderUNet) -> dict[str, str]:
    "Our parameters ↦ theirs, of a network or of a classifier."
    if isinstance(net, EncoderUNet):
        inside = {a: b for a, b in ENDS.items() if "head" not in a} | layer_names(net.body)
        table = {f"body.{a}": b for a, b in inside.items()} | POOL
        more = {"head.2.positions": "out.2.positional_embedding"}
    else:
        table, more = (
            ENDS | layer_names(net),
            {"label.weight": "label_emb.weight"} if net.label is not None else {},
        )
    return {f"{a}.{p}": f"{b}.{p}" for a, b in table.items() for p in ("weight", "bias")} | more


def reordered(rows: Tensor, heads: int) -> Tensor:
    "The rows of queries, keys and values of head 1, those of head 2, …, as all queries, all keys, all values."
    return rows.unflatten(0, (heads, 3, -1)).transpose(0, 1).reshape(rows.shape)


def fill_openai(
    net: UNet | EncoderUNet,
    tensors: dict[str, Tensor],
    together: bool = True,
    what: str = "this dictionary of weights",
) -> None:
    """Give a U-Net the weights of a network of improved-diffusion or guided-diffusion of the same shape.

    together: whether their queries, keys and values lie together head by head, as without `use_new_attention_order`.
    Raises ValueError where names or shapes differ.
    """
    attending = {f"{name}.qkv": part.heads for name, part in net.named_modules() if isinstance(part, Attention)}
    table, own = {theirs: ours for ours, theirs in names(net).items()}, {}
    for theirs, v in tensors.items():
        ours = table.get(theirs, theirs)
        layer = ours.rpartition(".")[0]
        v = v.squeeze(-1) if layer.endswith((".qkv", ".out")) and v.ndim == 3 else v
        own[ours] = reordered(v, attending[layer]) if together and layer in attending else v
    fill(net, own, what)


def load_openai(file: Path | str, name: str | None = None) -> NetDenoiser:
    """The denoiser of a published file of improved-diffusion or guided-diffusion, in eval mode, without gradients.

    file: such as 64x64_diffusion.pt; it is read without running code. name: which of PUBLISHED it is, if not as the file is called.
    All predict the noise, and with twice the channels where the variance between β̃ and β lies (`learned_variance`); labels are 0 … 999. The upsamplers take
    pictures of 6 channels: x_t, and the small picture resized bilinearly. Raises ValueError where the weights are another network's.
    """
    name = name or Path(file).stem
    if name not in PUBLISHED:
        raise ValueError(f"{name}: not a network that is known here; known are {', '.join(PUBLISHED)}")
    found = PUBLISHED[name]
    net = UNet(**dict(channels=3, channels_out=6) | found.options)
    fill_openai(net, read_weights(file, allow_pickle=True), found.together, str(file))
    schedule = DDPMSchedule(found.betas(found.T))
    time = partial(scaled_index, found.T) if found.scaled else step_index(found.T)
    return NetDenoiser(net, schedule, c_noise=time).eval().requires_grad_(False)


def load_classifier(file: Path | str, name: str | None = None) -> NetClassifier:
    """log f(y | x_t) by a published classifier of guided-diffusion, for `ClassifierGuidance` on the chain of 1000 steps; in eval mode, without gradients.

    file: such as 256x256_classifier.pt; it is read without running code. name: which of CLASSIFIERS it is, if not as the file is called. Raises ValueError for other weights.
    """
    name = name or Path(file).stem
    if name not in CLASSIFIERS:
        raise ValueError(f"{name}: not a classifier that is known here; known are {', '.join(CLASSIFIERS)}")
    net = EncoderUNet(**CLASSIFIERS[name])
    fill_openai(net, read_weights(file, allow_pickle=True), what=str(file))
    return NetClassifier(net, step_index(1000)).eval().requires_grad_(False)


def scaled_index(T: int, t: Tensor) -> Tensor:
    "The step counted from 0, times 1000/T."
    return (T * t - 1) * (1000 / T)


def load_consistency(file: Path | str, name: str | None = None) -> Consistency | NetDenoiser:
    """A published file of consistency_models, in eval mode, without gradients: a function for `consistency_sample`, or, of a file edm_…, the denoiser that taught it.

    file: such as cd_imagenet64_lpips.pt or edm_bedroom256_ema.pt; it is read without running code. name: what it is called, if not as the file is.
    The schedule is EDM's from 0.002 to 80; pictures have sigma_data 0.5; labels of imagenet64 are 0 … 999. Raises ValueError where the weights are another network's.
    """
    name = name or Path(file).stem
    kind = next((options for end, options in CONSISTENCY.items() if end in name), None)
    if kind is None or name.split("_")[0] not in ("cd", "ct", "edm"):
        raise ValueError(f"{name}: expected a name such as cd_imagenet64_l2, ct_bedroom256 or edm_cat256_ema")
    net = UNet(channels=3, channels_out=3, **kind)
    fill_openai(net, read_weights(file, allow_pickle=True), False, str(file))
    schedule = EDMSchedule(0.002)
    told = lambda t: 1000 * edm_time(schedule)(t)
    if name.startswith("edm"):
        model = NetDenoiser(net, schedule, predict_edm(0.5), edm_input(0.5), told)
    else:
        model = Consistency(net, schedule, sigma_data=0.5, c_noise=told)
    return model.eval().requires_grad_(False)
