"""Emoji in three stages, 16×16, 32×32 and 64×64, the first of which reads the caption (notebook 20)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from diffusion_nb.denoisers import Clip, NetDenoiser
from diffusion_nb.emoji import Emoji, emoji, vocabulary
from diffusion_nb.experiments.artifacts import artifact
from diffusion_nb.experiments.cascade import emoji_upsampler, enlarge_emoji
from diffusion_nb.experiments.emoji import emoji_judge, judge_captions, training_pictures
from diffusion_nb.experiments.latent import rounded
from diffusion_nb.experiments.pictures import by_2m, trained_on
from diffusion_nb.guidance import CFG
from diffusion_nb.recipes.captions import CaptionRecipe, caption_trainer
from diffusion_nb.recipes.cascade import UpsamplerRecipe, upsampler_trainer
from diffusion_nb.recipes.settings import settings

SHOWN = 6  # captions whose three pictures are kept


@dataclass(frozen=True)
class ThreeStages:
    "Stage 1 draws 16×16 from captions with guidance weight w in so many calls, stage 2 enlarges from the time s on; stage 3 is the artifact `emoji_upsampler`."

    first: CaptionRecipe = CaptionRecipe(mults=(1, 2), attention=(1,), steps=5000, batch=64, ema=0.998)
    second: UpsamplerRecipe = UpsamplerRecipe(steps=6000)
    w: float = 1.0
    calls: int = 20
    levels: tuple[float, ...] = (0.0, 0.1, 0.25)


def shown(items):
    "SHOWN of them, from the first on, evenly spread."
    return items[:: len(items) // SHOWN][:SHOWN]


def small(x: Float[Tensor, "n 3 32 32"]) -> Float[Tensor, "n 3 16 16"]:
    "The means of 2 × 2 pixels."
    return avg_pool2d(x, 2)


def train_stages(r: ThreeStages, data: Emoji, **options) -> tuple[NetDenoiser, NetDenoiser]:
    "Stages 1 and 2, trained on the training split, in eval mode."
    x, captions = training_pictures(data)
    first = caption_trainer(replace(r.first, words=vocabulary(data.captions)), small(x), captions, device="cpu", **options).fit()  # fmt: skip
    return first.eval(), upsampler_trainer(r.second, x, small(x), device="cpu").fit().eval()


@torch.no_grad()
def draw_first(first: NetDenoiser, captions: Sequence[str], r: ThreeStages, seed: int) -> Float[Tensor, "n 3 16 16"]:  # fmt: skip
    "What stage 1 draws; the i-th picture has seed `seed` + i."
    reader = first.net.label
    guided = Clip(CFG(first, r.w, reader.null))
    return by_2m(guided, len(captions), (3, 16, 16), r.calls, seed, 100, y=reader.told(captions)).clamp(-1, 1)


def run_three_stages(r: ThreeStages, **options) -> tuple[dict, dict]:
    "What the judge says of held-out combinations: true ones, true small ones enlarged, and drawn ones; and SHOWN of the drawn ones at each size, as bytes."
    data, judge = emoji(), emoji_judge()
    first, second = train_stages(r, data, **options)
    which = data.held_combinations.nonzero()[:, 0].tolist()
    drawn = draw_first(first, [data.captions[i] for i in which], r, 2**20)
    low = small(data.x[which])
    made = {
        "true pictures": data.x[which],
        "true 16×16, bicubic": bicubic(low),
        "drawn 16×16, bicubic": bicubic(drawn),
    }
    for name, x in (("true", low), ("drawn", drawn)):
        made |= {f"{name} 16×16, enlarged, s = {s:g}": enlarge_emoji(second, x, s, first=2**20) for s in r.levels}
    some = shown(made[f"drawn 16×16, enlarged, s = {r.levels[1]:g}"])
    large = enlarge_emoji(emoji_upsampler(), some, first=2**20)
    sizes = {16: shown(drawn), 32: some, 64: large}
    said = {name: judge_captions(judge, data, x, which) for name, x in made.items()}
    kept = {f"drawn at {k}": ((x + 1) * 127.5).round().byte() for k, x in sizes.items()}
    return kept, rounded(said) | trained_on()


def bicubic(x: Float[Tensor, "n 3 16 16"]) -> Float[Tensor, "n 3 32 32"]:
    return interpolate(x, scale_factor=2.0, mode="bicubic").clamp(-1, 1)


def shown_captions(data: Emoji) -> list[str]:
    "The captions whose pictures are kept."
    return [data.captions[i] for i in shown(data.held_combinations.nonzero()[:, 0].tolist())]


def three_stages() -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    "What `run_three_stages` kept and found (artifact `three_stages`, [20_cascade.three])."
    tensors, card = artifact("three_stages", run_three_stages, settings("20_cascade.three", ThreeStages))
    return tensors, card["metrics"]
