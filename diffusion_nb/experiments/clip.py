"""A CLIP of emoji, the prior and the decoder of unCLIP, and guidance by a CLIP (notebook 22)."""

import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_nb.denoisers import Clip, NetDenoiser, predict_x0
from diffusion_nb.emoji import Emoji, emoji, vocabulary, words
from diffusion_nb.experiments.artifacts import artifact
from diffusion_nb.experiments.control import seen_by
from diffusion_nb.experiments.emoji import (
    EmojiJudge,
    draw_captions,
    emoji_denoiser,
    emoji_judge,
    emoji_model,
    judge_captions,
    training_pairs,
)
from diffusion_nb.experiments.pictures import by_2m, halved, shifted, trained_on
from diffusion_nb.grids import edm_grid, time_grid
from diffusion_nb.guidance import CFG, ClassifierGuidance
from diffusion_nb.losses.clip import clip_loss
from diffusion_nb.losses.simple import denoising_loss, ones, snr_plus_one
from diffusion_nb.nets.clip import (
    CLIP,
    Agreement,
    EmbeddingReader,
    PictureEncoder,
    PriorNet,
    TextEncoder,
    at_guess,
)
from diffusion_nb.recipes.captions import CaptionRecipe
from diffusion_nb.recipes.diffusion import Training
from diffusion_nb.recipes.settings import settings
from diffusion_nb.recipes.unclip import draw_vectors, stretched
from diffusion_nb.samplers.linear import ddim, invert, slerp
from diffusion_nb.schedules import CosineSchedule
from diffusion_nb.time_samplers import continuous_times
from diffusion_nb.training.trainer import Trainer
from diffusion_nb.util.checks import default_device

LENGTH = 8  # words in the longest caption


# captions


def shorter(caption: str, gender: str, without: int) -> str:
    "The caption without skin tones (1), without the words for gender (2), or without both (3), where any word is left."
    out = set(gender.split()) | {"and"} if without & 2 and gender else set()
    kept = [w for w in words(caption) if w not in out and not (without & 1 and w.startswith("tone:"))]
    return " ".join(spelled(w) for w in kept) or caption


def spelled(word: str) -> str:
    "A word as captions have it: 'tone:dark' is 'dark skin tone'."
    return f"{word.removeprefix('tone:')} skin tone" if word.startswith("tone:") else word


def reordered(captions: Sequence[str]) -> list[str]:
    "For each caption another one of the same words in another order, such as the couple with exchanged skin tones; an empty text where there is none."
    groups = defaultdict(list)
    for caption in captions:
        groups[tuple(sorted(words(caption)))].append(caption)
    return [next((c for c in groups[tuple(sorted(words(own)))] if c != own), "") for own in captions]


def nameable(data: Emoji, known: Sequence[str]) -> Int[Tensor, " n"]:
    "Which of the held-out emoji have a caption of known words, and are drawn like no other held-out one before them: combinations first."
    held = torch.cat([data.held_combinations.nonzero()[:, 0], data.held_pictures.nonzero()[:, 0]])
    known, seen, found = set(known), set(), []
    for i in held.tolist():
        picture = data.x[i].numpy().tobytes()
        if set(words(data.captions[i])) <= known and picture not in seen:
            found.append(i)
            seen.add(picture)
    return torch.tensor(found)


# CLIP


@dataclass(frozen=True)
class ClipRecipe(Training):
    """A CLIP of emoji and its training. dim: of its space; widths, patch: of the picture's encoder; words: the width of the text's.

    clean: the share of pictures without noise. shorter: the share of captions that go without skin tones, without gender, or without both, each. hard: 1 to add captions of the same words in another order.
    """

    dim: int = 48
    widths: tuple[int, ...] = (48, 48)
    patch: int = 4
    words: int = 48
    clean: float = 0.5
    shorter: float = 0.1
    hard: int = 1
    steps: int = 2400
    batch: int = 128
    lr: float = 0.002
    ema: float = 0.998


