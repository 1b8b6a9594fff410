"""Augmentation that the network is told of, as EDM trains with it."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diffusion_nb.noise import Noise


def turned(angle: Float[Tensor, " b"]) -> Float[Tensor, "b 2 2"]:
    "The matrices of rotations."
    rows = [angle.cos(), -angle.sin(), angle.sin(), angle.cos()]
    return torch.stack(rows, dim=1).reshape(-1, 2, 2)


def warped(
    x: Float[Tensor, "b c h w"], inverse: Float[Tensor, "b 2 2"], shift: Float[Tensor, "b 2"]
) -> Float[Tensor, "b c h w"]:
    "At each place p, in pixels from the middle, what was at inverse p + shift; beyond the border the picture is reflected. Bicubic."
    size = torch.tensor([x.shape[3], x.shape[2]], device=x.device, dtype=x.dtype)
    theta = torch.cat([inverse * (size / size[:, None]), (2 * shift / size)[:, :, None]], dim=2)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False)


def edm_augment(
    x: Float[Tensor, "b c h w"], u: Float[Tensor, " b"], p: float = 0.12
) -> tuple[Float[Tensor, "b c h w"], dict[str, Float[Tensor, "b 9"]]]:
    """(the pictures augmented, {"augment": nine numbers each that tell a `SongUNet` how}), for a Trainer's `augment`. (Karras et al. 2022, table 6)

    Every second picture is mirrored; and with probability p each: turned upside down, scaled, rotated, stretched along some axis, moved. u: uniform numbers,
    one per picture, from which all that is random follows. Their program smooths before it resamples, this one does not.
    """
    z = Noise((u * 2**53).long(), (14,), x.device)(0)
    uniform, take = torch.special.ndtr(z[:, 5:]), lambda i, v: torch.where(uniform[:, i] < p, v, 0.0)
    mirrored, upside_down = (uniform[:, 0] < 0.5), take(1, (uniform[:, 2] < 0.5).float()) > 0
    size, angle, stretch = take(3, z[:, 0]), take(4, math.pi * (2 * uniform[:, 5] - 1)), take(6, z[:, 1])
    axis = torch.where(z[:, 4] < 0, math.pi * (2 * uniform[:, 7] - 1), 0.0)
    moved = take(8, z[:, 2]), take(8, z[:, 3])
    x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    x = torch.where(upside_down[:, None, None, None], x.flip(2), x)
    along = torch.diag_embed(torch.stack([-0.2 * stretch, 0.2 * stretch], dim=1).exp2())
    inverse = (-0.2 * size).exp2()[:, None, None] * turned(angle) @ turned(-axis) @ along @ turned(axis)
    by = torch.stack(moved, dim=1) * 0.125 * torch.tensor([x.shape[3], x.shape[2]], device=x.device)
    told = [mirrored, upside_down, size, angle.cos() - 1, angle.sin(), stretch * axis.cos(), stretch * axis.sin(), *moved]  # fmt: skip
    x = warped(x, inverse.to(x.dtype), -(inverse @ by[:, :, None])[:, :, 0].to(x.dtype))
    return x, {"augment": torch.stack([v.float() for v in told], dim=1)}
