"""The options of a residual block, each against its formula written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffusion_nb.nets.unet import Attention, ResBlock
from diffusion_nb.noise import Noise

X, EMB = Noise(range(2), (8, 4, 4))(0), Noise(range(2), (16,))(1)


def block(**options) -> ResBlock:
    torch.manual_seed(0)
    made = ResBlock(8, 8, 16, **options)
    nn.init.normal_(made.conv2.weight)
    return made


def test_scale_and_shift_act_on_the_second_normalisation():
    b = block(scale_shift=True)
    scale, shift = b.time(EMB)[:, :8, None, None], b.time(EMB)[:, 8:, None, None]
    h = b.norm2(b.conv1(F.silu(b.norm1(X)))) * (1 + scale) + shift
    torch.testing.assert_close(b(X, EMB), X + b.conv2(F.silu(h)))


@pytest.mark.parametrize("resize", [nn.AvgPool2d(2), nn.Upsample(scale_factor=2.0)])
def test_both_branches_change_their_size(resize):
    b = block(resize=resize)
    h = b.conv1(resize(F.silu(b.norm1(X)))) + b.time(EMB)[:, :, None, None]
    torch.testing.assert_close(b(X, EMB), resize(X) + b.conv2(F.silu(b.norm2(h))))


def test_sums_are_divided_by_the_root_of_two():
    torch.testing.assert_close(block(rescale=True)(X, EMB), block()(X, EMB) / 2**0.5)
    torch.manual_seed(0)
    torch.testing.assert_close(Attention(8, 4, rescale=True)(X), X / 2**0.5)  # fresh: it adds nothing
