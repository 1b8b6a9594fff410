"""How good are the models of pictures? References that their judges need no data for, and the models' scores."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffusion_nb.data import data_set
from diffusion_nb.emoji import emoji
from diffusion_nb.experiments.artifacts import artifact
from diffusion_nb.experiments.emoji import draw_captions, emoji_denoiser, emoji_judge
from diffusion_nb.experiments.judge import fashion_judge, mnist_judge
from diffusion_nb.experiments.pictures import (
    OF_CIFAR10,
    OF_FASHION,
    OF_MNIST,
    Guided,
    cifar10_denoiser,
    cifar10_judge,
    draw_pictures,
    fashion_denoiser,
    mnist_denoiser,
)
from diffusion_nb.metrics.features import density_coverage, frechet_distance, precision_recall
from diffusion_nb.recipes.settings import settings
from diffusion_nb.training.report import nearest_pictures


class Judged(NamedTuple):
    "A set of pictures with its judge, the model that comes with the book, and the guidance with which that is judged."

    judge: Callable[[], nn.Module]
    model: Callable[[], nn.Module]
    guided: Guided


JUDGED = {
    "mnist": Judged(mnist_judge, mnist_denoiser, OF_MNIST),
    "fashion-mnist": Judged(fashion_judge, fashion_denoiser, OF_FASHION),
    "cifar10": Judged(cifar10_judge, cifar10_denoiser, OF_CIFAR10),
}


@dataclass(frozen=True)
class ReferenceRecipe:
    "How many pictures: of the training set as a reference, and drawn or held out to be compared with it."

    data: tuple[str, ...] = tuple(JUDGED)
    real: int = 2000
    drawn: int = 1000


class Reference(NamedTuple):
    "Features that a judge finds, and how far pictures are from the nearest training picture (RMS a pixel)."

    real: Float[Tensor, "n f"]
    held_out: Float[Tensor, "m f"]
    held_out_labels: Int[Tensor, " m"]
    nearest_of_held_out: Float[Tensor, " m"]
    drawn: Float[Tensor, "m f"]
    nearest_of_drawn: Float[Tensor, " m"]


@torch.no_grad()
def features(judge: nn.Module, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n f"]:
    "What the judge's answers are read from, part by part."
    return torch.cat([judge.features(part) for part in x.split(250)])


def make_references(r: ReferenceRecipe) -> tuple[dict, dict]:
    "The references of all sets, in float16, and the scores of their models; needs the data sets."
    tensors, metrics = {}, {}
    for name, (judge_of, model_of, guided) in JUDGED.items():
        data, judge, model, n = data_set(name).load(), judge_of(), model_of(), r.drawn
        y, draw = torch.arange(n) % 10, partial(draw_pictures, model, w=guided.weight, shape=data.x.shape[1:])
        bar = tqdm(y.split(100), desc=f"drawing {name}", leave=False)
        x = torch.cat([draw(part, first=2**20 + 100 * i) for i, part in enumerate(bar)]).clamp(-1, 1)
        found = Reference(
            features(judge, data.x[: r.real]),
            features(judge, data.x_test[:n]),
            data.y_test[:n],
            nearest_pictures(data.x_test[:n], data.x).distance,
            features(judge, x),
            nearest_pictures(x, data.x).distance,
        )
        made = Reference(*(v.half() if v.is_floating_point() else v for v in found))
        tensors |= {f"{name}.{k}": v for k, v in made._asdict().items()}
        metrics[name] = {"guided": str(guided), "pictures": n, "classes": 10, "of each": n // 10} | scores(
            name, made, y
        )
    of_emoji, said = emoji_scores()
    return tensors | of_emoji, metrics | said


@torch.no_grad()
def emoji_scores(w: float = 2.0) -> tuple[dict, dict]:
    "How far drawings from captions, held out or trained on, and held-out emoji are from the nearest training picture; and what their features say against those of the training pictures."
    data, denoiser, judge = emoji(), emoji_denoiser(), emoji_judge()
    train, held, known = data.x[data.train], (~data.train).nonzero()[:, 0], data.train.nonzero()[:, 0]
    known = known[:: len(known) // len(held)][: len(held)]
    draw = lambda which: draw_captions(denoiser, [data.captions[i] for i in which], w, first=2**20).clamp(-1, 1)
    sets = {"held_out": data.x[held], "drawn": draw(held), "drawn_of_known_captions": draw(known)}
    seen = features(judge, train)
    tensors = {f"emoji.nearest_of_{name}": nearest_pictures(x, train).distance.half() for name, x in sets.items()}
    said = {
        what: {k: round(v, 4) for k, v in against(seen, features(judge, sets[name])).items()}
        for what, name in (("drawn", "drawn"), ("held out", "held_out"))
    }
    return tensors, {"emoji": {"w": w, "pictures": len(held)} | said}


def reference(name: str) -> Reference:
    "The reference of a set (artifact `references`): what its judge needs, without the data."
    tensors, _ = artifact("references", make_references, settings("references", ReferenceRecipe))
    return Reference(*(tensors[f"{name}.{k}"] for k in Reference._fields))


def against(real: Float[Tensor, "n f"], some: Float[Tensor, "m f"]) -> dict[str, float]:
    "Fréchet distance, precision, recall, density and coverage of some features against real ones."
    real, some = real.float(), some.float()
    few = real[: 2 * len(some)]
    p, r = precision_recall(few, some)
    d, c = density_coverage(few, some)
    return {"Fréchet distance": frechet_distance(some, real), "precision": p, "recall": r, "density": d, "coverage": c}  # fmt: skip


def scores(name: str, ref: Reference, y: Int[Tensor, " m"]) -> dict[str, dict[str, float]]:
    "The scores of the model's drawings, which are meant to be y, and of as many held-out pictures."
    judge, copied = JUDGED[name].judge(), ref.nearest_of_held_out.float().quantile(0.01)
    found = {}
    for what, f, labels, near in (
        ("drawn", ref.drawn, y, ref.nearest_of_drawn),
        ("held out", ref.held_out, ref.held_out_labels, ref.nearest_of_held_out),
    ):
        given = (judge.head(f.float()).argmax(1) == labels).double().mean().item()
        error = 2 * (given * (1 - given) / len(labels)) ** 0.5
        said = {"given their class": given, "± of that": error} | against(ref.real, f)
        said |= {
            "nearest training picture": near.float().median().item(),
            "nearer than 99 % of held-out ones": (near.float() < copied).double().mean().item(),
        }
        found[what] = {k: round(v, 4) for k, v in said.items()}
    return found
