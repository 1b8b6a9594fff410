"""Commands that train: train, distill."""

import time
from pathlib import Path

from diffusion_nb.cli.models import device_name, write_json


def train(args) -> int:
    from diffusion_nb.training.sharding import together

    with together(cpu=args.device == "cpu") as team:
        return train_together(args, team)


def watchers(args, out: Path, denoiser, data, classes: int, device) -> list:
    "What looks on as a model is trained: the log, and what the options ask for."
    import torch

    from diffusion_nb.training.ema import PowerEMA
    from diffusion_nb.training.hooks import Grids, JsonLines, Speed, TensorBoard, fixed_draws
    from diffusion_nb.util.profiling import matrix_peak

    hooks = [
        JsonLines(out / "log.jsonl"),
        Speed(matrix_peak(device, torch.bfloat16 if args.bf16 else torch.float32)),
    ]
    board = [TensorBoard(out / "tensorboard")] if args.tensorboard else []
    if args.grids:
        draw = fixed_draws(data.shape, 8 * classes or 64, classes)
        hooks.append(Grids(out / "grids", draw, args.grids, 8, *board))
    if args.power_ema:
        hooks.append(PowerEMA(denoiser, folder=out / "power", every=args.every))
    return hooks + board


def train_together(args, team) -> int:
    "One of the processes that train a model; there may be one only."
    import torch
    from safetensors.torch import save_file

    from diffusion_nb.data import data_set
    from diffusion_nb.recipes.diffusion import recipe, recipe_denoiser, recipe_trainer
    from diffusion_nb.recipes.vdm import vdm_denoiser, vdm_recipe, vdm_trainer
    from diffusion_nb.util.storage import write_atomically

    if min(args.every, args.keep, args.accumulate) < 1 or args.grids < 0:
        raise ValueError(
            "--every, --keep and --accumulate: expected numbers of at least 1; --grids: of at least 0"
        )
    of, fresh, trainer_of = (
        (vdm_recipe, vdm_denoiser, vdm_trainer) if args.vdm else (recipe, recipe_denoiser, recipe_trainer)
    )
    given = {k: v for k in ("steps", "batch", "lr", "width", "seed") if (v := getattr(args, k)) is not None}
    data, out = data_set(args.data), Path(args.out or f"runs/{'vdm-' if args.vdm else ''}{args.data}")
    r, device, first = (
        of(args.data) | given,
        torch.device(args.device) if args.device else team.device,
        team.rank == 0,
    )
    torch.backends.cudnn.benchmark = not args.deterministic
    torch.use_deterministic_algorithms(args.deterministic)
    trainer = trainer_of(r, data.load(), device=device, bf16=args.bf16, compile=args.compile, checkpoint=out / "checkpoint.safetensors",
                         save_every=args.every, keep_checkpoints=args.keep, accumulate=args.accumulate, skip=args.skip, shard=args.shard,
                         hooks=watchers(args, out, fresh(r, data.shape), data, r["classes"], device))  # fmt: skip
    resumed, start = trainer.step, time.perf_counter()
    if resumed == trainer.steps and all((out / name).exists() for name in ("run.json", "model.safetensors")):
        print(f"{out} holds this run, finished; ask for more --steps to go on with it")
        return 0
    if resumed and first:
        print(f"going on from step {resumed} of {out / 'checkpoint.safetensors'}")
    model = trainer.fit(args.minutes)
    if not first:
        return 0
    weights = {k: v.detach().cpu().contiguous() for k, v in (model if args.vdm else model.net).named_parameters()}
    seconds = time.perf_counter() - start
    write_atomically(out / "model.safetensors", lambda p: save_file(weights, p))
    about = dict(vdm=args.vdm, recipe=r, shape=data.shape, levels=data.levels, steps_here=trainer.step - resumed, seconds_here=round(seconds, 1),
                 device=device_name(device), processes=team.world, torch=torch.__version__, bf16=args.bf16, compile=args.compile,
                 skipped=int(trainer.state.skipped), losses=trainer.losses)  # fmt: skip
    write_json(out / "run.json", about)
    if trainer.step < trainer.steps:
        print(f"step {trainer.step} of {trainer.steps}; the same command goes on from there")
    if trainer.state.skipped:
        print(f"{int(trainer.state.skipped)} steps were left out, for their gradient was not finite")
    print(f"wrote {out}/model.safetensors and run.json; next: diffusion-nb sample --model {out}")
    return 0


def distill(args) -> int:
    from diffusion_nb.recipes.consistency import train_consistency
    from diffusion_nb.recipes.distillation import distill_recipe

    options = dict(device=args.device, bf16=args.bf16, compile=args.compile, save_every=args.every)
    if args.consistency:
        folder = Path(args.out or f"runs/{args.data}")
        if not (folder / "run.json").exists():
            raise ValueError(
                f"{folder} holds no teacher; first: diffusion-nb train --data {args.data} --out {folder}"
            )
        train_consistency(args.data, folder, checkpoint=folder / "consistency-checkpoint.safetensors", **options)
        print(f"wrote {folder}/consistency.safetensors, a model that draws in one call")
    else:
        folder = Path(args.out or f"runs/distill-{args.data}")
        students = distill_recipe(args.data, folder, **options)
        print(f"wrote the teacher and the students of {', '.join(map(str, students))} steps to {folder}")
    return 0
