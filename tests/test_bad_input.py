"""Wrong input is refused at the door, and the message says what was expected."""

import gzip
import hashlib
import re
import struct
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.error import URLError

import pytest
import torch
from torch import nn

from diffusion_nb import data
from diffusion_nb.data import DATA_SETS, fashion_mnist, mnist
from diffusion_nb.denoisers import Clip, Denoiser, NetDenoiser, predict_eps, predict_score, predict_v, predict_x0
from diffusion_nb.experiments.judge import JudgeRecipe
from diffusion_nb.forward import posterior_steps, q_posterior, q_sample, q_step, transition
from diffusion_nb.generation.generate import generate
from diffusion_nb.grids import time_grid
from diffusion_nb.guidance import CFG, Unconditional
from diffusion_nb.likelihood.bits import bits_per_dim
from diffusion_nb.likelihood.continuous import vdm_bits
from diffusion_nb.likelihood.lossless import LosslessCodec, lossless_decode, lossless_encode
from diffusion_nb.likelihood.lossy import Codec, arithmetic_decode, arithmetic_encode, encode, equal_bits_grid
from diffusion_nb.metrics.cards import MetricCard, load_cards, save_cards
from diffusion_nb.metrics.features import density_coverage, inception_score, precision_recall
from diffusion_nb.mixtures import GaussianMixture, GMMDenoiser, random_mixture
from diffusion_nb.nets.unet import UNet
from diffusion_nb.noise import Noise
from diffusion_nb.recipes.diffusion import Recipe, recipe
from diffusion_nb.recipes.settings import settings
from diffusion_nb.samplers.heun import heun
from diffusion_nb.samplers.langevin import langevin
from diffusion_nb.samplers.linear import ddim, ddpm, dpmpp_2m, invert
from diffusion_nb.samplers.sde import probability_flow
from diffusion_nb.schedules import (
    CosineSchedule,
    DDPMSchedule,
    EDMSchedule,
    LinearGamma,
    Schedule,
    StraightSchedule,
    VESchedule,
    VPSchedule,
    linear_betas,
)
from diffusion_nb.training.trainer import Trainer
from diffusion_nb.util.checks import check_finite, check_time
from diffusion_nb.util.storage import project_root
from diffusion_nb.variances import expected_eps2, fixed_large

nan, inf = float("nan"), float("inf")
CHAIN = DDPMSchedule(linear_betas())
x = torch.zeros(4, 1, 8, 8)
T = torch.tensor


def refused(*says: str):
    "ValueError whose message holds all of these."
    return pytest.raises(ValueError, match="(?s)" + "".join(f"(?=.*{re.escape(s)})" for s in says))


@pytest.mark.parametrize(
    "error",
    [TypeError("Cannot convert a MPS Tensor to float64"), RuntimeError("Required aspect fp64 is not supported")],
)
def test_an_accelerator_without_float64_is_refused_in_one_sentence(error, monkeypatch):
    def zeros(*size, device=None, **options):
        if torch.device(device or "cpu").type == "meta":  # stands for it
            raise error
        return make(*size, device=device, **options)

    make = torch.zeros
    monkeypatch.setattr(torch, "zeros", zeros)
    with refused("device: meta has no float64", "device='cpu'"):
        ddim(POINT, torch.empty(1, 2, device="meta"), T([1.0, 0.0]))
    with refused("device: meta has no float64"):
        Trainer(NetDenoiser(nn.Conv2d(1, 1, 1), CHAIN), make(4, 1, 8, 8), steps=1, lr=lambda k: 0.1, device="meta")


# times


@pytest.mark.parametrize(
    "f",
    [CHAIN, VPSchedule(), CosineSchedule(), VESchedule(), EDMSchedule(), StraightSchedule()],
    ids=lambda f: type(f).__name__,
)
@pytest.mark.parametrize(
    "t", [-1e-6, 1.000001, 500, nan, inf, -inf, [0.5, 1.5], [-0.5, 0.5], [0.5, nan], [nan, 0.5]]
)
def test_times_outside_0_1(f, t):
    for call in (f, f.logsnr, check_time):
        with refused("t: expected times in [0, 1]", "got values from"):
            call(T(t, dtype=torch.float64))


def test_times_at_the_ends_are_fine():
    for t in (0.0, 1.0, [0.0, 1.0], 0, 1, []):
        CHAIN(T(t))


@pytest.mark.parametrize("bound", [0.0, -1.0])
def test_a_bound_on_the_log_snr_is_positive(bound):
    with refused("bound: expected a positive log SNR", str(bound)):
        CosineSchedule(bound)


