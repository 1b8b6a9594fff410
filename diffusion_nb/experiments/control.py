"""Controls: digits steered by strokes, emoji coloured from their outlines (notebook 23)."""

from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffusion_nb.data import digits
from diffusion_nb.denoisers import Clip, Denoiser, NetDenoiser
from diffusion_nb.emoji import Emoji, emoji
from diffusion_nb.experiments.artifacts import artifact
from diffusion_nb.experiments.digits import digit_denoiser
from diffusion_nb.experiments.emoji import (
    EmojiJudge,
    Neighbours,
    draw_captions,
    emoji_denoiser,
    emoji_judge,
    emoji_model,
    training_pictures,
    twins,
)
from diffusion_nb.experiments.judge import accuracy_of, digit_judge
from diffusion_nb.experiments.pictures import trained_on
from diffusion_nb.grids import even_logsnr_grid
from diffusion_nb.nets.controlnet import ControlNet, outlines, strokes
from diffusion_nb.nets.unet import UNet
from diffusion_nb.noise import Noise
from diffusion_nb.recipes.captions import CaptionRecipe
from diffusion_nb.recipes.control import ControlRecipe, ControlTraining, control_trainer, controlled
from diffusion_nb.recipes.diffusion import Recipe, recipe, recipe_denoiser
from diffusion_nb.recipes.settings import settings
from diffusion_nb.samplers.linear import dpmpp_2m
from diffusion_nb.training.trainer import Trainer
from diffusion_nb.util.checks import default_device

# emoji, coloured from their outlines


@dataclass(frozen=True)
class EmojiControl(ControlTraining):
    "The control of the model of emoji by outlines; base: the recipe of that model, another of which needs another control."

    steps: int = 1000
    batch: int = 32
    warmup: int = 100
    ema: float = 0.995
    levels: int = 2
    dropped: float = 0.5
    base: CaptionRecipe = CaptionRecipe()


def emoji_control_recipe() -> EmojiControl:
    "The recipe of settings.ini, with that of the model of emoji."
    return replace(settings("control.emoji", EmojiControl), base=settings("recipe.emoji", CaptionRecipe))


def train_emoji_control(r: EmojiControl, **options) -> tuple[dict, dict]:
    """What a control adds to the model of emoji, in float16. options: those of `Trainer`, such as a checkpoint.

    It learns from the training split, as that model did: each picture as it is, and mirrored where that has the same caption.
    """
    data, control = emoji(), controlled(emoji_denoiser(), 1, r.levels)
    (x, captions), reader = training_pictures(data), control.net.label
    options = {"device": default_device()} | options
    trainer = control_trainer(
        r, x, reader.told(captions), denoiser=control, hint=outlines(x), null=reader.null, **options
    )
    trained = trainer.fit().cpu()
    return {k: v.half() for k, v in trained.net.own_state().items()}, trained_on()


def emoji_control() -> NetDenoiser:
    "The model of emoji with its trained control, in eval mode: y counts words, hint is an outline (artifact `control_emoji`, [control.emoji])."
    r = emoji_control_recipe()
    return filled(controlled(emoji_denoiser(), 1, r.levels), artifact("control_emoji", train_emoji_control, r)[0])


def emoji_control_model() -> tuple[NetDenoiser, ControlRecipe]:
    "The same, with the recipe that says what it is."
    (_, base), r = emoji_model(), emoji_control_recipe()
    return emoji_control(), ControlRecipe(
        **asdict(base) | dict(steps=r.steps, batch=r.batch, levels=r.levels, dropped=r.dropped)
    )


def filled(control: NetDenoiser, weights: dict[str, Tensor]) -> NetDenoiser:
    "The control with these weights, in eval mode, without gradients."
    unknown = control.net.load_state_dict(weights, strict=False)
    if unknown.unexpected_keys or any(not k.startswith("base.") for k in unknown.missing_keys):
        raise ValueError("these weights are of another control")
    return control.eval().requires_grad_(False)


def agreement(
    x: Float[Tensor, "n c h w"], hint: Float[Tensor, "n 1 h w"], hint_of=outlines
) -> Float[Tensor, " n"]:
    "How well the hint of a drawing agrees with the one that was asked for: pixels in both, divided by pixels in either."
    a, b = (hint_of(x) > 0.5).flatten(1), (hint > 0.5).flatten(1)
    return (a & b).sum(1) / (a | b).sum(1).clamp(min=1)


MEASURES = ("agreement with the outline", "likeness to the true picture", "true picture nearest", "among the nearest five", "error per pixel")  # fmt: skip