def clip_model(r: ClipRecipe, data: Emoji) -> CLIP:
    "The fresh CLIP of a recipe, which knows the words of the training captions."
    known = vocabulary(c for c, kept in zip(data.captions, data.train.tolist(), strict=True) if kept)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(r.seed)
        text = TextEncoder(r.dim, known, LENGTH, words, r.words)
        return CLIP(PictureEncoder(r.dim, widths=r.widths, patch=r.patch), text, CosineSchedule())


def variants(clip: CLIP, data: Emoji, which: Sequence[int]) -> Int[Tensor, "n 4 m"]:
    "The captions of these emoji as `shorter` leaves them, in full first."
    told = clip.text.reader.told
    return torch.stack(
        [told([shorter(data.captions[i], data.gender[i], k) for i in which]) for k in range(4)], dim=1
    )


def chosen_variant(y: Tensor, share: float) -> Tensor:
    "Of the four variants of each caption one: each shorter one in this share of cases."
    u = torch.rand(len(y), device=y.device)
    return y[torch.arange(len(y)), torch.where(u < 3 * share, 1 + (u / share).long().clamp(max=2), 0)]


def keys(data: Emoji, which: Sequence[int]) -> Int[Tensor, " n"]:
    "A number for each of these emoji: equal where they are drawn alike."
    return data.x[list(which)].flatten(1).unique(dim=0, return_inverse=True)[1]


