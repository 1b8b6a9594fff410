"""Published weights: names, numbers, orders of channels; there and back; what is refused."""

import hashlib
import json

import diffusers
import pytest
import torch
from waves import wave

from diffusion_nb.denoisers import Clip, NetDenoiser, predict_v, step_index
from diffusion_nb.grids import time_at
from diffusion_nb.guidance import ClassifierGuidance, Unconditional
from diffusion_nb.models import edm, taef2
from diffusion_nb.models.diffusers import (
    betas_of,
    load_diffusers,
    save_diffusers,
    unet_from_diffusers,
    unet_to_diffusers,
)
from diffusion_nb.models.openai import (
    CLASSIFIERS,
    CONSISTENCY,
    PUBLISHED,
    fill_openai,
    layers,
    load_classifier,
    load_consistency,
    load_openai,
    names,
    reordered,
)
from diffusion_nb.models.taef2 import TAEF2, load_taef2
from diffusion_nb.nets.classifier import EncoderUNet
from diffusion_nb.nets.song import SongUNet
from diffusion_nb.nets.unet import ADM, IMPROVED, Attention, UNet, parameters
from diffusion_nb.samplers.linear import ddim
from diffusion_nb.schedules import CosineSchedule, DDPMSchedule, cosine_betas, linear_betas
from diffusion_nb.util.storage import user_folder
from diffusion_nb.variances import learned_variance

SIZES = {  # how many tensors and parameters, and a hash of the names, as their programs make them
    "cifar10_uncond_50M_500K": (446, 52_546_438, "76a9e2cfd3634d68"),
    "imagenet64_uncond_100M_1500K": (450, 121_063_942, "13ffbe9d45c5be2e"),
    "imagenet64_cond_270M_250K": (451, 273_049_350, "34c91c1b369cc6c0"),
    "lsun_uncond_100M_1200K_bs128": (426, 113_676_678, "7802549aefe55d2f"),
    "64x64_diffusion": (541, 295_904_454, "a761555b497d81ab"),
    "128x128_diffusion": (493, 421_529_606, "a7de044d796b4e43"),
    "256x256_diffusion": (567, 553_838_086, "0daba198b08e3157"),
    "256x256_diffusion_uncond": (566, 552_814_086, "3ce9da73fa7c0a94"),
    "512x512_diffusion": (645, 558_997_638, "975cde2a885235a5"),
    "64_256_upsampler": (567, 311_795_910, "0daba198b08e3157"),
    "128_512_upsampler": (537, 308_835_270, "f2944331cd9f1147"),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_published_network_has_their_names_and_numbers(name):
    with torch.device("meta"):
        net = UNet(**dict(channels=3, channels_out=6) | PUBLISHED[name].options)
    theirs = sorted(names(net).values())
    digest = hashlib.sha256("\n".join(theirs).encode()).hexdigest()[:16]
    assert (len(theirs), parameters(net), digest) == SIZES[name]
    assert set(names(net)) == set(net.state_dict())


SMALL = dict(channels=3, channels_out=6, width=8, mults=(1, 2), blocks=1, attention=(0, 1))
KINDS = {
    "ADM": SMALL | ADM | dict(head_width=4, classes=7),
    "improved": SMALL | IMPROVED | dict(heads=2),
    "one head": SMALL | IMPROVED | dict(heads=1, scale_shift=False),
}


def as_theirs(net: UNet, together: bool) -> dict[str, torch.Tensor]:
    "The weights as their program would hold them: convolutions of length 1 in the attention, and each head's q, k and v side by side."
    heads = {ours: part.heads for ours, _, part in layers(net) if isinstance(part, Attention)}
    found = {}
    for ours, theirs in names(net).items():
        v, layer = net.state_dict()[ours], ours.rpartition(".")[0]
        block, _, last = layer.rpartition(".")
        if last == "qkv" and together:
            rows = v.unflatten(0, (3, heads[block], -1))
            v = torch.cat([rows[kind, head] for head in range(heads[block]) for kind in range(3)])
        found[theirs] = v[..., None] if last in {"qkv", "out"} and block in heads and v.ndim == 2 else v
    return found


def fresh(kind: str, seed: int) -> UNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = UNet(**KINDS[kind])
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.2)
    return net.eval()


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_their_layout_gives_the_same_function(kind, together):
    net, other = fresh(kind, 0), fresh(kind, 1)
    fill_openai(other, as_theirs(net, together), together)
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3.0, 877.0])
    y = torch.tensor([1, 6]) if "classes" in KINDS[kind] else None
    assert net(x, t, y).std() > 0.1 and other(x, t, y).equal(net(x, t, y))


