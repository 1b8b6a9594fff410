"""Commands that train: train, distill."""

import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from diffusion_nb.cli.folders import check_own
from diffusion_nb.cli.models import device_name
from diffusion_nb.cli.tasks import family_of, task_of


@dataclass
class Train:
    data: str = "digits"
    "Data set, see `diffusion-nb data`; emoji, whose captions are read; words, or a .txt file of short texts, a line each; or a folder of pictures, its subfolders being the classes; or an .npz file (arr_0, labels); or hf:NAME, a data set of the Hugging Face Hub."
    out: str | None = None
    "Folder to write, if not runs/DATA."
    recipe: str | None = None
    "Section [recipe.NAME] of settings.ini, if not that of the data set; [recipe.pictures] for one's own. ([vdm.NAME] and [dit.NAME] with these options.)"
    size: int | None = None
    "Pixels to which the pictures of a folder, or of hf:NAME, are cropped and resized; of emoji 32 or 64."
    from_: Annotated[str | None, arg(name="from")] = None
    "A model to start from: a folder or a file of weights."
    steps: int | None = None
    "Training steps, if not the recipe's."
    batch: int | None = None
    "Pictures per step, if not the recipe's."
    lr: float | None = None
    "Peak learning rate, if not the recipe's."
    width: int | None = None
    "Channels of the network, if not the recipe's."
    seed: int | None = None
    "Of everything, if not the recipe's."
    control: str | None = None
    "Train a control of this model instead (notebook 23), a folder or one that comes with the book: strokes of grey pictures, outlines of those in colour, steer it."
    vdm: bool = False
    "For the bound, on a schedule that is learned (notebook 16); digits or cifar10."
    dit: bool = False
    "A diffusion transformer instead of a U-Net (notebook 24); sections [dit.NAME] of settings.ini. Its --width is a multiple of 4 and of its heads."
    codec: bool = False
    "An autoencoder, whose latents another model can draw (notebook 19); sections [codec.NAME] of settings.ini."
    latent: str | None = None
    "A model of the latents of this codec, a folder that train --codec wrote, or emoji-codec (notebook 19); sections [latent.NAME]."
    text: str | None = None
    "The same, of captioned pictures, by a model that reads the tokens of a frozen text encoder (notebook 21); needs the extra [text]; sections [text.NAME]."
    cold: bool = False
    "A network that takes away blur, and draws from a grey level (notebook 25); sections [25_cold.NAME] of settings.ini."
    upsampler: bool = False
    "A stage that enlarges pictures of half the size, for `sample --large` (notebook 20); sections [20_cascade.NAME]. Of emoji with --size 64."
    minutes: float | None = None
    "Stop after so many minutes; the same command goes on from there."
    every: int = 1000
    "Steps between checkpoints."
    keep: int = 2
    "How many checkpoints to keep."
    grids: int = 0
    "Steps between grids of pictures drawn with the averaged weights; 0: none."
    report: bool = False
    "At the end draw 32 pictures and find the training pictures nearest to them: report.png, and in run.json how near."
    tensorboard: bool = False
    "Log for TensorBoard, too; log.jsonl is written always."
    power_ema: bool = False
    "Keep power-function averages, too: which to use is chosen afterwards (notebook 28)."
    accumulate: int = 1
    "Do a step's pictures in so many parts, where they do not fit into memory at once."
    skip: bool = False
    "Leave out, and count, steps whose gradient is not finite, instead of stopping."
    workers: int = 2
    "Processes that read the pictures of a folder."
    bf16: bool = False
    "bfloat16 autocast, for GPUs."
    compile: bool = False
    "torch.compile the network, for GPUs."
    deterministic: bool = False
    "On a GPU: the same bits in every run, more slowly (on a CPU they always are)."
    shard: bool = False
    "With several processes: divide the weights among them, too (FSDP2)."
    device: str | None = None
    "cpu or cuda; if not given, the GPU if there is one."


def watchers(args: Train, out: Path, denoiser, shape, classes: int, device) -> list:
    "What looks on as a model is trained: the log, and what the options ask for."
    import torch

    from diffusion_nb.training.ema import PowerEMA
    from diffusion_nb.training.hooks import JsonLogger, SampleGrids, TensorBoard, Throughput, fixed_draws
    from diffusion_nb.util.profiling import matrix_peak

    hooks = [
        JsonLogger(out / "log.jsonl"),
        Throughput(matrix_peak(device, torch.bfloat16 if args.bf16 else torch.float32)),
    ]
    board = [TensorBoard(out / "tensorboard")] if args.tensorboard else []
    if args.grids:
        draw = fixed_draws(shape, 8 * classes or 64, classes)
        hooks.append(SampleGrids(out / "grids", draw, args.grids, 8, *board))
    if args.power_ema:
        hooks.append(PowerEMA(denoiser, folder=out / "power", every=args.every))
    return hooks + board


