"""Averages of weights whose length is chosen after the training."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffusion_nb.denoisers import Denoiser
from diffusion_nb.training.hooks import check_every
from diffusion_nb.training.sharding import whole
from diffusion_nb.training.state import by_dtype
from diffusion_nb.training.trainer import Trainer
from diffusion_nb.util.storage import check_fits, load_tensors, save_tensors


def power_gamma(sigma_rel: float) -> float:
    "The exponent γ of the power profile whose standard deviation is this share of the training, 0 < sigma_rel < 0.2887. (EMA-width)"
    if not 0 < sigma_rel < 12**-0.5:
        raise ValueError(
            f"sigma_rel: expected a width between 0 and 1/√12 = 0.2887, which is that of the plain mean; got {sigma_rel}"
        )
    w = sigma_rel**-2
    return float(np.roots([1, 7, 16 - w, 12 - w]).real.max())


def power_decay(gamma: float, step: int) -> float:
    "β of the update after step 1, 2, …: average ← β average + (1 - β) weights. (EMA-power)"
    return (1 - 1 / step) ** (gamma + 1)


def power_profile(gamma: float, step: int, steps: int) -> Float[Tensor, " steps"]:
    "The share of each step 1 … steps in the average at `step`; float64, sums to 1. (EMA-power)"
    edges = torch.arange(steps + 1, dtype=torch.float64) / step
    return edges.clamp(max=1).pow(gamma + 1).diff()


def profile_product(t: Tensor, gamma: Tensor, s: Tensor, delta: Tensor) -> Tensor:
    "∫ p q dτ of the power profiles p, of exponent gamma at step t, and q, of exponent delta at step s. (EMA-posthoc)"
    m = torch.minimum(t, s)
    return (gamma + 1) * (delta + 1) / (gamma + delta + 1) * (m / t) ** gamma * (m / s) ** delta * m / (t * s)


def snapshot_weights(
    steps: Sequence[int], gammas: Sequence[float], step: int, gamma: float
) -> Float[Tensor, " n"]:
    "How much of each snapshot (its step, its γ) to take, 1 in all, for the average of exponent gamma at `step`: least squares. (EMA-posthoc)"
    t, d, at, want = (torch.as_tensor(v, dtype=torch.float64) for v in (steps, gammas, step, gamma))
    n = len(t)
    system, right = torch.ones(n + 1, n + 1, dtype=torch.float64), torch.ones(n + 1, dtype=torch.float64)
    system[:n, :n], system[n, n] = at * profile_product(t[:, None], d[:, None], t, d), 0
    right[:n] = at * profile_product(t, d, at, want)
    return torch.linalg.lstsq(system, right[:, None], driver="gelsd").solution[:n, 0]


def followed(denoiser: Denoiser) -> dict[str, Tensor]:
    "Parameters and floating-point buffers, such as the statistics of BatchNorm, by name."
    buffers = {name: v for name, v in denoiser.named_buffers() if v.is_floating_point()}
    return dict(denoiser.named_parameters()) | buffers


class PowerEMA(nn.Module):
    """A hook: averages of the weights with power profiles of these widths. (EMA-power)

    Made before the Trainer, whose checkpoints then hold the averages. With a folder, each is written there every `every` steps and at the end, on
    the first process, for `reconstruct`. On every process it keeps whole copies of the weights, even where they are sharded.
    denoiser: the one that is trained. Raises ValueError for widths outside (0, 0.2887), and for another denoiser's training.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        sigma_rels: Sequence[float] = (0.05, 0.1),
        folder: Path | str | None = None,
        every: int = 1000,
    ):
        super().__init__()
        check_every(every)
        self.widths = {s: power_gamma(s) for s in sigma_rels}
        self.folder, self.every = Path(folder) if folder else None, every
        self.names = tuple(followed(denoiser))
        for s in self.widths:
            for name, v in followed(denoiser).items():
                self.register_buffer(self._buffer(s, name), v.detach().clone())

    def _buffer(self, sigma_rel: float, name: str) -> str:
        return f"{sigma_rel}/{name}".replace(".", "/")

    def average(self, sigma_rel: float) -> dict[str, Tensor]:
        "The averaged weights of this width, as they are now. Raises ValueError for one that is not followed."
        if sigma_rel not in self.widths:
            raise ValueError(
                f"sigma_rel: expected a width that is followed, {', '.join(map(str, self.widths))}; got {sigma_rel}; reconstruct mixes others"
            )
        return {name: self.get_buffer(self._buffer(sigma_rel, name)) for name in self.names}

    @torch.no_grad()
    def forward(self, trainer: Trainer) -> None:
        now = followed(trainer.denoiser)
        if tuple(now) != self.names:
            raise ValueError(
                "PowerEMA: made for another denoiser than the one that is trained; expected PowerEMA(denoiser) and Trainer(denoiser, …) of the same"
            )
        values = [whole(v) for v in now.values()]
        for s, gamma in self.widths.items():
            for averages, parts in by_dtype([*self.average(s).values()], values):
                torch._foreach_lerp_(averages, parts, 1 - power_decay(gamma, trainer.step))
        if self.folder and not trainer.rank and (trainer.step % self.every == 0 or trainer.step == trainer.steps):
            for s in self.widths:
                about = dict(step=str(trainer.step), sigma_rel=repr(s))
                save_tensors(self.folder / f"power-{s:g}-{trainer.step:08d}.safetensors", self.average(s), about)


