"""Restorers of blurred, pooled and masked pictures, and what is drawn with them (notebook 25)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_nb.corruption import (
    Blur,
    Degradation,
    Mask,
    Pool,
    Restorer,
    afresh,
    kept,
    restoration_loss,
)
from diffusion_nb.data import data_set, digits
from diffusion_nb.emoji import emoji
from diffusion_nb.experiments.artifacts import artifact
from diffusion_nb.experiments.evaluation import evaluate
from diffusion_nb.experiments.judge import accuracy_of, mnist_judge
from diffusion_nb.experiments.latent import psnr
from diffusion_nb.experiments.pictures import halved, trained_on
from diffusion_nb.metrics.features import frechet_distance
from diffusion_nb.noise import Noise
from diffusion_nb.recipes.cold import ColdRecipe, restored
from diffusion_nb.recipes.settings import settings
from diffusion_nb.training.trainer import Trainer

WAYS = (
    "one guess",
    "afresh",
    "kept",
    "kept, held-out starts",
    "kept, start + 0.002",
    "kept, start + 0.02",
)


@dataclass(frozen=True)
class ColdComparison(ColdRecipe):
    "Restorers of blurred digits, with noise and without, of some seeds; each draws `drawn` digits by `calls` calls."

    sigmas: tuple[float, ...] = (0.0, 0.1)
    seeds: int = 3
    calls: int = 24
    drawn: int = 300


def blur_times(blur: Blur, calls: int, least: float = 0.35) -> Float[Tensor, " calls"]:
    "Falling times from 1 on, between which the width of the blur shrinks by the same factor, down to `least` pixels."
    widths = torch.logspace(math.log10(blur.width), math.log10(least), calls, dtype=torch.float64)
    return (widths / blur.width).sqrt().clamp(max=1)


def level_starts(x: Float[Tensor, "n 1 s s"], y: Int[Tensor, " n"], wanted: Int[Tensor, " b"], seeds: Sequence[int]) -> Float[Tensor, "b 1 s s"]:  # fmt: skip
    "Flat pictures, made of no picture: one grey level each, normal with the mean and the spread of the training pictures' mean levels in the class."
    levels = x.mean((1, 2, 3))
    mean, spread = (
        torch.stack([f(levels[y == k]) for k in range(int(y.max()) + 1)]) for f in (torch.mean, torch.std)
    )
    level = mean[wanted] + spread[wanted] * Noise(seeds, (1,))(2**20)[:, 0]
    return level[:, None, None, None].expand(-1, *x.shape[1:]).contiguous()


def trained_restorer(r: ColdRecipe, corruption: Degradation, x: Tensor, y: Tensor, loss: Callable = restoration_loss) -> Restorer:  # fmt: skip
    "A restorer of a recipe, trained on these pictures."
    restorer = Restorer(r.network(x.shape[1]), corruption)
    return Trainer(restorer, x, cond={"y": y}, loss=loss, device="cpu", **r.options()).fit()


def first_axis(x: Float[Tensor, "n *d"], y: Int[Tensor, " n"]) -> float:
    "The share of the variance within a class along its first principal axis, mean over the classes."
    shares = []
    for k in y.unique():
        size = torch.linalg.svdvals(x[y == k].flatten(1) - x[y == k].flatten(1).mean(0)) ** 2
        shares.append(size[0] / size.sum())
    return torch.stack(shares).mean().item()


# digits of 8×8: both rules, with noise and without


@torch.no_grad()
def draw_ways(restorer: Restorer, r: ColdComparison, seed: int) -> list[Float[Tensor, "n 1 8 8"]]:
    "What each of the WAYS draws, with the same labels and noise."
    data, y, blur = digits(), torch.arange(r.drawn) % 10, restorer.corruption
    noise = Noise(torch.arange(r.drawn) + 2**20 + 1000 * seed, (1, 8, 8))
    ts, flat = blur_times(blur, r.calls), level_starts(data.x, data.y, y, noise.seeds)
    real = blur.degrade(held_out(data, y), ts[0])
    start, walk = blur.sigma * noise(0), lambda x, rule=kept: restored(restorer, x, ts, rule, noise, y=y)
    return [
        restored(restorer, flat + start, ts[:1], y=y),
        walk(flat + start, afresh),
        walk(flat + start),
        walk(real + start),
        *(walk(flat + start + more * noise(2**20 + 1)) for more in (0.002, 0.02)),
    ]


def held_out(data, y: Int[Tensor, " n"]) -> Float[Tensor, "n 1 s s"]:
    "Held-out pictures of these classes, each class from its first on, again from the first where they do not suffice."
    pools = [data.x_test[data.y_test == k] for k in range(10)]
    return torch.stack([pools[k][i // 10 % len(pools[k])] for i, k in enumerate(y.tolist())])


def run_cold(r: ColdComparison) -> tuple[dict, dict]:
    "The comparison on digits: scores (sigmas, seeds, ways, 9), the last the share of the first axis; 40 drawings of the first seed as grey levels; scores of held-out digits."
    data, y = digits(), torch.arange(r.drawn) % 10
    score = lambda x: torch.tensor([s.mean() for s in evaluate(x.clamp(-1, 1), y, len(y))] + [first_axis(x, y)])
    scores, pictures = [], []
    for sigma in r.sigmas:
        drawn = [draw_ways(trained_restorer(replace(r, seed=s), Blur(8, sigma=sigma), data.x, data.y), r, s) for s in range(r.seeds)]  # fmt: skip
        scores.append(torch.stack([torch.stack([score(x) for x in ways]) for ways in drawn]))
        pictures.append(torch.stack([(8 * (x[:40].clamp(-1, 1) + 1)).round().byte() for x in drawn[0]]))
    found = {
        "scores": torch.stack(scores),
        "drawings": torch.stack(pictures),
        "held out": score(held_out(data, y)),
    }
    means = found["scores"].mean(1)
    return found, {
        f"sigma = {sigma:g}, {way}": {"recognised": round(row[0].item(), 3), "Fréchet distance": round(row[1].item(), 2), "variety": round(row[6].item(), 3)}
        for sigma, rows in zip(r.sigmas, means, strict=True) for way, row in zip(WAYS, rows, strict=True)
    }  # fmt: skip


def cold_comparison() -> dict[str, Tensor]:
    "What `run_cold` found on digits (artifact `cold`, [25_cold])."
    return artifact("cold", run_cold, settings("25_cold", ColdComparison))[0]


# digits of 28×28, drawn from a blurred nothing


def train_cold_mnist(r: ColdRecipe) -> tuple[dict, dict]:
    "A restorer of blurred MNIST in float16, the mean grey levels of the classes, and what the judge says of 500 drawings."
    data = data_set("mnist").load()
    restorer = trained_restorer(r, Blur(28, sigma=r.sigma), data.x, data.y)
    levels = data.x.mean((1, 2, 3))
    of_class = torch.stack(
        [torch.stack([levels[data.y == k].mean(), levels[data.y == k].std()]) for k in range(10)]
    )
    kept_tensors = halved(restorer.net) | {"levels": of_class}
    model, said = cold_model(r, kept_tensors), {}
    judge, y = mnist_judge(), torch.arange(500) % 10
    seen = lambda x: torch.cat([judge.features(part) for part in x.split(500)])
    real = seen(data.x[:2000])
    for name, way in {"one guess": dict(calls=1), "afresh": dict(rule=afresh), "kept": {}}.items():
        f = seen(draw_cold(*model, y, first=2**20, **way).clamp(-1, 1))
        said[name] = {"recognised": round((judge.head(f).argmax(1) == y).double().mean().item(), 4), "Fréchet distance": round(frechet_distance(f, real), 2)}  # fmt: skip
    said["held-out pictures"] = {"recognised": round(accuracy_of(judge, data.x_test[:500], data.y_test[:500]), 4), "Fréchet distance": round(frechet_distance(seen(data.x_test[:500]), real), 2)}  # fmt: skip
    return kept_tensors, said | trained_on()


def cold_model(r: ColdRecipe, tensors: dict[str, Tensor]) -> tuple[Restorer, Tensor]:
    "The restorer that an artifact keeps, in eval mode, and mean and spread of the grey level of each class."
    tensors = dict(tensors)
    levels, net = tensors.pop("levels"), r.network(1)
    net.load_state_dict(tensors)
    return Restorer(net, Blur(28, sigma=r.sigma)).eval().requires_grad_(False), levels


def draw_cold(restorer: Restorer, levels: Float[Tensor, "10 2"], y: Int[Tensor, " n"], rule: Callable = kept, calls: int = 24, first: int = 0) -> Float[Tensor, "n 1 28 28"]:  # fmt: skip
    "Digits of these classes: from a grey level drawn for each and noise, by so many calls."
    noise = Noise(torch.arange(len(y)) + first, (1, 28, 28))
    level = levels[y, 0] + levels[y, 1] * Noise(noise.seeds, (1,))(2**20)[:, 0]
    start = level[:, None, None, None] + restorer.corruption.sigma * noise(0)
    return restored(restorer, start, blur_times(restorer.corruption, calls), rule, noise, y=y)


def cold_mnist() -> tuple[Restorer, Tensor]:
    "The restorer of blurred MNIST and the grey levels of its classes (artifact `cold_mnist`, [25_cold.mnist])."
    r = settings("25_cold.mnist", ColdRecipe)
    return cold_model(r, artifact("cold_mnist", train_cold_mnist, r)[0])


# emoji: three corruptions, one network


def emoji_corruptions(sigma: float) -> dict[str, Degradation]:
    "What the restorer of emoji restores; the number of each, in this order, is its condition y."
    return {
        "blur": Blur(32, 8.0, sigma),
        "pool": Pool((1, 2, 4, 8), sigma),
        "mask": Mask(32, 3.0, sigma),
    }


def loss_of_kinds(
    restorer: Restorer, x0: Tensor, t: Tensor, eps: Tensor, y: Int[Tensor, " b"]
) -> Float[Tensor, " b"]:
    "`restoration_loss`, each picture under the corruption whose number is y."
    kinds = emoji_corruptions(restorer.corruption.sigma).values()
    x_t = torch.stack([kind.q_sample(x0, t, eps) for kind in kinds])[y, torch.arange(len(y))]
    return (restorer(x_t, t, y=y) - x0).abs().flatten(1).mean(1)


@torch.no_grad()
def train_cold_emoji(r: ColdRecipe) -> tuple[dict, dict]:
    "A restorer of emoji in float16, and PSNR of 60 held-out pictures restored from the middle of each corruption."
    data = emoji(32)
    x = data.x[data.train]
    y = torch.arange(3).repeat_interleave(len(x))
    with torch.enable_grad():
        restorer = trained_restorer(r, Blur(32, 8.0, r.sigma), x.repeat(3, 1, 1, 1), y, loss_of_kinds)
    tensors = halved(restorer.net)
    models, real = emoji_models(r, tensors), data.x[data.held_pictures][:60]
    return tensors, {name: restoration_scores(model, real, k) for k, (name, model) in enumerate(models.items())} | trained_on()  # fmt: skip


def restoration_scores(
    restorer: Restorer, x: Float[Tensor, "n 3 32 32"], kind: int, t: float = 0.6, calls: int = 12
) -> dict[str, float]:
    "PSNR in decibels of the corrupted pictures, and of what each rule makes of them."
    noise, y = Noise(torch.arange(len(x)) + 2**20, x.shape[1:]), torch.full((len(x),), kind)
    ts = torch.linspace(t, t / calls, calls, dtype=torch.float64)
    x_t = restorer.corruption.q_sample(x, ts[0], noise(0))
    made = {"corrupted": x_t, "one guess": restored(restorer, x_t, ts[:1], y=y)}
    made |= {rule.__name__: restored(restorer, x_t, ts, rule, noise, y=y) for rule in (afresh, kept)}
    return {name: round(psnr(x, m.clamp(-1, 1)), 2) for name, m in made.items()}


def emoji_models(r: ColdRecipe, tensors: dict[str, Tensor]) -> dict[str, Restorer]:
    "The one network as the restorer of each corruption, in eval mode."
    net = r.network(3)
    net.load_state_dict(tensors)
    net.eval().requires_grad_(False)
    return {name: Restorer(net, kind) for name, kind in emoji_corruptions(r.sigma).items()}


def cold_emoji() -> dict[str, Restorer]:
    "Restorers of blurred, pooled and masked emoji, y = 0, 1, 2 in this order (artifact `cold_emoji`, [25_cold.emoji])."
    r = settings("25_cold.emoji", ColdRecipe)
    return emoji_models(r, artifact("cold_emoji", train_cold_emoji, r)[0])


def cold_card(name: str) -> dict:
    "What was measured when the artifact `cold_mnist` or `cold_emoji` was made."
    make, section = {"cold_mnist": (train_cold_mnist, "25_cold.mnist"), "cold_emoji": (train_cold_emoji, "25_cold.emoji")}[name]  # fmt: skip
    return artifact(name, make, settings(section, ColdRecipe))[1]["metrics"]
