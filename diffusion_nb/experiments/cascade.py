"""Cascades: emoji enlarged from 32×32 to 64×64, and digits from 4×4 to 8×8 (notebook 20)."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from diffusion_nb.data import digits
from diffusion_nb.denoisers import Clip, Denoiser, Edited, NetDenoiser
from diffusion_nb.emoji import Emoji, emoji
from diffusion_nb.experiments.artifacts import artifact
from diffusion_nb.experiments.emoji import EmojiJudge, emoji_judge, training_pictures
from diffusion_nb.experiments.evaluation import evaluate
from diffusion_nb.experiments.latent import psnr
from diffusion_nb.experiments.pictures import halved, trained_on
from diffusion_nb.forward import q_sample
from diffusion_nb.grids import even_logsnr_grid, stopped_grid, time_grid
from diffusion_nb.losses.cascade import blurred
from diffusion_nb.metrics.features import frechet_distance
from diffusion_nb.nets.upsampler import enlarged
from diffusion_nb.noise import Noise
from diffusion_nb.recipes.cascade import UpsamplerRecipe, upsampler_denoiser, upsampler_trainer
from diffusion_nb.recipes.diffusion import Recipe, recipe_trainer
from diffusion_nb.recipes.settings import settings
from diffusion_nb.samplers.cascade import upsample
from diffusion_nb.samplers.consistency import super_resolve
from diffusion_nb.samplers.linear import dpmpp_2m
from diffusion_nb.training.trainer import Trainer


def upsampler_of_emoji(r: UpsamplerRecipe, small: Emoji, large: Emoji, **options) -> Trainer:
    "The trainer of the stage that enlarges emoji, on the training split."
    return upsampler_trainer(r, training_pictures(large)[0], training_pictures(small)[0], **options)


def renoised(stage: Denoiser, low: Float[Tensor, "n c h w"], s: float, noise: Tensor) -> Float[Tensor, "n c h w"]:
    "Small pictures, noised to the time s; at 0, they themselves."
    return q_sample(stage.schedule, low, torch.full((len(low),), s), noise) if s else low


def train_emoji_upsampler(r: UpsamplerRecipe, **options) -> tuple[dict, dict]:
    "The weights of the stage that enlarges emoji, in float16, and how it does on held-out pictures. options: those of `Trainer`, such as a checkpoint."
    small, large = emoji(32), emoji(64)
    denoiser = upsampler_of_emoji(r, small, large, **{"device": "cpu"} | options).fit()
    weights = halved(denoiser.net)
    denoiser.net.load_state_dict(weights)
    return weights, judged_upsampler(denoiser.eval(), small, large) | trained_on()


def emoji_upsampler() -> NetDenoiser:
    "The stage that enlarges emoji from 32×32 to 64×64, in eval mode (artifact `emoji_upsampler`, [20_cascade.emoji])."
    r = settings("20_cascade.emoji", UpsamplerRecipe)
    denoiser = upsampler_denoiser(r, 3)
    denoiser.net.load_state_dict(artifact("emoji_upsampler", train_emoji_upsampler, r)[0])
    return denoiser.eval().requires_grad_(False)


def upsampler_scores() -> dict[str, dict[str, float]]:
    "What the card of the artifact says of held-out pictures."
    r = settings("20_cascade.emoji", UpsamplerRecipe)
    return artifact("emoji_upsampler", train_emoji_upsampler, r)[1]["metrics"]


@torch.no_grad()
def enlarge_emoji(
    stage: NetDenoiser, low: Float[Tensor, "n 3 s s"], s: float = 0.1, calls: int = 10, first: int = 0, keep: bool = True, batch: int = 40
) -> Float[Tensor, "n 3 2*s 2*s"]:  # fmt: skip
    "Emoji of twice the size that the stage draws from small ones, which are noised to the time s first; the i-th has seed `first` + i. keep: whether the means of 2 × 2 pixels are those of the small ones."
    ts, drawn, size = even_logsnr_grid(stage.schedule, calls), [], low.shape[-1]
    for part in torch.arange(len(low)).split(batch):
        given = renoised(stage, low[part], s, Noise(first + part, (3, size, size))(2**20))
        held = Edited(Clip(stage), super_resolve(low[part])).eval() if keep else Clip(stage)
        x = upsample(held, given, s, ts, noise=Noise(first + part, (3, 2 * size, 2 * size)))
        drawn.append(x.clamp(-1, 1))
    return torch.cat(drawn)


@torch.no_grad()
def guessed_at_once(stage: NetDenoiser, low: Float[Tensor, "n 3 32 32"]) -> Float[Tensor, "n 3 64 64"]:
    "The stage's guess from nothing but noise and the small picture: the mean of what could belong to it, as the stage sees it."
    x, t = Noise(torch.arange(len(low)), (3, 64, 64))(0), time_grid(1)[0]
    level = torch.zeros(len(low))
    parts = zip(x.split(40), low.split(40), level.split(40), strict=True)
    return torch.cat([Clip(stage)(x, t, low=small, s=s).x0 for x, small, s in parts])


def quarters(x: Float[Tensor, "n 3 64 64"]) -> Float[Tensor, "4*n 3 32 32"]:
    "The four quarters of each picture."
    return torch.cat([part for half in x.chunk(2, 2) for part in half.chunk(2, 3)])


def detail(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    "What is left of pictures without the means of 2 × 2 pixels."
    return x - interpolate(avg_pool2d(x, 2), scale_factor=2.0, mode="nearest")


@torch.no_grad()
def seen_in_quarters(judge: EmojiJudge, x: Float[Tensor, "n 3 64 64"]) -> Float[Tensor, "4*n f"]:
    "The judge's features of the quarters of pictures."
    return torch.cat([judge.features(part) for part in quarters(x).split(200)])


def compared(judge: EmojiJudge, x: Float[Tensor, "n 3 64 64"], true: Float[Tensor, "n 3 64 64"], real: Float[Tensor, "m f"]) -> dict[str, float]:  # fmt: skip
    """Of enlarged pictures: the peak signal-to-noise ratio in decibels; the power of the detail, relative to that of the true pictures; and
    the Fréchet distance of the judge's features of their quarters to those of real ones, `real`."""
    return {
        "PSNR": round(psnr(true, x), 2),
        "detail": round((detail(x).square().sum() / detail(true).square().sum()).item(), 3),
        "Fréchet distance": round(frechet_distance(seen_in_quarters(judge, x), real), 2),
    }