@pytest.mark.parametrize("kind, low", [(VPSchedule, 0.0), (VESchedule, 0.0), (EDMSchedule, -0.1)])
@pytest.mark.parametrize("ends", [(1.0, 1.0), (None, 1.0), (2.0, 1.0)])
def test_noise_grows_with_time(kind, low, ends):
    with refused("noise grows with time"):
        kind(low if ends[0] is None else ends[0], ends[1])


def test_the_message_names_the_worst_times():
    with refused("from -0.5 to 3"):
        CHAIN(T([0.1, 3.0, -0.5, 0.2]))


@pytest.mark.parametrize(
    "s, t", [(0.5, 0.5), (0.6, 0.5), ([0.1, 0.5], [0.2, 0.4]), ([0.1, 0.6], 0.5), (nan, 0.5), (0.5, nan)]
)
def test_posterior_wants_s_below_t(s, t):
    with refused("expected s < t", "noise at 1"):
        posterior_steps(CHAIN, T(s), T(t))
    with refused("expected s < t"):
        q_posterior(CHAIN, x[:2], x[:2], T(s), T(t))


def test_transition_wants_s_below_t():
    with refused("expected s < t everywhere"):
        transition(CHAIN, T(0.6), T(0.5))
    with refused("expected s < t everywhere"):
        q_step(CHAIN, x, T([0.1, 0.1, 0.1, 0.6]), T(0.5).expand(4), x)
    for s, t in ((0.5, 0.5), (nan, 0.5), (0.5, nan)):
        with refused("expected s < t everywhere"):
            transition(CHAIN, T(s), T(t))
    for s, t in ((-0.1, 0.5), (0.5, 1.1)):
        with refused("expected times in [0, 1]"):
            transition(CHAIN, T(s), T(t))


# shapes


@pytest.mark.parametrize(
    "call", [q_sample, lambda f, x, t, e: q_step(f, x, t * 0, t, e)], ids=["q_sample", "q_step"]
)
def test_shapes_of_noising(call):
    t = torch.full((4,), 0.5)
    for eps in (x[:1], x[:, 0], torch.zeros(4, 3, 8, 8), torch.zeros(())):
        with refused("eps: expected the shape of the pictures, (4, 1, 8, 8); got", str(tuple(eps.shape))):
            call(CHAIN, x, t, eps)
    for bad in (t[:3], t[:1], t[:, None], t[:, None, None, None]):
        with refused("t: expected one time, or one for each of 4 pictures; got shape", str(tuple(bad.shape))):
            call(CHAIN, x, bad, x)
    assert call(CHAIN, x, t, x).shape == call(CHAIN, x, t[0], x).shape == x.shape


def test_shapes_of_the_posterior():
    with refused("x0: expected the shape of the pictures, (4, 1, 8, 8); got (1, 1, 8, 8)"):
        q_posterior(CHAIN, x, x[:1], T(0.1), T(0.5))
    with pytest.raises((ValueError, RuntimeError), match="3"):
        q_posterior(CHAIN, x, x, torch.zeros(3), torch.ones(3))


def test_posterior_times_of_a_wrong_shape():
    with refused("t: expected one time"):
        q_posterior(CHAIN, x, x, torch.zeros(4, 1), torch.ones(4, 1))


# schedules and denoisers


@pytest.mark.parametrize(
    "betas", [[0.0], [1.0, 0.5], [-0.1, 0.5], [0.5, 1.5], [0.5, nan], [inf], 0.5, [[0.1, 0.2]]]
)
def test_betas_outside_0_1(betas):
    with refused("betas: expected a vector of variances in (0, 1), the last of which may be 1; got"):
        DDPMSchedule(T(betas))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_casting_a_model_leaves_its_schedule_exact(dtype):
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    denoiser = NetDenoiser(Same(), DDPMSchedule(linear_betas())).to(dtype)
    for got, want in zip(denoiser.schedule(t), CHAIN(t), strict=True):
        assert torch.equal(got, want)


def test_no_betas():
    with refused("betas"):
        DDPMSchedule(T([]))


def test_linear_betas_of_a_chain_too_short():
    assert DDPMSchedule(linear_betas(20)).T == 20  # whose last beta is 1
    with refused("betas: expected a vector of variances in (0, 1)"):
        DDPMSchedule(linear_betas(19))


class ToPureNoise(Schedule):
    "alpha = 0 at t = 1."

    def coefficients(self, t):
        return (1 - t**2).sqrt(), t


class Same(nn.Module):
    def forward(self, x, t):
        return x


def singular_out(alpha, sigma):
    return alpha, sigma / alpha


@pytest.mark.parametrize("row", [predict_eps, predict_score, singular_out])
def test_rows_that_divide_by_alpha(row):
    with refused(row.__name__, "divides by alpha, which is 0 at t = 1", "use predict_v or predict_x0"):
        NetDenoiser(Same(), ToPureNoise(), row)
    NetDenoiser(Same(), CHAIN, row)