def test_the_order_of_heads_matters_and_is_theirs():
    "Rows by head (q, k, v of the first, then of the second) become all q, all k, all v."
    rows = torch.arange(12.0)[:, None]
    assert reordered(rows, 2)[:, 0].tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
    assert reordered(rows, 1).equal(rows)
    net = fresh("ADM", 0)
    wrong = fresh("ADM", 1)
    fill_openai(wrong, as_theirs(net, True), together=False)
    assert not wrong.down[0][1].qkv.weight.equal(net.down[0][1].qkv.weight)


def test_a_file_becomes_a_denoiser_that_is_told_what_it_was_trained_with(tmp_path, monkeypatch):
    from diffusion_nb.models import openai

    small = openai.Published(KINDS["improved"], 4000, openai.cosine_betas, scaled=True)
    monkeypatch.setitem(PUBLISHED, "small", small)
    net, file = fresh("improved", 0), tmp_path / "small.pt"
    torch.save(as_theirs(net, True), file)
    denoiser, x, t = load_openai(file), torch.zeros(1, 3, 8, 8), torch.tensor(0.5, dtype=torch.float64)
    told = []
    denoiser.net.register_forward_pre_hook(lambda module, args: told.append(args[1].item()))
    pred = denoiser(x, t)
    assert told == [pytest.approx(1999 * 0.25)]
    assert denoiser.schedule.T == 4000 and pred.eps.allclose(net(x, torch.tensor([1999 * 0.25]))[:, :3], atol=1e-4)
    assert learned_variance(pred, denoiser_step(denoiser)).shape == x.shape
    assert not any(p.requires_grad for p in denoiser.parameters())


def denoiser_step(denoiser):
    from diffusion_nb.forward import Step, posterior_steps

    step = posterior_steps(denoiser.schedule, torch.tensor(0.4), torch.tensor(0.5))
    return Step._make(c.item() for c in step)


def test_other_weights_are_refused(tmp_path):
    net = fresh("ADM", 0)
    with pytest.raises(ValueError, match="does not fit the network"):
        fill_openai(fresh("improved", 0), as_theirs(net, True))
    torch.save(as_theirs(net, True), tmp_path / "64x64_diffusion.pt")
    with pytest.raises(ValueError, match="known are cifar10_uncond_50M_500K"):
        load_openai(tmp_path / "64x64_diffusion.pt", "mine")


class Runs:
    def __reduce__(self):
        return print, ("code from a file of weights",)


def test_a_file_that_would_run_code_is_refused(tmp_path, capsys):
    torch.save({"time_embed.0.weight": Runs()}, tmp_path / "256x256_diffusion_uncond.pt")
    with pytest.raises(ValueError):
        load_openai(tmp_path / "256x256_diffusion_uncond.pt")
    assert "code" not in capsys.readouterr().out


# EDM

SONG = {  # (size, ncsn): tensors, parameters and a hash of the names, as its program makes them, with ten classes and nine numbers of augmentation
    (32, False): (419, 55_735_299, "48b1fcfb37a11747"),
    (32, True): (424, 56_400_643, "021337511e920ab9"),
    (64, False): (543, 61_806_979, "245cc774231ec942"),
    (64, True): (550, 62_763_907, "52fdeeb63c3e22c1"),
}


