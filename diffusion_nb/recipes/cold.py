"""Recipes of restorers of blurred pictures, which draw from a blurred nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_nb.corruption import Blur, Restorer, ancestral, kept, restoration_loss
from diffusion_nb.denoisers import Prediction
from diffusion_nb.noise import Noise
from diffusion_nb.recipes.diffusion import NetRecipe
from diffusion_nb.schedules import Schedule
from diffusion_nb.training.trainer import Trainer


@dataclass(frozen=True)
class ColdRecipe(NetRecipe):
    "A restorer and its training. sigma: the noise on top of the corruption."

    steps: int = 500
    lr: float = 0.004
    sigma: float = 0.1


class BlurredNothing(Schedule):
    "(1, sigma) at all times: of what is blurred nothing is taken away, and the noise stays as it is. width: of the blur at t = 1, in pixels."

    def __init__(self, width: float, sigma: float):
        super().__init__()
        self.width, self.sigma = width, sigma

    def coefficients(self, t):
        return torch.ones_like(t), torch.full_like(t, self.sigma)


class ColdModel(Restorer):
    """A restorer of blurred pictures with what drawing starts from: mean and spread of the grey level of each class.

    levels: (classes, channels, 2), with one row where there are no classes; zeros, to be filled, if not given.
    """

    def __init__(self, r: ColdRecipe, shape: Sequence[int], levels: Tensor | None = None):
        channels, size, width = shape
        if size != width:
            raise ValueError(f"shape: expected square pictures; got {size}×{width}")
        super().__init__(r.network(channels), Blur(size, sigma=r.sigma))
        self.schedule = BlurredNothing(self.corruption.width, r.sigma)
        levels = torch.zeros(max(r.classes, 1), channels, 2) if levels is None else levels
        self.register_buffer("levels", levels)

    def start(self, noise: Noise, y: Int[Tensor, " b"] | None) -> Float[Tensor, "b c 1 1"]:
        "A grey level for each picture, of its class."
        mean, spread = self.levels[torch.zeros(len(noise.seeds), dtype=torch.long) if y is None else y].unbind(-1)
        of_channel = Noise(noise.seeds, (mean.shape[1],), mean.device)(2**20)
        return (mean + spread * of_channel)[..., None, None]


def grey_levels(x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"] | None) -> Float[Tensor, "k c 2"]:
    "Mean and spread of the mean level of each channel in the pictures of each class; of all, where there are no classes."
    means = x.mean((2, 3))
    groups = [means] if y is None else [means[y == k] for k in range(int(y.max()) + 1)]
    return torch.stack([torch.stack([m.mean(0), m.std(0)], dim=-1) for m in groups])


def cold_trainer(r: ColdRecipe, x: Float[Tensor, "n c h w"], y: Tensor | None = None, *, denoiser: ColdModel, **options) -> Trainer:  # fmt: skip
    "The trainer of a restorer of blurred pictures x with labels y. options: those of `Trainer`."
    cond = {} if y is None else {"cond": {"y": y}}
    return Trainer(denoiser, x, loss=restoration_loss, **cond, **r.options(), **options)


@torch.no_grad()
def restored(restorer: Restorer, x: Float[Tensor, "b *d"], ts: Float[Tensor, " n"], rule: Callable = kept, noise: Callable | None = None, callback: Callable | None = None, **cond) -> Float[Tensor, "b *d"]:  # fmt: skip
    "From x at time ts[0] along falling times, and the guess at the last of them; of one time, the guess alone."
    if len(ts) > 1:
        x = ancestral(restorer.corruption, restorer, x, ts, rule, noise=noise, callback=callback, **cond)
    return restorer(x, ts[-1], **cond)


@torch.no_grad()
def cold_sample(model: ColdModel, x: Float[Tensor, "b c h w"], ts: Float[Tensor, " n+1"], *, noise: Noise, y: Tensor | None = None, callback: Callable | None = None) -> Float[Tensor, "b c h w"]:  # fmt: skip
    """Pictures from flat ones with noise x on top, guessed and blurred a little less along the falling times ts, by the rule `kept`; the last time is not used: the guess before it is the picture.

    callback: called as callback(i, x, Prediction) after step i, as the samplers of `samplers.linear` do.
    """
    cond = {} if y is None else {"y": y}
    one = torch.ones((), device=x.device)
    told = callback and (lambda i, x, guess: callback(i, x, Prediction(x, one, 0 * one, guess)))
    return restored(model, model.start(noise, y) + x, ts[:-1], noise=noise, callback=told, **cond)