def prepared(args: Train, team, out: Path):
    "The trainer of the model that was asked for, what that model is, and the task."
    import torch

    from diffusion_nb.models.model import About, Model, fill
    from diffusion_nb.util.checks import check_numbers
    from diffusion_nb.util.storage import own_tensors

    check_numbers(every=(args.every, 1), keep=(args.keep, 1), accumulate=(args.accumulate, 1), grids=(args.grids, 0), workers=(args.workers, 0))  # fmt: skip
    task = task_of(args)
    about = About(task.family, task.recipe, task.shape, task.levels, start=args.control or args.from_)
    device, denoiser = torch.device(args.device) if args.device else team.device, task.denoiser or about.fresh()
    if args.from_:
        fill(denoiser, own_tensors(Model.load(args.from_).denoiser), f"--from {args.from_}")
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when a GPU is first used
    torch.backends.cudnn.benchmark = not args.deterministic
    torch.set_float32_matmul_precision("high")  # TF32 where it is not bf16, as in convolutions
    torch.use_deterministic_algorithms(args.deterministic)
    trainer = task.trainer(
        denoiser=denoiser, device=device, bf16=args.bf16, compile=args.compile, checkpoint=out / "checkpoint.safetensors",
        save_every=args.every, keep_checkpoints=args.keep, accumulate=args.accumulate, skip=args.skip, shard=args.shard, workers=args.workers,
        hooks=watchers(args, out, denoiser, task.shape, task.classes, device))  # fmt: skip
    return trainer, about, task


def check_start(trainer, about, out: Path) -> None:
    "Say that a run goes on. Raises ValueError where it began from other weights, and OSError where there is no room, or other files are in the way."
    from diffusion_nb.models.model import read_about
    from diffusion_nb.util.storage import write_json

    if trainer.step and (start_was := read_about(out / "model.json").start) != about.start:
        raise ValueError(f"{out} holds a run that began from {start_was or 'a fresh network'}; name another --out")
    if trainer.rank == 0:
        trainer.checkpoints.check_room(trainer.state.nbytes())
        if not trainer.step:
            check_own(out, ("model.safetensors", "model.json", "run.json", "report.png", "log.jsonl"), "family")
            write_json(out / "run.json", dict(family=about.family))  # the folder is ours from now on
        about.save(out)
        if trainer.step:
            print(f"going on from step {trainer.step} of {out / 'checkpoint.safetensors'}")