@pytest.mark.parametrize("size, ncsn", SONG)
def test_edm_s_networks_have_its_names_and_numbers(size, ncsn):
    shape = dict(mults=(2, 2, 2), attention=(1,)) if size == 32 else dict(mults=(1, 2, 2, 2), attention=(2,))
    with torch.device("meta"):
        net = SongUNet(3, 128, blocks=4, classes=10, augment=9, ncsn=ncsn, **shape)
    theirs = edm.names(net, size)
    digest = hashlib.sha256("\n".join(sorted(theirs.values())).encode()).hexdigest()[:16]
    assert (len(theirs), parameters(net), digest) == SONG[size, ncsn] and set(theirs) == set(net.state_dict())


def song(seed: int, ncsn: bool) -> SongUNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = SongUNet(3, 16, (1, 2), 1, (1,), classes=5, augment=9, ncsn=ncsn)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.2)
    return net.eval()


@pytest.mark.parametrize("ncsn", [False, True])
def test_edm_s_layout_gives_the_same_function(ncsn, tmp_path):
    "Rows of query, key and value of one channel side by side; layers of the attention as convolutions; filters that ours makes itself."
    net, other, theirs = song(0, ncsn), song(1, ncsn), {"enc.8x8_down.conv0.resample_filter": torch.ones(1)}
    for ours, name in edm.names(net, 16).items():
        v = net.state_dict()[ours]
        if name.endswith("qkv.weight") or name.endswith("qkv.bias"):
            v = torch.stack(v.chunk(3), 1).flatten(0, 1)
        theirs[name] = (
            v[..., None, None] if v.ndim == 2 and name.rpartition(".")[0].endswith(("qkv", "proj")) else v
        )
    edm.fill_edm(other, theirs, 16)
    x, t, y = (
        torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0.3, -1.2]),
        torch.tensor([1, 5]),
    )
    augment = torch.randn(2, 9, generator=torch.Generator().manual_seed(1))
    assert net(x, t, y).std() > 0.1 and other(x, t, y, augment).equal(net(x, t, y, augment))
    assert not net(x, t, y, augment).equal(net(x, t, y)) and not net(x, t, y).equal(
        net(x, t, torch.tensor([2, 5]))
    )
    with pytest.raises(ValueError, match="does not fit"):
        edm.fill_edm(other, {k: v for k, v in theirs.items() if "map_label" not in k}, 16)
    with pytest.raises(ValueError, match="multiples of 2"):
        net(x[..., :15], t, y)


def test_a_file_of_edm_becomes_a_denoiser_with_its_preconditioning(tmp_path, monkeypatch):
    small = lambda *a, **options: SongUNet(3, 16, **options | dict(blocks=1))
    monkeypatch.setattr(edm, "SongUNet", small)
    net = small(3, 128, mults=(2, 2, 2), attention=(1,), classes=0, augment=9, ncsn=True)
    torch.nn.init.normal_(net.head[2].weight, std=0.1)
    as_convolutions = {}
    for ours, name in edm.names(net, 32).items():
        v = net.state_dict()[ours]
        if "qkv" in name:
            v = torch.stack(v.chunk(3), 1).flatten(0, 1)
        as_convolutions[name] = (
            v[..., None, None] if v.ndim == 2 and name.rpartition(".")[0].endswith(("qkv", "proj")) else v
        )
    torch.save(as_convolutions, tmp_path / "edm.pt")
    denoiser = edm.load_edm(tmp_path / "edm.pt", ncsn=True)
    sigma, x = 5.0, 5 * torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    t = torch.tensor((sigma / 80) ** (1 / 7), dtype=torch.float64)
    inside = net.eval()(x / (sigma**2 + 0.25) ** 0.5, torch.tensor([sigma]).log() / 4)
    want = 0.25 / (sigma**2 + 0.25) * x + sigma * 0.5 / (sigma**2 + 0.25) ** 0.5 * inside
    torch.testing.assert_close(denoiser(x, t).x0, want.detach(), rtol=1e-4, atol=1e-4)
    assert inside.std() > 0.01


# The numbers that the programs themselves print for weights and pictures that are waves.

