"""Emoji drawn from free text, by the tokens of a frozen encoder (notebook 21)."""

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, one_hot

from diffusion_nb.codecs import Codec, latents
from diffusion_nb.denoisers import Clip, NetDenoiser
from diffusion_nb.emoji import TONES, Emoji, emoji, share
from diffusion_nb.experiments.artifacts import artifact
from diffusion_nb.experiments.emoji import (
    EmojiJudge,
    answered,
    emoji_denoiser,
    emoji_judge,
    judge_captions,
    share_right,
    training_pairs,
)
from diffusion_nb.experiments.latent import emoji_codec, emoji_latent_shape, rounded
from diffusion_nb.experiments.pictures import by_2m, from_bytes, in_bytes, trained_on
from diffusion_nb.experiments.scenes import SCENES
from diffusion_nb.guidance import CFG, DynamicThreshold
from diffusion_nb.nets.efficient import EfficientUNet
from diffusion_nb.nets.frozen import FrozenTokens, principal
from diffusion_nb.recipes.settings import settings
from diffusion_nb.recipes.text import (
    TextRecipe,
    encoded,
    encoder,
    text_denoiser,
    text_trainer,
)
from diffusion_nb.util.checks import default_device

# texts: what captions can be said as in training, and what is held out of it

TONE = re.compile(rf"\s*\b({'|'.join(sorted(TONES, key=len, reverse=True))}) skin tone")
WITH_TONE = ("a {} with {} skin", "{1} skin {0}", "drawing of a {}, skin tone {}")
PLAIN = ("a {}", "drawing of a {}", "{} emoji")
NEW_WITH_TONE = ("please show me a {} whose skin is {}", "{1}-skinned {0}", "somebody of {1} complexion: a {0}")
SEXES = {"woman": "female", "man": "male"}
NEW_GENDERS = {"woman": "lady", "man": "gentleman"}
NEW_ROLES = {
    "cook": "chef", "health worker": "doctor", "police officer": "cop", "astronaut": "cosmonaut", "artist": "painter", "mage": "sorcerer",
    "technologist": "programmer", "student": "graduate", "teacher": "professor", "scientist": "researcher", "singer": "vocalist",
    "pilot": "aviator", "mechanic": "repairer", "detective": "investigator", "construction worker": "builder", "office worker": "clerk",
    "factory worker": "welder", "judge": "magistrate", "golfing": "playing golf", "biking": "riding a bicycle", "running": "jogging",
}  # fmt: skip


def tone_apart(caption: str) -> tuple[str, str]:
    "The caption without its skin tone, and the tone; two tones, or none, are left where they are."
    found = TONE.findall(caption)
    return (TONE.sub("", caption).strip(), found[0]) if len(found) == 1 else (caption, "")