@pytest.mark.parametrize("row", [predict_v, predict_x0])
def test_rows_that_do_not(row):
    noise = Noise(range(4), (1, 8, 8))(0)
    pred = NetDenoiser(Same(), ToPureNoise(), row)(noise, T(1.0))
    assert torch.equal(pred.eps, noise)  # all is noise at alpha = 0
    assert torch.equal(pred.x0, noise if row is predict_x0 else -noise)


class Repeats(nn.Module):
    "The picture, and its multiples, one after the other along the channels."

    def __init__(self, *factors: float):
        super().__init__()
        self.factors = factors

    def forward(self, x, t):
        return torch.cat([f * x for f in self.factors], dim=1)


def test_a_network_may_return_twice_the_channels():
    noise = Noise(range(4), (3, 8, 8))(0)
    pred = NetDenoiser(Repeats(1.0, 2.0), CHAIN, predict_x0)(noise, T(0.5))
    assert torch.equal(pred.x0, noise) and torch.equal(pred.extra, 2 * noise)
    assert NetDenoiser(Repeats(1.0), CHAIN, predict_x0)(noise, T(0.5)).extra is None
    with refused("(4, 9, 8, 8)", "(4, 3, 8, 8)", "as many channels, or twice as many"):
        NetDenoiser(Repeats(1.0, 2.0, 3.0), CHAIN, predict_x0)(noise, T(0.5))


def test_a_network_with_every_option_runs_up_and_down():
    net = UNet(
        1, 16, (1, 2, 2), 1, (1,), head_width=8, scale_shift=True, biggan=True, rescale=True, channels_out=2
    )
    out = net(Noise(range(2), (1, 8, 8))(0), T([3.0, 5.0]))
    assert out.shape == (2, 2, 8, 8) and not out.any()  # the last layer starts at zero


def test_heads_that_do_not_part_the_channels():
    with refused("head_width: 16 channels do not part into heads of 3"):
        UNet(1, 16, (1, 2), 1, (0,), head_width=3)


def test_denoisers_refuse_times_outside_0_1():
    for denoiser, x_t in (
        (NetDenoiser(Same(), CHAIN), x),
        (GMMDenoiser(random_mixture(), CHAIN), torch.zeros(4, 2)),
    ):
        assert isinstance(denoiser, Denoiser)
        for t in (T(1.1), T(nan), T([0.5, 0.5, 0.5, -0.5])):
            with refused("t: expected times in [0, 1]"):
                denoiser(x_t, t)


# mixtures

EYE = torch.eye(2).expand(2, 2, 2)
ZERO = torch.zeros(2, 2)


@pytest.mark.parametrize("weights", [[0.5, 0.6], [-0.5, 1.5], [0.0, 1.0], [0.3, 0.3]])
def test_weights_of_a_mixture(weights):
    with refused("weights: expected positive numbers that sum to 1"):
        GaussianMixture(weights, ZERO, EYE)


@pytest.mark.parametrize(
    "weights, means, covs",
    [
        ([1.0], ZERO, EYE),
        ([0.5, 0.5], ZERO, EYE[0]),
        ([0.5, 0.5], ZERO, EYE[:1]),
        ([0.5, 0.5], torch.zeros(2, 3), EYE),
        ([0.5, 0.5], torch.zeros(3, 2), EYE),
    ],
)
def test_shapes_of_a_mixture(weights, means, covs):
    k, d = means.shape
    with refused(f"expected weights ({k},) and covs ({k}, {d}, {d}) for means ({k}, {d})", str(tuple(covs.shape))):
        GaussianMixture(weights, means, covs)


@pytest.mark.parametrize("cov", [[[1, 1], [0, 1]], [[1, 0], [0, -1]], [[1, 2], [2, 1]]])
def test_covariances_of_a_mixture(cov):
    with refused("covs: expected symmetric matrices without negative eigenvalues"):
        GaussianMixture([0.5, 0.5], ZERO, torch.stack([torch.eye(2), T(cov).float()]))


@pytest.mark.parametrize("bad", [nan, inf])
def test_not_numbers_in_a_mixture(bad):
    with refused("weights: expected positive numbers"):
        GaussianMixture([bad, 1.0], ZERO, EYE)
    with refused("means: 4 of its 4 values are NaN or infinite"):
        GaussianMixture([0.5, 0.5], ZERO + bad, EYE)
    with refused("covs:", "NaN or infinite"):
        GaussianMixture([0.5, 0.5], ZERO, EYE * bad)


@pytest.mark.parametrize("label", [4, -1])
def test_labels_of_the_oracle(label):
    oracle = GMMDenoiser(random_mixture(k=3), CHAIN)
    assert oracle(torch.zeros(1, 2), T(0.5), y=T([3])).x0.isfinite().all()
    with pytest.raises((ValueError, IndexError)):
        oracle(torch.zeros(1, 2), T(0.5), y=T([label]))


