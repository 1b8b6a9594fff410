"""Pictures as tokens: the codes of the quantiser of MNIST, written by a transformer of masks (notebook 26)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_nb.codecs import Codec
from diffusion_nb.corruption import MaskTokens, ancestral, kept
from diffusion_nb.data import data_set
from diffusion_nb.experiments.artifacts import artifact
from diffusion_nb.experiments.judge import accuracy_of, mnist_judge
from diffusion_nb.experiments.latent import mnist_codec, rounded
from diffusion_nb.experiments.pictures import from_bytes, in_bytes, trained_on
from diffusion_nb.experiments.reference import features, reference
from diffusion_nb.losses.discrete import mask_loss
from diffusion_nb.metrics.features import frechet_distance
from diffusion_nb.nets.text import TextNet
from diffusion_nb.noise import Noise
from diffusion_nb.recipes.diffusion import Training
from diffusion_nb.recipes.settings import settings
from diffusion_nb.samplers.discrete import Drawn, TokenGuess, noisy_surest, surest
from diffusion_nb.time_samplers import chain_times
from diffusion_nb.training.trainer import Trainer

CODES, SIDE, CLASSES = 256, 7, 10
LENGTH, MASK = SIDE**2, CODES
WAYS = {
    "one code per step, w = 1": dict(steps=LENGTH),
    "8 steps, random places, w = 1": {},
    "8 steps, the surest first, w = 1": dict(rule=surest),
    "8 steps, the surest with noise, w = 0": dict(rule=noisy_surest(4.5), w=0.0),
    "8 steps, the surest with noise, w = 1": dict(rule=noisy_surest(4.5)),
    "8 steps, the surest with noise, w = 2": dict(rule=noisy_surest(4.5), w=2.0),
}  # how pictures are drawn, as `draw_codes` is told


@dataclass(frozen=True)
class CodeRecipe(Training):
    "A transformer of codes that is told a label, and its training."

    width: int = 96
    depth: int = 3
    heads: int = 4
    steps: int = 6000
    lr: float = 0.003
    warmup: int = 200
    ema: float = 0.998
    beta2: float = 0.98

    def fresh(self) -> TextNet:
        "The network, not trained, from the recipe's seed."
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return TextNet(CODES, LENGTH, self.width, self.depth, self.heads, classes=CLASSES)


# pictures and their codes


@torch.no_grad()
def as_codes(codec: Codec, x: Float[Tensor, "n 1 28 28"]) -> Int[Tensor, "n 49"]:
    "The numbers of the codes of pictures, row by row."
    ae = codec.autoencoder
    return torch.cat([ae.quantiser.index(ae.encode(part)).flatten(1) for part in x.split(500)])


@torch.no_grad()
def as_pictures(codec: Codec, codes: Int[Tensor, "n 49"]) -> Float[Tensor, "n 1 28 28"]:
    "The pictures of codes."
    ae = codec.autoencoder
    part_of = lambda part: ae.decode(ae.quantiser.vectors(part.unflatten(1, (SIDE, SIDE)))).clamp(-1, 1)
    return torch.cat([part_of(part) for part in codes.split(500)])


# training


def labelled_loss(net: Callable, x0: Int[Tensor, "b L"], t: Tensor, noise: Tensor, y: Int[Tensor, " b"]) -> Float[Tensor, " b"]:  # fmt: skip
    "`mask_loss` of a network that is told labels."
    return mask_loss(partial(net, y=y), x0, t, noise, corruption=MaskTokens(CODES))


def code_trainer(r: CodeRecipe, codes: Int[Tensor, "n 49"], y: Int[Tensor, " n"], **options) -> Trainer:
    "The trainer of a transformer of codes; one label in ten is left out. options: those of `Trainer`."
    return Trainer(r.fresh(), codes, cond={"y": y}, null=CLASSES, loss=labelled_loss, time_sampler=chain_times(LENGTH), device="cpu",
                   **r.options(), **options)  # fmt: skip


@torch.no_grad()
def code_bits(net: Callable, codes: Int[Tensor, "n 49"], y: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    "The bound on -log2 p(codes | label) of each picture: the mean over all 49 times, of one draw of noise at each."
    noise, times = Noise(range(len(codes)), (LENGTH,)), range(1, LENGTH + 1)
    terms = [labelled_loss(net, codes, torch.full((len(codes),), k / LENGTH), noise(k), y).double() for k in times]
    return torch.stack(terms).mean(0) / math.log(2)


def bits_by_counts(codes: Int[Tensor, "n 49"], y: Int[Tensor, " n"], held: Int[Tensor, "m 49"], y_held: Int[Tensor, " m"]) -> Float[Tensor, " m"]:  # fmt: skip
    "-log2 p of held-out codes, each place by itself: counted in the training pictures of its class, plus a half for each code."
    counts = torch.full((CLASSES, LENGTH, CODES), 0.5, dtype=torch.float64)
    place = torch.arange(LENGTH)
    counts.index_put_((y[:, None], place, codes), torch.ones(codes.shape, dtype=torch.float64), accumulate=True)
    p = counts / counts.sum(-1, keepdim=True)
    return -p[y_held[:, None], place, held].log2().sum(1)


def train_codes(r: CodeRecipe, **options) -> tuple[dict, dict]:
    "A transformer of the codes of MNIST in 8 bits, its bits per picture, and what the judge says of 500 drawings in each of the WAYS."
    data, (codec, *_) = data_set("mnist").load(), mnist_codec("vq")
    codes, held, y = as_codes(codec, data.x), as_codes(codec, data.x_test[:500]), data.y_test[:500]
    net = code_trainer(r, codes, data.y, **options).fit()
    weights = in_bytes(net)
    net.load_state_dict(from_bytes(weights))
    said = {"bits per picture": {
        "held out": code_bits(net.eval(), held, y).mean().item(), "trained on": code_bits(net, codes[:500], data.y[:500]).mean().item(),
        "each place by itself": bits_by_counts(codes, data.y, held, y).mean().item(),
    }}  # fmt: skip
    wanted = torch.arange(500) % CLASSES
    drawn = {name: as_pictures(codec, draw_codes(net, wanted, first=2**20, **way)) for name, way in WAYS.items()}
    drawn = {name: judged(x, wanted) for name, x in drawn.items()}
    drawn |= {"held-out pictures": judged(data.x_test[:500], y), "held-out pictures, encoded and decoded": judged(as_pictures(codec, held), y)}  # fmt: skip
    return weights, rounded(said | drawn) | trained_on()


def judged(x: Float[Tensor, "n 1 28 28"], y: Int[Tensor, " n"]) -> dict[str, float]:
    "The share of pictures that are recognised, and their Fréchet distance from training pictures."
    judge = mnist_judge()
    distance = frechet_distance(features(judge, x), reference("mnist").real.float())
    return {"recognised": accuracy_of(judge, x, y), "Fréchet distance": distance}


def code_net() -> TextNet:
    "The transformer of the codes of MNIST (artifact `mnist_codes`), in eval mode."
    r = settings("26_discrete.codes", CodeRecipe)
    net = r.fresh()
    net.load_state_dict(from_bytes(artifact("mnist_codes", train_codes, r)[0]))
    return net.eval().requires_grad_(False)


def code_card() -> dict:
    "What was measured when the artifact `mnist_codes` was made."
    return artifact("mnist_codes", train_codes, settings("26_discrete.codes", CodeRecipe))[1]["metrics"]


# drawing


def masked_counts(steps: int) -> list[int]:
    "How many of the codes are masked after each step: a quarter of a cosine, and at least one less each time. (MaskGIT)"
    left = [LENGTH]
    for j in range(1, steps + 1):
        left.append(min(left[-1] - 1, int(LENGTH * math.cos(math.pi / 2 * j / steps))))
    return left


def guided(net: TextNet, y: Int[Tensor, " n"], w: float) -> Callable:
    "(codes, t) ↦ logits, (1 + w) times those of the labels less w times those of any label."
    if not w:
        return partial(net, y=y)
    any_label = torch.full_like(y, CLASSES)
    return lambda x, t: (1 + w) * net(x, t, y) - w * net(x, t, any_label)


@torch.no_grad()
def draw_codes(net: TextNet, y: Int[Tensor, " n"], rule: Callable = kept, steps: int = 8, w: float = 1.0, first: int = 0, callback: Callable | None = None) -> Int[Tensor, "n 49"]:  # fmt: skip
    "Codes of pictures of these labels, in so many steps, with guidance weight w; the i-th has seed first + i."
    noise = Noise(range(first, first + len(y)), (LENGTH,))
    guess = TokenGuess(guided(net, y, w), MASK)
    start = torch.full((len(y), LENGTH), MASK)
    ts = torch.tensor(masked_counts(steps), dtype=torch.float64) / LENGTH
    return ancestral(MaskTokens(CODES), Drawn(guess, noise) if rule is kept else guess, start, ts, rule, noise=noise, callback=callback)  # fmt: skip
