"""The models of MNIST, Fashion-MNIST and CIFAR-10 that come with the book, their judges and references."""

from types import SimpleNamespace

import pytest
import torch

from diffusion_nb.cli.book import artifacts
from diffusion_nb.cli.models import label_of, load_model
from diffusion_nb.denoisers import NetDenoiser, predict_v
from diffusion_nb.experiments.artifacts import artifact, as_plain
from diffusion_nb.experiments.judge import fashion_judge, mnist_judge
from diffusion_nb.experiments.pictures import (
    CIFAR10_CLASSES,
    FASHION_CLASSES,
    Guided,
    PictureClassifier,
    by_2m,
    cifar10_denoiser,
    cifar10_judge,
    draw_pictures,
    fashion_denoiser,
    from_bytes,
    in_bytes,
    mnist_denoiser,
    shifted,
)
from diffusion_nb.experiments.reference import (
    JUDGED,
    ReferenceRecipe,
    against,
    make_references,
    reference,
    scores,
)
from diffusion_nb.grids import edm_grid
from diffusion_nb.nets.unet import UNet, parameters
from diffusion_nb.noise import Noise
from diffusion_nb.recipes.captions import CaptionRecipe
from diffusion_nb.recipes.diffusion import Recipe, recipe
from diffusion_nb.recipes.settings import settings
from diffusion_nb.samplers.linear import dpmpp_2m
from diffusion_nb.schedules import CosineSchedule
from diffusion_nb.util.images import show


def test_pictures_are_shifted_within_their_mirrored_border():
    x = torch.arange(2 * 3 * 8 * 8.0).reshape(2, 3, 8, 8)
    still = shifted(x, torch.tensor([[4, 4], [4, 4]]))
    moved = shifted(x, torch.tensor([[5, 4], [4, 1]]))  # the first one row down, the second three columns left
    assert still.equal(x)
    assert moved[0, :, :7].equal(x[0, :, 1:]) and moved[0, :, 7].equal(x[0, :, 6])
    assert moved[1, :, :, 3:].equal(x[1, :, :, :5]) and moved[1, :, :, :3].equal(x[1, :, :, 1:4].flip(2))


def test_weights_in_8_bits_come_back_to_half_a_step():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5), torch.nn.Linear(7, 4))
    net[0].weight.data[1] *= 1000  # a large filter does not cost the others their digits
    net[0].weight.data[2] = 0
    kept = in_bytes(net)
    back, own = from_bytes(kept), net.state_dict()
    assert (
        back.keys() == own.keys() and kept["0.weight"].dtype == torch.int8 and kept["0.bias"].dtype == torch.half
    )
    for name in ("0.weight", "2.weight"):
        step = own[name].flatten(1).abs().amax(1, keepdim=True) / 127
        assert ((back[name] - own[name]).flatten(1).abs() <= 0.5001 * step).all()
        assert back[name].flatten(1).abs().amax(1).allclose(own[name].flatten(1).abs().amax(1))
    assert back["0.bias"].float().allclose(own["0.bias"], rtol=1e-3) and back["1.num_batches_tracked"] == 0


def test_drawings_depend_on_their_seed_and_condition_alone():
    net = UNet(1, 8, (1, 2), 1, (1,), classes=10)
    model, y = NetDenoiser(net, CosineSchedule(), predict_v).eval(), torch.tensor([3, 1, 4, 1, 5])
    for p in net.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    whole = by_2m(model, 5, (1, 8, 8), 4, first=7, y=y)
    parts = by_2m(model, 5, (1, 8, 8), 4, first=7, batch=2, y=y)
    last = by_2m(model, 1, (1, 8, 8), 4, first=11, y=y[4:])
    assert torch.allclose(whole, parts, atol=1e-4) and torch.allclose(whole[4:], last, atol=1e-4)
    other = by_2m(model, 5, (1, 8, 8), 4, first=7, y=y.flip(0))
    assert (whole - other)[0].abs().max() > 1e-3 and (whole[0] - whole[1]).abs().max() > 1e-2
    ts = edm_grid(model.schedule, 4, 0.02, 80.0)
    start = model.schedule(ts[0])[1].float() * Noise(range(7, 12), (1, 8, 8))(0)
    with torch.no_grad():
        assert torch.equal(whole, dpmpp_2m(model, start, ts, y=y))