def test_check_finite():
    check_finite(T([0.0, 1e38]), "x")
    check_finite(T([0, 1]), "x")
    for bad, n in (([nan, 0.0], 1), ([inf, -inf], 2)):
        with refused(f"pictures: {n} of its 2 values are NaN or infinite"):
            check_finite(T(bad), "pictures")


# noise


def test_seeds():
    for seeds in (3, [[1, 2]], torch.zeros(2, 2, dtype=torch.int64)):
        with refused("seeds: expected one integer a sample"):
            Noise(seeds, (2,))
    with pytest.raises((ValueError, OverflowError)):
        Noise([2**63], (2,))
    assert Noise([], (3, 2))(0).shape == (0, 3, 2)


def test_seeds_that_are_not_integers():
    with pytest.raises((ValueError, TypeError)):
        Noise([0.2, 0.9], (2,))


@pytest.mark.parametrize("step", [-1, 2**24])
def test_steps_at_which_the_noise_would_repeat(step):
    with refused("step: expected an integer from 0 to 16777215"):
        Noise([0], (4,))(step)


# networks

PLAIN = UNet(1, 16, (1, 2), 1, ())
LABELLED = UNet(1, 16, (1, 2), 1, (), classes=10)
times, labels = torch.full((4,), 500.0), torch.arange(4)


@pytest.mark.parametrize("size", [(7, 8), (8, 7), (9, 9), (1, 1)])
def test_pictures_that_cannot_be_halved(size):
    with refused("height and width must be multiples of 2", f"got {size[0]}×{size[1]}"):
        PLAIN(torch.zeros(4, 1, *size), times)
    with refused("multiples of 8", "got 12×12"):
        UNet(1, 16, (1, 2), 1, (), patch=4)(torch.zeros(4, 1, 12, 12), times)


def test_labels():
    with refused("y: expected a label for each picture"):
        LABELLED(x, times)
    with refused("y: this network was built without classes"):
        PLAIN(x, times, labels)
    LABELLED(x, times, torch.full((4,), 10))  # any
    for y in (labels + 8, labels - 1):
        with pytest.raises((ValueError, IndexError)):
            LABELLED(x, times, y)
    for y in (labels[:3], labels.float()):
        with pytest.raises((ValueError, RuntimeError)):
            LABELLED(x, times, y)


def test_wrong_channels_and_times():
    with pytest.raises((ValueError, RuntimeError), match="channels"):
        PLAIN(torch.zeros(4, 3, 8, 8), times)
    with pytest.raises((ValueError, RuntimeError), match="3"):
        PLAIN(x, times[:3])


# settings


@dataclass(frozen=True)
class Known:
    steps: int
    lr: float
    sizes: tuple[int, ...]
    kind: Literal["x", "y"] = "x"


def set_by(monkeypatch, text):
    monkeypatch.setenv("DIFFUSION_NB_SET", text)


def test_settings_in_order(project, monkeypatch):
    assert settings("a", Known) == Known(steps=5, lr=0.1, sizes=(1, 2))
    monkeypatch.setenv("DIFFUSION_NB_PROFILE", "gpu")
    assert settings("a", Known) == Known(steps=50, lr=0.1, sizes=(1, 2))
    set_by(monkeypatch, " a.steps = 7 ;; a.sizes=3;b.other=x; ")
    assert settings("a", Known) == Known(steps=7, lr=0.1, sizes=(3,))
    monkeypatch.setenv("DIFFUSION_NB_PROFILE", "cpu")
    assert settings("a", Known).steps == 7
    set_by(monkeypatch, "a.sizes=")
    assert settings("a", Known).sizes == ()
    with refused("mults: expected the multiple of a level"):
        Recipe(mults=())


