"""Recipes of progressive distillation."""

from dataclasses import dataclass
from pathlib import Path

from diffusion_nb.data import Pictures, data_set
from diffusion_nb.denoisers import Denoiser
from diffusion_nb.recipes.diffusion import recipe, recipe_trainer
from diffusion_nb.recipes.settings import settings
from diffusion_nb.training.distill import distill


@dataclass(frozen=True)
class Distillation:
    "From which recipe's model, from how many steps to how few; the training steps of a student, `last` for those of 4, 2 and 1 steps."

    teacher: str = "digits"
    n_from: int = 64
    n_to: int = 1
    steps: int = 300
    last: int = 1000
    batch: int = 64
    lr: float = 0.0007
    ema: float = 0.99
    beta2: float = 0.99


def distill_pictures(
    r: Distillation,
    teacher: Denoiser,
    pictures: Pictures,
    seed: int = 0,
    folder: Path | str | None = None,
    **options,
) -> dict[int, Denoiser]:
    "The students {n: denoiser} of a teacher of these pictures; the last three, of 4, 2 and 1 steps, get r.last steps each."
    labels = recipe(r.teacher).labelled(pictures.y)
    return distill(teacher, pictures.x, r.n_from, r.n_to, steps=lambda n: r.last if n <= 4 else r.steps, lr=r.lr,
                   folder=folder, seed=seed, batch=r.batch, ema=r.ema, betas=(0.9, r.beta2), **labels, **options)  # fmt: skip


def distill_recipe(name: str, folder: Path | str, **options) -> dict[int, Denoiser]:
    """Train the teacher of [distill.NAME] in settings.ini, then its students, {n: denoiser}.

    folder: holds the checkpoints teacher.safetensors and a student-N.safetensors for each; run again, it goes on where it was.
    options: those of `recipe_trainer`: device, bf16, compile, save_every.
    """
    r = settings(f"distill.{name}", Distillation)
    pictures = data_set(recipe(r.teacher).data).load()
    checkpoint = Path(folder) / "teacher.safetensors"
    teacher = recipe_trainer(recipe(r.teacher), pictures.x, pictures.y, checkpoint=checkpoint, **options).fit()
    return distill_pictures(r, teacher, pictures, folder=folder, **options)