def test_the_judge_reads_its_classes_off_its_features():
    judge, x = cifar10_judge(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert parameters(PictureClassifier()) == 1_564_090 and judge.features(x).shape == (2, 192)
    assert judge(x).equal(judge.head(judge.features(x)))


def test_the_model_draws_what_it_is_asked_for():
    "20 drawings of 5 classes that are easy; by chance two of them would be recognised."
    y = torch.tensor([1, 6, 7, 8, 9]).repeat(4)
    x = draw_pictures(cifar10_denoiser(), y, w=2.0, steps=8)
    assert x.abs().max() < 1.5 and (cifar10_judge()(x).argmax(1) == y).sum() >= 15


def test_it_is_asked_for_by_name_and_its_classes_too():
    about = load_model("cifar10").about
    assert about.shape == (3, 32, 32) and as_plain(about.recipe) == as_plain(recipe("cifar10-small"))
    assert [label_of(name, about) for name in (*CIFAR10_CLASSES, "3", None)] == [*range(10), 3, None]


@pytest.mark.parametrize("label, r, said", [
    ("boat", recipe("cifar10-small"), "the labels 0 to 9, airplane, automobile, .* truck; got boat"),
    ("-1", recipe("digits"), "the labels 0 to 9; got -1"),
    ("ship", Recipe(classes=0), "no labels; got ship"),
    ("ship", recipe("cifar10"), "no labels; got ship"),
])  # fmt: skip
def test_unknown_labels(label, r, said):
    with pytest.raises(ValueError, match=f"--label: this model knows {said}"):
        label_of(label, SimpleNamespace(recipe=r))


def test_mnist_s_model_draws_the_digits_it_is_asked_for():
    "30 drawings; by chance three of them would be recognised."
    y = torch.arange(30) % 10
    x = draw_pictures(mnist_denoiser(), y, w=0.5, steps=10, shape=(1, 28, 28))
    assert x.shape == (30, 1, 28, 28) and (mnist_judge()(x).argmax(1) == y).sum() >= 27


def test_fashion_s_model_draws_the_clothes_it_is_asked_for():
    "30 drawings; by chance three of them would be recognised."
    y = torch.arange(30) % 10
    x = draw_pictures(fashion_denoiser(), y, w=0.5, steps=10, shape=(1, 28, 28))
    assert (fashion_judge()(x).argmax(1) == y).sum() >= 24
    about = load_model("fashion-mnist").about
    assert about.shape == (1, 28, 28) and as_plain(about.recipe) == as_plain(recipe("fashion-small"))
    assert [label_of(name, about) for name in FASHION_CLASSES] == list(range(10))


def test_guidance_of_a_judged_model_begins_when_it_is_to():
    late, always = Guided(1.5, 0.85), Guided(0.5)
    assert late.weight(torch.tensor([0.9, 0.851, 0.85, 0.01])).tolist() == [0, 0, 1.5, 1.5]
    assert always.weight == 0.5 and (str(late), str(always)) == ("w = 1.5 for t ≤ 0.85", "w = 0.5")


@pytest.mark.parametrize("name", JUDGED)
def test_scores_on_the_card_are_those_of_the_references(name):
    "Worked out again from what is stored, in float16; and what they are measured with has not been exchanged."
    ref, card = (
        reference(name),
        artifact("references", make_references, settings("references", ReferenceRecipe))[1],
    )
    said = scores(name, ref, torch.arange(1000) % 10)
    for what in ("drawn", "held out"):
        for k, v in card["metrics"][name][what].items():
            assert said[what][k] == pytest.approx(v, abs=2e-3 + 1e-3 * abs(v)), (what, k)
    assert said["held out"]["given their class"] > 0.9 and len(ref.real) == 2000


def test_precision_and_distance_of_features():
    real, same = torch.randn(2, 400, 4, generator=torch.Generator().manual_seed(0))
    near, far = against(real, same), against(real, same + 5)
    assert near["Fréchet distance"] < 0.2 and abs(far["Fréchet distance"] - 100) < 5
    assert near["precision"] > 0.9 > 0.1 > far["precision"] and near["coverage"] > 0.8 > far["coverage"]


def test_artifacts_whose_data_are_missing_are_left_alone(monkeypatch, capsys):
    asked = []
    makers = {"emoji": (asked.append, CaptionRecipe()), "references": (asked.append, ReferenceRecipe())}
    monkeypatch.setattr("diffusion_nb.cli.book.artifact_makers", lambda: makers)
    monkeypatch.setattr("diffusion_nb.data.DataSet.state", lambda self: "not here")
    monkeypatch.setattr("diffusion_nb.emoji.PACKAGES", ("no-such-package",))
    assert artifacts() == 0 and not asked
    said = capsys.readouterr().out
    assert "emoji: left as it is, for the emoji need what is not installed: no-such-package" in said
    assert "references: left as it is, for mnist is not here" in said and "cifar10 is not here" in said


def test_what_a_gpu_trained_is_left_alone_where_there_is_none(monkeypatch, capsys):
    asked = []
    makers = {"cifar10_small": (asked.append, recipe("cifar10-small"))}
    monkeypatch.setattr("diffusion_nb.cli.book.artifact_makers", lambda: makers)
    monkeypatch.setattr("diffusion_nb.experiments.artifacts.ship_artifact", lambda name, make, r: make(r))
    monkeypatch.setattr("diffusion_nb.data.DataSet.state", lambda self: "verified")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert artifacts() == 0 and not asked
    assert (
        "cifar10_small: left as it is, for it was trained on an NVIDIA H200, and here is no GPU"
        in capsys.readouterr().out
    )


def test_a_grid_with_names():
    x = torch.arange(6.0)[:, None, None, None].expand(6, 1, 4, 8) / 5
    ax = show(x, columns=3, row_labels=["a", "b"], column_labels=["p", "q", "r"], title="six")
    assert ax.images[0].get_array().shape == (9, 26)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"] and list(ax.get_yticks()) == [1.5, 6.5]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["p", "q", "r"] and list(ax.get_xticks()) == [
        3.5,
        12.5,
        21.5,
    ]
    assert list(show(x).get_xticks()) == []