def phrasings(caption: str) -> tuple[str, str]:
    "Two ways to say a caption that training uses beside it; the caption decides which."
    subject, tone = tone_apart(caption)
    found, frames = [], WITH_TONE if tone else PLAIN
    for k in (0, 1):
        number = int(60 * share(caption))
        first, *rest = subject.split()
        sexed = [SEXES[first], *rest] if (number + k) % 2 and first in SEXES and rest else [first, *rest]
        found.append(frames[(number // 2 + k) % 3].format(" ".join(sexed), tone))
    return tuple(found)


def training_texts(data: Emoji) -> tuple[Float[Tensor, "n 3 s s"], list[str], list[int]]:
    "Training pictures, for each a text, and which picture each belongs to: once its caption and once a phrasing."
    x, which = training_pairs(data)
    half = len(which) // 2
    said = [phrasings(data.captions[i])[k >= half] for k, i in enumerate(which)]
    return x, [data.captions[i] for i in which] + said, 2 * list(range(len(which)))


def paraphrases(data: Emoji, each: int = 60) -> dict[str, tuple[list[str], list[int]]]:
    "Texts that no training text is like, and the emoji that they mean: in new sentences, with new words for man and woman, with new words for what they do."
    found = {"new sentences": [], "new words for gender": [], "new words for roles": []}
    for i, (caption, role, gender, tones) in enumerate(
        zip(data.captions, data.role, data.gender, data.tones, strict=True)
    ):
        if gender not in NEW_GENDERS or len(tones) != 1 or role not in NEW_ROLES:
            continue
        frame = NEW_WITH_TONE[int(300 * share(caption)) % 3]
        found["new sentences"].append((frame.format(f"{gender} {role}", tones[0]), i))
        found["new words for gender"].append((f"a {NEW_GENDERS[gender]} {role} with {tones[0]} skin", i))
        found["new words for roles"].append((f"a {gender} {NEW_ROLES[role]} with {tones[0]} skin", i))
    some = lambda pairs: sorted(pairs, key=lambda pair: share(pair[0]))[:each]
    return {kind: tuple(map(list, zip(*some(pairs), strict=True))) for kind, pairs in found.items()}


# drawing and judging


@torch.no_grad()
def draw_told(codec: Codec, denoiser: NetDenoiser, y: Tensor, w: float = 2.0, steps: int = 20, first: int = 0) -> Float[Tensor, "n 3 64 64"]:  # fmt: skip
    "Pictures of what the network is told, by DPM-Solver++ 2M with guidance weight w, decoded; the i-th has seed `first` + i."
    guided = Clip(CFG(denoiser, w, denoiser.net.context.null) if w else denoiser, -6.0, 6.0)
    z = by_2m(guided, len(y), emoji_latent_shape(), steps, first, batch=100, y=y)
    return torch.cat([codec.decode(part).clamp(-1, 1) for part in z.split(100)])


@torch.no_grad()
def judged_texts(told: Callable, codec: Codec, denoiser: NetDenoiser, kinds: dict[str, tuple[list[str], list[int]]], w: float = 2.0) -> dict[str, dict[str, float]]:  # fmt: skip
    "What the judge of 32×32 emoji says of drawings at half their size; told: texts ↦ what the network reads; kinds: of each, texts and the emoji that they mean."
    judge, small = emoji_judge(), emoji(32)
    drawn = {kind: draw_told(codec, denoiser, told(texts), w, first=2**20) for kind, (texts, _) in kinds.items()}
    return {kind: judge_captions(judge, small, avg_pool2d(x, 2), kinds[kind][1]) for kind, x in drawn.items()}


def held_out(data: Emoji) -> dict[str, tuple[list[str], list[int]]]:
    "Captions and numbers of held-out combinations, of half of the held-out pictures, and of 100 that were trained on."
    trained = data.train.nonzero()[:, 0].tolist()
    kinds = {
        "held-out combinations": data.held_combinations.nonzero()[:, 0].tolist(),
        "held-out pictures": data.held_pictures.nonzero()[::2, 0].tolist(),
        "trained on": trained[:: len(trained) // 100][:100],
    }
    return {kind: ([data.captions[i] for i in which], which) for kind, which in kinds.items()}


# the network


def fit_tokens(reader: FrozenTokens, texts: Sequence[str]) -> None:
    "Give the reader the principal components of the tokens of these texts, rounded to float16, and the tokens themselves."
    texts = sorted(set(texts), key=lambda text: (len(text), text))
    raw = [x[there].clone() for part in in_parts(texts) for x, there in zip(*reader.encode(part), strict=True)]
    mean, basis = principal(torch.cat(raw), reader.basis.shape[1])
    reader.mean, reader.basis = mean.half().float(), basis.half().float()
    reader.known = {text: (x - reader.mean) @ reader.basis for text, x in zip(texts, raw, strict=True)}


def in_parts(texts: Sequence[str], size: int = 100) -> list[list[str]]:
    return [list(texts[i : i + size]) for i in range(0, len(texts), size)]


def packed_text(net: nn.Module) -> dict[str, Tensor]:
    "The weights as `in_bytes` keeps them, the basis of the tokens in float16."
    kept = in_bytes(net)
    del kept["context.basis.scale"]
    return kept | {"context.basis": net.context.basis.half()}


def train_emoji_text(r: TextRecipe, **options) -> tuple[dict, dict]:
    "The model that reads the tokens of the frozen encoder, in 8 bits, and what the judge says in the course of its training and at its end."
    data, codec, course = emoji(64), emoji_codec(), {}
    denoiser = text_denoiser(r, emoji_latent_shape())
    reader, (x, texts, which) = denoiser.net.context, training_texts(data)
    fit_tokens(reader, texts)
    y, reader.known = reader.told(texts), {}

    def look(trainer):
        if trainer.step in r.looks:
            average = trainer.average.eval()
            course[f"after {trainer.step} steps"] = judged_texts(average.net.context.told, codec, average, held_out(data))  # fmt: skip

    trainer = text_trainer(
        r, latents(codec, x)[which], y, denoiser, device=default_device(), hooks=[look], **options
    )
    denoiser = trainer.fit().cpu()
    weights = packed_text(denoiser.net)
    denoiser.net.load_state_dict(from_bytes(weights))
    return weights, rounded(course | judged_everywhere(denoiser.net.context.told, codec, denoiser.eval(), data)) | trained_on()  # fmt: skip


def judged_everywhere(told: Callable, codec: Codec, denoiser: NetDenoiser, data: Emoji) -> dict:
    "What the judge says of captions at each weight of guidance, and of paraphrases."
    ends = {f"w = {w:g}": judged_texts(told, codec, denoiser, held_out(data), w) for w in (0.0, 2.0, 5.0)}
    return ends | {"paraphrases": judged_texts(told, codec, denoiser, paraphrases(data))}


# what ships: the model, tokens of some texts, so that the book needs no encoder, and what a few sentences are to the encoder

SENTENCES = (
    "a red three left of a blue seven", "a blue seven left of a red three", "a blue three left of a red seven", "a red seven left of a blue three",
    "the weather is lovely today",
)  # fmt: skip
SOME_TEXTS = (
    "a woman firefighter with medium-dark skin", "a lady astronaut", "female cook", "a chef with dark skin", "a cosmonaut with light skin",
    "a sorcerer", "a red apple", "a fruit that is red", "a slice of pizza", "a big smile", "an angry face", "a frog", "a football", "green heart",
    "the flag of ukraine", "a cop with medium skin", "woman firefighter", "firefighter woman", "a man farmer with dark skin", "a lady farmer with dark skin",
)  # fmt: skip


@dataclass(frozen=True)
class SentencesRecipe:
    "The sentences whose tokens are stored."

    texts: tuple[str, ...] = SENTENCES


def store_sentences(r: SentencesRecipe) -> tuple[dict, dict]:
    "The encoder's tokens of some sentences, in float16, one after the other, and how many each has."
    found, there = encoded(list(r.texts))
    return {"tokens": found[there].half(), "lengths": there.sum(1)}, {}


def sentence_tokens() -> dict[str, Float[Tensor, "_ 384"]]:
    "The encoder's tokens of SENTENCES (artifact `minilm_sentences`)."
    kept = artifact("minilm_sentences", store_sentences, SentencesRecipe())[0]
    return dict(zip(SENTENCES, kept["tokens"].float().split(kept["lengths"].tolist()), strict=True))


def without_new_words(texts: Sequence[str]) -> list[str]:
    "The texts without the words for genders and roles that training never saw: the control that tells whether these were read."
    new = "|".join(sorted([*NEW_GENDERS.values(), *NEW_ROLES.values()], key=len, reverse=True))
    return [re.sub(rf"\b({new}) ", "", text) for text in texts]


def some_paraphrases(each: int = 10) -> dict[str, tuple[list[str], list[int]]]:
    "The paraphrases whose tokens are shipped."
    return paraphrases(emoji(32), each)


def store_texts(r: TextRecipe) -> tuple[dict, dict]:
    "The components of the tokens of some texts, in 8 bits, one text after the other, the texts, and how many tokens each has."
    new = [text for said, _ in some_paraphrases().values() for text in said]
    texts = list(dict.fromkeys([*SOME_TEXTS, *new, *without_new_words(new)]))
    tokens = text_model()[0].net.context.tokens(texts)
    scale = torch.cat(tokens).abs().amax(0) / 127
    kept = (torch.cat(tokens) / scale).round().to(torch.int8)
    letters = torch.tensor(list("\n".join(texts).encode()), dtype=torch.uint8)
    return {
        "tokens": kept,
        "scale": scale,
        "lengths": torch.tensor([len(x) for x in tokens]),
        "texts": letters,
    }, {}


def text_recipe() -> TextRecipe:
    return settings("text.emoji", TextRecipe)


def text_model() -> tuple[NetDenoiser, TextRecipe]:
    "The model that reads tokens of the frozen encoder (artifact `emoji_text`), in eval mode, and its recipe."
    r = text_recipe()
    denoiser = text_denoiser(r, emoji_latent_shape())
    denoiser.net.load_state_dict(from_bytes(artifact("emoji_text", train_emoji_text, r)[0]))
    return denoiser.eval().requires_grad_(False), r


def emoji_text_model() -> tuple[NetDenoiser, TextRecipe]:
    "The same; the tokens of SOME_TEXTS and `some_paraphrases` are at hand (artifact `emoji_texts`), for other texts it needs the encoder."
    denoiser, r = text_model()
    kept = artifact("emoji_texts", store_texts, r)[0]
    texts = bytes(kept["texts"].tolist()).decode().split("\n")
    tokens = (kept["tokens"] * kept["scale"]).split(kept["lengths"].tolist())
    denoiser.net.context.known = dict(zip(texts, tokens, strict=True))
    return denoiser, r


def emoji_text() -> NetDenoiser:
    "The model that draws emoji at 64×64 from free text, in latents, in eval mode."
    return emoji_text_model()[0]


def text_scores() -> dict:
    "What the card of `emoji_text` tells."
    return artifact("emoji_text", train_emoji_text, text_recipe())[1]["metrics"]


# large weights of guidance


THRESHOLDS = {"none": lambda guided: guided, "static": Clip, "dynamic": DynamicThreshold}


@dataclass(frozen=True)
class ThresholdsRecipe:
    "Weights of guidance, seeds, and how few of the held-out combinations: one in `every`."

    weights: tuple[float, ...] = (1.0, 2.0, 4.0, 7.0, 15.0)
    seeds: tuple[int, ...] = (1, 2, 3)
    every: int = 12


def run_thresholds(r: ThresholdsRecipe) -> tuple[dict, dict]:
    "Of the model of emoji at 32×32, for each way to hold guesses in range, each weight and each of three seeds: what `measured` tells."
    data, judge, denoiser = emoji(32), emoji_judge(), emoji_denoiser()
    which = data.held_combinations.nonzero()[:, 0].tolist()[:: r.every]
    told = denoiser.net.label.told([data.captions[i] for i in which])
    table = [
        [[measured(judge, data, which, denoiser, way, w, told, seed * 2**20) for seed in r.seeds] for w in r.weights]
        for way in THRESHOLDS.values()
    ]  # fmt: skip
    return {"table": torch.tensor(table)}, {}


@torch.no_grad()
def measured(judge: EmojiJudge, data: Emoji, which: Sequence[int], denoiser: NetDenoiser, way: Callable, w: float, told: Tensor, first: int) -> list[float]:  # fmt: skip
    """Of drawings with guidance weight w, held in range in this way: the share of coordinates beyond ±1.02 in the guesses of the walk before they are held, and in the
    drawings; their contrast, the standard deviation within a picture; the mean of their four corners, which are white; right roles and right tones."""
    guided, outside = CFG(denoiser, w, denoiser.net.label.null), []
    guided.register_forward_hook(lambda module, given, pred: outside.append(beyond(pred.x0)))
    x = by_2m(way(guided), len(told), (3, 32, 32), 20, first, batch=50, y=told)
    seen, right = judge(x.clamp(-1, 1)), answered(data, judge.answers)
    corners, contrast = x.clamp(-1, 1)[:, :, [0, 0, -1, -1], [0, -1, 0, -1]], x.clamp(-1, 1).flatten(1).std(1)
    shares = [share_right(seen[q], right[q][which]) for q in ("role", "tone")]
    return [sum(outside) / len(outside), beyond(x), contrast.mean().item(), corners.mean().item(), *shares]


def beyond(x: Tensor) -> float:
    "The share of coordinates outside [-1.02, 1.02]."
    return (x.abs() > 1.02).double().mean().item()


def thresholds_found() -> Float[Tensor, "way weight seed 6"]:
    "The table of `run_thresholds` (artifact `thresholds`)."
    return artifact("thresholds", run_thresholds, settings("21_imagen.thresholds", ThresholdsRecipe))[0]["table"]


# what can be read off the encoder's vectors


@dataclass(frozen=True)
class ProbeRecipe:
    "The seeds of the splits into fitted and held-out captions."

    seeds: tuple[int, ...] = (0, 1, 2)


def run_probe(r: ProbeRecipe) -> tuple[dict, dict]:
    """Which colour the digit named first has, and the one named last, told by a linear function of one vector: the share right of 400 held-out captions of two digits.

    Rows: the mean of the tokens; the digit's own token; its token before the first layer, which knows nothing of the others. One column a seed.
    """
    found, there = zip(*(encoded([s.caption for s in SCENES[i : i + 100]]) for i in range(0, len(SCENES), 100)), strict=True)  # fmt: skip
    x = torch.cat(found)  # all captions have the same number of tokens
    plain = encoder().norm(encoder().word(encoder().numbers([s.caption for s in SCENES])))
    shares = []
    for seed in r.seeds:
        order = torch.randperm(len(SCENES), generator=torch.Generator().manual_seed(seed))
        ends = []
        for place, colour in ((3, [s.colour for s in SCENES]), (-2, [s.other_colour for s in SCENES])):
            features = (x.mean(1), x[:, place], plain[:, place])
            ends.append([read_off(v[order], torch.tensor(colour)[order], 400) for v in features])
        shares.append(torch.tensor(ends).mean(0))
    return {"shares": torch.stack(shares, 1)}, {}


def read_off(v: Float[Tensor, "n e"], answer: Tensor, held: int) -> float:
    "The share of right answers to the first `held` rows by least squares, with a little ridge, on the others."
    v = torch.cat([v, torch.ones(len(v), 1)], 1).double()
    a, b = v[held:], one_hot(answer[held:]).double()
    weights = torch.linalg.solve(a.T @ a + 1e-3 * len(a) * torch.eye(a.shape[1]).double(), a.T @ b)
    return ((v[:held] @ weights).argmax(1) == answer[:held]).double().mean().item()


def probed() -> Float[Tensor, "3 seeds"]:
    "The table of `run_probe` (artifact `minilm_probe`)."
    return artifact("minilm_probe", run_probe, settings("21_imagen.probe", ProbeRecipe))[0]["shares"]


# what the order of layers costs


@dataclass(frozen=True)
class EfficientRecipe:
    "The network and the batch that are timed, and how often."

    width: int = 32
    size: int = 64
    batch: int = 4
    rounds: int = 5


def time_efficient(r: EfficientRecipe) -> tuple[dict, dict]:
    "How many times as long a step of training takes in the usual order of layers, by the time of one core, both in turn, the best of some rounds."
    x, t, best = torch.randn(r.batch, 3, r.size, r.size), torch.full((r.batch,), 500.0), {}  # fmt: skip
    nets = {late: EfficientUNet(3, r.width, late=late) for late in (False, True)}
    for _ in range(r.rounds + 1):
        for late, net in nets.items():
            start = time.process_time()
            net(x, t).square().mean().backward()
            best[late] = min(best.get(late, math.inf), time.process_time() - start)
    return {"seconds": torch.tensor([best[False], best[True]])}, {
        "ratio": round(best[True] / best[False], 2)
    } | asdict(r)


def efficient_scores() -> dict:
    "What the card of `efficient_times` tells."
    return artifact("efficient_times", time_efficient, settings("21_imagen.efficient", EfficientRecipe))[1][
        "metrics"
    ]