def write_report(model, trainer, about, out: Path, workers: int) -> dict:
    "Draws with a trained model; writes report.png, the drawings above the training pictures nearest to them; returns how near they are."
    import torch
    from PIL import Image

    from diffusion_nb.training.hooks import fixed_draws
    from diffusion_nb.training.report import memory_check
    from diffusion_nb.util.images import picture_grid
    from diffusion_nb.util.storage import write_atomically

    x = fixed_draws(about.shape, 32, about.recipe.classes)(model).float().clamp(-1, 1).cpu()
    source = trainer.batches.source
    said, nearest = memory_check(x, getattr(source, "data", source.x0), workers)
    rows = [part for pair in zip(x.split(16), nearest.picture.split(16), strict=True) for part in pair]
    scale = max(1, 64 // about.shape[1])
    grid = picture_grid(torch.cat(rows).repeat_interleave(scale, 2).repeat_interleave(scale, 3), 16)
    write_atomically(out / "report.png", lambda p: Image.fromarray(grid.squeeze(-1).numpy()).save(p, "PNG"))
    print(f"wrote {out}/report.png, drawings above the training pictures nearest to them: " + ", ".join(f"{k} {v:g}" for k, v in said.items()))  # fmt: skip
    return said


def write_down(args: Train, trainer, about, out: Path, steps_here: int, seconds: float, said: dict) -> None:
    "The record of a training beside its weights, and what to do next."
    import torch

    from diffusion_nb.util.storage import write_json

    write_json(out / "run.json", dict(
        family=about.family, recipe=asdict(about.recipe), shape=about.shape, levels=about.levels, steps_here=steps_here, seconds_here=round(seconds, 1),
        device=device_name(trainer.device), processes=trainer.world, torch=torch.__version__, bf16=args.bf16, compile=args.compile,
        skipped=int(trainer.state.skipped), report=said, losses=trainer.losses))  # fmt: skip
    if trainer.step < trainer.steps:
        print(f"step {trainer.step} of {trainer.steps}; the same command goes on from there")
    if trainer.state.skipped:
        print(f"{int(trainer.state.skipped)} steps were left out, for their gradient was not finite")
    following = {
        "codec": f"train --data {args.data} --latent {out}",
        "upsampler": f"sample --model MODEL --large {out}",
    }
    print(
        f"wrote {out}/model.safetensors, model.json and run.json; next: diffusion-nb {following.get(about.family, f'sample --model {out}')}"
    )


def train(args: Train) -> int:
    "Train a model of a data set; goes on where an earlier run of the same command stopped."
    from diffusion_nb.models.model import Model
    from diffusion_nb.training.sharding import process_group

    family = family_of(args)
    plain = ("diffusion", "captions", "words")
    out = Path(args.out or f"runs/{'' if family in plain else family.removesuffix('-captions') + '-'}{Path(args.data).stem}")  # fmt: skip
    with process_group(cpu=args.device == "cpu") as team:
        trainer, about, task = prepared(args, team, out)
        resumed, start = trainer.step, time.perf_counter()
        if resumed == trainer.steps and all((out / name).exists() for name in ("run.json", "model.safetensors")):
            print(f"{out} holds this run, finished; ask for more --steps to go on with it")
            return 0
        check_start(trainer, about, out)
        model = trainer.fit(args.minutes)
        if team.rank == 0:
            Model(task.finish(model), about, task.codec).save(out)
            said = write_report(model, trainer, about, out, args.workers) if args.report else {}
            write_down(args, trainer, about, out, trainer.step - resumed, time.perf_counter() - start, said)
    return 0


@dataclass
class Distill:
    data: Literal["mnist", "cifar10"] = "mnist"
    "The data set of the teacher."
    consistency: bool = False
    "A one-step model of the teacher in --out, which `train` wrote; else the teacher is trained too, and its steps halved again and again."
    out: str | None = None
    "Folder to write, if not runs/distill-DATA, or with --consistency runs/DATA."
    every: int = 1000
    "Steps between checkpoints."
    bf16: bool = False
    "bfloat16 autocast, for GPUs."
    compile: bool = False
    "torch.compile the networks, for GPUs."
    device: str | None = None
    "cpu or cuda; if not given, the GPU if there is one."


def distill(args: Distill) -> int:
    "Teach a student to draw in few calls what a model draws in many; goes on where an earlier run of the same command stopped."
    return one_step(args) if args.consistency else halve(args)


def options_of(args: Distill) -> dict:
    return dict(device=args.device, bf16=args.bf16, compile=args.compile, save_every=args.every)


def one_step(args: Distill) -> int:
    "A consistency model of the teacher in a folder."
    from diffusion_nb.models.model import Model
    from diffusion_nb.recipes.consistency import train_consistency

    folder = Path(args.out or f"runs/{args.data}")
    if not (folder / "model.json").exists():
        raise ValueError(f"{folder} holds no teacher; first: diffusion-nb train --data {args.data} --out {folder}")
    teacher = Model.load(folder)
    checkpoint = folder / "consistency-checkpoint.safetensors"
    f = train_consistency(args.data, teacher.denoiser, teacher.about.recipe.classes, checkpoint=checkpoint, **options_of(args))  # fmt: skip
    Model(f, replace(teacher.about, family="consistency")).save(folder / "consistency")
    print(
        f"wrote {folder}/consistency, a model that draws in one call; next: diffusion-nb sample --model {folder}/consistency"
    )
    return 0


def halve(args: Distill) -> int:
    "A teacher, and students of ever fewer steps."
    from diffusion_nb.data import data_set
    from diffusion_nb.models.model import About, Model
    from diffusion_nb.recipes.diffusion import recipe
    from diffusion_nb.recipes.distillation import Distillation, distill_recipe
    from diffusion_nb.recipes.settings import settings

    folder, r = (
        Path(args.out or f"runs/distill-{args.data}"),
        recipe(settings(f"distill.{args.data}", Distillation).teacher),
    )
    data, students = data_set(r.data), distill_recipe(args.data, folder, **options_of(args))
    for n, student in students.items():
        Model(student, About("student", r, data.shape, data.levels, n)).save(folder / f"student-{n}")
    print(f"wrote the teacher and the students of {', '.join(map(str, students))} steps to {folder}; "
          f"next: diffusion-nb sample --model {folder}/student-{min(students)}")  # fmt: skip
    return 0