@torch.no_grad()
def seen_by(judge: EmojiJudge, x: Float[Tensor, "n 3 32 32"]) -> Float[Tensor, "n f"]:
    "The judge's features of pictures, of length 1."
    return F.normalize(torch.cat([judge.features(part) for part in x.split(500)]), dim=1)


def measured(data: Emoji, x: Float[Tensor, "n 3 32 32"], which: Int[Tensor, " n"], drawn: Float[Tensor, "n f"], real: Float[Tensor, "m f"]) -> Float[Tensor, " 5"]:  # fmt: skip
    """MEASURES of drawings that are meant to be these emoji; the likeness is the cosine of the judge's features, the error a root mean square.

    drawn, real: the features of the drawings, and of all emoji, as `seen_by` gives them.
    """
    near, want = Neighbours((drawn @ real.T).argsort(1, descending=True)), twins(data, which.tolist())
    lines, alike = agreement(x, outlines(data.x[which])).mean(), (drawn * real[which]).sum(1).mean()
    error = (x.clamp(-1, 1) - data.x[which]).square().mean().sqrt()
    return torch.tensor([lines, alike, near.first(want), near.first(want, 5), error], dtype=torch.float64)


@dataclass(frozen=True)
class EmojiControlTable:
    "Held-out pictures in `groups` of `pictures`, drawn in `steps` steps with and without their outlines; control: how the control was trained."

    weights: tuple[float, ...] = (0.0, 1.0, 3.0)
    groups: int = 3
    pictures: int = 16
    steps: int = 12
    control: EmojiControl = EmojiControl()


def emoji_table_recipe() -> EmojiControlTable:
    "The recipe of settings.ini, with that of the control."
    return replace(settings("control.emoji-table", EmojiControlTable), control=emoji_control_recipe())


def held_out(data: Emoji, r: EmojiControlTable) -> list[Int[Tensor, " n"]]:
    "The groups of held-out pictures: every so many, so that each has some of all kinds."
    held = data.held_pictures.nonzero()[:, 0]
    return [held[g :: r.groups][: r.pictures] for g in range(r.groups)]


def run_emoji_control(r: EmojiControlTable) -> tuple[dict[str, Tensor], dict]:
    """`table` (with outline or without, weight, group, measure); `any` (group, measure): with the outline and no caption.

    `conflict` (weight, group, 3): with the outline of one held-out picture and the caption of another, the agreement with the outline, and the likeness to either.
    """
    data, judge, control = emoji(), emoji_judge(), emoji_control()
    groups, real = held_out(data, r), seen_by(judge, data.x)
    hints, names = [outlines(data.x[g]) for g in groups], [[data.captions[i] for i in g] for g in groups]
    table, conflict, without = (
        torch.zeros(2, len(r.weights), r.groups, 5),
        torch.zeros(len(r.weights), r.groups, 3),
        [],
    )
    for k, (g, hint) in enumerate(zip(groups, hints, strict=True)):
        other, seed = (k + 1) % r.groups, 2**20 + 1000 * k
        for i, w in enumerate(r.weights):
            for j, given in enumerate((hint, None)):
                x = draw_captions(control, names[k], w, r.steps, seed, hint=given)
                table[j, i, k] = measured(data, x, g, seen_by(judge, x), real)
            x = draw_captions(control, names[other], w, r.steps, seed, hint=hint)
            seen = seen_by(judge, x)
            to = [(seen * real[h]).sum(1).mean() for h in (g, groups[other])]
            conflict[i, k] = torch.stack([agreement(x, hint).mean(), *to])
        x = draw_captions(control, [""] * len(g), 0.0, r.steps, seed, hint=hint)
        without.append(measured(data, x, g, seen_by(judge, x), real))
    return {"table": table, "any": torch.stack(without).float(), "conflict": conflict}, {}


# digits, steered by strokes


@dataclass(frozen=True)
class DigitsControl(ControlTraining):
    "Digits steered by strokes, `seeds` times, looked at every `every` steps; base: the recipe of their model."

    steps: int = 300
    batch: int = 64
    levels: int = 0
    every: int = 20
    drawn: int = 100
    seeds: int = 3
    base: Recipe = Recipe()


def digits_control_recipe() -> DigitsControl:
    "The recipe of settings.ini, with that of the model of digits."
    return replace(settings("control.digits", DigitsControl), base=recipe("digits"))


