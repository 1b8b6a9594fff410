"""CLIPs of scenes of two coloured digits, with captions of exchanged colours or digits as wrong answers and without (notebook 22)."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_nb.experiments.artifacts import artifact
from diffusion_nb.experiments.clip import ClipRecipe, pictures_seen, retrieval, texts_read
from diffusion_nb.experiments.pictures import trained_on
from diffusion_nb.experiments.scenes import EACH, WORDS, Scene, pictures_of_scenes, split_scenes
from diffusion_nb.losses.clip import clip_loss
from diffusion_nb.nets.clip import CLIP, PictureEncoder, TextEncoder
from diffusion_nb.recipes.settings import settings
from diffusion_nb.schedules import CosineSchedule
from diffusion_nb.time_samplers import continuous_times
from diffusion_nb.training.trainer import Trainer

SEEDS = 3
SCORES = ("text of a picture", "picture of a text", "exchanged colours told", "exchanged digits told")


def exchanges(s: Scene) -> tuple[Scene, Scene]:
    "The scene with its colours exchanged, and with its digits."
    return s._replace(colour=s.other_colour, other_colour=s.colour), s._replace(digit=s.other, other=s.digit)


def scene_clip(r: ClipRecipe) -> CLIP:
    "The fresh CLIP of a recipe, of pictures of 16×16 and the words of scenes."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(r.seed)
        text = TextEncoder(r.dim, WORDS, 8, width=r.words)
        return CLIP(PictureEncoder(r.dim, 16, widths=r.widths, patch=r.patch), text, CosineSchedule())


def wrong_texts(clip: CLIP, scenes: Sequence[Scene]) -> Int[Tensor, "n 2 m"]:
    "The captions of the two exchanges of each scene; rows of zeros where they change nothing."
    told = clip.text.reader.told
    own, others = told([s.caption for s in scenes]), zip(*map(exchanges, scenes), strict=True)
    wrong = torch.stack([told([s.caption for s in other]) for other in others], dim=1)
    return wrong * (wrong != own[:, None]).any(-1, keepdim=True)


def train_scene_clip(r: ClipRecipe, **options) -> CLIP:
    "The CLIP, trained on EACH pictures of each scene of the training set; in eval mode."
    clip, scenes = scene_clip(r), split_scenes()[0]
    cond = {
        "y": clip.text.reader.told([s.caption for s in scenes]).repeat(EACH, 1),
        "key": torch.arange(len(scenes)).repeat(EACH),
        "hard": wrong_texts(clip, scenes).repeat(EACH, 1, 1),
    }

    def loss(model, x0, t, eps, *, y, key, hard):
        one = hard[torch.arange(len(hard)), torch.randint(0, 2, (len(hard),))]
        return clip_loss(model, x0, torch.zeros_like(t), eps, y, key, one if r.hard else None)

    x = pictures_of_scenes(scenes * EACH)
    return Trainer(clip, x, loss=loss, cond=cond, time_sampler=continuous_times, device="cpu", **r.options(), **options).fit().eval()  # fmt: skip


@torch.no_grad()
def scores_of_scenes(clip: CLIP, scenes: Sequence[Scene]) -> list[float]:
    "The SCORES of a CLIP: retrieval among the first 256 scenes, and how often a picture goes better with its own caption than with that of an exchange; a tie counts half."
    x, own = pictures_of_scenes(scenes, held_out=True), texts_read(clip, [s.caption for s in scenes])
    seen, wrong = pictures_seen(clip, x), wrong_texts(clip, scenes)
    told = []
    for k in range(2):
        other = clip.text(wrong[:, k])
        better = torch.sign(((seen * own).sum(1) - (seen * other).sum(1)) * (own != other).any(1))
        told.append(((better + 1) / 2)[(wrong[:, k] > 0).any(1)].mean().item())
    return [*retrieval(seen[:256] @ own[:256].T, [{i} for i in range(256)]), *told]


def train_scene_clips(r: ClipRecipe) -> tuple[dict, dict]:
    "The SCORES of held-out scenes (2, SEEDS, 4), without hard wrong answers and with them."
    held = split_scenes()[1]
    found = torch.tensor([[scores_of_scenes(train_scene_clip(replace(r, hard=hard, seed=r.seed + s)), held) for s in range(SEEDS)] for hard in (0, 1)])  # fmt: skip
    said = {f"{name}, {how}": round(v, 4) for how, row in zip(("in-batch", "with exchanged"), found.mean(1).tolist(), strict=True) for name, v in zip(SCORES, row, strict=True)}  # fmt: skip
    return {"scores": found}, said | trained_on()


def scene_clip_scores() -> Float[Tensor, "2 seeds 4"]:
    "What `train_scene_clips` found (artifact `scene_clips`, [22_unclip.scenes])."
    return artifact("scene_clips", train_scene_clips, settings("22_unclip.scenes", ClipRecipe))[0]["scores"]