PRINTED = {
    "DDPM++": [-2.0711604, -0.8921144, 0.6242437, 0.6953936, -0.3762815, -3.0676033, -0.8473464],
    "NCSN++": [-2.0676752, -1.0706046, 0.9041975, 0.851793, -2.9904078, 0.51827, 0.3711793],
    "guided-diffusion": [-16.1556408, 14.8436326, 11.4929216, 8.6126569, 8.4665556, -9.2375357],
    "guided-diffusion, new order": [-16.4062276, 15.0743779, 11.6146186, 8.6009697, 8.4726696, -9.2428851],
    "improved-diffusion": [11.1834719, -4.9925159, -16.4792218, -3.9970724, -18.2616082, 12.0630952],
}


def waves(net, table: dict[str, str]) -> dict[str, torch.Tensor]:
    "Their parameters, each a wave that begins at its place in the list of names; the scales of normalisations about 1."
    shapes = {theirs: net.state_dict()[ours].shape for ours, theirs in table.items()}
    return {name: 0.2 * wave(*shapes[name], k=k) + (len(shapes[name]) == 1 and name.endswith("weight"))
            for k, name in enumerate(sorted(shapes))}  # fmt: skip


@pytest.mark.parametrize("ncsn", [False, True])
def test_the_networks_of_edm_say_what_its_program_says(ncsn):
    net = SongUNet(3, 16, (1, 2), 1, (1,), classes=5, augment=9, ncsn=ncsn).double().eval()
    edm.fill_edm(net, waves(net, edm.names(net, 16)), 16)
    t = torch.tensor([0.3, -1.2] if ncsn else [3.0, 700.0], dtype=torch.float64)
    out = net(wave(2, 3, 16, 16), t, torch.tensor([1, 4]), wave(2, 9, k=1))
    want = torch.tensor(PRINTED["NCSN++" if ncsn else "DDPM++"], dtype=torch.float64)
    torch.testing.assert_close(out.flatten()[::241].detach(), want, rtol=0, atol=2e-5)  # theirs: sines in float32


@pytest.mark.parametrize("name", [name for name in PRINTED if "diffusion" in name])
def test_the_networks_of_openai_say_what_their_programs_say(name):
    y = torch.tensor([1, 4]) if "guided" in name else None
    options = ADM | dict(head_width=32, classes=7) if "guided" in name else IMPROVED
    net = UNet(3, 128, (1, 2), 1, (0, 1), channels_out=6, **options).double().eval()
    fill_openai(net, waves(net, names(net)), together="new" not in name)
    out = net(wave(2, 3, 8, 8), torch.tensor([3.0, 700.0]), y).flatten()[::131].detach()
    torch.testing.assert_close(out, torch.tensor(PRINTED[name], dtype=torch.float64), rtol=0, atol=2e-5)


# classifiers


@pytest.mark.parametrize("name, tensors, numbers, digest", [("64x64_classifier", 307, 65_438_568, "e8d35940a0fd7117"), ("128x128_classifier", 221, 42_568_040, "2e761bfc8dd05aa4"),
                                                            ("256x256_classifier", 249, 54_096_360, "2c6a4ef24ee08b3a"), ("512x512_classifier", 281, 54_448_360, "5594603fecf53dcd")])  # fmt: skip
def test_a_published_classifier_has_its_names_and_numbers(name, tensors, numbers, digest):
    with torch.device("meta"):
        net = EncoderUNet(**CLASSIFIERS[name])
    own = sorted(names(net).values())
    assert (len(own), parameters(net)) == (tensors, numbers) and set(names(net)) == set(net.state_dict())
    assert hashlib.sha256("\n".join(own).encode()).hexdigest()[:16] == digest


LOGITS = [-2.812841, 2.0567306, -1.7179991, 1.3518694, -0.5096157, -2.902203, 2.135084, -1.7840373, 1.4044913, -0.5479438]  # fmt: skip


