"""Students of the model of MNIST: progressive distillation and consistency distillation at 28×28 (notebooks 17 and 18)."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffusion_nb.data import Pictures, data_set
from diffusion_nb.denoisers import Clip, Denoiser, DenoiserConsistency, NetDenoiser, VEView
from diffusion_nb.experiments.artifacts import artifact
from diffusion_nb.experiments.judge import JudgeRecipe, mnist_judge, train_judge
from diffusion_nb.experiments.pictures import mnist_denoiser, trained_on
from diffusion_nb.forward import q_sample
from diffusion_nb.grids import edm_grid, sigma_grid, time_grid
from diffusion_nb.guidance import CFG
from diffusion_nb.losses.consistency import consistency_distillation, heun_step, perceptual
from diffusion_nb.losses.distillation import regression_loss
from diffusion_nb.losses.simple import truncated_snr
from diffusion_nb.metrics.features import frechet_distance
from diffusion_nb.nets.classifier import DigitClassifier
from diffusion_nb.noise import Noise
from diffusion_nb.recipes.consistency import ConsistencyRecipe, consistency_trainer
from diffusion_nb.recipes.settings import settings
from diffusion_nb.samplers.consistency import consistency_sample
from diffusion_nb.samplers.linear import ddim, dpmpp_2m
from diffusion_nb.training.distill import distill
from diffusion_nb.training.lr import linear_decay
from diffusion_nb.training.trainer import Trainer
from diffusion_nb.util.checks import default_device

SHAPE, CALLS = (1, 28, 28), (1, 2, 4)
SIGMAS = {1: (80.0,), 2: (80.0, 0.8), 4: (80.0, 3.0, 1.0, 0.4)}  # where a consistency model of so many calls asks


@dataclass(frozen=True)
class StudentsRecipe:
    """w: the guidance that the first student learns to do in one call. guided, steps, last: training steps of that student, of those of more than 2 calls, and of 2 and 1.

    consistency: training steps of the consistency model, on `levels` levels of noise, with Heun's step and a perceptual distance. groups: groups of 300 drawings.
    """

    w: float = 0.5
    guided: int = 500
    n_from: int = 16
    steps: int = 250
    last: int = 500
    consistency: int = 1000
    levels: int = 18
    batch: int = 64
    lr: float = 0.0005
    consistency_lr: float = 0.0003
    ema: float = 0.99
    groups: int = 3
    seed: int = 0


def one_call(teacher: NetDenoiser, w: float) -> Callable:
    "The objective that teaches a student to guess at once what guidance with weight w guesses from two calls."
    guided = Clip(CFG(teacher, w, 10))

    def loss(denoiser, x0, t, eps, y):
        x_t = q_sample(denoiser.schedule, x0, t, eps)
        with torch.no_grad():
            want = guided(x_t, t, y=y).x0
        return regression_loss(want, denoiser, x_t, t, truncated_snr, y=y)

    return loss


def train_guided_student(r: StudentsRecipe, data: Pictures, **options) -> Denoiser:
    "The model of MNIST, guided with weight r.w, as one network."
    teacher = mnist_denoiser().to(default_device())
    student = copy.deepcopy(teacher).requires_grad_(True)
    return Trainer(student, data.x, steps=r.guided, batch=r.batch, lr=linear_decay(r.lr, r.guided), ema=r.ema, betas=(0.9, 0.99),
                   loss=one_call(teacher, r.w), cond={"y": data.y}, seed=r.seed, **options).fit()  # fmt: skip


def train_few_calls(r: StudentsRecipe, teacher: Denoiser, data: Pictures, **options) -> dict[int, Denoiser]:
    "Progressive distillation of `teacher`: {calls: student}."
    return distill(teacher, data.x, r.n_from, 1, steps=lambda n: r.steps if n > 2 else r.last, lr=r.lr, seed=r.seed, batch=r.batch,
                   ema=r.ema, betas=(0.9, 0.99), cond={"y": data.y}, **options)  # fmt: skip


def train_consistent(r: StudentsRecipe, teacher: Denoiser, data: Pictures, **options) -> nn.Module:
    "Consistency distillation of `teacher` with Heun's step, a perceptual distance by a classifier that is not the judge, and r.levels levels."
    plan = ConsistencyRecipe(data="mnist", levels=r.levels, smallest=0.05, largest=80.0, steps=r.consistency, batch=r.batch,
                             lr=r.consistency_lr, warmup=50, ema=r.ema, seed=r.seed)  # fmt: skip
    eye = DigitClassifier(12, 28)
    eye.load_state_dict(train_judge(JudgeRecipe("mnist", width=12, steps=400, seed=7))[0])
    distance = perceptual(eye.eval().requires_grad_(False).to(default_device()))
    make = partial(consistency_distillation, VEView(Clip(teacher)), step=heun_step, distance=distance)
    f = DenoiserConsistency(copy.deepcopy(teacher).requires_grad_(True))
    return consistency_trainer(plan, data, f, make, **options | {"cond": {"y": data.y}}).fit()


def walks(teacher: Denoiser, w: float, students: dict[int, Denoiser], f: nn.Module) -> dict[str, Callable]:
    "How each draws with n calls: name ↦ (n, noise, y) ↦ pictures. The teacher's guidance takes two calls per step, here counted as one."
    guided = Clip(CFG(teacher, w, 10))

    def solver(sampler, denoiser, grid):
        def draw(n, noise, y):
            ts = grid(n)
            return sampler(denoiser, denoiser.schedule(ts[0])[1].float() * noise(0), ts, y=y)

        return draw

    def consistent(n, noise, y):
        sigmas = SIGMAS[n]
        return consistency_sample(f, sigmas[0] * noise(0), sigma_grid(f.schedule, *sigmas), noise=noise, y=y)

    return {
        "teacher, DDIM": solver(ddim, guided, time_grid),
        "teacher, DPM-Solver++ 2M": solver(dpmpp_2m, guided, lambda n: edm_grid(teacher.schedule, n, 0.02, 80.0)),
        "progressive distillation": lambda n, noise, y: solver(ddim, Clip(students[n]), time_grid)(n, noise, y),
        "consistency distillation": consistent,
    }


def group_scores(judge: nn.Module, real: Tensor, x: Float[Tensor, "n 1 28 28"], y: Int[Tensor, " n"]) -> list[list[float]]:  # fmt: skip
    "(share recognised, Fréchet distance) of each 300 pictures."
    features = judge.features(x)
    right = (judge.head(features).argmax(1) == y).double()
    return [[k.mean().item(), frechet_distance(f, real)] for f, k in zip(features.split(300), right.split(300), strict=True)]  # fmt: skip


@torch.no_grad()
def run_students(r: StudentsRecipe) -> tuple[dict, dict]:
    """The first 20 drawings of each way with 1, 2 and 4 calls, as bytes, and the judge's verdicts: `scores` (ways, calls, groups, 2).

    `held` (groups, 2): the same of held-out digits.
    """
    data, judge, options = data_set("mnist").load(), mnist_judge(), dict(device=default_device())
    with torch.enable_grad():
        teacher = train_guided_student(r, data, **options)
        students = train_few_calls(r, teacher, data, **options)
        f = train_consistent(r, teacher, data, **options)
    ways = walks(mnist_denoiser(), r.w, {n: s.cpu().eval() for n, s in students.items()}, f.cpu().eval())
    y, noise = torch.arange(300 * r.groups) % 10, Noise(torch.arange(300 * r.groups) + 2**20, SHAPE)
    real = torch.cat([judge.features(part) for part in data.x[:10_000].split(500)])
    found, scores = {}, torch.zeros(len(ways), len(CALLS), r.groups, 2)
    for i, (name, draw) in enumerate(ways.items()):
        for j, n in enumerate(CALLS):
            x = draw(n, noise, y).clamp(-1, 1)
            scores[i, j] = torch.tensor(group_scores(judge, real, x, y))
            found[f"{name}.{n}"] = ((x[:20] + 1) * 127.5).round().to(torch.uint8)
    held = torch.tensor(group_scores(judge, real, data.x_test[: len(y)], data.y_test[: len(y)]))
    metrics = {f"{name}, {n} calls": "recognised {:.3f}, Fréchet {:.2f}".format(*scores[i, j].mean(0)) for i, name in enumerate(ways) for j, n in enumerate(CALLS)}  # fmt: skip
    held_out = {"held-out digits": "recognised {:.3f}, Fréchet {:.2f}".format(*held.mean(0))}
    return found | {"scores": scores, "held": held}, metrics | held_out | trained_on()


def mnist_students() -> dict[str, Tensor]:
    "What `run_students` found (artifact `mnist_students`, [mnist_students])."
    return artifact("mnist_students", run_students, settings("mnist_students", StudentsRecipe))[0]
