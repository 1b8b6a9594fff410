"""Words of five letters as points that are learned, written by normal diffusion (notebook 27)."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_nb.corruption import Gaussian, ancestral, as_uniform, posterior
from diffusion_nb.experiments.artifacts import artifact
from diffusion_nb.experiments.pictures import halved, trained_on
from diffusion_nb.experiments.words import LENGTH, LETTERS, as_tokens, quality, word_list
from diffusion_nb.grids import time_grid
from diffusion_nb.losses.bound import prior_kl
from diffusion_nb.losses.encoded import encoded_bound, token_loss
from diffusion_nb.nets.text import EmbeddedText
from diffusion_nb.noise import Noise
from diffusion_nb.recipes.diffusion import Training
from diffusion_nb.recipes.settings import settings
from diffusion_nb.samplers.discrete import draw
from diffusion_nb.schedules import LinearGamma
from diffusion_nb.training.trainer import Trainer


@dataclass(frozen=True)
class EncoderRecipe(Training):
    """A transformer of words whose letters are points of R^d, and its training.

    first, last: -log SNR at time 0 and 1. unit: whether the points are scaled to mean square 1. prior: whether the prior term is added to the loss.
    short, seeds: steps of the runs that compare the three ways, and how many runs of each, looked at every so many steps.
    """

    d: int = 8
    width: int = 48
    depth: int = 2
    heads: int = 4
    dropout: float = 0.05
    first: float = -5.0
    last: float = 4.0
    unit: bool = True
    prior: bool = False
    steps: int = 6000
    batch: int = 128
    lr: float = 0.005
    ema: float = 0.995
    beta2: float = 0.98
    short: int = 300
    seeds: int = 3
    every: int = 20

    def fresh(self) -> EmbeddedText:
        "The network, not trained, from the recipe's seed."
        schedule = LinearGamma(self.first, self.last).requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return EmbeddedText(LETTERS, LENGTH, schedule, self.d, self.width, self.depth, self.heads, self.dropout, self.unit)  # fmt: skip

    def loss(self, net: EmbeddedText, x0: Int[Tensor, "b L"], t: Tensor, eps: Tensor) -> Float[Tensor, " b"]:
        "Of the letters, at points with noise of their own: eps is shaped like the letters and not read."
        found = token_loss(net, x0, t, torch.randn(*x0.shape, self.d))
        return found + prior_kl(net.schedule, net.encode(x0)) if self.prior else found


ARMS = {"free points": (False, False), "free, with the prior term": (False, True), "scaled to mean square 1": (True, False)}  # fmt: skip


def encoder_trainer(r: EncoderRecipe, x: Int[Tensor, "n L"], **options) -> Trainer:
    "The trainer of a network of words x. options: those of `Trainer`."
    return Trainer(r.fresh(), x, loss=r.loss, device="cpu", **r.options(), **options)


@torch.no_grad()
def mean_over_words(f: Callable, net: EmbeddedText, x: Int[Tensor, "n L"], copies: int = 16, first: int = 0) -> Float[Tensor, " n"]:  # fmt: skip
    "The mean of f(net, x, t, noise) over `copies` evenly spread times for each word; the noise is that of the seeds first, first + 1, …"
    noise = Noise(range(first, first + len(x)), (LENGTH, net.points.shape[1]))
    start = as_uniform(noise(0)[:, 0, 0])
    return torch.stack([f(net, x, ((start + k) / copies).float(), noise(k + 1)).double() for k in range(copies)]).mean(0)  # fmt: skip


def root_mean_square(net: EmbeddedText) -> float:
    return net.embeddings().detach().square().mean().sqrt().item()


def compared(r: EncoderRecipe, x: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    "The size of the points on the way (arm, seed, look), and at the end (arm, seed, 3): loss per word, prior term, bound, in nats, on held-out words."
    sizes, ends = [], []
    for unit, prior in ARMS.values():
        for seed in range(r.seeds):
            arm = replace(r, unit=unit, prior=prior, seed=seed, steps=r.short)
            way = [root_mean_square(arm.fresh())]
            look = lambda trainer, way=way: trainer.step % r.every or way.append(root_mean_square(trainer.denoiser))  # fmt: skip
            net = encoder_trainer(arm, x, hooks=[look]).fit().eval()
            sizes.append(way)
            with torch.no_grad():
                prior_now = prior_kl(net.schedule, net.encode(held)).mean().item()
            ends.append([mean_over_words(token_loss, net, held).mean().item(), prior_now, mean_over_words(encoded_bound, net, held).mean().item()])  # fmt: skip
    shape = (len(ARMS), r.seeds, -1)
    return torch.tensor(sizes).view(shape), torch.tensor(ends).view(shape)


def draw_encoded(net: EmbeddedText, n: int, rule: Callable = posterior, steps: int = 100, first: int = 0) -> Int[Tensor, "n L"]:  # fmt: skip
    "n words: points by a rule of `ancestral`, and at time 0 a letter for each place by its probabilities. The i-th word has seed first + i."
    noise = Noise(range(first, first + n), (LENGTH, net.points.shape[1]))
    with torch.no_grad():
        z = ancestral(Gaussian(net.schedule), net.guess, noise(0), time_grid(steps), rule, noise=noise)
        p = net(z, torch.zeros(())).double().softmax(-1)
    return draw(p, as_uniform(noise(steps + 1)[..., 0]))


def train_encoder(r: EncoderRecipe) -> tuple[dict, dict]:
    "The weights of the network in float16, what the three ways of training led to, and the bounds of the network in bits per word."
    words = word_list()
    x, held = as_tokens(words.train), as_tokens(words.held_out)
    sizes, ends = compared(r, x, held[:200])
    weights = halved(encoder_trainer(r, x).fit())
    weights = {k: v for k, v in weights.items() if not k.startswith("schedule")}
    net = loaded(r, weights)
    said = {"held out": held, "trained on": x[: len(held)]}
    bits = {
        name: round(mean_over_words(encoded_bound, net, w).mean().item() / math.log(2), 3)
        for name, w in said.items()
    }
    shares = quality(draw_encoded(net, 500), words)
    metrics = {"bits per word": bits, "drawn": {k: round(v, 3) for k, v in shares.items()}} | trained_on()
    return weights | {"sizes": sizes, "ends": ends}, metrics


def loaded(r: EncoderRecipe, weights: dict[str, Tensor]) -> EmbeddedText:
    "The network with these weights, in eval mode."
    net = r.fresh()
    net.load_state_dict(weights, strict=False)
    return net.eval().requires_grad_(False)


def encoder_recipe() -> EncoderRecipe:
    return settings("27_unified", EncoderRecipe)


def encoder_results() -> tuple[EmbeddedText, Float[Tensor, "3 seeds looks"], Float[Tensor, "3 seeds 3"], dict]:
    "The network of the artifact `words_encoded`; the sizes of the points and the ends of the three ways, as `compared` returns them; the card's metrics."
    r = encoder_recipe()
    weights, card = artifact("words_encoded", train_encoder, r)
    sizes, ends = weights.pop("sizes"), weights.pop("ends")
    return loaded(r, weights), sizes, ends, card["metrics"]
