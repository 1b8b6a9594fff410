"""The autoencoder of latent diffusion: diffusers' own module with the same weights; its divergence; what is refused."""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from diffusion_nb.models.autoencoder_kl import autoencoder_of, load_autoencoder
from diffusion_nb.models.diffusers import WEIGHTS
from diffusion_nb.nets.autoencoder import Code, KLAutoencoder
from diffusion_nb.nets.unet import parameters

SMALL = dict(block_out_channels=(128, 256), layers_per_block=1, latent_channels=3, scaling_factor=0.5,
             down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    net = AutoencoderKL(**SMALL).eval().requires_grad_(False)
    for p in net.parameters():
        p.add_(0.05 * torch.randn_like(p))
    return net


def test_it_computes_what_diffusers_does(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    ours, scale = load_autoencoder(tmp_path)
    assert scale == 0.5 and not ours.training and parameters(ours) == parameters(theirs)
    x = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    code, want = ours.encode(x), theirs.encode(x).latent_dist
    assert code.mean.shape == (2, 3, 8, 12)
    torch.testing.assert_close(code.mean, want.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(code.log_var, want.logvar, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.decode(want.mean), theirs.decode(want.mean).sample, rtol=0, atol=1e-5)
    torch.testing.assert_close(code.kl(), want.kl(), rtol=1e-4, atol=1e-3)


def test_files_from_before_2023_give_the_same_network(theirs, tmp_path):
    "There the layers of attention have other names, and their weights are 1×1 convolutions."
    theirs.save_pretrained(tmp_path)
    now, _ = load_autoencoder(tmp_path)
    file = tmp_path / WEIGHTS
    old = {}
    for name, v in load_file(file).items():
        for new, was in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            if f".attentions.0.{new}." in name:
                name, v = name.replace(new, was), v[..., None, None] if v.ndim == 2 else v
        old[name] = v.contiguous()
    assert sum("proj_attn" in name for name in old) == 4
    save_file(old, file)
    before, _ = load_autoencoder(tmp_path)
    assert all(a.equal(b) for a, b in zip(now.parameters(), before.parameters(), strict=True))


def test_the_published_one_has_its_number_of_parameters():
    with torch.device("meta"):
        assert parameters(KLAutoencoder()) == 83_653_863  # as of Stable Diffusion's, by diffusers' own module
        config = dict(
            in_channels=3, latent_channels=4, block_out_channels=[128, 256, 512, 512], layers_per_block=2
        )
        assert parameters(autoencoder_of(config)) == 83_653_863


def test_a_code_is_a_normal_distribution():
    n = 20_000
    code = Code(torch.full((n, 1, 1, 1), 0.7), torch.full((n, 1, 1, 1), -1.0))
    z = code.sample(torch.randn(n, 1, 1, 1, generator=torch.Generator().manual_seed(0)))
    own, standard = torch.distributions.Normal(0.7, torch.tensor(-0.5).exp()), torch.distributions.Normal(0, 1)
    gap = own.log_prob(z) - standard.log_prob(z)  # whose mean is the divergence
    assert abs(gap.mean() - code.kl()[0]) < 5 * gap.std() / n**0.5
    torch.testing.assert_close(code.kl()[:1], torch.distributions.kl_divergence(own, standard)[None])


def test_what_is_refused(theirs, tmp_path):
    with pytest.raises(ValueError, match="holds no config.json of an AutoencoderKL"):
        load_autoencoder(tmp_path)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, said in ((dict(act_fn="relu"), "another kind, with {'act_fn': 'relu'}"), (dict(block_out_channels=[128, 200]), "multiples of the first"),
                         (dict(layers_per_block=2), "the weights lack"), (dict(latent_channels=4), "model.safetensors")):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=said):
            load_autoencoder(tmp_path)
    with pytest.raises(ValueError, match="multiples of 2; got 7×8"):
        KLAutoencoder(1, 1, 8, (1, 1), 1).encode(torch.zeros(1, 1, 7, 8))