def test_a_classifier_says_what_its_program_says(tmp_path, monkeypatch):
    small = dict(size=8, classes=5, width=128, mults=(1, 2), blocks=1, attention=(0, 1), head_width=32)
    monkeypatch.setitem(CLASSIFIERS, "64x64_classifier", small)
    net = EncoderUNet(**small)
    torch.save(waves(net, names(net)), tmp_path / "64x64_classifier.pt")
    f = load_classifier(tmp_path / "64x64_classifier.pt").double()
    x, t, want = (
        wave(2, 3, 8, 8),
        torch.tensor([3.0, 700.0], dtype=torch.float64),
        torch.tensor(LOGITS, dtype=torch.float64).reshape(2, 5),
    )
    torch.testing.assert_close(f.net(x, t), want, rtol=0, atol=2e-5)
    y = torch.tensor([3, 1])
    torch.testing.assert_close(f(x, (t + 1) / 1000, y), want.log_softmax(1)[[0, 1], y], rtol=0, atol=2e-5)
    model = NetDenoiser(UNet(3, 8, (1, 2), 1, ()).double(), DDPMSchedule(linear_betas()))
    guided = ClassifierGuidance(Unconditional(model), f, 2.0)(x, torch.tensor(0.5, dtype=torch.float64), y=y)
    assert guided.x0.isfinite().all() and not guided.x0.equal(model(x, torch.tensor(0.5, dtype=torch.float64)).x0)
    for bad, said in ((torch.tensor([5, 0]), "from 0 to 4"), (torch.tensor([0.0, 1.0]), "integer labels")):
        with pytest.raises(ValueError, match=said):
            f(x, torch.tensor(0.5), bad)
    with pytest.raises(ValueError, match="not a classifier that is known"):
        load_classifier(tmp_path / "64x64_classifier.pt", "other")


# consistency models


@pytest.mark.parametrize("name, tensors, numbers, digest", [("imagenet64", 541, 295_899_267, "a761555b497d81ab"), ("bedroom256", 566, 526_304_771, "3ce9da73fa7c0a94"),
                                                            ("cat256", 566, 526_304_771, "3ce9da73fa7c0a94")])  # fmt: skip
def test_consistency_models_have_their_names_and_numbers(name, tensors, numbers, digest):
    with torch.device("meta"):
        net = UNet(channels=3, channels_out=3, **CONSISTENCY[name])
    own = sorted(names(net).values())
    assert (len(own), parameters(net)) == (tensors, numbers)
    assert hashlib.sha256("\n".join(own).encode()).hexdigest()[:16] == digest


SMALL_CM = dict(width=128, mults=(1, 2), blocks=1, attention=(0, 1), **ADM | dict(head_width=32, classes=7))
FUNCTION = [-0.2302325, 2.3622236, -4.1101909, 4.5709949, -11.0538304, -0.2851085]  # printed by their program


def test_a_consistency_model_says_what_its_program_says(tmp_path, monkeypatch):
    monkeypatch.setitem(CONSISTENCY, "imagenet64", SMALL_CM)
    net = UNet(channels=3, channels_out=3, **SMALL_CM)
    torch.save(waves(net, names(net)), tmp_path / "cd_imagenet64_l2.pt")
    f = load_consistency(tmp_path / "cd_imagenet64_l2.pt").double()
    assert not f.training and not any(p.requires_grad for p in f.parameters())
    t = time_at(f.schedule, -2 * torch.tensor([0.02, 30.0], dtype=torch.float64).log())
    x, y = 10 * wave(2, 3, 8, 8), torch.tensor([1, 4])
    want = torch.tensor(FUNCTION, dtype=torch.float64)
    torch.testing.assert_close(f(x, t, y=y).flatten()[::67], want, rtol=0, atol=2e-5)
    torch.testing.assert_close(f(x, torch.zeros(2), y=y), x)  # at sigma = 0.002 it is the identity
    teacher = load_consistency(tmp_path / "cd_imagenet64_l2.pt", "edm_imagenet64_ema").double()
    skip, out = (
        (f.schedule(t)[1] ** 2 + 0.25).reciprocal() / 4,
        f.schedule(t)[1] / 2 * (f.schedule(t)[1] ** 2 + 0.25).rsqrt(),
    )
    raw = (f(x, t, y=y) - 0.25 / ((f.schedule(t)[1] - 0.002) ** 2 + 0.25)[:, None, None, None] * x) / (
        (f.schedule(t)[1] - 0.002) / 2 * (f.schedule(t)[1] ** 2 + 0.25).rsqrt()
    )[:, None, None, None]
    torch.testing.assert_close(
        teacher(x, t, y=y).x0, skip[:, None, None, None] * x + out[:, None, None, None] * raw
    )
    for other in ("imagenet64", "cd_ffhq"):
        with pytest.raises(ValueError, match="expected a name such as"):
            load_consistency(tmp_path / "cd_imagenet64_l2.pt", other)


