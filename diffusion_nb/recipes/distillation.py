"""Recipes of progressive distillation."""

from pathlib import Path

from diffusion_nb.data import Pictures, data_set
from diffusion_nb.denoisers import Denoiser
from diffusion_nb.recipes.diffusion import recipe, recipe_trainer
from diffusion_nb.recipes.settings import settings
from diffusion_nb.training.distill import distill

DISTILL = dict(teacher=str, n_from=int, n_to=int, steps=int, last=int, batch=int, lr=float, ema=float, beta2=float)


def distill_pictures(
    r: dict, teacher: Denoiser, pictures: Pictures, seed: int = 0, folder: Path | str | None = None, **options
):
    "The students {n: denoiser} of a teacher of these pictures, as the settings r say; the last three, of 4, 2 and 1 steps, get r['last'] steps each."
    classes = recipe(r["teacher"])["classes"]
    cond = dict(cond={"y": pictures.y}, null=classes) if classes else {}
    return distill(teacher, pictures.x, r["n_from"], r["n_to"], steps=lambda n: r["last"] if n <= 4 else r["steps"], lr=r["lr"],
                   folder=folder, seed=seed, batch=r["batch"], ema=r["ema"], betas=(0.9, r["beta2"]), **cond, **options)  # fmt: skip


def distill_recipe(name: str, folder: Path | str, **options) -> dict[int, Denoiser]:
    """Train the teacher of [distill.NAME] in settings.ini, then its students, {n: denoiser}.

    folder: holds the checkpoints teacher.safetensors and a student-N.safetensors for each; run again, it goes on where it was.
    options: those of `recipe_trainer`: device, bf16, compile, save_every.
    """
    r = vars(settings(f"distill.{name}", **DISTILL))
    pictures = data_set(recipe(r["teacher"])["data"]).load()
    checkpoint = Path(folder) / "teacher.safetensors"
    teacher = recipe_trainer(recipe(r["teacher"]), pictures.x, pictures.y, checkpoint=checkpoint, **options).fit()
    return distill_pictures(r, teacher, pictures, folder=folder, **options)
