"""The benchmarks of speed run at toy size, and their checks notice what would make a timing worthless."""

import functools
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("denoising_diffusion_pytorch")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import contenders  # noqa: E402
import curves  # noqa: E402
import fifty_thousand  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402

TINY = contenders.Setting("cpu", width=8, size=8, batch=2, bf16=False, compile=False)


@pytest.fixture(scope="module")
def nets():
    torch.manual_seed(0)
    return contenders.networks(TINY.width, TINY.size)


@pytest.fixture
def run(tmp_path, monkeypatch):
    "Run a benchmark's command with these options; returns what it wrote."

    def command(module, name, options):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *options, "--width=8", "--rounds=1", f"--out={tmp_path}"])
        monkeypatch.setattr(contenders, "peaks", lambda *_: {"product": 5e11, "convolution": 1e12})
        module.main()
        return json.loads((tmp_path / f"{name}-cpu.json").read_text())

    return command


def rows_of(told, name="diffusion_nb"):
    assert told["machine"]["torch"] == torch.__version__.split("+")[0] and told["command"].startswith(
        "python benchmarks/"
    )
    return told["results"][name]


def test_training(run):
    told = run(
        train, "train", ["--size=8", "--batch=4", "--turn=1", "--bf16", "--only", "diffusion_nb", "lucidrains 4"]
    )
    row = rows_of(told)
    assert set(told["results"]) == {"diffusion_nb", "lucidrains 4"}
    # The rate times the operations of a picture is the rate of operations, and its share of the peak, here 1 TFLOP/s.
    assert row["TFLOP/s"] == pytest.approx(row["pictures/s"] * row["GFLOP a picture"] / 1e3, rel=1e-2)
    assert row["share of the measured peak"] == pytest.approx(row["TFLOP/s"], rel=1e-2)
    assert row["peak_memory_GiB"] is None and "bfloat16" in row["setting"]


def test_sampling_and_profile(run, tmp_path):
    told = run(
        sample,
        "sample",
        ["--size=8", "--batch=2", "--steps=2", "--profile", "--only", "diffusion_nb", "diffusers"],
    )
    assert set(told["results"]) == {"diffusion_nb", "diffusers"} and told["ratios"]["diffusion_nb"] == 1
    assert "convolution" in (tmp_path / "sample-cpu-profile.txt").read_text()


def test_fifty_thousand(run):
    row = rows_of(run(fifty_thousand, "fifty_thousand", ["--n=3", "--batch=2", "--only", "one step"]), "one step")
    assert row["pictures"] == 4  # two whole batches


def test_curves(run, tmp_path):
    told = run(
        curves, "curves", ["--batches", "1", "2", "--sizes", "--steps=1", "--turn=1", "--only", "diffusers"]
    )
    assert told["results"]["training against batch"]["x"] == [1, 2]
    assert len(told["results"]["sampling against steps"]["diffusers"]) == 1
    assert (tmp_path / "curves-cpu.png").read_bytes().startswith(b"\x89PNG")


def test_operations_of_the_published_network():
    net = contenders.UNet().to("meta")
    # 12.1 GFLOP of convolutions and linear layers (twice the multiplications), 0.3 of attention's two products.
    assert contenders.operations(net, 32) == pytest.approx(12.444e9, rel=1e-3)
    assert contenders.operations(net, 32, backward=True) == pytest.approx(37.324e9, rel=1e-3)


# the checks, with something broken


def test_other_weights_are_noticed(nets):
    broken = nets | {"diffusion_nb": contenders.UNet(width=TINY.width)}
    with pytest.raises(AssertionError):
        contenders.check_networks(broken, TINY.size)


def test_a_wrong_walk_is_noticed(nets, monkeypatch):
    contenders.check_walks(TINY, nets)
    monkeypatch.setattr(
        contenders, "ddim", functools.partial(contenders.ddim, eta=0.1, noise=lambda k: torch.randn(2, 3, 8, 8))
    )
    with pytest.raises(AssertionError, match="differ by up to"):
        contenders.check_walks(TINY, nets)


@pytest.mark.parametrize("name", ["diffusion_nb", "diffusers", "lucidrains 4"])
def test_a_wrong_loss_is_noticed(nets, monkeypatch, name):
    kind = name.split()[0]
    make = contenders.TRAIN[kind]

    def scaled(*args, **kwargs):
        made = make(*args, **kwargs)
        return made._replace(loss=lambda *a: 1.01 * made.loss(*a))

    x0 = contenders.pictures(8, TINY.size, "cpu")
    contenders.checked_training(name, TINY, nets[name], x0, steps=0)
    monkeypatch.setitem(contenders.TRAIN, kind, scaled)
    with pytest.raises(AssertionError, match="should be"):
        contenders.checked_training(name, TINY, nets[name], x0, steps=0)


def test_training_that_learns_nothing_is_noticed(nets, monkeypatch):
    monkeypatch.setattr(contenders.Trainer, "train_step", lambda self: None)
    with pytest.raises(AssertionError, match="should fall"):
        contenders.checked_training(
            "diffusion_nb", TINY, nets["diffusion_nb"], contenders.pictures(8, 8, "cpu"), steps=2
        )


def test_pictures_that_are_not_the_networks_are_noticed(nets, monkeypatch):
    draw = contenders.DRAW["diffusion_nb"]
    monkeypatch.setitem(
        contenders.DRAW, "diffusion_nb", lambda s, net: lambda n: draw(s, net)(n) * (0.5 if s.bf16 else 1)
    )
    with pytest.raises(AssertionError, match="spread"):
        contenders.checked_draw("diffusion_nb", TINY._replace(bf16=True), nets["diffusion_nb"])


@pytest.mark.parametrize("name", ["diffusion_nb", "diffusers", "lucidrains 4"])
def test_each_draws_pictures_of_the_size_that_is_timed(nets, name):
    larger = TINY._replace(size=16)
    draw = contenders.DRAW[name.split()[0]](larger, contenders.copy.deepcopy(nets[name]))
    contenders.check_shape(larger, name, draw(1))
    with pytest.raises(AssertionError, match="8×8"):
        contenders.check_shape(TINY, name, draw(1))


def test_only_another_library_may_go_without_compilation():
    def make(s):
        if s.compile:
            raise RuntimeError("cannot")
        return "made"

    s = TINY._replace(compile=True)
    assert contenders.where_it_works("diffusers", s, make) == ("made", TINY)
    assert contenders.where_it_works("lucidrains 4", s, make) == ("made", TINY)
    with pytest.raises(RuntimeError, match="cannot"):
        contenders.where_it_works("diffusion_nb", s, make)