def test_somebody_elses_settings_are_not_taken_for_ours(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = mylib\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DIFFUSION_NB_SETTINGS", raising=False)
    assert settings("judge.mnist", JudgeRecipe).width == 32 and project_root() == Path(__file__).parents[1]


def test_wrong_profile(project, monkeypatch):
    for profile in ("tpu", "GPU", ""):
        monkeypatch.setenv("DIFFUSION_NB_PROFILE", profile)
        with refused("DIFFUSION_NB_PROFILE: expected cpu or gpu", repr(profile)):
            settings("a", Known)


def test_wrong_section(project):
    with refused("no section [07_ddpm]", "it has a, a.gpu, b"):
        settings("07_ddpm", Known)


@dataclass(frozen=True)
class Wider(Known):
    width: int = field(kw_only=True)


@dataclass(frozen=True)
class Narrower:
    steps: int
    sizes: tuple[int, ...]


def test_wrong_keys(project, monkeypatch):
    with refused("settings [a]", "'width' is missing", "the settings are"):
        settings("a", Wider)
    with refused("settings [a]", "'lr' is not a setting", "the settings are steps, sizes"):
        settings("a", Narrower)
    set_by(monkeypatch, "a.step=7")
    with refused("'step' is not a setting", "steps"):
        settings("a", Known)


@pytest.mark.parametrize(
    "item", ["a.steps=many", "a.steps=1.5", "a.steps=", "a.lr=fast", "a.sizes=1,,2", "a.sizes=,"]
)
def test_wrong_types(project, monkeypatch, item):
    set_by(monkeypatch, item)
    name, value = item.split("=")
    kind = {"steps": "int", "lr": "float", "sizes": "list of int"}[name[2:]]
    with refused("settings [a]", f"{name[2:]} = {value!r} is not a valid {kind}"):
        settings("a", Known)


@pytest.mark.parametrize(
    "item", ["a.steps", "steps=7", "=7", "a=7", "c.steps=7", ".steps=7", "a.steps:7", "a.steps=7,b=1;x"]
)
def test_malformed_override(project, monkeypatch, item):
    set_by(monkeypatch, item)
    with refused("DIFFUSION_NB_SET: expected 'section.key=value'", "got"):
        settings("a", Known)


def test_override_of_a_profile_section(project, monkeypatch):
    set_by(monkeypatch, "a.gpu.steps=7")
    monkeypatch.setenv("DIFFUSION_NB_PROFILE", "gpu")
    try:
        assert settings("a", Known).steps == 7
    except ValueError:
        pass  # refusing is as good


# data sets


def idx(array: torch.Tensor) -> bytes:
    "The .gz file of the MNIST kind that holds this array of bytes."
    header = struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape)
    return gzip.compress(header + array.to(torch.uint8).numpy().tobytes(), mtime=0)


NAMES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


class Web:
    "What there is to download, and whether the network is up; it counts what is asked for."

    def __init__(self):
        self.x = (torch.arange(3 * 28 * 28) % 256).reshape(3, 28, 28)
        self.x_test = (torch.arange(2 * 28 * 28) * 7 % 256).reshape(2, 28, 28)
        self.y, self.y_test = T([3, 0, 9]), T([255, 1])  # 255: a label is a byte without sign
        self.files = dict(zip(NAMES, map(idx, (self.x, self.y, self.x_test, self.y_test)), strict=True))
        self.md5 = [(name, hashlib.md5(raw).hexdigest()) for name, raw in self.files.items()]
        self.up, self.asked = True, set()

    def open(self, request, *_, **__):
        url = request.full_url
        if not self.up:
            raise URLError("Name or service not known")
        self.asked.add(url.rpartition("/")[2])
        return Response(url, self.files[url.rpartition("/")[2]])


class Response:
    def __init__(self, url, raw):
        self.url, self.raw, self.length = url, raw, len(raw)

    def read(self, n):
        piece, self.raw = self.raw[:n], self.raw[n:]
        return piece

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def web(project, monkeypatch):
    from torchvision import datasets

    web = Web()
    monkeypatch.setattr(urllib.request, "urlopen", web.open)
    for cls in (datasets.MNIST, datasets.FashionMNIST):
        monkeypatch.setattr(cls, "resources", web.md5)
    return web


def state(name="mnist"):
    return next(d for d in DATA_SETS if d.name == name).state()


def is_what_the_web_holds(got, web):
    for x, raw in ((got.x, web.x), (got.x_test, web.x_test)):
        assert x.dtype == torch.float32 and x.shape == (len(raw), 1, 28, 28)
        assert torch.equal(((x[:, 0] + 1) * 127.5).round().long(), raw)  # 0 … 255 stands for -1 … 1
        assert x.min() == -1 and x.max() == 1
        torch.testing.assert_close(x[:, 0].double(), raw / 127.5 - 1, rtol=0, atol=1e-6, check_dtype=False)
    assert torch.equal(got.y, web.y) and torch.equal(got.y_test, web.y_test)


@pytest.mark.parametrize(
    "load, folder, name", [(mnist, "MNIST", "mnist"), (fashion_mnist, "FashionMNIST", "fashion-mnist")]
)
def test_download_and_read(web, project, load, folder, name):
    assert state(name) == "not here"
    is_what_the_web_holds(load(), web)
    assert state(name) == "verified" and web.asked == set(NAMES)
    web.up = False
    is_what_the_web_holds(load(), web)  # from the disk
    assert (project / "data" / folder / "raw" / NAMES[0]).exists()