def clip_trainer(r: ClipRecipe, data: Emoji, **options) -> Trainer:
    "The trainer of a CLIP. options: those of `Trainer`."
    clip, (x, which) = clip_model(r, data), training_pairs(data)
    told, orders = (
        clip.text.reader.told,
        dict(zip(which, reordered([data.captions[i] for i in which[: len(which) // 2]]), strict=False)),
    )
    cond = {"y": variants(clip, data, which), "key": keys(data, which), "hard": told([orders[i] for i in which])}

    def loss(model, x0, t, eps, *, y, key, hard):
        t = ((t - r.clean) / (1 - r.clean)).clamp(min=0)
        x0 = shifted(x0, torch.randint(0, 5, (2, len(x0))), border=2)
        return clip_loss(model, x0, t, eps, chosen_variant(y, r.shorter), key, hard if r.hard else None)

    return Trainer(clip, x, loss=loss, cond=cond, time_sampler=continuous_times, **r.options(), **options)


def train_clip(r: ClipRecipe, **options) -> tuple[dict, dict]:
    "The weights of a CLIP, in float16, and what it finds among held-out emoji."
    data = emoji()
    trainer = clip_trainer(r, data, **{"device": default_device()} | options)
    clip = trainer.fit().cpu()
    weights = halved(clip)
    clip.load_state_dict(weights)
    return weights, found_by(clip.eval(), data) | trained_on()


def emoji_clip() -> CLIP:
    "The CLIP of emoji (artifact `emoji_clip`, [22_unclip.clip]), in eval mode."
    r = settings("22_unclip.clip", ClipRecipe)
    clip = clip_model(r, emoji())
    clip.load_state_dict(artifact("emoji_clip", train_clip, r)[0])
    return clip.eval().requires_grad_(False)


@torch.no_grad()
def pictures_seen(clip: CLIP, x: Float[Tensor, "n 3 32 32"], t: Tensor | None = None) -> Float[Tensor, "n d"]:
    "The vectors of pictures, part by part."
    return torch.cat([clip.picture(part, t) for part in x.split(250)])


@torch.no_grad()
def texts_read(clip: CLIP, captions: Sequence[str]) -> Float[Tensor, "n d"]:
    "The vectors of captions. Raises ValueError for unknown words."
    return clip.text(clip.text.reader.told(captions))


def retrieval(scores: Float[Tensor, "n n"], right: list[set[int]]) -> tuple[float, float]:
    "How often the best text of a picture is right, and the best picture of a text; right: which texts are, for each picture."
    hits = [[best in right[i] for i, best in enumerate(s.argmax(1).tolist())] for s in (scores, scores.T)]
    return tuple(sum(h) / len(h) for h in hits)


@torch.no_grad()
def found_by(clip: CLIP, data: Emoji) -> dict[str, float]:
    "Retrieval among 256 held-out emoji, clean and noisy, and how often the order of words is told, among couples of two tones."
    which = nameable(data, clip.text.reader.vocabulary)[:256]
    x, e = data.x[which], texts_read(clip, [data.captions[i] for i in which])
    itself, noise = (
        [{i} for i in range(len(which))],
        torch.randn(x.shape, generator=torch.Generator().manual_seed(0)),
    )
    found = {}
    for t in (0.0, 0.3, 0.6):
        alpha, sigma = (v.float() for v in clip.schedule(torch.tensor(t, dtype=torch.float64)))
        there, back = retrieval(pictures_seen(clip, alpha * x + sigma * noise, torch.tensor(t)) @ e.T, itself)
        found |= {f"texts of pictures, t = {t:g}": there, f"pictures of texts, t = {t:g}": back}
    for name, split in (("held out", ~data.train), ("trained on", data.train)):
        share, n = order_told(clip, data, split)
        found[f"order told, {n} couples {name}"] = share
    return {k: round(v, 4) for k, v in found.items()}


@torch.no_grad()
def order_told(clip: CLIP, data: Emoji, split: Tensor) -> tuple[float, int]:
    "How often the picture of a couple of two skin tones goes better with its caption than with that of exchanged tones; and of how many."
    which = [i for i in split.nonzero()[:, 0].tolist() if len(set(data.tones[i])) > 1]
    own = [data.captions[i] for i in which]
    swapped = [exchanged(c) for c in own]
    c, a, b = pictures_seen(clip, data.x[which]), texts_read(clip, own), texts_read(clip, swapped)
    return ((c * a).sum(1) > (c * b).sum(1)).float().mean().item(), len(which)


def exchanged(caption: str) -> str:
    "The caption of a couple with its two skin tones exchanged."
    found = words(caption)
    i, j = [k for k, w in enumerate(found) if w.startswith("tone:")]
    found[i], found[j] = found[j], found[i]
    return " ".join(map(spelled, found))


# the prior


@dataclass(frozen=True)
class PriorRecipe(Training):
    "The prior of unCLIP and its training. width, depth: of its network; shorter: as in `ClipRecipe`; clip: how that was trained."

    width: int = 128
    depth: int = 3
    shorter: float = 0.15
    steps: int = 4000
    batch: int = 256
    lr: float = 0.001
    clip: ClipRecipe = ClipRecipe()


def prior_denoiser(r: PriorRecipe) -> NetDenoiser:
    "The fresh prior of a recipe: it predicts the clean vector."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(r.seed)
        return NetDenoiser(PriorNet(r.clip.dim, r.width, r.depth, r.clip.dim), CosineSchedule(), predict_x0)


def prior_trainer(r: PriorRecipe, clip: CLIP, data: Emoji, **options) -> Trainer:
    "The trainer of a prior: vectors of training pictures, told the vectors of their captions. options: those of `Trainer`."
    prior, (x, which) = prior_denoiser(r), training_pairs(data)
    told = variants(clip, data, which)
    with torch.no_grad():
        y = torch.stack([clip.text(told[:, k]) for k in range(4)], dim=1)

    def loss(denoiser, x0, t, eps, *, y):
        return denoising_loss(denoiser, x0, t, eps, weight=ones, y=chosen_variant(y, r.shorter))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "x0: pictures are expected")  # coordinates go beyond [-1, 1]
        return Trainer(prior, stretched(pictures_seen(clip, x)), loss=loss, cond={"y": stretched(y)}, null=torch.zeros(4, r.clip.dim),
                       **r.options(), **options)  # fmt: skip


def train_prior(r: PriorRecipe, **options) -> tuple[dict, dict]:
    "The weights of a prior, in float16, and how near to the vectors of held-out pictures it draws."
    clip, data = emoji_clip(), emoji()
    prior = prior_trainer(r, clip, data, **{"device": default_device()} | options).fit().cpu()
    weights = halved(prior.net)
    prior.net.load_state_dict(weights)
    which = nameable(data, clip.text.reader.vocabulary)[:256]
    c, e = pictures_seen(clip, data.x[which]), texts_read(clip, [data.captions[i] for i in which])
    drawn, regressed = draw_vectors(prior.eval(), e), regressed_vectors(prior, e)
    said = {"of the text": e, "drawn": drawn, "regressed": regressed}
    found = {f"cosine with the picture's, {name}": (v * c).sum(1).mean().item() for name, v in said.items()}
    found |= {
        f"cosine with another's, {name}": (v * c.roll(1, 0)).sum(1).mean().item() for name, v in said.items()
    }
    return weights, {k: round(v, 4) for k, v in found.items()} | trained_on()


@torch.no_grad()
def regressed_vectors(prior: NetDenoiser, e: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    "What the prior predicts from noise alone, the mean of the pictures' vectors given the text: not scaled to length 1."
    t = edm_grid(prior.schedule, 1, 0.02, 80.0)[0]
    return prior(torch.zeros_like(e), t, y=stretched(e)).x0 / e.shape[1] ** 0.5


def emoji_prior() -> NetDenoiser:
    "The prior of emoji (artifact `emoji_prior`, [22_unclip.prior]), in eval mode."
    prior = prior_denoiser(prior_recipe())
    prior.net.load_state_dict(artifact("emoji_prior", train_prior, prior_recipe())[0])
    return prior.eval().requires_grad_(False)


def prior_recipe() -> PriorRecipe:
    "The recipe of settings.ini, with that of the CLIP."
    return replace(settings("22_unclip.prior", PriorRecipe), clip=settings("22_unclip.clip", ClipRecipe))


# the decoder


@dataclass(frozen=True)
class DecoderRecipe(Training):
    """The decoder of unCLIP: the model of emoji, frozen, and a small network that tells it a vector instead of words, which is trained.

    hidden: the width of that network; fit: steps in which it first learns to tell what the caption would; base, clip: what it rests on.
    """

    hidden: int = 256
    fit: int = 1500
    steps: int = 500
    batch: int = 32
    lr: float = 0.001
    base: CaptionRecipe = CaptionRecipe()
    clip: ClipRecipe = ClipRecipe()


def decoder_denoiser(r: DecoderRecipe) -> NetDenoiser:
    "The model of emoji, frozen, with a fresh reader of vectors."
    decoder, own = emoji_model()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(r.seed)
        decoder.net.label = EmbeddingReader(r.clip.dim, 4 * own.width, r.hidden)
    return decoder


def fit_reader(
    r: DecoderRecipe, reader: EmbeddingReader, c: Float[Tensor, "n d"], told: Float[Tensor, "n e"]
) -> None:
    "Teach a reader to tell of vectors c what is told in place of them."
    optimizer, g = torch.optim.Adam(reader.parameters(), 0.002), torch.Generator().manual_seed(r.seed)
    for _ in range(r.fit):
        pick = torch.randint(len(c), (256,), generator=g)
        loss = F.mse_loss(reader(c[pick]), told[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def decoder_trainer(r: DecoderRecipe, clip: CLIP, data: Emoji, **options) -> Trainer:
    "The trainer of a decoder: training pictures, told their own vectors. options: those of `Trainer`."
    decoder, (x, which), words_of = decoder_denoiser(r), training_pairs(data), emoji_model()[0].net.label
    c = stretched(pictures_seen(clip, x))
    with torch.no_grad():
        told = torch.cat(
            [words_of(words_of.told([data.captions[i] for i in which])), words_of(words_of.null.expand(700, -1))]
        )
    fit_reader(r, decoder.net.label, torch.cat([c, torch.zeros(700, c.shape[1])]), told)
    loss = partial(denoising_loss, weight=snr_plus_one)
    return Trainer(decoder, x, loss=loss, cond={"y": c}, null=decoder.net.label.null, **r.options(), **options)


def train_decoder(r: DecoderRecipe, **options) -> tuple[dict, dict]:
    "The weights of a decoder's reader, in float16, and its losses."
    trainer = decoder_trainer(r, emoji_clip(), emoji(), **{"device": default_device()} | options)
    reader = trainer.fit().cpu().net.label
    return halved(reader), {"loss": [[k, round(v, 4)] for k, v in trainer.losses[::5]]} | trained_on()


def emoji_decoder() -> NetDenoiser:
    "The decoder of emoji (artifact `emoji_decoder`, [22_unclip.decoder]), in eval mode: y is a vector of the CLIP, `stretched`."
    decoder = decoder_denoiser(decoder_recipe())
    decoder.net.label.load_state_dict(artifact("emoji_decoder", train_decoder, decoder_recipe())[0])
    return decoder.eval().requires_grad_(False)


def decoder_recipe() -> DecoderRecipe:
    "The recipe of settings.ini, with those of the model of emoji and of the CLIP."
    r = settings("22_unclip.decoder", DecoderRecipe)
    return replace(r, base=settings("recipe.emoji", CaptionRecipe), clip=settings("22_unclip.clip", ClipRecipe))


def decode(
    decoder: NetDenoiser, c: Float[Tensor, "n d"], w: float = 1.0, steps: int = 20, first: int = 0
) -> Float[Tensor, "n 3 32 32"]:
    "A picture for each vector, by DPM-Solver++ 2M with guidance weight w; the i-th has seed `first` + i."
    guided = Clip(CFG(decoder, w, decoder.net.label.null) if w else decoder)
    return by_2m(guided, len(c), (3, 32, 32), steps, first, batch=100, y=stretched(c))


# guidance by the CLIP


@dataclass(frozen=True)
class ClipGuidanceTable:
    "Held-out combinations in `groups` of `pictures`, drawn by each kind of guidance in `steps` steps. weights: of CFG; scales: of the CLIP's gradient, in multiples of its own."

    weights: tuple[float, ...] = (0.0, 1.0)
    scales: tuple[float, ...] = (1.0, 4.0)
    groups: int = 3
    pictures: int = 12
    steps: int = 12
    clip: ClipRecipe = ClipRecipe()


MEASURES = ("true picture nearest", "right answers", "likeness to the true picture", "likeness to the nearest emoji", "CLIP's cosine")  # fmt: skip


@torch.no_grad()
def clip_guided(denoiser: NetDenoiser, clip: CLIP, captions: Sequence[str], s: float, told: bool = False, clean: bool = False,
                steps: int = 20, first: int = 0) -> Float[Tensor, "n 3 32 32"]:  # fmt: skip
    """Pictures drawn along the gradient of s times the CLIP's score with their captions.

    told: whether the model is given the caption as well. clean: the CLIP reads the model's guess, as clean, instead of the noisy picture.
    """
    e, reader = texts_read(clip, captions), denoiser.net.label
    y = reader.told(captions) if told else reader.null.expand(len(e), -1)
    score = Agreement(clip, e)
    guide = at_guess(lambda x, t: denoiser(x, t, y=y), score) if clean else score
    return by_2m(Clip(ClassifierGuidance(denoiser, guide, s)), len(e), (3, 32, 32), steps, first, y=y)


def kinds(r: ClipGuidanceTable, denoiser: NetDenoiser, clip: CLIP) -> dict[str, Callable]:
    "For each kind of guidance a function (captions, first seed) ↦ pictures."
    by_weight = {f"CFG, w = {w:g}": partial(draw_captions, denoiser, w=w, steps=r.steps) for w in r.weights}
    by_clip = partial(clip_guided, denoiser, clip, steps=r.steps)
    found = dict(by_weight)
    for s in r.scales:
        found[f"noised CLIP alone, {s:g}"] = partial(by_clip, s=s)
        found[f"noised CLIP and caption, {s:g}"] = partial(by_clip, s=s, told=True)
    last = r.scales[-1]
    return found | {f"clean CLIP at the guess, {last:g}": partial(by_clip, s=last, clean=True)}


@torch.no_grad()
def measured(judge: EmojiJudge, clip: CLIP, data: Emoji, x: Float[Tensor, "n 3 32 32"], which: list[int], real: Float[Tensor, "m f"]) -> Float[Tensor, " 5"]:  # fmt: skip
    "MEASURES of drawings that are meant to be these emoji; likeness: the cosine of the judge's features. real: those of all emoji."
    seen, said = seen_by(judge, x) @ real.T, judge_captions(judge, data, x, which)
    answers = sum(said[f"right {q}"] for q in ("role", "gender", "tone")) / 3
    agrees = (pictures_seen(clip, x) * texts_read(clip, [data.captions[i] for i in which])).sum(1).mean().item()
    alike = seen[torch.arange(len(which)), which].mean().item()
    return torch.tensor(
        [said["true picture nearest"], answers, alike, seen.max(1).values.mean().item(), agrees],
        dtype=torch.float64,
    )


def groups_of(data: Emoji, known: Sequence[str], groups: int, pictures: int) -> list[list[int]]:
    "Held-out combinations in groups, each drawn differently from all others."
    which = [i for i in nameable(data, known).tolist() if data.held_combinations[i]]
    return [which[g::groups][:pictures] for g in range(groups)]


def run_clip_guidance(r: ClipGuidanceTable) -> tuple[dict, dict]:
    "MEASURES of each kind of guidance in each group, (kinds, groups, 5), and of the true pictures, last."
    data, judge, clip, denoiser = emoji(), emoji_judge(), emoji_clip(), emoji_denoiser()
    real, groups = seen_by(judge, data.x), groups_of(data, clip.text.reader.vocabulary, r.groups, r.pictures)
    rows = {name: [] for name in kinds(r, denoiser, clip)}
    for g, which in enumerate(groups):
        captions = [data.captions[i] for i in which]
        for name, draw in kinds(r, denoiser, clip).items():
            x = draw(captions, first=2**21 + 1000 * g)
            rows[name].append(measured(judge, clip, data, x, which, real))
    rows["the true pictures"] = [measured(judge, clip, data, data.x[which], which, real) for which in groups]
    return {"table": torch.stack([torch.stack(v) for v in rows.values()])}, {"rows": list(rows)} | trained_on()


# unCLIP, measured


@dataclass(frozen=True)
class UnclipTable:
    """Held-out combinations in `groups` of `pictures`, drawn by several routes, and edited; roles: those whose names alone are drawn, `draws` times each.

    steps: of each drawing; w: of the decoder; turns: how far a vector is turned towards the difference of two texts; what it rests on: prior, decoder.
    """

    groups: int = 3
    pictures: int = 8
    draws: int = 8
    roles: tuple[str, ...] = ("firefighter", "cook", "student")
    steps: int = 10
    w: float = 1.0
    turns: tuple[float, ...] = (0.0, 0.25, 0.5)
    prior: PriorRecipe = PriorRecipe()
    decoder: DecoderRecipe = DecoderRecipe()


class System(NamedTuple):
    "All parts of unCLIP for emoji, with the model that is told words, and the judge."

    data: Emoji
    clip: CLIP
    prior: NetDenoiser
    decoder: NetDenoiser
    by_words: NetDenoiser
    judge: EmojiJudge


def system() -> System:
    "The parts that come with the book."
    return System(emoji(), emoji_clip(), emoji_prior(), emoji_decoder(), emoji_denoiser(), emoji_judge())


def routes(s: System, r: UnclipTable, which: list[int], first: int) -> dict[str, Float[Tensor, "n 3 32 32"]]:
    "Drawings of held-out emoji: from words, from the vector of the true picture, of the caption, of the mean, of the prior."
    captions = [s.data.captions[i] for i in which]
    c, e = pictures_seen(s.clip, s.data.x[which]), texts_read(s.clip, captions)
    vectors = {
        "prior and decoder": draw_vectors(s.prior, e, first=first),
        "regressed prior and decoder": F.normalize(regressed_vectors(s.prior, e), dim=1),
        "decoder told the caption's vector": e,
        "decoder told the true picture's vector": c,
        "decoder told another picture's vector": c.roll(1, 0),
    }
    drawn = {"model told words": draw_captions(s.by_words, captions, r.w, r.steps, first)}
    return drawn | {name: decode(s.decoder, v, r.w, r.steps, first) for name, v in vectors.items()}


def turned(
    c: Float[Tensor, "n d"], old: Float[Tensor, "n d"], new: Float[Tensor, "n d"], w: float
) -> Float[Tensor, "n d"]:
    "Vectors of pictures turned by the share w of the way towards the difference of two texts' vectors. (Ramesh et al. 2022, section 3.3)"
    return slerp(c, F.normalize(new - old, dim=1), w) if w else c


@torch.no_grad()
def inverted(
    decoder: NetDenoiser, x: Float[Tensor, "n 3 32 32"], c: Float[Tensor, "n d"], steps: int
) -> Float[Tensor, "n 3 32 32"]:
    "The noise from which the decoder draws these pictures from their vectors, deterministically."
    return invert(decoder, x, time_grid(steps, end=0.002).flip(0), y=stretched(c))


@torch.no_grad()
def redrawn(
    decoder: NetDenoiser, noise: Float[Tensor, "n 3 32 32"], c: Float[Tensor, "n d"], steps: int
) -> Float[Tensor, "n 3 32 32"]:
    "The pictures that the decoder draws from this noise, deterministically, by DDIM."
    return ddim(decoder, noise, time_grid(steps, end=0.002), y=stretched(c))


def other_tone(caption: str) -> str:
    "The caption with dark skin for light, and light for dark."
    tone = next(w for w in words(caption) if w.startswith("tone:"))
    other = {
        "light": "dark",
        "medium-light": "medium-dark",
        "medium": "dark",
        "medium-dark": "medium-light",
        "dark": "light",
    }
    return " ".join(spelled("tone:" + other[tone[5:]] if w == tone else w) for w in words(caption))


def edits(s: System, r: UnclipTable, which: list[int]) -> Float[Tensor, "turns 4"]:
    "For each turn towards another skin tone: how often the judge finds the old tone, the new tone, the same role; and the change per pixel."
    old = [s.data.captions[i] for i in which]
    new = [other_tone(c) for c in old]
    x, known = s.data.x[which], s.judge.answers["tone"]
    c, rows = pictures_seen(s.clip, x), []
    noise = inverted(s.decoder, x, c, r.steps)
    for w in r.turns:
        made = redrawn(s.decoder, noise, turned(c, texts_read(s.clip, old), texts_read(s.clip, new), w), r.steps)
        said = s.judge(made)
        tones = [known[k] for k in said["tone"].argmax(1).tolist()]
        hits = [
            sum(t in texts_tone(c) for t, c in zip(tones, captions, strict=True)) / len(which)
            for captions in (old, new)
        ]
        roles = [
            s.judge.answers["role"][k] == s.data.role[i]
            for k, i in zip(said["role"].argmax(1).tolist(), which, strict=True)
        ]
        change = (made.clamp(-1, 1) - x).square().mean().sqrt().item()
        rows.append([*hits, sum(roles) / len(which), change])
    return torch.tensor(rows, dtype=torch.float64)


def texts_tone(caption: str) -> list[str]:
    "The skin tones of a caption."
    return [w[5:] for w in words(caption) if w.startswith("tone:")]


def variety(s: System, r: UnclipTable, role: str, first: int) -> dict[str, list[float]]:
    "Drawings of a role that is named alone: how many skin tones and genders the judge finds, the spread of their vectors, and the share of the role."
    e, found = texts_read(s.clip, [role]).expand(r.draws, -1), {}
    mean = F.normalize(regressed_vectors(s.prior, e), dim=1)
    for name, x in (
        ("prior and decoder", decode(s.decoder, draw_vectors(s.prior, e, first=first), r.w, r.steps, first)),
        ("regressed prior and decoder", decode(s.decoder, mean, r.w, r.steps, first)),
        ("model told words", draw_captions(s.by_words, r.draws * [role], r.w, r.steps, first)),
    ):
        said, c = s.judge(x), pictures_seen(s.clip, x)
        kinds = [len(said[q].argmax(1).unique()) for q in ("tone", "gender")]
        right = (said["role"].argmax(1) == s.judge.answers["role"].index(role)).double().mean().item()
        found[name] = [*kinds, (c - c.mean(0)).square().sum(1).mean().item(), right]
    return found


def nearest_training(data: Emoji, x: Float[Tensor, "n 3 32 32"]) -> Float[Tensor, " n"]:
    "The distance per pixel to the nearest picture of the training split, mirrored ones included."
    real = training_pairs(data)[0].flatten(1)
    return torch.cdist(x.clamp(-1, 1).flatten(1), real).min(1).values / x[0].numel() ** 0.5


@torch.no_grad()
def run_unclip(r: UnclipTable) -> tuple[dict, dict]:
    "MEASURES of each route, (routes, groups, 5); edits (groups, turns, 4); variety (ways, roles, 4); distances to training pictures, of drawings and of the true pictures."
    s = system()
    real, groups = (
        seen_by(s.judge, s.data.x),
        groups_of(s.data, s.clip.text.reader.vocabulary, r.groups, r.pictures),
    )
    rows, edited, near = defaultdict(list), [], []
    for g, which in enumerate(groups):
        for name, x in routes(s, r, which, 2**22 + 1000 * g).items():
            rows[name].append(measured(s.judge, s.clip, s.data, x, which, real))
            if name == "prior and decoder":
                near.append(torch.stack([nearest_training(s.data, x), nearest_training(s.data, s.data.x[which])]))
        edited.append(edits(s, r, [i for i in which if len(s.data.tones[i]) == 1]))
    kinds = defaultdict(list)
    for k, role in enumerate(r.roles):
        for name, row in variety(s, r, role, 2**23 + 1000 * k).items():
            kinds[name].append(row)
    tensors = {
        "routes": torch.stack([torch.stack(v) for v in rows.values()]),
        "edits": torch.stack(edited),
        "variety": torch.tensor(list(kinds.values()), dtype=torch.float64),
        "nearest": torch.cat(near, 1),
    }
    return tensors, {"routes": list(rows), "ways": list(kinds)} | trained_on()


def unclip_recipe() -> UnclipTable:
    "The recipe of settings.ini, with those of its parts."
    return replace(settings("22_unclip.table", UnclipTable), prior=prior_recipe(), decoder=decoder_recipe())


def guidance_recipe() -> ClipGuidanceTable:
    "The recipe of settings.ini, with that of the CLIP."
    return replace(settings("22_unclip.guidance", ClipGuidanceTable), clip=settings("22_unclip.clip", ClipRecipe))


class UnclipNumbers(NamedTuple):
    "What `run_unclip` found, with the names of its rows."

    names: list[str]
    ways: list[str]
    turns: tuple[float, ...]
    routes: Float[Tensor, "routes groups 5"]
    edits: Float[Tensor, "groups turns 4"]
    variety: Float[Tensor, "ways roles 4"]
    nearest: Float[Tensor, "2 n"]


def unclip_table() -> UnclipNumbers:
    "The numbers of the artifact `unclip`, [22_unclip.table]."
    r = unclip_recipe()
    tensors, card = artifact("unclip", run_unclip, r)
    return UnclipNumbers(card["metrics"]["routes"], card["metrics"]["ways"], r.turns, **tensors)


def guidance_table() -> tuple[list[str], Float[Tensor, "kinds groups 5"]]:
    "The names of the kinds of guidance, and the numbers of the artifact `clip_guidance`, [22_unclip.guidance]."
    tensors, card = artifact("clip_guidance", run_clip_guidance, guidance_recipe())
    return card["metrics"]["rows"], tensors["table"]
