"""EDM's published networks, DDPM++ and NCSN++, and EDM2's, from tensors under the names of their programs."""

from pathlib import Path

from torch import Tensor, nn

from diffusion_nb.denoisers import NetDenoiser, edm_input, edm_time, predict_edm
from diffusion_nb.models.model import fill
from diffusion_nb.nets.edm2 import EDM2UNet
from diffusion_nb.nets.song import Resample, SongUNet
from diffusion_nb.nets.unet import Attention
from diffusion_nb.schedules import EDMSchedule
from diffusion_nb.util.storage import own_tensors, read_weights

RES = {"norm1": "norm0", "conv1": "conv0", "time": "affine", "norm2": "norm1", "conv2": "conv1", "skip": "skip"}
ATTENTION = {"norm": "norm2", "qkv": "qkv", "out": "proj"}


def blocks(net: SongUNet, size: int) -> list[tuple[str, str, nn.Module]]:
    "(our name, theirs, ours) of every block, for pictures of `size`: their names hold the size of what a block sees."
    found, at, k, aux = [], size, 0, 0
    for i, layer in enumerate(net.down):
        if isinstance(layer, nn.ModuleList):
            found.append((f"down.{i}", f"enc.{at}x{at}_block{k}", layer))
            k += 1
        else:
            at, k = at // 2, 0
            found.append((f"down.{i}", f"enc.{at}x{at}_down", layer))
            if len(net.pyramid):
                found.append((f"pyramid.{aux}.0", f"enc.{at}x{at}_aux_residual", net.pyramid[aux]))
                aux += 1
    found += [(f"middle.{j}", f"dec.{at}x{at}_in{j}", part) for j, part in enumerate(net.middle)]
    k = 0
    for i, layer in enumerate(net.up):
        if isinstance(layer, nn.ModuleList):
            found.append((f"up.{i}", f"dec.{at}x{at}_block{k}", layer))
            k += 1
        else:
            at, k = at * 2, 0
            found.append((f"up.{i}", f"dec.{at}x{at}_up", layer))
    return found


def names(net: SongUNet, size: int) -> dict[str, str]:
    "Our parameters and buffers ↦ theirs."
    layer = {"embed.0": "map_layer0", "embed.2": "map_layer1", "label": "map_label", "augment": "map_augment", "stem": f"enc.{size}x{size}_conv",
             "head.0": f"dec.{size}x{size}_aux_norm", "head.2": f"dec.{size}x{size}_aux_conv"}  # fmt: skip
    for ours, theirs, part in blocks(net, size):
        if isinstance(part, nn.ModuleList):
            layer |= {f"{ours}.0.{a}": f"{theirs}.{b}" for a, b in RES.items()}
            layer |= {f"{ours}.1.{a}": f"{theirs}.{b}" for a, b in ATTENTION.items()}
        elif "aux" in theirs:
            layer[ours] = theirs
        else:
            layer |= {f"{ours}.{a}": f"{theirs}.{b}" for a, b in RES.items()}
    table = {f"{a}.{p}": f"{b}.{p}" for a, b in layer.items() for p in ("weight", "bias")}
    table["fourier.freqs"], own = "map_noise.freqs", own_tensors(net)
    return {a: b for a, b in table.items() if a in own}


def fill_edm(
    net: SongUNet, tensors: dict[str, Tensor], size: int, what: str = "this dictionary of weights"
) -> None:
    """Give a network the weights of EDM's `SongUNet` for pictures of `size`. Raises ValueError where names or shapes differ.

    Their attention stores query, key and value of each channel side by side, and its layers as convolutions.
    """
    table = {theirs: ours for ours, theirs in names(net, size).items()}
    attending = {name for name, m in net.named_modules() if isinstance(m, Attention)}
    own = {}
    for theirs, v in tensors.items():
        if theirs.endswith("resample_filter"):
            continue
        ours = table.get(theirs, theirs)
        block, _, last = ours.rpartition(".")[0].rpartition(".")
        if block in attending and last in {"qkv", "out"}:
            v = v.flatten(1) if v.ndim > 1 else v
            v = v.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1) if last == "qkv" else v
        own[ours] = v
    fill(net, own, what)


