"""The model of emoji: pictures drawn from captions, and the judge of its drawings."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffusion_nb.denoisers import Clip, NetDenoiser
from diffusion_nb.emoji import Emoji, emoji, vocabulary
from diffusion_nb.experiments.artifacts import artifact
from diffusion_nb.experiments.judge import JudgeRecipe
from diffusion_nb.experiments.pictures import Residual, by_2m, from_bytes, halved, in_bytes, shifted, trained_on
from diffusion_nb.guidance import CFG
from diffusion_nb.recipes.captions import CaptionRecipe, caption_denoiser, caption_trainer
from diffusion_nb.recipes.settings import settings
from diffusion_nb.training.trainer import Trainer
from diffusion_nb.util.checks import default_device

SOME_CAPTIONS = (
    "red apple", "green apple", "grinning face", "smiling face with sunglasses", "green heart", "thumbs up medium skin tone",
    "woman firefighter dark skin tone", "man astronaut medium skin tone", "woman superhero medium-dark skin tone", "mage light skin tone",
    "couple with heart woman man dark skin tone light skin tone", "flag ukraine", "one o'clock", "pizza", "frog", "soccer ball",
)  # fmt: skip


def train_emoji(r: CaptionRecipe) -> tuple[dict, dict]:
    "The weights of the model of emoji, in 8 bits, with its vocabulary, and what the judge says, in the course of the training and at its end."
    data, judge, course = emoji(), emoji_judge(), {}

    def look(trainer):
        if trainer.step in [r.steps // k for k in (24, 12, 6, 3)]:
            course[f"after {trainer.step} steps"] = judged_model(trainer.average, judge, data)

    denoiser = emoji_trainer(r, data, device=default_device(), hooks=[look]).fit().cpu()
    words = torch.tensor(list("\n".join(denoiser.net.label.words).encode()), dtype=torch.uint8)
    weights = in_bytes(denoiser.net)
    denoiser.net.load_state_dict(from_bytes(weights))
    ends = {f"w = {w:g}": judged_model(denoiser, judge, data, w) for w in (0.0, 1.0, 2.0, 4.0)}
    return weights | {"words": words}, course | ends | trained_on()


def emoji_trainer(r: CaptionRecipe, data: Emoji, **options) -> Trainer:
    "The trainer of the model."
    return caption_trainer(replace(r, words=vocabulary(data.captions)), *training_pictures(data), **options)


def training_pictures(data: Emoji) -> tuple[Float[Tensor, "n 3 s s"], list[str]]:
    "The pictures of the training split, once as they are, and once mirrored where that has the same caption; and the captions."
    x, which = training_pairs(data)
    return x, [data.captions[i] for i in which]


def training_pairs(data: Emoji) -> tuple[Float[Tensor, "n 3 s s"], list[int]]:
    "The pictures of `training_pictures`, and which emoji each is."
    kept = data.train.nonzero()[:, 0]
    x, mirrors = data.x[kept], data.mirrors[kept, None, None, None]
    return torch.cat([x, torch.where(mirrors, x.flip(3), x)]), 2 * kept.tolist()


def emoji_model() -> tuple[NetDenoiser, CaptionRecipe]:
    "The trained model of emoji, which draws from captions (artifact `emoji`, [emoji]), in eval mode, and its recipe with its words."
    r = settings("recipe.emoji", CaptionRecipe)
    weights = dict(artifact("emoji", train_emoji, r)[0])
    r = replace(r, words=tuple(bytes(weights.pop("words").tolist()).decode().split("\n")))
    denoiser = caption_denoiser(r, (3, 32, 32))
    denoiser.net.load_state_dict(from_bytes(weights))
    return denoiser.eval().requires_grad_(False), r


def emoji_denoiser() -> NetDenoiser:
    "The trained model of emoji, in eval mode: y counts words, `draw_captions` draws with it."
    return emoji_model()[0]


# the judge


class EmojiJudge(nn.Module):
    """Tells role, gender, skin tone and group of an emoji: `judge(x)` gives the logits of each question, `judge.features(x)` what they are read from.

    answers: for each question the answers that there are.
    """

    def __init__(self, answers: dict[str, tuple[str, ...]], width: int):
        super().__init__()
        self.answers, w = answers, width
        self.body = nn.Sequential(
            nn.PixelUnshuffle(2), nn.Conv2d(12, w, 3, 1, 1, bias=False), nn.BatchNorm2d(w), nn.ReLU(), Residual(w, w), Residual(w, 2 * w, 2),
            Residual(2 * w, 2 * w), Residual(2 * w, 4 * w, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())  # fmt: skip
        self.heads = nn.ModuleDict({q: nn.Linear(4 * width, len(a)) for q, a in answers.items()})

    def features(self, x: Float[Tensor, "n 3 32 32"]) -> Float[Tensor, "n f"]:
        return self.body(x)

    def forward(self, x: Float[Tensor, "n 3 32 32"]) -> dict[str, Float[Tensor, "n _"]]:
        features = self.features(x)
        return {question: head(features) for question, head in self.heads.items()}


def questions(data: Emoji) -> dict[str, tuple[str, ...]]:
    "What the judge is asked of each emoji, with the answer; 'several' tones are no question to it."
    tone = tuple("several" if len(t) > 1 else t[0] if t else "none" for t in data.tones)
    return {"role": data.role, "gender": data.gender, "tone": tone, "category": data.category}


def known_answers(data: Emoji) -> dict[str, tuple[str, ...]]:
    "The answers that occur in training."
    kept = data.train.tolist()
    found = {q: {a for a, seen in zip(given, kept, strict=True) if seen} for q, given in questions(data).items()}
    return {q: tuple(sorted(answers - {"several"})) for q, answers in found.items()}


def answered(data: Emoji, answers: dict[str, tuple[str, ...]]) -> dict[str, Int[Tensor, " n"]]:
    "The number of the right answer to each question, for each emoji; -100 where it is none of those known."
    places = {q: {a: i for i, a in enumerate(known)} for q, known in answers.items()}
    return {q: torch.tensor([places[q].get(a, -100) for a in given]) for q, given in questions(data).items()}


def disturbed(x: Float[Tensor, "n 3 32 32"], mirrors: Bool[Tensor, " n"], g: torch.Generator) -> Float[Tensor, "n 3 32 32"]:  # fmt: skip
    "The pictures moved by up to three pixels, some mirrored, a little lighter or darker in each colour, and with noise."
    n = len(x)
    x = torch.where((mirrors & (torch.rand(n, generator=g) < 0.5))[:, None, None, None], x.flip(3), x)
    x = shifted(x, torch.randint(0, 7, (2, n), generator=g), border=3)
    gain = 1 + 0.05 * torch.randn(n, 3, 1, 1, generator=g)
    return 1 - gain * (1 - x) + 0.2 * torch.rand(n, 1, 1, 1, generator=g) * torch.randn(x.shape, generator=g)


@dataclass(frozen=True)
class EmojiJudgeRecipe(JudgeRecipe):
    "The judge of emoji, and its training."

    data: str = "emoji"
    width: int = 48
    steps: int = 3000
    batch: int = 64


def train_emoji_judge(r: EmojiJudgeRecipe) -> tuple[dict, dict]:
    "The weights of a judge of emoji, in float16, and its right answers on what was held out."
    data, g = emoji(), torch.Generator().manual_seed(r.seed)
    answers = known_answers(data)
    right, kept = answered(data, answers), data.train.nonzero()[:, 0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(r.seed)
        judge = EmojiJudge(answers, r.width)
    optimizer = torch.optim.AdamW(judge.parameters(), r.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, r.lr, total_steps=r.steps)
    for _ in tqdm(range(r.steps), desc="training the judge", leave=False):
        pick = kept[torch.randint(len(kept), (r.batch,), generator=g)]
        logits = judge(disturbed(data.x[pick], data.mirrors[pick], g))
        loss = sum(F.cross_entropy(logits[q], right[q][pick], label_smoothing=0.05) for q in answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    weights = halved(judge)
    judge.load_state_dict(weights)
    return weights, judged_emoji(judge.eval(), data)


@torch.no_grad()
def judged_emoji(judge: EmojiJudge, data: Emoji) -> dict[str, float]:
    "The share of right answers on held-out combinations, and on held-out pictures where the question can be asked."
    right, found = answered(data, judge.answers), {}
    for name, held in (("combinations", data.held_combinations), ("pictures", data.held_pictures)):
        logits = judge(data.x[held])
        for q in judge.answers:
            asked = int((right[q][held] >= 0).sum())
            found[f"{q} of {asked} held-out {name}"] = round(share_right(logits[q], right[q][held]), 4)
    return found


def emoji_judge() -> EmojiJudge:
    "The judge of emoji (artifact `emoji_judge`, [judge.emoji]), in eval mode; it needs the packages that hold the emoji."
    r = settings("judge.emoji", EmojiJudgeRecipe)
    judge = EmojiJudge(known_answers(emoji()), r.width)
    judge.load_state_dict(artifact("emoji_judge", train_emoji_judge, r)[0])
    return judge.eval().requires_grad_(False)


# the drawings


@torch.no_grad()
def draw_captions(
    denoiser: NetDenoiser,
    captions: Sequence[str],
    w: float = 1.0,
    steps: int = 20,
    first: int = 0,
    batch: int = 100,
    hint: Float[Tensor, "n k 32 32"] | None = None,
) -> Float[Tensor, "n 3 32 32"]:
    """A picture of each caption (an empty one stands for any), by DPM-Solver++ 2M with guidance weight w; the i-th has seed `first` + i.

    hint: what a control is given (notebook 23). Raises ValueError for unknown words.
    """
    reader, cond = denoiser.net.label, {} if hint is None else {"hint": hint}
    null = reader.null.to(next(denoiser.parameters()).device)
    guided = Clip(CFG(denoiser, w, null) if w else denoiser)
    return by_2m(guided, len(captions), (3, 32, 32), steps, first, batch, y=reader.told(captions), **cond).cpu()


class Neighbours(NamedTuple):
    "For each picture: the emoji in order of likeness, by cosine of the judge's features, (n, all)."

    order: Int[Tensor, "n m"]

    def first(self, want: list[set[int]], k: int = 1) -> float:
        "The share of pictures that have one of those wanted among the k nearest."
        return sum(bool(w & set(row[:k].tolist())) for row, w in zip(self.order, want, strict=True)) / len(want)


def neighbours(judge: EmojiJudge, x: Float[Tensor, "n 3 32 32"], data: Emoji) -> Neighbours:
    "The emoji that the judge finds most like each of these pictures."
    seen = lambda pictures: F.normalize(torch.cat([judge.features(part) for part in pictures.split(500)]), dim=1)
    return Neighbours((seen(x) @ seen(data.x).T).argsort(1, descending=True))


def twins(data: Emoji, which: Sequence[int]) -> list[set[int]]:
    "For each of these emoji, all that are drawn alike, itself among them."
    return [set((data.x == data.x[i]).flatten(1).all(1).nonzero()[:, 0].tolist()) for i in which]


@torch.no_grad()
def judge_captions(judge: EmojiJudge, data: Emoji, x: Float[Tensor, "n 3 32 32"], which: Sequence[int]) -> dict[str, float]:  # fmt: skip
    """What the judge says of drawings x that are meant to be these emoji: right answers, and how often the true picture is the nearest.

    A picture that is drawn exactly like the true one counts as the true one.
    """
    logits, right = judge(x), answered(data, judge.answers)
    found = {f"right {q}": share_right(logits[q], right[q][which]) for q in ("role", "gender", "tone")}
    near, want = neighbours(judge, x, data), twins(data, which)
    return found | {"true picture nearest": near.first(want), "among the nearest five": near.first(want, 5)}


def share_right(logits: Float[Tensor, "n k"], right: Int[Tensor, " n"]) -> float:
    "The share of right answers to what can be asked."
    return (logits.argmax(1) == right)[right >= 0].double().mean().item()


def judged_model(denoiser: NetDenoiser, judge: EmojiJudge, data: Emoji, w: float = 2.0) -> dict[str, dict[str, float]]:  # fmt: skip
    "What the judge says of drawings of all held-out combinations and pictures, and of 200 captions that were trained on."
    trained, found = data.train.nonzero()[:, 0].tolist(), {}
    for name, which in (
        ("held-out combinations", data.held_combinations.nonzero()[:, 0].tolist()),
        ("held-out pictures", data.held_pictures.nonzero()[:, 0].tolist()),
        ("trained on", trained[:: len(trained) // 200][:200]),
    ):
        x = draw_captions(denoiser, [data.captions[i] for i in which], w, first=2**20)
        said = judge_captions(judge, data, x, which)
        found[name] = {what: round(value, 4) for what, value in said.items()}
    return found
