"""The options of a residual block, each against its formula written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffusion_nb.denoisers import NetDenoiser, predict_v, step_index
from diffusion_nb.nets.unet import Attention, Down, ResBlock, UNet, Up, cos_first_embedding, norm, time_embedding
from diffusion_nb.noise import Noise
from diffusion_nb.schedules import CosineSchedule

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


def test_attention_written_out():
    torch.manual_seed(0)
    attend = Attention(8, head_width=4)
    nn.init.normal_(attend.out.weight)
    pixels = F.group_norm(X, 2, attend.norm.weight, attend.norm.bias, eps=1e-6).flatten(2).transpose(1, 2)
    heads = attend.qkv(pixels).reshape(2, 16, 3, 2, 4)  # sample, pixel, which of q k v, head, channel
    weights = torch.einsum("nihc,njhc->nhij", heads[:, :, 0], heads[:, :, 1]).div(2).softmax(-1)
    mixed = torch.einsum("nhij,njhc->nihc", weights, heads[:, :, 2]).reshape(2, 16, 8)
    want = X + attend.out(mixed).transpose(1, 2).reshape(X.shape)
    torch.testing.assert_close(attend(X), want)


def test_groups_of_a_normalisation():
    assert [norm(c).num_groups for c in (4, 8, 64, 128, 256)] == [1, 2, 16, 32, 32]
    small = 1e-3 * X  # so small that what is added to the variance counts
    torch.testing.assert_close(norm(8)(small), F.group_norm(small, 2, eps=1e-6), rtol=1e-6, atol=1e-7)


def test_frequencies_of_a_time():
    got = time_embedding(torch.tensor([2.0, 500.0]), 6)
    angles = [[w * t for w in (1, 1e-2, 1e-4)] for t in (2, 500)]
    want = torch.tensor(angles)
    torch.testing.assert_close(got, torch.cat([want.sin(), want.cos()], 1))


@pytest.mark.parametrize("biggan, down, up", [(False, Down, Up), (True, nn.AvgPool2d, nn.Upsample)])
def test_what_changes_the_size_of_pictures(biggan, down, up):
    net = UNet(1, 8, (1, 2, 2), 1, (), biggan=biggan)
    for layers, kind in ((net.down, down), (net.up, up)):
        alone = [getattr(m, "resize", m) for m in layers if not isinstance(m, nn.ModuleList)]
        assert len(alone) == 2 and all(isinstance(m, kind) for m in alone)
    assert net(torch.zeros(2, 1, 8, 8), torch.zeros(2)).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("embed, last, order", [(time_embedding, 3, 1), (cos_first_embedding, 4, -1)])
def test_a_time_is_embedded_in_its_own_precision(embed, last, order):
    t = torch.tensor([0.0, 37.0, 999.37], dtype=torch.float64)
    angles = torch.tensor([[v * 10_000 ** (-k / last) for k in range(4)] for v in t.tolist()], dtype=torch.float64)
    want = torch.cat([angles.sin(), angles.cos()][::order], 1)
    assert (embed(t, 8) - want).abs().max() < 1e-12
    assert embed(t.float(), 8).dtype == torch.float32 and 1e-7 < (embed(t.float(), 8) - want).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_network_hears_the_time_in_the_precision_of_its_pictures(dtype):
    heard, t = [], torch.tensor(0.1234567890123, dtype=torch.float64)
    denoiser = NetDenoiser(
        lambda x, time: heard.append(time) or x, CosineSchedule(), predict_v, c_noise=lambda t: t
    )
    denoiser(torch.zeros(2, 1, 4, 4, dtype=dtype), t)
    assert heard[0].dtype == dtype and heard[0].equal(t.to(dtype).expand(2))


def test_steps_are_counted_from_0_as_the_published_networks_were_told_them():
    t = torch.tensor([1, 500, 1000], dtype=torch.float64) / 1000
    assert step_index()(t).tolist() == [0, 499, 999] and step_index(50)(torch.tensor(0.5)) == 24


class Doubled(nn.Module):
    "A condition of one number a picture, told to every channel of the embedding."

    def forward(self, y):
        return y.expand(len(y), 16)

    def check_y(self, y):
        if y.shape[1:] != (1,):
            raise ValueError("y: expected one number a picture")


def test_a_module_that_reads_the_condition_is_added_behind_the_layers_that_read_the_time():
    torch.manual_seed(0)
    plain, told = UNet(1, 4, (1,), 1, (0,)), UNet(1, 4, (1,), 1, (0,), condition=Doubled())
    told.load_state_dict(plain.state_dict())
    x, t, y = torch.ones(2, 1, 4, 4), torch.tensor([3.0, 7.0]), torch.tensor([[0.5], [-1.0]])
    emb = plain.encode(x, t)[2].emb, told.encode(x, t, y)[2].emb
    want = F.silu(plain.embed(time_embedding(t, 4)) + y)
    assert emb[1].allclose(want) and not emb[0].allclose(want)
    for net, wrong in ((told, None), (told, torch.ones(2, 2)), (plain, y)):
        with pytest.raises(ValueError, match="y: "):
            net(x, t, wrong)


def awake(net: UNet) -> UNet:
    "The network with small random numbers where its weights start at zero."
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.05)
    return net


class Tokens(nn.Module):
    "A context of two tokens, each the number y times a direction, read by adding their mean."

    def __init__(self):
        super().__init__()
        self.directions = nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))

    def forward(self, y):
        return y[:, None, None] * self.directions

    def attention(self, channels):
        return AddsMean(channels)

    def check_y(self, y):
        if y.ndim != 1:
            raise ValueError("y: expected one number a picture")


class AddsMean(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.spread = nn.Parameter(torch.zeros(2, channels))

    def forward(self, h, tokens):
        return h + (tokens.mean(1) @ self.spread)[:, :, None, None]


def test_a_context_is_read_behind_every_attention():
    torch.manual_seed(0)
    plain = awake(UNet(1, 8, (1, 2), 1, (1,)))
    told = UNet(1, 8, (1, 2), 1, (1,), context=Tokens())
    own = told.state_dict()
    assert set(own) - set(plain.state_dict()) == {
        "context.directions", "down.2.2.spread", "middle.3.spread", "up.0.2.spread", "up.1.2.spread"}  # fmt: skip
    told.load_state_dict(own | plain.state_dict())
    x, t, y = torch.randn(3, 1, 8, 8), torch.tensor([1.0, 50.0, 900.0]), torch.tensor([0.0, 1.0, -2.0])
    assert torch.equal(told(x, t, y), plain(x, t))  # what reads the tokens starts at zero
    for name, reads in told.named_parameters():
        if name.endswith("spread"):
            with torch.no_grad():
                reads.fill_(1.0)
            assert torch.equal(told(x, t, y)[0], plain(x, t)[0]), name  # y = 0 makes tokens of zeros
            assert (told(x, t, y)[1:] - plain(x, t)[1:]).abs().amax((1, 2, 3)).gt(1e-3).all(), name
            with torch.no_grad():
                reads.zero_()
    with pytest.raises(ValueError, match="one number a picture"):
        told(x, t, y[:, None])
    with pytest.raises(ValueError, match="expected a label"):
        told(x, t)


def test_encode_and_decode_are_the_whole_network():
    torch.manual_seed(0)
    net = awake(UNet(2, 8, (1, 2), 1, (1,), classes=3))
    x, t, y = torch.randn(2, 2, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([0, 3])
    h, pile, told = net.encode(x, t, y)
    assert torch.equal(net.decode(h, pile, told), net(x, t, y)) and len(pile) == 4
    for i in range(len(pile)):  # each part of the pile is read
        more = [p + (i == j) for j, p in enumerate(pile)]
        assert not torch.allclose(net.decode(h, more, told), net(x, t, y), atol=1e-4)
    assert len(pile) == 4  # and decode leaves it as it was