# diffusers


def theirs(**options) -> diffusers.UNet2DModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return diffusers.UNet2DModel(**dict(sample_size=8, layers_per_block=1, block_out_channels=(128, 160), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                                            up_block_types=("AttnUpBlock2D", "UpBlock2D")) | options).eval()  # fmt: skip


DDPM = dict(downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6, attention_head_dim=None)
X, T5 = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([5.0, 640.0])


@pytest.mark.parametrize("options", [DDPM, dict(num_class_embeds=7, attention_head_dim=32), dict(out_channels=6, attention_head_dim=None)])  # fmt: skip
def test_their_unet_becomes_ours_and_theirs_again(options):
    net, y = theirs(**options), torch.tensor([1, 6]) if "num_class_embeds" in options else None
    ours = unet_from_diffusers(dict(net.config), net.state_dict()).eval()
    want = net(X, T5, class_labels=y).sample
    torch.testing.assert_close(ours(X, T5, y), want, rtol=0, atol=1e-5)
    config, tensors = unet_to_diffusers(ours)
    back = diffusers.UNet2DModel.from_config(config).eval()
    back.load_state_dict(tensors)
    assert back(X, T5, class_labels=y).sample.equal(want) and want.std() > 0.1


def test_an_option_that_a_config_leaves_out_is_theirs():
    net = theirs()  # attention in heads of 8 channels, if nothing is said
    config = {
        k: v for k, v in net.config.items() if k in {"block_out_channels", "down_block_types", "layers_per_block"}
    }
    torch.testing.assert_close(
        unet_from_diffusers(config, net.state_dict()).eval()(X, T5), net(X, T5).sample, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("predict", ["epsilon", "v_prediction"])
def test_a_pipeline_of_theirs_draws_the_same_pictures_from_what_is_written(predict, tmp_path):
    net = unet_from_diffusers(dict(theirs(**DDPM).config), theirs(**DDPM).state_dict()).eval()
    kind = {} if predict == "epsilon" else {"predict": predict_v}
    ours = NetDenoiser(net, DDPMSchedule(linear_betas(1000)), c_noise=step_index(1000), **kind)
    save_diffusers(ours, tmp_path / "pipe")
    pipe = diffusers.DDPMPipeline.from_pretrained(tmp_path / "pipe")
    assert pipe(num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)
    scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(10)
    x = X
    with torch.no_grad():
        for k in scheduler.timesteps:
            x = scheduler.step(pipe.unet(x, k).sample, k, x, use_clipped_model_output=True).prev_sample
    ts = torch.cat([(scheduler.timesteps + 1) / 1000, torch.zeros(1)]).double()
    again = load_diffusers(tmp_path / "pipe")
    config, tensors = unet_to_diffusers(again.net)
    was = {k.replace("to_q", "query").replace("to_out.0", "proj_attn"): v for k, v in tensors.items()}
    assert was.keys() != tensors.keys()  # as files from before May 2023 call them
    for a, b in zip(again.net.parameters(), unet_from_diffusers(config, was).parameters(), strict=True):
        assert a.equal(b)
    for part in ("unet", "scheduler"):  # side by side, as some are distributed
        for file in (tmp_path / "pipe" / part).iterdir():
            file.rename(tmp_path / "pipe" / file.name)
        (tmp_path / "pipe" / part).rmdir()
    for denoiser in (ours, again, load_diffusers(tmp_path / "pipe")):
        torch.testing.assert_close(ddim(Clip(denoiser), X, ts), x, rtol=0, atol=1e-4)
    assert x.std() > 0.1


def test_betas_are_theirs():
    for kind, zero in (
        ("linear", False),
        ("scaled_linear", False),
        ("squaredcos_cap_v2", False),
        ("linear", True),
    ):
        options = dict(beta_start=2e-4, beta_end=0.03, beta_schedule=kind, rescale_betas_zero_snr=zero)
        want = diffusers.DDPMScheduler(500, **options).betas.double()
        got = betas_of(dict(num_train_timesteps=500, **options))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(
        betas_of({"trained_betas": [0.1, 0.2]}), torch.tensor([0.1, 0.2], dtype=torch.float64)
    )
    with pytest.raises(ValueError, match="got sigmoid"):
        betas_of({"beta_schedule": "sigmoid"})


def test_what_diffusers_has_not_is_refused(tmp_path):
    fine = NetDenoiser(UNet(3, 128, (1,), 1, ()), DDPMSchedule(cosine_betas(10)), c_noise=step_index(10))
    for net, says in ((UNet(3, 32, (1, 2), 1, ()), "from 128 on"), (UNet(3, 128, (1,), 1, (), scale_shift=True), "ADM's changes"),
                      (UNet(3, 128, (1,), 1, (), classes=3), "no label in front"), (UNet(3, 128, (1, 2), 1, (0, 1), heads=2), "heads by their width")):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            unet_to_diffusers(net)
    with pytest.raises(ValueError, match="c_noise=step_index"):
        save_diffusers(NetDenoiser(fine.net, fine.schedule), tmp_path)
    with pytest.raises(ValueError, match="another kind, with {'act_fn': 'gelu'}"):
        unet_from_diffusers(dict(theirs(**DDPM).config) | {"act_fn": "gelu"}, {})
    with pytest.raises(ValueError, match="do not fit their config.json"):
        unet_from_diffusers(dict(theirs(**DDPM).config), {})
    save_diffusers(fine, tmp_path / "pipe")
    assert json.loads((tmp_path / "pipe/model_index.json").read_text())["_class_name"] == "DDPMPipeline"
    with pytest.raises(ValueError, match="is not empty"):
        save_diffusers(fine, tmp_path / "pipe")
    scheduler = tmp_path / "pipe/scheduler/scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "flow"}))
    with pytest.raises(ValueError, match="got flow"):
        load_diffusers(tmp_path / "pipe")
    with pytest.raises(ValueError, match="DDPMSchedule"):
        save_diffusers(NetDenoiser(fine.net, CosineSchedule(), c_noise=step_index(10)), tmp_path)


# the Hub


def test_a_model_goes_to_the_hub_and_comes_back(tmp_path, monkeypatch):
    import shutil

    import huggingface_hub

    from diffusion_nb.models.model import About, Model
    from diffusion_nb.recipes.diffusion import recipe

    hub, asked = tmp_path / "hub", []

    class Api:
        def __init__(self, token=None):
            asked.append(token)

        def create_repo(self, repo_id, private, exist_ok):
            asked.append((repo_id, private, exist_ok))

        def upload_folder(self, repo_id, folder_path):
            shutil.copytree(folder_path, hub / repo_id)
            return f"https://example.org/{repo_id}/commit/1"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: asked.append(options) or hub / name
    )
    about = About("diffusion", recipe("digits"), (1, 8, 8), 17)
    model = Model(about.fresh(), about)
    assert model.push_to_hub("me/digits", private=True, token="t").endswith("me/digits/commit/1")
    assert sorted(p.name for p in (hub / "me/digits").iterdir()) == [
        "README.md",
        "model.json",
        "model.safetensors",
    ]
    card = (hub / "me/digits/README.md").read_text(encoding="utf-8")
    assert "8×8 with 1 channel," in card and 'from_pretrained("me/digits")' in card and "| target | v |" in card
    again = Model.from_pretrained("me/digits", revision="main")
    own, back = model.denoiser.state_dict(), again.denoiser.state_dict()
    assert again.about == about and all(v.equal(back[k]) for k, v in own.items())
    assert asked == [
        "t",
        ("me/digits", True, True),
        {"revision": "main", "token": None, "allow_patterns": ["model.safetensors", "model.json", "codec/*"]},
    ]
    assert Model.from_pretrained(hub / "me/digits").about == about and len(asked) == 3