class Snapshot(NamedTuple):
    "An average on disk: of which step, how wide, where."

    step: int
    sigma_rel: float
    path: Path


def snapshots(folder: Path | str) -> list[Snapshot]:
    "The snapshots that `PowerEMA` wrote to a folder, in the order of their steps. Raises FileNotFoundError where there is none, ValueError where one is damaged."
    found = []
    for path in Path(folder).glob("power-*.safetensors"):
        try:
            with safe_open(path, "pt") as f:
                about = f.metadata()
            found.append(Snapshot(int(about["step"]), float(about["sigma_rel"]), path))
        except (SafetensorError, KeyError, TypeError, ValueError) as e:
            raise ValueError(f"{path} is damaged, or was not written by PowerEMA ({e!r}); move it away") from e
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no snapshots: expected power-*.safetensors, which PowerEMA(denoiser, folder=…) writes"
        )
    return sorted(found)


def reconstruct(found: Sequence[Snapshot], sigma_rel: float, step: int | None = None) -> dict[str, Tensor]:
    """The weights that an average of this width would have at `step` (of the last snapshot, if not given), mixed from the snapshots up to there. (EMA-posthoc)

    found: as `snapshots` gives them. They are read one at a time. Raises ValueError where there is none up to `step`, and where they are of different networks.
    """
    if not found:
        raise ValueError("found: expected snapshots, as snapshots(folder) gives them; got none")
    last = max(s.step for s in found)
    step = last if step is None else step
    used = [s for s in found if s.step <= step]
    if not used or step > last:
        raise ValueError(
            f"step: expected one from {min(s.step for s in found)} to {last}, between the first snapshot and the last; got {step}"
        )
    shares = snapshot_weights(
        [s.step for s in used], [power_gamma(s.sigma_rel) for s in used], step, power_gamma(sigma_rel)
    )
    mixed = {}
    for share, snapshot in tqdm(
        list(zip(shares.tolist(), used, strict=True)), desc="mixing", delay=3, leave=False
    ):
        weights = load_tensors(snapshot.path)[0]
        check_fits(mixed or weights, weights, f"{snapshot.path}, mixed with snapshots before it,")
        for name, v in weights.items():
            mixed[name] = mixed.get(name, 0) + share * v.double()
    return {name: v.float() for name, v in mixed.items()}