class HintChannels(nn.Module):
    "A network that is given the hint as further channels of its input: the baseline, trained as a whole."

    def __init__(self, net: UNet):
        super().__init__()
        self.net = net

    def check_y(self, y: Tensor | None) -> None:
        self.net.check_y(y)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, hint: Tensor | None = None) -> Tensor:
        return self.net(torch.cat([x, hint], 1), t, y)


KINDS = ("a copy", "a fresh encoder", "a copy, the hint's convolution not zero", "from scratch, hint as a channel")


def start_of(kind: str, r: DigitsControl, seed: int) -> NetDenoiser:
    "One of KINDS before its training."
    base = digit_denoiser()
    torch.manual_seed(seed)
    if kind == KINDS[3]:
        net = HintChannels(UNet(2, r.base.width, r.base.mults, r.base.blocks, r.base.attention, classes=r.base.classes, channels_out=1))  # fmt: skip
        return NetDenoiser(net, base.schedule, base.predict)
    control = controlled(base, 1)
    if kind == KINDS[1]:
        fresh = recipe_denoiser(replace(r.base, seed=seed), (1, 8, 8)).net
        control.net = ControlNet(fresh, 1)
        control.net.base = base.net
    if kind == KINDS[2]:
        control.net.read.reset_parameters()
    return control


@torch.no_grad()
def draw_hinted(denoiser: Denoiser, y: Int[Tensor, " n"], hint: Tensor | None, first: int = 0, calls: int = 10) -> Float[Tensor, "n 1 8 8"]:  # fmt: skip
    "Digits of these labels, with these strokes if any, by `calls` calls of 2M."
    ts = even_logsnr_grid(denoiser.schedule, calls)
    start = denoiser.schedule(ts[0])[1].float() * Noise(torch.arange(len(y)) + first, (1, 8, 8))(0)
    return dpmpp_2m(Clip(denoiser), start, ts, y=y, **({} if hint is None else {"hint": hint}))


def same_strokes(x: Float[Tensor, "n 1 8 8"], hint: Float[Tensor, "n 1 8 8"]) -> float:
    "The share of pixels that are stroke in both or in neither."
    return (strokes(x) == hint).float().mean().item()


def digits_trainer(kind: str, r: DigitsControl, seed: int, hooks=()) -> Trainer:
    "The trainer of one of KINDS; from scratch, with the learning rate of the digits' own recipe."
    data = digits()
    r = replace(r, seed=seed, lr=r.base.lr if kind == KINDS[3] else r.lr)
    start, hint = start_of(kind, r, seed), strokes(data.x)
    return control_trainer(
        r,
        data.x,
        data.y,
        denoiser=start,
        hint=hint,
        null=r.base.classes,
        hooks=hooks,
        log_every=r.every,
        device="cpu",
    )


def run_digits_control(r: DigitsControl) -> tuple[dict[str, Tensor], dict]:
    """`curves` (kind, seed, look, 3): strokes that agree, recognised, and the loss since the last look, in the course of the training, with the weights of that step.

    And the weights of the first seed's control, averaged; the looks are at held-out digits, with the label and the strokes of each.
    """
    data, judge, looks = digits(), digit_judge(), r.steps // r.every
    y, hint = data.y_test[: r.drawn], strokes(data.x_test[: r.drawn])
    curves, weights = torch.zeros(len(KINDS), r.seeds, looks, 3), {}
    for i, kind in enumerate(KINDS):
        for seed in range(r.seeds):

            def look(trainer, i=i, seed=seed):
                if trainer.step % r.every == 0:
                    x = draw_hinted(trainer.denoiser.eval(), y, hint, first=2**20 * (seed + 1))
                    trainer.denoiser.train()
                    said = (
                        same_strokes(x, hint),
                        accuracy_of(judge, x, y),
                        trainer.losses[-1][1] if trainer.losses else 0.0,
                    )
                    curves[i, seed, trainer.step // r.every - 1] = torch.tensor(said)

            trained = digits_trainer(kind, r, seed, [look]).fit()
            if (i, seed) == (0, 0):
                weights = {k: v.half() for k, v in trained.net.own_state().items()}
    return weights | {"curves": curves}, {}


def digits_control() -> tuple[NetDenoiser, Tensor]:
    "The digit model with its control by strokes, in eval mode, and the curves of its training (artifact `control_digits`, [control.digits])."
    weights = dict(artifact("control_digits", run_digits_control, digits_control_recipe())[0])
    curves = weights.pop("curves")
    return filled(controlled(digit_denoiser(), 1), weights), curves
