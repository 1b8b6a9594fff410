"""The model of emoji: pictures drawn from captions, and the judge of its drawings."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffusion_nb.denoisers import NetDenoiser
from diffusion_nb.emoji import Emoji, bag_of_words, emoji, vocabulary
from diffusion_nb.experiments.judge import JudgeRecipe
from diffusion_nb.experiments.pictures import Residual, halved, shifted
from diffusion_nb.recipes.diffusion import Recipe, chosen, recipe_trainer
from diffusion_nb.training.trainer import Trainer


class BagOfWords(nn.Module):
    "Reads captions for a U-Net: how often each of its `words` is in one ↦ `width` numbers; a row of zeros means any caption."

    def __init__(self, words: Sequence[str], width: int, hidden: int):
        super().__init__()
        self.words = tuple(words)
        self.layers = nn.Sequential(nn.Linear(len(words), hidden), nn.SiLU(), nn.Linear(hidden, width))

    def forward(self, y: Float[Tensor, "n V"]) -> Float[Tensor, "n e"]:
        return self.layers(y)

    def told(self, captions: Sequence[str]) -> Float[Tensor, "n V"]:
        "The captions as this module reads them. Raises ValueError for words that it does not know, and offers the nearest."
        return bag_of_words(captions, self.words)

    def check_y(self, y: Tensor) -> None:
        "Raise ValueError unless y counts these words."
        if y.ndim != 2 or y.shape[1] != len(self.words) or not y.is_floating_point():
            raise ValueError(f"y: expected the counts of {len(self.words)} words for each picture; got {y.dtype} {tuple(y.shape)}")  # fmt: skip


@dataclass(frozen=True)
class EmojiRecipe(Recipe):
    "The model of emoji, and its training; hidden: the width within the layers that read the words."

    data: str = "emoji"
    width: int = 32
    mults: tuple[int, ...] = (1, 2, 4)
    attention: tuple[int, ...] = (2,)
    classes: int = 0
    patch: int = 2
    hidden: int = 256
    steps: int = 13_000
    lr: float = 0.002
    warmup: int = 200
    ema: float = 0.999


def caption_denoiser(r: EmojiRecipe, words: Sequence[str]) -> NetDenoiser:
    "The fresh network, which reads these words."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(r.seed)
        reader = BagOfWords(words, 4 * r.width, r.hidden)
    schedule, predict, _ = chosen(r)
    return NetDenoiser(r.network(3, scale_shift=True, condition=reader), schedule(), predict)


def emoji_trainer(r: EmojiRecipe, data: Emoji, **options) -> Trainer:
    "The trainer of the model: the pictures of the training split, once as they are, and once mirrored where that has the same caption."
    words = vocabulary(data.captions)
    kept = data.train.nonzero()[:, 0]
    x, mirrors = data.x[kept], data.mirrors[kept, None, None, None]
    y = bag_of_words([data.captions[i] for i in kept], words)
    cond = dict(cond={"y": y.repeat(2, 1)}, null=torch.zeros(len(words)))
    return recipe_trainer(r, torch.cat([x, torch.where(mirrors, x.flip(3), x)]), denoiser=caption_denoiser(r, words), **cond, **options)  # fmt: skip


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
    steps: int = 4000
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
    return halved(judge), judged_emoji(judge.eval(), data)


@torch.no_grad()
def judged_emoji(judge: EmojiJudge, data: Emoji) -> dict[str, float]:
    "The share of right answers on held-out combinations, and on held-out pictures where the question can be asked."
    right, found = answered(data, judge.answers), {}
    for name, held in (("combinations", data.held_combinations), ("pictures", data.held_pictures)):
        logits = judge(data.x[held])
        for q in judge.answers:
            asked = right[q][held] >= 0
            share = (logits[q].argmax(1) == right[q][held])[asked].double().mean().item()
            found[f"{q} of {int(asked.sum())} held-out {name}"] = round(share, 4)
    return found