def load_edm(file: Path | str, *, size: int = 32, ncsn: bool = False, classes: int = 0, augment: int = 9) -> NetDenoiser:  # fmt: skip
    """The denoiser of EDM's CIFAR-10, FFHQ or AFHQ networks, of their tensors in a file; in eval mode, without gradients.

    file: tensors by name, without the prefix "model."; EDM publishes pickles that run code, so take them out in its own environment:
    `torch.save(pickle.load(open("edm.pkl", "rb"))["ema"].model.state_dict(), "edm.pt")`.
    size: of the pictures, 32 or 64. ncsn: NCSN++, else DDPM++. classes: 10 for class-conditional CIFAR-10. Raises ValueError for other weights.
    """
    shape = dict(mults=(2, 2, 2), attention=(1,)) if size == 32 else dict(mults=(1, 2, 2, 2), attention=(2,))
    net = SongUNet(3, 128, blocks=4, classes=classes, augment=augment, ncsn=ncsn, **shape)
    fill_edm(net, read_weights(file, allow_pickle=True), size, str(file))
    schedule = EDMSchedule()
    return NetDenoiser(net, schedule, predict_edm(0.5), edm_input(0.5), edm_time(schedule)).eval().requires_grad_(False)  # fmt: skip


# EDM2

BLOCK = {"gain": "emb_gain", "conv1.weight": "conv_res0.weight", "emb.weight": "emb_linear.weight", "conv2.weight": "conv_res1.weight",
         "skip.weight": "conv_skip.weight", "qkv.weight": "attn_qkv.weight", "out.weight": "attn_proj.weight"}  # fmt: skip
WIDTHS = {"xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}  # of the published sizes


def edm2_names(net: EDM2UNet, size: int) -> dict[str, str]:
    "Our parameters and buffers ↦ EDM2's, for pictures of `size`."
    found = {"gain": "out_gain", "fourier.freqs": "emb_fourier.freqs", "fourier.phases": "emb_fourier.phases", "time.weight": "emb_noise.weight",
             "label.weight": "emb_label.weight", "stem.weight": f"enc.{size}x{size}_conv.weight", "head.weight": "out_conv.weight"}  # fmt: skip
    at, k = size, 0
    for room, there, blocks in (("down", "enc", net.down), ("middle", "dec", net.middle), ("up", "dec", net.up)):
        for i, block in enumerate(blocks):
            if isinstance(block.resize, Resample):
                at, k = (at // 2, 0) if room == "down" else (at * 2, 0)
                part = "down" if room == "down" else "up"
            else:
                part, k = (f"in{i}", 0) if room == "middle" else (f"block{k}", k + 1)
            found |= {f"{room}.{i}.{a}": f"{there}.{at}x{at}_{part}.{b}" for a, b in BLOCK.items()}
    own = own_tensors(net)
    return {ours: f"unet.{theirs}" for ours, theirs in found.items() if ours in own}


def load_edm2(file: Path | str, *, width: str | int = "s", size: int = 64, channels: int = 4, classes: int = 1000) -> NetDenoiser:  # fmt: skip
    """The denoiser of EDM2's ImageNet networks, of their tensors in a file; in eval mode, without gradients.

    file: tensors by name; EDM2 publishes pickles that run code, so take them out in its own environment:
    `torch.save(pickle.load(open("edm2.pkl", "rb"))["ema"].state_dict(), "edm2.pt")`.
    width: 'xs', 's', 'm', 'l', 'xl' or 'xxl', or channels. size, channels: 64 and 4 for ImageNet-512, whose pictures are latents, 64 and 3 for ImageNet-64.
    classes: 0 for an unconditional network. Raises ValueError for other weights.
    """
    if width not in WIDTHS and not isinstance(width, int):
        raise ValueError(f"width: expected one of {', '.join(WIDTHS)}, or a number of channels; got {width!r}")
    net = EDM2UNet(channels, WIDTHS.get(width, width), classes=classes)
    table = {theirs: ours for ours, theirs in edm2_names(net, size).items()}
    theirs = {k: v for k, v in read_weights(file, allow_pickle=True).items() if not k.startswith("logvar")}
    fill(net, {table.get(name, name): v.float() for name, v in theirs.items()}, str(file))
    schedule = EDMSchedule()
    return NetDenoiser(net, schedule, predict_edm(0.5), edm_input(0.5), edm_time(schedule)).eval().requires_grad_(False)  # fmt: skip