def test_offline(web, project):
    web.up = False
    with pytest.raises(ConnectionError) as e:
        mnist()
    for part in (
        "MNIST could not be downloaded",
        "Name or service not known",
        "Connect to the internet",
        "digits",
        *NAMES,
    ):
        assert part in str(e.value)
    assert str(project / "data" / "MNIST" / "raw") in str(e.value)
    assert state() == "not here"


def test_files_put_in_place_by_hand(web, project):
    web.up = False
    raw = project / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in web.files.items():
        (raw / name).write_bytes(content)
    assert state() == "verified"
    is_what_the_web_holds(mnist(), web)


@pytest.mark.parametrize("victim", NAMES)
def test_truncated_file_is_fetched_again(web, project, victim):
    mnist()
    path = project / "data" / "MNIST" / "raw" / victim
    path.write_bytes(path.read_bytes()[:-9])
    assert state() == "damaged"
    web.up = False
    with pytest.raises(ConnectionError) as e:
        mnist()
    assert victim in str(e.value) and sum(name in str(e.value) for name in NAMES) == 1  # only what is wanted
    assert (
        not path.exists() and not path.with_suffix("").exists()
    )  # nor is what was unpacked from it left to be read
    web.up, web.asked = True, set()
    is_what_the_web_holds(mnist(), web)
    assert web.asked == {victim} and state() == "verified"


def test_one_file_missing(web, project):
    mnist()
    (project / "data" / "MNIST" / "raw" / NAMES[3]).unlink()
    assert state() == "damaged"
    is_what_the_web_holds(mnist(), web)


def test_damaged_download(web):
    web.files[NAMES[0]] = web.files[NAMES[0]][:-9]  # another file than its checksum says
    with pytest.raises(ConnectionError, match=NAMES[0]):
        mnist()
    assert state() in ("damaged", "not here")


def test_digits_need_no_network(web):
    web.up = False
    assert state("digits") == "built in"
    got = data.digits()
    assert got.x.shape == (1497, 1, 8, 8) and got.x_test.shape == (300, 1, 8, 8)
    assert sorted(got.x.unique().tolist()) == [i / 8 - 1 for i in range(17)]
    assert got.y.bincount().tolist() == [148, 152, 147, 152, 151, 152, 151, 149, 145, 150]


# training


def test_a_number_where_a_tensor_or_a_function_belongs():
    with refused("y: expected a tensor of integer labels, one for each picture; got 3; for n pictures of one class, torch.full((n,), label)"):  # fmt: skip
        LABELLED(x, times, 3)
    with refused("ts: expected the times at which to stop, such as time_grid(100) for 100 steps; got 50"):
        ddim(NetDenoiser(Same(), CHAIN), x, 50)
    with refused("lr: expected a function of the step, such as warmup_cosine(0.001, 100, 5) or lambda step: 0.001; got 0.001"):  # fmt: skip
        Trainer(NetDenoiser(Same(), CHAIN), x, steps=5, lr=1e-3)


def test_data_that_cannot_be_trained_on():
    def trainer(x0, **kw):
        return Trainer(NetDenoiser(Same(), CHAIN), x0, steps=1, lr=lambda k: 0.1, **kw)

    with refused("x0: 1 of its 256 values are NaN or infinite"):
        trainer(torch.zeros(4, 1, 8, 8).index_put((torch.tensor(0),) * 4, T(nan).float()))
    with refused("y: expected 4, one for each picture; got 3"):
        trainer(torch.zeros(4, 1, 8, 8), cond={"y": torch.zeros(3).long()})


def test_recipe_with_a_word_that_is_no_choice(monkeypatch):
    monkeypatch.setenv("DIFFUSION_NB_SET", "recipe.digits.schedule=sine")
    with refused("settings [recipe.digits]: schedule = 'sine' is not a valid choice of cosine, linear"):
        recipe("digits")


# the bound and the metrics

POINT = GMMDenoiser(GaussianMixture([1.0], torch.zeros(1, 2), torch.eye(2)[None]), CHAIN)
levels = torch.arange(8).reshape(4, 2) / 8


@pytest.mark.parametrize(
    "x, says",
    [
        (levels + 0.01, "off that grid"),
        (levels + 1, "got values from 1 to 1.875"),
        (levels - 2, "got values from -2 to -1.125"),
        (levels / 8, "of 17 grey levels"),
        (levels * nan, "8 of its 8 values are NaN"),
        (levels.long(), "expected pictures (n, …) in float32 or float64"),
    ],
)
def test_pictures_that_are_not_of_these_levels(x, says):
    with refused(says):
        bits_per_dim(POINT, x, time_grid(3), levels=17)


@pytest.mark.parametrize(
    "ts", [time_grid(1), time_grid(3, end=0.1), time_grid(3, start=0.9), time_grid(3).flip(0), T([1, 0.5, 0.5, 0])]
)
def test_a_bound_along_times_that_are_not_from_1_to_0(ts):
    with refused("expected times"):
        bits_per_dim(POINT, levels, ts, levels=17)