def test_taef2_has_the_published_numbers_and_halves_three_times():
    net = TAEF2()
    assert (parameters(net.encoder), parameters(net.decoder)) == (1_338_528, 1_338_499)
    names = {part: hashlib.sha256("\n".join(sorted(getattr(net, part).state_dict())).encode()).hexdigest()[:8] for part in ("encoder", "decoder")}  # fmt: skip
    assert names == {"encoder": "0d482ce9", "decoder": "86b3d349"}
    z = net.encode(torch.zeros(1, 3, 24, 16))
    assert z.shape == (1, 32, 3, 2) and net.decode(z).shape == (1, 3, 24, 16)
    with pytest.raises(ValueError, match="multiples of 8; got 20×16"):
        net.encode(torch.zeros(1, 3, 20, 16))


def test_taef2_is_told_pictures_from_0_to_1():
    net, x = TAEF2(width=4, latent=2).double(), torch.rand(1, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(net.encode(2 * x - 1), net.encoder(x))
    z = torch.full((1, 2, 1, 1), 5.0, dtype=torch.float64)
    torch.testing.assert_close(net.decode(z), 2 * net.decoder[1:](3 * (z / 3).tanh()) - 1)


def test_taef2_is_read_from_the_published_files_only(tmp_path, monkeypatch):
    torch.manual_seed(0)
    net = TAEF2()
    with pytest.raises(FileNotFoundError, match="put taef2_encoder.pth and taef2_decoder.pth of https"):
        load_taef2(tmp_path)
    for part in ("encoder", "decoder"):
        torch.save(
            {k: v.half() for k, v in getattr(net, part).state_dict().items()}, tmp_path / f"taef2_{part}.pth"
        )
    with pytest.raises(ValueError, match="is not the published file"):
        load_taef2(tmp_path)
    made = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in tmp_path.iterdir()}
    monkeypatch.setattr(taef2, "SHA256", made)
    loaded = load_taef2(tmp_path)
    assert all(v.half().float().equal(loaded.state_dict()[k]) for k, v in net.state_dict().items())
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


