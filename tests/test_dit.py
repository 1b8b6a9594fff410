"""Diffusion transformers: numbers of parameters and operations, the published program and diffusers with the same weights, what is refused."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel

from diffusion_nb.cli.main import main
from diffusion_nb.denoisers import NetDenoiser, predict_eps, predict_v
from diffusion_nb.experiments.dit import CONTENDERS, contender, held_out_loss, sizes
from diffusion_nb.losses.bound import hybrid_loss
from diffusion_nb.models.dit import (
    dit_from_diffusers,
    dit_from_published,
    dit_to_diffusers,
    dit_to_published,
    load_dit,
    published_names,
)
from diffusion_nb.models.model import About, Model
from diffusion_nb.nets.dit import (
    DIT_B,
    DIT_L,
    DIT_S,
    DIT_XL,
    AdaLNZero,
    CrossAttend,
    DiT,
    InContext,
    patchify,
    sincos_positions,
    unpatchify,
)
from diffusion_nb.nets.unet import parameters
from diffusion_nb.recipes.dit import DiTRecipe, dit_denoiser, dit_recipe
from diffusion_nb.schedules import CosineSchedule, DDPMSchedule, linear_betas
from diffusion_nb.training.identity import network_hash
from diffusion_nb.util.profiling import flops

BLOCKS = (AdaLNZero, InContext, CrossAttend)
SMALL = dict(channels=3, size=8, patch=2, width=48, depth=2, heads=3, classes=5, channels_out=6)


def stirred(net, by=0.1, seed=1):
    "The network with all weights moved, so that nothing is zero."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(by * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return net.eval().requires_grad_(False)


def given(n=3, channels=3, size=8, classes=5, dtype=torch.float32):
    g = torch.Generator().manual_seed(2)
    t = torch.tensor([0.0, 17.0, 999.0], dtype=dtype)[:n]
    return (
        torch.randn(n, channels, size, size, generator=g, dtype=torch.float64).to(dtype),
        t,
        torch.arange(n) % (classes + 1),
    )


@pytest.mark.parametrize("options, count, operations", [
    (DIT_S, 32_963_360, 6.06), (DIT_B, 130_512_416, 23.01), (DIT_L, 458_102_816, 80.71), (DIT_XL, 675_129_632, 118.64),
])  # fmt: skip
def test_sizes_are_those_of_the_paper(options, count, operations):
    with torch.device("meta"):
        net = DiT(**options, patch=2, channels_out=8)
        x = torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long)
        assert parameters(net) + net.positions.numel() == count
        assert abs(flops(lambda: net(*x)) / 2e9 - operations) < 0.03  # a multiplication and addition are one there


@pytest.mark.parametrize("block", BLOCKS)
def test_a_fresh_network_puts_out_zero(block):
    net = DiT(3, 8, 2, 48, 2, 3, 5, block, channels_out=6)
    assert (net(*given()) == 0).all()
    h, told = torch.randn(2, 16, 48), torch.randn(2, 2, 48)
    assert torch.equal(net.blocks[1](h, told), h) == (block is AdaLNZero)


def test_patches_are_cut_row_by_row_and_put_back():
    x = torch.arange(2 * 3 * 8 * 8.0).reshape(2, 3, 8, 8)
    tokens = patchify(x, 4)
    assert torch.equal(tokens[1, 1], x[1, :, :4, 4:].permute(1, 2, 0).flatten())
    assert torch.equal(unpatchify(tokens, 4, 2), x)
    assert torch.equal(unpatchify(patchify(x[:, :, :4], 2), 2, 2), x[:, :, :4])


def test_positions_are_sines_and_cosines_of_column_and_row():
    got = sincos_positions(3, 5, 16)
    for row in range(3):
        for column in range(5):
            for k in range(4):
                w = 10_000 ** (-k / 4)
                want = [math.sin(w * column), math.cos(w * column), math.sin(w * row), math.cos(w * row)]
                assert got[5 * row + column, k::4].tolist() == pytest.approx(want, abs=1e-14)


def program(w, x, t, y, heads):
    "What DiT's program computes, of the tensors as it calls them; float64."
    at = lambda name, h: F.linear(h, w[f"{name}.weight"], w[f"{name}.bias"])
    normed = lambda h: (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    angles = t[:, None] * 10_000 ** (-torch.arange(128, dtype=t.dtype) / 128)
    c = at("t_embedder.mlp.2", F.silu(at("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))
    c = F.silu(c + w["y_embedder.embedding_table.weight"][y])
    p = w["x_embedder.proj.weight"].shape[-1]
    h = (
        F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=p).flatten(2).mT
        + w["pos_embed"]
    )
    for n in range(sum(name.endswith("attn.qkv.bias") for name in w)):
        s1, m1, g1, s2, m2, g2 = at(f"blocks.{n}.adaLN_modulation.1", c)[:, None].chunk(6, -1)
        b, m, d = h.shape
        q, k, v = (
            at(f"blocks.{n}.attn.qkv", normed(h) * (1 + m1) + s1)
            .reshape(b, m, 3, heads, d // heads)
            .permute(2, 0, 3, 1, 4)
        )
        mixed = ((q @ k.mT / (d // heads) ** 0.5).softmax(-1) @ v).transpose(1, 2).reshape(b, m, d)
        h = h + g1 * at(f"blocks.{n}.attn.proj", mixed)
        a = at(f"blocks.{n}.mlp.fc1", normed(h) * (1 + m2) + s2)
        gelu = a / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (a + 0.044715 * a**3)))
        h = h + g2 * at(f"blocks.{n}.mlp.fc2", gelu)
    shift, scale = at("final_layer.adaLN_modulation.1", c)[:, None].chunk(2, -1)
    out, side = at("final_layer.linear", normed(h) * (1 + scale) + shift), x.shape[-1] // p
    return torch.einsum("nhwpqc->nchpwq", out.reshape(len(x), side, side, p, p, -1)).reshape(
        len(x), -1, side * p, side * p
    )


def test_published_weights_say_what_their_program_says():
    net = stirred(DiT(**SMALL).double())
    tensors = dit_to_published(net)
    x, t, y = given(dtype=torch.float64)
    want = program(tensors, x, t, y, 3)
    assert want.std() > 0.1
    torch.testing.assert_close(net(x, t, y), want, rtol=0, atol=1e-6)  # positions are kept in float32
    back = dit_from_published(tensors, heads=3).double()
    assert all(
        torch.equal(a, b.float().double()) for a, b in zip(back.parameters(), net.parameters(), strict=True)
    )


def test_the_published_names_and_numbers(tmp_path):
    names = set(published_names(28).values()) | {"pos_embed"}
    assert len(names) == 292 and {
        "x_embedder.proj.weight", "t_embedder.mlp.2.bias", "y_embedder.embedding_table.weight", "blocks.27.attn.qkv.weight", "blocks.0.attn.proj.bias",
        "blocks.3.mlp.fc2.weight", "blocks.9.adaLN_modulation.1.weight", "final_layer.linear.bias", "final_layer.adaLN_modulation.1.weight",
    } < names  # fmt: skip
    net = DiT(channels=4, size=8, patch=2, width=384, depth=1, heads=6, classes=10, channels_out=8)
    torch.save(dit_to_published(stirred(net)), tmp_path / "DiT.pt")
    denoiser = load_dit(tmp_path / "DiT.pt")
    x, _, y = given(2, 4, 8)
    pred = denoiser(x, torch.tensor(0.5), y=y)
    torch.testing.assert_close(pred.extra, net(x, torch.full((2,), 499.0), y)[:, 4:])
    assert not denoiser.training and denoiser.net.blocks[0].attention.heads == 6


def theirs(dtype):
    torch.manual_seed(0)
    net = stirred(DiTTransformer2DModel(num_attention_heads=3, attention_head_dim=16, in_channels=3, out_channels=6, num_layers=2, sample_size=8, num_embeds_ada_norm=5).to(dtype))  # fmt: skip
    for block in net.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(net.transformer_blocks[0].norm1.emb.state_dict())
    return net


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_diffusers_says_the_same_for_the_same_weights(dtype, tol):
    net, (x, t, y) = theirs(dtype), given(dtype=dtype)
    ours = dit_from_diffusers(dict(net.config), net.state_dict()).to(dtype)
    if dtype == torch.float64:  # a fresh network is in float32
        ours.load_state_dict({k: v.double() for k, v in ours.state_dict().items()})
        config, tensors = dict(net.config), {k: v.float().double() for k, v in net.state_dict().items()}
        net.load_state_dict(tensors)
    want = net(x, t, y).sample
    assert want.std() > 0.1
    torch.testing.assert_close(ours(x, t, y), want, rtol=0, atol=tol)
    config, tensors = dit_to_diffusers(ours)
    again = DiTTransformer2DModel.from_config(config).to(dtype)
    again.load_state_dict(tensors)
    assert torch.equal(again.eval()(x, t, y).sample, want)


def test_a_pipelines_folder_is_read(tmp_path):
    from diffusers import DDIMScheduler

    net = theirs(torch.float32)
    net.save_pretrained(tmp_path / "transformer")
    DDIMScheduler(beta_schedule="linear").save_pretrained(tmp_path / "scheduler")
    x, _, y = given(2)
    pred = load_dit(tmp_path)(x, torch.tensor(0.4), y=y)
    torch.testing.assert_close(pred.eps, net(x, torch.full((2,), 399), y).sample[:, :3], rtol=0, atol=2e-5)


def test_the_time_of_diffusers_is_another_than_the_programs():
    net = dit_from_diffusers(dict((n := theirs(torch.float32)).config), n.state_dict())
    with pytest.raises(ValueError, match="cos_first_embedding"):
        dit_to_published(net)
    with pytest.raises(ValueError, match="other frequencies"):
        dit_to_diffusers(DiT(**SMALL))


def test_weights_that_do_not_fit_are_refused():
    tensors = dit_to_published(DiT(**SMALL))
    for change, said in (({"pos_embed": tensors["pos_embed"].flip(2)}, "pos_embed: expected sines"), ({"more": torch.zeros(1)}, "more"),
                         ({"final_layer.linear.bias": torch.zeros(3)}, "head.bias")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            dit_from_published(tensors | change, heads=3)
    with pytest.raises(ValueError, match="heads: say how many"):
        dit_from_published(tensors)
    with pytest.raises(ValueError, match="no weights of DiT"):
        dit_from_published({"a": torch.zeros(1)})
    net = theirs(torch.float32)
    with pytest.raises(ValueError, match="another kind"):
        dit_from_diffusers(dict(net.config) | {"activation_fn": "geglu"}, net.state_dict())
    with pytest.raises(ValueError, match="do not fit"):
        dit_from_diffusers(dict(net.config), {k: v for k, v in net.state_dict().items() if "proj_out_2" not in k})
    net.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight.add_(1)
    with pytest.raises(ValueError, match="the same in every block"):
        dit_from_diffusers(dict(net.config), net.state_dict())
    with pytest.raises(ValueError, match="AdaLNZero"):
        dit_to_published(DiT(**SMALL, block=InContext))


def test_bad_input_is_named():
    net = DiT(**SMALL)
    x, t, y = given()
    for call, said in ((lambda: net(x[:, :, :4], t, y), "expected pictures of"), (lambda: net(x, t, None), "y: expected a label"), (lambda: net(x, t, y + 4), "from 0 to 4"),
                       (lambda: DiT(size=9), "multiple of patch"), (lambda: DiT(width=50, heads=4), "one of heads"), (lambda: DiT(width=30, heads=3), "multiple of 4"),
                       (lambda: DiT(3, 8, 2, 48, 1, 3, 0)(x, t, y), "without classes"), (lambda: dit_denoiser(DiTRecipe(), (1, 28, 32)), "square")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            call()
    assert DiT(3, 8, 2, 48, 1, 3, 0)(x, t).shape == x.shape


@pytest.mark.parametrize("block", BLOCKS)
def test_the_label_and_the_time_are_read(block):
    net = stirred(DiT(3, 8, 2, 48, 2, 3, 5, block))
    x, t, y = given()
    out = net(x, t, y)
    assert (out[:1] - net(x, t, y + 1)[:1]).abs().max() > 1e-3 and (
        out[:1] - net(x, t + 1, y)[:1]
    ).abs().max() > 1e-3
    torch.testing.assert_close(net(x[1:2], t[1:2], y[1:2]), out[1:2], rtol=0, atol=1e-5)  # each picture by itself


def test_noise_and_covariance_are_learned_by_the_hybrid_loss():
    schedule = DDPMSchedule(linear_betas(100))
    denoiser = NetDenoiser(DiT(1, 8, 2, 16, 1, 2, 3, channels_out=2), schedule, predict_eps)
    x, t, y = torch.rand(6, 1, 8, 8) * 2 - 1, (10 * torch.arange(6) + 10) / 100, torch.arange(6) % 4
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    hybrid_loss(100, 17)(denoiser, x, t, noise, y=y).mean().backward()
    of_noise, of_variance = denoiser.net.head.bias.grad.reshape(2, 2, 2).unbind(-1)  # the channels are the fastest
    assert (of_noise != 0).all() and (of_variance != 0).all()
    assert of_variance.abs().max() < 0.01 * of_noise.abs().max()  # a thousandth of the weight


def test_the_contenders_need_as_many_operations():
    counts = dict(zip(CONTENDERS, sizes((1, 8, 8))[:, 1].tolist(), strict=True))
    base = counts["U-Net"]
    assert all(abs(counts[k] / base - 1) < 0.08 for k in ("adaLN-Zero", "cross-attention", "in-context"))
    assert (
        0.3 * base < counts["adaLN-Zero, small"] < 0.4 * base
        and 4 * base < counts["adaLN-Zero, large"] < 4.2 * base
    )
    latent = contender("in-context", (4, 8, 8), 0)  # and in latents
    assert latent(torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long)).shape == (1, 4, 8, 8)


def test_the_held_out_loss_of_a_network_that_says_nothing_is_that_of_v():
    x = torch.zeros(4, 1, 8, 8)
    fresh = NetDenoiser(contender("adaLN-Zero", (1, 8, 8), 0), CosineSchedule(), predict_v)
    assert (
        abs(held_out_loss(fresh, x, torch.zeros(4, dtype=torch.long), 64) - 0.5) < 0.02
    )  # E α², of the noise alone


def test_recipe_and_command_line(tmp_path, monkeypatch, capsys):
    r = dit_recipe("mnist-small")
    net = dit_denoiser(r, (1, 28, 28)).net
    assert (len(net.blocks), net.patch, net.stem.out_features) == (r.blocks, r.patch, r.width)
    monkeypatch.setenv("DIFFUSION_NB_SET", "dit.digits.batch=8")
    assert (
        main(
            [
                "train",
                "--dit",
                "--data",
                "digits",
                "--steps",
                "2",
                "--out",
                str(tmp_path / "run"),
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    model = Model.load(tmp_path / "run")
    assert model.about.family == "dit" and isinstance(model.denoiser.net, DiT) and isinstance(model.about, About)
    assert main(["sample", "--model", str(tmp_path / "run"), "--n", "3", "--steps", "2", "--out", str(tmp_path / "drawn"), "--label", "3", "--device", "cpu"]) == 0  # fmt: skip


def test_a_transformer_with_other_heads_is_another_run():
    "Its weights have the same names and shapes."
    r = dit_recipe("digits")
    one, same, other = (dit_denoiser(replace(r, heads=h), (1, 8, 8)) for h in (r.heads, r.heads, 1))
    assert [p.shape for p in one.parameters()] == [p.shape for p in other.parameters()] and r.heads > 1
    assert network_hash(one) == network_hash(same) != network_hash(other)