def test_a_bound_with_too_few_seeds_or_other_labels():
    with refused("seeds: expected 4, one for each picture; got 3"):
        bits_per_dim(POINT, levels, time_grid(3), levels=17, seeds=range(3))
    with refused("y: expected 4, one for each picture; got 1"):
        bits_per_dim(POINT, levels, time_grid(3), levels=17, y=T([0]))
    with refused("y: expected labels from 0 to 0"):
        bits_per_dim(POINT, levels, time_grid(3), levels=17, y=T([0, 1, 2, 3]))


@pytest.mark.parametrize("k", [0, -1, 4, 100])
def test_more_neighbours_than_there_are(k):
    for measure in (density_coverage, precision_recall):
        with refused("k: expected a number of neighbours from 1 to 3, for 4 points", f"got {k}"):
            measure(levels, levels, k)


def test_features_that_are_not_finite():
    for measure in (density_coverage, precision_recall):
        with refused("real: 8 of its 8 values"):
            measure(levels * nan, levels, 1)
        with refused("fake: 1 of its 8 values"):
            measure(levels, 1 / levels, 1)


@pytest.mark.parametrize("text", ["", "[", "null", "3", "[1]", '[{"metric": "FID"}]', '[{"score": 1}]'])
def test_damaged_cards(text, tmp_path):
    path = tmp_path / "cards.json"
    save_cards([MetricCard("FID", 1.0, 2, "a", "b")], path)
    path.write_text(text)
    with refused("cards.json holds no metric cards"):
        load_cards(path)


def test_a_decoder_without_variance():
    with refused("decoder_var: expected a positive variance"):
        bits_per_dim(POINT, levels, time_grid(3), levels=17, decoder_var=lambda pred, step: 0.0)


@pytest.mark.parametrize("x", [levels.half(), levels[:0], levels[0]])
def test_pictures_of_a_kind_that_has_no_bits(x):
    with refused("expected pictures (n, …) in float32 or float64"):
        bits_per_dim(POINT, x, time_grid(3), levels=17)


@pytest.mark.parametrize("ts", [time_grid(4), time_grid(4, start=0.9, end=0.1), time_grid(4, end=0.1).flip(0)])
def test_codec_along_times_that_it_cannot_take(ts):
    codec = Codec(POINT, ts, fixed_large, 2.0, 16)
    with refused("ts: expected times that fall from 1 and end above 0"):
        encode(codec, levels[:1])


@pytest.mark.parametrize("share", [0.0, -1.0, 1.0])
def test_share_of_the_bits_that_the_steps_do_not_carry(share):
    bits = bits_per_dim(POINT, levels, time_grid(5), levels=17, var=fixed_large)
    with refused("share: expected more than 0 and at most"):
        equal_bits_grid(bits, 3, share)


@pytest.mark.parametrize("message", ["", "012", "one"])
def test_messages_that_are_not_of_zeros_and_ones(message):
    with refused("message: expected a text of zeros and ones"):
        arithmetic_decode(message, [[0, 1, 2]])


@pytest.mark.parametrize("number", [-1, 2])
def test_numbers_that_have_no_code(number):
    with refused("numbers: expected 0 to 1"):
        arithmetic_encode([number], [[0, 1, 2]])


def test_logits_that_are_not_finite():
    with refused("logits: 1 of its 4 values"):
        inception_score(T([[1.0, nan], [0.0, 2.0]]))


@pytest.mark.parametrize("minutes", [0, -1, nan])
def test_minutes_that_are_none(minutes):
    trainer = Trainer(NetDenoiser(nn.Conv2d(1, 1, 1), CosineSchedule(), predict_v), torch.zeros(4, 1, 8, 8), steps=2,
                      lr=lambda k: 1e-3, batch=2, device="cpu")  # fmt: skip
    with refused("minutes: expected a positive number"):
        trainer.fit(minutes)


# at the door: what is wrong with the last of many is refused before the first is looked at


class Untouched(Denoiser):
    "Knows three labels, and must not be called."

    def __init__(self, schedule=None):
        super().__init__()
        self.schedule, self.net = schedule or CosineSchedule(), UNet(1, 8, (1, 2), 1, (), classes=3)

    def forward(self, x_t, t, **cond):
        raise AssertionError("something was done before the labels were looked at")