HERE = user_folder() / "taef2"


@pytest.mark.skipif(not (HERE / "taef2_encoder.pth").exists(), reason=f"needs the published files in {HERE}")
def test_taef2_gives_photographs_back():
    from sklearn.datasets import load_sample_image

    x = torch.tensor(load_sample_image("flower.jpg")).permute(2, 0, 1)[None].float() / 127.5 - 1
    x = torch.nn.functional.interpolate(x, size=(256, 384), mode="bicubic", antialias=True).clamp(-1, 1)
    net = load_taef2(HERE)
    z = net.encode(x)
    error = (net.decode(z).clamp(-1, 1) - x).square().mean()
    assert abs(10 * torch.log10(4 / error) - 31.6) < 0.2 and abs(z.std() - 0.81) < 0.02


@pytest.mark.skipif(not (HERE / "taef2_encoder.pth").exists(), reason=f"needs the published files in {HERE}")
def test_taef2_gives_emoji_back_as_notebook_19_says():
    from diffusion_nb.codecs import fit_codec
    from diffusion_nb.emoji import emoji
    from diffusion_nb.experiments.latent import psnr, there_and_back

    data = emoji(64)
    held = data.x[data.held_pictures]
    codec = fit_codec(load_taef2(HERE), data.x[data.train][:500])
    assert len(held) == 318 and abs(psnr(held, there_and_back(codec, held)) - 25.75) < 0.05
