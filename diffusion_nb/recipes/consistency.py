"""Recipes of consistency models."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

from diffusion_nb.data import Pictures, data_set
from diffusion_nb.denoisers import AsVE, Clip, Guess
from diffusion_nb.grids import edm_grid
from diffusion_nb.losses.consistency import consistency_distillation, consistency_training
from diffusion_nb.recipes.diffusion import recipe_denoiser
from diffusion_nb.recipes.settings import settings
from diffusion_nb.time_samplers import Levels, steady
from diffusion_nb.training.lr import warmup_cosine
from diffusion_nb.training.trainer import Trainer
from diffusion_nb.util.storage import write_atomically

RECIPE = dict(
    data=str,
    levels=int,
    smallest=float,
    largest=float,
    steps=int,
    batch=int,
    lr=float,
    warmup=int,
    ema=float,
    beta2=float,
    seed=int,
)


def consistency_trainer(
    r: dict, pictures: Pictures, f: nn.Module, make_loss: Callable, classes: int = 0, **options
) -> Trainer:
    """The trainer that a recipe describes: `make_loss(levels)` is the loss. options: device, bf16, compile, checkpoint, save_every.

    The recipe's keys are those of RECIPE; the grid has r["levels"] steps, the last one down to 0. With classes, one label in ten becomes "any".
    """
    levels = Levels(steady(edm_grid(f.schedule, r["levels"], r["smallest"], r["largest"])))
    labels = dict(cond={"y": pictures.y}, null=classes) if classes else {}
    return Trainer(f, pictures.x, steps=r["steps"], batch=r["batch"], lr=warmup_cosine(r["lr"], r["warmup"], r["steps"]), time_sampler=levels,
                   loss=make_loss(levels), ema=r["ema"], betas=(0.9, r["beta2"]), seed=r["seed"], **labels, **options)  # fmt: skip


def train_consistency(name: str, teacher_folder: Path | str, distil: bool = True, **options) -> Guess:
    """A one-step model of MNIST or CIFAR-10 from a folder that `diffusion-nb train` wrote, by [consistency.NAME] of settings.ini.

    distil: whether to follow the teacher, or only to start from its weights. options: device, bf16, compile, checkpoint, save_every.
    Writes consistency.safetensors beside the teacher. Raises FileNotFoundError where the folder holds no run.json and model.safetensors.
    """
    r, folder = vars(settings(f"consistency.{name}", **RECIPE)), Path(teacher_folder)
    about = json.loads((folder / "run.json").read_text())
    teacher = recipe_denoiser(about["recipe"], about["shape"])
    teacher.net.load_state_dict(load_file(folder / "model.safetensors"))
    f = Guess(copy.deepcopy(teacher))
    teacher = AsVE(Clip(teacher)).eval().requires_grad_(False)
    make = partial(consistency_distillation, teacher) if distil else consistency_training
    trainer = consistency_trainer(r, data_set(r["data"]).load(), f, make, about["recipe"]["classes"], **options)
    teacher.to(trainer.device)
    f = trainer.fit()
    tensors = {k: v.detach().cpu().contiguous() for k, v in f.denoiser.denoiser.net.state_dict().items()}
    write_atomically(folder / "consistency.safetensors", lambda path: save_file(tensors, path))
    return f