@torch.no_grad()
def judged_upsampler(stage: NetDenoiser, small: Emoji, large: Emoji, n: int = 106) -> dict[str, dict[str, float]]:
    "What is measured on n held-out pictures, enlarged in several ways."
    held, trained = (mask.nonzero()[:, 0] for mask in (large.held_pictures, large.train))
    held, trained = held[:: len(held) // n][:n], trained[:: len(trained) // 1000]
    low, true, judge = small.x[held], large.x[held], emoji_judge()
    real = seen_in_quarters(judge, large.x[trained])
    made = {
        "bilinear": enlarged(low),
        "bicubic": interpolate(low, scale_factor=2.0, mode="bicubic").clamp(-1, 1),
        "one guess": super_resolve(low)(guessed_at_once(stage, low)).clamp(-1, 1),
        "drawn, s = 0, means not kept": enlarge_emoji(stage, low, 0.0, first=2**20, keep=False),
    } | {f"drawn, s = {s:g}": enlarge_emoji(stage, low, s, first=2**20) for s in (0.0, 0.1, 0.25)}
    floor = {
        "the true pictures": {"Fréchet distance": round(frechet_distance(seen_in_quarters(judge, true), real), 2)}
    }
    return {name: compared(judge, x, true, real) for name, x in made.items()} | floor


# digits, from 4×4 to 8×8


@dataclass(frozen=True)
class DigitsCascade:
    """Digits in two stages, `seeds` times: 4×4 from labels, and three stages of 8×8 that enlarge, one for each way to augment the small ones.

    first, second: the recipes. levels: the times to which small digits are noised before they are enlarged. drawn: how many; calls: of each stage.
    """

    first: Recipe = Recipe(width=16, mults=(1,), attention=(), steps=300, lr=0.004, ema=0.99)
    second: UpsamplerRecipe = UpsamplerRecipe(data="digits", width=32, mults=(1,), classes=10, steps=600, batch=64, lr=0.004, ema=0.99)  # fmt: skip
    levels: tuple[float, ...] = (0.0, 0.1, 0.2, 0.35, 0.5)
    seeds: int = 3
    drawn: int = 300
    calls: int = 12


WAYS = ("none", "noise", "blur")


def halved_digits(x: Float[Tensor, "n 1 8 8"]) -> Float[Tensor, "n 1 4 4"]:
    "The means of 2 × 2 pixels."
    return avg_pool2d(x, 2)


def digit_stages(r: DigitsCascade, seed: int) -> tuple[NetDenoiser, list[NetDenoiser]]:
    "Stage 1, and a stage 2 for each of WAYS, trained with this seed, in eval mode, their guesses held within [-1, 1]."
    data = digits()
    low, ways = halved_digits(data.x), (clean, None, blurred)
    first = recipe_trainer(replace(r.first, seed=seed), low, data.y, device="cpu").fit()
    second = [upsampler_trainer(replace(r.second, seed=seed), data.x, low, data.y, augment_low=way, device="cpu").fit() for way in ways]  # fmt: skip
    return Clip(first.eval()), [Clip(stage.eval()) for stage in second]


def clean(low: Float[Tensor, "b *d"]) -> tuple[Tensor, Float[Tensor, " b"]]:
    "(low, 0): no augmentation, the control."
    return low, torch.zeros(len(low), device=low.device)


@torch.no_grad()
def small_digits(first: Denoiser, y: Int[Tensor, " n"], seed: int, calls: int, s: float = 0.0) -> Float[Tensor, "n 1 4 4"]:  # fmt: skip
    "Digits of stage 1, stopped at the time s."
    noise = Noise(torch.arange(len(y)) + 2**20 * (seed + 1), (1, 4, 4))
    ts = even_logsnr_grid(first.schedule, calls)
    return dpmpp_2m(first, first.schedule(ts[0])[1].float() * noise(0), stopped_grid(ts, s), y=y)


def enlarge_digits(second: Denoiser, low: Float[Tensor, "n 1 4 4"], y: Tensor, s: float, seed: int, calls: int) -> Float[Tensor, "n 1 8 8"]:  # fmt: skip
    "Digits that stage 2 draws from small ones that are noised to the time s, rounded to 17 grey levels."
    noise = Noise(torch.arange(len(low)) + 2**20 * (seed + 1) + 2**19, (1, 8, 8))
    x = upsample(second, low, s, even_logsnr_grid(second.schedule, calls), noise=noise, y=y)
    return (8 * x.clamp(-1, 1)).round() / 8


MEASURED = ("Fréchet distance", "recognised", "variety")


def measured(x: Float[Tensor, "n 1 8 8"], y: Int[Tensor, " n"]) -> Float[Tensor, " 3"]:
    "MEASURED, the mean of groups of 300."
    found = evaluate(x, y)
    return torch.stack([found.frechet, found.recognised, found.variety]).mean(1)


def sweep(r: DigitsCascade, seed: int) -> dict[str, Tensor]:
    """What one seed finds, (…, MEASURED). `generated`, `real`: without augmentation, with blur, then with noise at each level; `truncated`: at each level above 0.

    `pictures`: for the first 10 labels, the small digits and what the three stages make of them.
    """
    first, (plain, noisy, soft) = digit_stages(r, seed)
    data, y = digits(), torch.arange(r.drawn) % 10
    made = small_digits(first, y, seed, r.calls)

    def row(low, y):
        seen = [
            enlarge_digits(plain, low, y, 0.0, seed, r.calls),
            enlarge_digits(soft, low, y, 0.0, seed, r.calls),
        ]
        noise = Noise(torch.arange(len(low)) + 2**20 * (seed + 1) + 2**18, (1, 4, 4))(0)
        return seen + [
            enlarge_digits(noisy, renoised(noisy, low, s, noise), y, s, seed, r.calls) for s in r.levels
        ]

    generated, real = row(made, y), row(halved_digits(data.x_test), data.y_test)
    cut = [small_digits(first, y, seed, r.calls, s) for s in r.levels[1:]]
    truncated = [enlarge_digits(noisy, c, y, s, seed, r.calls) for c, s in zip(cut, r.levels[1:], strict=True)]
    return {
        "generated": torch.stack([measured(x, y) for x in generated]),
        "real": torch.stack([measured(x, data.y_test) for x in real]),
        "truncated": torch.stack([measured(x, y) for x in truncated]),
        "pictures": torch.stack([enlarged_plainly(made), *generated])[:, :10],
    }


def run_digits_cascade(r: DigitsCascade) -> tuple[dict[str, Tensor], dict]:
    "What `sweep` finds, stacked over the seeds, pictures as their grey levels, 0 to 16; and the means."
    found = [sweep(r, seed) for seed in range(r.seeds)]
    return stacked(found)


def stacked(found: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict]:
    "The tables of all seeds, the pictures of the first, and the mean of each table."
    tables = {k: torch.stack([f[k] for f in found]).float() for k in ("generated", "real", "truncated")}
    means = {k: [[round(v, 3) for v in row] for row in table.mean(0).tolist()] for k, table in tables.items()}
    return tables | {"pictures": (8 * (found[0]["pictures"] + 1)).round().to(torch.uint8)}, means


def digits_cascade() -> dict[str, Tensor]:
    "What was found on digits (artifact `cascade_digits`, [20_cascade.digits])."
    return artifact("cascade_digits", run_digits_cascade, settings("20_cascade.digits", DigitsCascade))[0]


def enlarged_plainly(low: Float[Tensor, "n 1 4 4"]) -> Float[Tensor, "n 1 8 8"]:
    "Each pixel as a square of four."
    return low.repeat_interleave(2, 2).repeat_interleave(2, 3)