LATE = torch.tensor([0, 1, 2, 0, 7])  # the last is no label
FIVE = torch.zeros(5, 1, 8, 8)
DOORS = {
    "bits_per_dim": lambda d, y, tmp: bits_per_dim(d, FIVE, levels=17, batch=2, y=y),
    "vdm_bits": lambda d, y, tmp: vdm_bits(d, FIVE, 17, batch=2, y=y),
    "generate": lambda d, y, tmp: generate(
        tmp / "a.npz", d, ddim, time_grid(2), 5, (1, 8, 8), cond={"y": y}, chunk=2
    ),
    "expected_eps2": lambda d, y, tmp: expected_eps2(d, FIVE, time_grid(4)[:-1], batch=2, y=y),
    "Trainer": lambda d, y, tmp: Trainer(
        d, FIVE, steps=1, batch=2, lr=lambda k: 1e-3, cond={"y": y}, device="cpu"
    ),
    "lossless_encode": lambda d, y, tmp: lossless_encode(
        LosslessCodec(d, time_grid(4), 17, fixed_large, classes=3, initial=600), FIVE, y
    ),
}


@pytest.mark.parametrize("wrap", [lambda d: d, Clip, lambda d: CFG(d, 1.0, 3)], ids=["as it is", "Clip", "CFG"])
@pytest.mark.parametrize("door", DOORS)
def test_labels_are_refused_at_the_door(door, wrap, tmp_path):
    for y in (LATE, LATE - 1, LATE.float()):
        with pytest.raises(ValueError, match="^y: expected"):
            DOORS[door](wrap(Untouched(LinearGamma(-7, 6) if door == "vdm_bits" else None)).eval(), y, tmp_path)
    with pytest.raises(ValueError, match="expected 5"):
        DOORS[door](
            wrap(Untouched(LinearGamma(-7, 6) if door == "vdm_bits" else None)).eval(), LATE[:4] % 3, tmp_path
        )
    assert not list(tmp_path.iterdir())


def test_a_label_for_a_picture_that_needs_none_is_no_matter(tmp_path):
    blind = Unconditional(NetDenoiser(UNet(1, 8, (1, 2), 1, ()), CosineSchedule(), predict_v)).eval()
    assert generate(tmp_path / "a.npz", blind, ddim, time_grid(2), 5, (1, 8, 8), cond={"y": LATE})


@pytest.mark.parametrize("shape", [(5,), (0, 1, 8, 8), (5, 0, 8, 8)])
def test_shapes_of_a_message_are_refused_at_the_door(shape):
    with pytest.raises(ValueError, match="^shape: expected"):
        lossless_decode(LosslessCodec(Untouched(), time_grid(4), 17, fixed_large, classes=3), b"\1" * 400, shape)


def test_times_of_a_codec_are_refused_at_the_door():
    rising = LosslessCodec(Untouched(), time_grid(4).flip(0), 17, fixed_large, classes=3)
    for attempt in (
        lambda: lossless_encode(rising, FIVE, LATE % 3),
        lambda: lossless_decode(rising, b"", (5, 1, 8, 8)),
    ):
        with pytest.raises(ValueError, match="^ts: expected"):
            attempt()


def test_the_label_that_means_any_cannot_be_sent():
    codec = LosslessCodec(Untouched(), time_grid(4), 17, fixed_large, classes=3, initial=600)
    with pytest.raises(ValueError, match="^y: expected integer labels from 0 to 2"):
        lossless_encode(codec, FIVE, LATE.clamp(max=3))


# networks that are still in training mode


@pytest.mark.parametrize(
    "layer", [lambda: torch.nn.Dropout(0.3), lambda: torch.nn.BatchNorm2d(1)], ids=["Dropout", "BatchNorm"]
)
@pytest.mark.parametrize("call", [
    lambda d, x, ts: ddpm(d, x, ts, noise=lambda k: x), lambda d, x, ts: ddim(d, x, ts), lambda d, x, ts: heun(d, x, ts),
    lambda d, x, ts: dpmpp_2m(d, x, ts), lambda d, x, ts: invert(d, x, ts.flip(0) * 0.9 + 0.05),
    lambda d, x, ts: langevin(d, x, ts[1], noise=lambda k: x, steps=2, delta=0.01), lambda d, x, ts: probability_flow(d, x, ts * 0.9 + 0.05),
    lambda d, x, ts: bits_per_dim(d, x.clamp(-1, 1).round(), ts, levels=3),
], ids=["ddpm", "ddim", "heun", "2M", "invert", "langevin", "flow", "bits"])  # fmt: skip
def test_a_network_in_training_mode_is_refused(call, layer):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer()

        def forward(self, x, t):
            return self.layer(x)

    denoiser, x = NetDenoiser(Net(), CosineSchedule(), predict_v), torch.randn(4, 1, 4, 4)
    with refused("denoiser: its net.layer,", "is in training mode", "call denoiser.eval()"):
        call(denoiser, x, time_grid(5))
    with torch.no_grad():
        call(denoiser.eval(), x, time_grid(5))
