"""Commands that use a model: sample, bits."""

import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from diffusion_nb.cli.folders import check_own
from diffusion_nb.cli.models import condition_of, device_name, hint_of, load_model, null_of, reads_captions


@dataclass
class Sample:
    model: str = "digits"
    "A folder or checkpoint written by train or distill, or a model that comes with the book: digits, mnist, fashion-mnist, cifar10, emoji, emoji-outlines, emoji-latent and emoji-text, which draw at 64×64, emoji-unclip, scenes, cold-mnist, or words, which writes."
    n: Annotated[int, arg(aliases=["--pictures"])] = 64
    "How many pictures (torchrun takes --n for its own: say --pictures)."
    steps: int | None = None
    "Steps of the sampler, if not 100, 20 for emoji, 24 for cold-mnist, those of a student, 1 for a consistency model, or one a letter for words."
    seed: int = 0
    "Picture i has seed SEED + i."
    label: str | None = None
    "Draw this class only, not all in turn: its number or, for cifar10 and fashion-mnist, its name, such as ship."
    prompt: str | None = None
    "For emoji: draw this caption, such as 'red apple'; for words: fill these holes, such as s___e; of several, with semicolons between them, each in turn. emoji-text reads free text, with the text encoder of the extra [text]."
    temperature: float = 1.0
    "For words: below 1, letters that are likely are taken more often than the network says."
    hint: str | None = None
    "For emoji-outlines, and models of train --control: a picture, or a folder of pictures, whose dark lines (in colour) or bright strokes (grey) are to be followed."
    large: str | None = None
    "Enlarge what is drawn to twice its size by this stage: emoji-upsampler, or a folder that train --upsampler wrote."
    guidance: float | None = None
    "Classifier-free guidance, the weight w in (w+1) with - w without label; if not given, 2 for emoji, 1 for emoji-unclip, else 0."
    batch: int = 0
    "Pictures at a time, which changes nothing but rounding; 0: as many as fit."
    sampler: str | None = None
    "How to walk from noise to pictures, one of cli/samplers.py: ddpm, or with few steps, such as --steps 20, ddim, heun or dpmpp_2m. If not given: ddpm, dpmpp_2m for emoji, or ddim for a student."
    variance: Literal["small", "large"] | None = None
    "Of a step of ddpm: β̃ (small, the default) or β."
    bf16: bool = False
    "The network in bfloat16, for GPUs."
    out: str | None = None
    "Folder to write, if not runs/samples, where another run's pictures are replaced."
    film: bool = False
    "Write film.gif, too: how the first pictures, 16 at most, came out of the noise; above the state, below the guess."
    replace: bool = False
    "Delete what is in --out of another run."
    format: Literal["safetensors", "npz", "png"] = "safetensors"
    "One file of floats, one file of bytes (arr_0, as FID tools read it), or a PNG a picture."
    device: str | None = None
    "cpu or cuda; if not given, the GPU if there is one."


def sample(args: Sample) -> int:
    "Draw pictures with a trained model, a grid of them, and a record of how; goes on where an earlier run of the same command stopped. Or write texts."
    import torch

    from diffusion_nb.cli.texts import sample_texts
    from diffusion_nb.generation.generate import generate
    from diffusion_nb.training.sharding import process_group

    out, start = Path(args.out or "runs/samples"), time.perf_counter()
    with process_group(cpu=args.device == "cpu") as team:
        device, model = torch.device(args.device) if args.device else team.device, load_model(args.model)
        check_sample(args, model)
        check_own(out, ("grid.png", "film.gif", "samples.txt", "run.json"), "model")
        if model.about.family == "words":
            if team.rank == 0:
                sample_texts(args, model, device, out)
            return 0
        file, asked = (
            out / {"png": "pictures"}.get(args.format, f"samples.{args.format}"),
            to_draw(args, model, device),
        )
        generate(
            file, **asked, first=args.seed, chunk=args.batch or None, replace=args.replace or args.out is None
        )
        if team.rank == 0:
            here = dict(
                seconds=round(time.perf_counter() - start, 1), device=device_name(device), processes=team.world
            )
            show_drawn(args, model, asked, file, out, here)
    return 0


def to_draw(args: Sample, model, device) -> dict:
    "What `generate` is told: the denoiser, the sampler and its times, how many pictures of which shape, of what, and what decodes them."
    from diffusion_nb.cli.stages import enlarging, in_two

    shape, (sampler, ts) = model.about.shape, walk_of(args, model)
    if args.large:
        stage, (channels, height, width) = enlarging(model, args.large).to(device), shape
        sampler, shape = in_two(sampler, stage), (channels, 2 * height, 2 * width)
    cond = condition_of(model, args.n, args.label, args.prompt, args.seed) | hint_of(model, args.n, args.hint)
    denoiser, decode = ready(args, model, device), model.codec.denoiser.to(device).decode if model.codec else None
    return dict(denoiser=denoiser, sampler=sampler, ts=ts, n=args.n, shape=shape, cond=cond or None, decode=decode)


def show_drawn(args: Sample, model, asked: dict, file: Path, out: Path, here: dict) -> None:
    "A grid of what was drawn, a film if it was asked for, and a record of how."
    import torch

    write_how(args, model, len(asked["ts"]) - 1, here, out / "run.json")
    write_grid(file, out / "grid.png")
    if args.film:
        first = torch.arange(min(args.n, 16))
        of_first = {name: v[first] for name, v in (asked["cond"] or {}).items()}
        write_film(asked["denoiser"], asked["sampler"], asked["ts"], first + args.seed, asked["shape"], of_first, out / "film.gif", asked["decode"])  # fmt: skip
    print(f"{args.n} pictures: {file}, and {out}/grid.png and run.json{' and film.gif' if args.film else ''}")


def write_how(args: Sample, model, steps: int, here: dict, file: Path) -> None:
    "The record of how pictures were drawn."
    import torch

    from diffusion_nb.util.storage import write_json

    how = dict(sampler=args.sampler or default_walk(model)[0], steps=steps, guidance=weight_of(args, model), torch=torch.__version__)  # fmt: skip
    write_json(file, asdict(args) | here | how | dict(recipe=asdict(model.about.recipe)))


def check_sample(args: Sample, model) -> None:
    "Raise ValueError for what this model cannot be asked."
    if model.about.family == "codec":
        raise ValueError(
            f"--model: a codec draws nothing by itself; train --latent {args.model} makes a model of its latents"
        )
    if model.about.family == "upsampler":
        raise ValueError(f"--model: {args.model} enlarges what another model draws; say --large {args.model}")
    if args.film and args.large:
        raise ValueError(
            "--film: not with --large; the film of the same seeds without it shows the small pictures"
        )
    if weight_of(args, model) and null_of(model) is None:
        raise ValueError("--guidance: this model knows no labels to be guided to")
    if args.temperature != 1 and model.about.family != "words":
        raise ValueError("--temperature: for networks that write, such as words")
    if not 0 < args.temperature < float("inf"):
        raise ValueError(f"--temperature: expected a number above 0; got {args.temperature}")
    if args.n < 1 or args.batch < 0 or (args.steps is not None and args.steps < 1):
        raise ValueError(
            "--n and --steps: expected numbers of at least 1; --batch: of at least 1, or 0 for what fits"
        )


def weight_of(args: Sample, model) -> float:
    "The guidance weight that was asked for, or else 2 for captions, which need it, 1 for unCLIP's vectors, and 0 for labels."
    usual = 1.0 if model.about.family == "unclip" else 2.0 * reads_captions(model)
    return usual if args.guidance is None else args.guidance


def default_walk(model) -> tuple[str, int]:
    "The sampler and the number of steps that a model is made for."
    steps = {
        "student": ("ddim", model.about.steps),
        "consistency": ("consistency", 1),
        "cold": ("cold", 24),
    }
    few = reads_captions(model) or model.codec is not None
    return steps.get(model.about.family, ("dpmpp_2m", 20) if few else ("ddpm", 100))


ALONE = "consistency", "cold"  # families that draw in a way of their own, by the sampler of the same name


def walk_of(args: Sample, model):
    "The sampler that was asked for, or else the model's own, and its times."
    from diffusion_nb.cli.samplers import SAMPLERS
    from diffusion_nb.variances import fixed_large

    name, steps = default_walk(model)
    name, steps = args.sampler or name, args.steps or steps
    if name not in SAMPLERS:
        raise ValueError(f"--sampler: expected one of {', '.join(SAMPLERS)}; got {name}")
    for own in ALONE:
        if (name == own) != (model.about.family == own):
            raise ValueError(
                f"--sampler {name}: a {own} model draws with the sampler {own}, and no other model does"
            )
    if args.film and name == "consistency":
        raise ValueError("--film: a consistency model maps noise to pictures at once; there is no walk to show")
    if args.variance and name != "ddpm":
        raise ValueError(f"--variance: it is of a step of ddpm; {name} has none to choose")
    sampler, times = SAMPLERS[name]
    return partial(sampler, var=fixed_large) if args.variance == "large" else sampler, times(
        model.denoiser.schedule, steps
    )


def ready(args: Sample, model, device):
    "The model's denoiser as it is to be used: guided, clipped, fast, on its device."
    from diffusion_nb.denoisers import Clip
    from diffusion_nb.generation.fast import CompiledDenoiser
    from diffusion_nb.guidance import CFG

    denoiser = model.denoiser.to(device)
    if model.about.family in ALONE:
        if args.guidance or args.bf16:
            raise ValueError(f"--guidance, --bf16: not for a {model.about.family} model")
        return denoiser
    w = weight_of(args, model)
    guided = CFG(denoiser, w, null_of(model)) if w else denoiser
    return CompiledDenoiser(Clip(guided, -6.0, 6.0) if model.codec else Clip(guided), bf16=args.bf16)


def write_grid(file: Path, path: Path, most: int = 400) -> None:
    "The first pictures of what `generate` wrote, in a grid."
    import numpy as np
    import torch
    from PIL import Image
    from safetensors import safe_open

    from diffusion_nb.util.images import picture_grid
    from diffusion_nb.util.storage import write_atomically

    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as f:
            x = f.get_slice("pictures")[:most]
    else:
        bytes = np.load(file)["arr_0"][:most] if file.suffix else np.stack(
            [np.atleast_3d(np.asarray(Image.open(p))) for p in sorted(file.glob("*.png"))[:most]])  # fmt: skip
        x = torch.from_numpy(bytes).permute(0, 3, 1, 2) / 127.5 - 1
    scale = max(1, 64 // x.shape[2])
    grid = picture_grid(x.repeat_interleave(scale, 2).repeat_interleave(scale, 3)).squeeze(-1).numpy()
    write_atomically(path, lambda p: Image.fromarray(grid).save(p, "PNG"))


def write_film(denoiser, sampler, ts, seeds, shape, cond: dict, path: Path, decode=None) -> None:
    "The walk of a few pictures, drawn once more, as an animation of up to 40 frames: the states, scaled to one size, and what is guessed from them; decode: latents ↦ pictures."
    import torch

    from diffusion_nb.generation.generate import draw
    from diffusion_nb.util.images import animate
    from diffusion_nb.util.storage import write_atomically

    frames, n, seen = [], len(ts) - 1, torch.no_grad()(decode or (lambda x: x))
    kept = {round(i * (n - 1) / 39) for i in range(40)} if n > 40 else set(range(n))

    def keep(i, x, pred):
        if i in kept:
            state = pred.x_t / (pred.alpha**2 + pred.sigma**2).sqrt() / 2
            frames.append(seen(torch.cat([state, pred.x0]).float()).clamp(-1, 1).cpu())

    last = seen(draw(denoiser, partial(sampler, callback=keep), ts, seeds, shape, cond).float()).clamp(-1, 1).cpu()
    frames += 10 * [torch.cat([last, last])]
    gif = animate(frames, columns=len(seeds), scale=max(1, 64 // last.shape[2]))
    write_atomically(path, lambda p: p.write_bytes(gif))


@dataclass
class BitsOptions:
    model: str = "digits"
    "A folder written by train, or a model that comes with the book: digits, mnist, fashion-mnist or cifar10."
    n: int = 256
    "How many held-out pictures."
    steps: int = 1000
    "Of the chain; for a learned schedule, looks at a picture."
    end: float = 0.0
    "Time at which the decoder takes over; 0: after the last of equal steps."
    variance: Literal["small", "large", "fitted"] = "large"
    "Of the steps: DDPM's β̃ or β, or the best, fitted on as many training pictures."
    batch: int = 256
    "At a time; does not change the result."
    bf16: bool = False
    "bfloat16 autocast, for GPUs."
    out: str | None = None
    "File to write, if not bits.json beside the model, or runs/bits-MODEL.json for one that comes with the book."
    device: str | None = None
    "cpu or cuda; if not given, the GPU if there is one."


def beside(model: Path) -> Path:
    "Where the bits of a model are written: in its folder, or in runs/ where it comes with the book."
    folder = model if model.is_dir() else model.parent
    return folder / "bits.json" if model.exists() else Path("runs") / f"bits-{model.name}.json"


def bits(args: BitsOptions) -> int:
    "Bits per dimension of held-out pictures by the variational bound, with its terms and error, as a JSON record."
    import torch

    from diffusion_nb.data import data_set
    from diffusion_nb.denoisers import Clip, TimeWarped
    from diffusion_nb.grids import truncated_grid
    from diffusion_nb.likelihood.bits import bits_per_dim, fitted_variance
    from diffusion_nb.likelihood.continuous import vdm_bits
    from diffusion_nb.util.checks import default_device
    from diffusion_nb.util.storage import write_json
    from diffusion_nb.variances import fixed_large, fixed_small

    if args.n < 2 or args.batch < 1 or args.steps < 2 or not 0 <= args.end < 1:
        raise ValueError("expected --n and --steps of at least 2, --batch of at least 1, --end from 0 to below 1")
    device = torch.device(args.device) if args.device else default_device()
    loaded, start = load_model(args.model), time.perf_counter()
    if loaded.about.family in ALONE:
        raise ValueError(
            f"--model: a {loaded.about.family} model is no denoiser of a chain, and has no bound on its bits"
        )
    if reads_captions(loaded) or loaded.about.family in (
        "control",
        "codec",
        "latent",
        "upsampler",
        "text",
        "words",
    ):
        raise ValueError(
            "--model: bits are of models of labelled pictures; one of captions, of latents, or with a control has none here"
        )
    model, r = Clip(loaded.denoiser).to(device), loaded.about.recipe
    data = data_set(r.data)
    pictures = data.load()

    def measure(bound, x, y, *ts, **options):
        x, y, count = x[: args.n].to(device), y[: args.n].to(device), min(args.n, len(x))
        print(f"{count} pictures, {args.steps} steps each")
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            return bound(model, x, *ts, levels=data.levels, batch=args.batch, **options, **({"y": y} if r.classes else {}))  # fmt: skip

    if isinstance(model.denoiser, TimeWarped):  # a learned schedule: the bound of infinitely many steps
        result = measure(vdm_bits, pictures.x_test, pictures.y_test, times=args.steps)
        parts = dict(prior=result.prior.mean(), diffusion=result.diffusion.mean(), decoder=result.decoder.mean())
    else:
        ts = truncated_grid(args.steps, args.end)
        var = {
            "var": fixed_small if args.variance == "small" else fixed_large,
            "decoder_var": fixed_large if args.end else fixed_small,
        }
        if args.variance == "fitted":
            best = fitted_variance(measure(bits_per_dim, pictures.x, pictures.y, ts, **var))
            var = {"var": best, "decoder_var": best}
        result = measure(bits_per_dim, pictures.x_test, pictures.y_test, ts, **var)
        parts = dict(prior=result.prior.mean(), steps_cost=result.steps.sum(1).mean(), decoder=result.decoder.mean(),
                     rmse_of_255=127.5 * result.mse[:, -1].mean().sqrt())  # fmt: skip
    about = asdict(args) | dict(
        bits_per_dim=result.total.mean().item(), two_standard_errors=2 * result.total.std().item() / len(result.total) ** 0.5,
        **{name: part.item() for name, part in parts.items()}, pictures=len(result.total), held_out_of=data.name,
        levels=data.levels, seconds=round(time.perf_counter() - start, 1), device=device_name(device), torch=torch.__version__, recipe=asdict(r))  # fmt: skip
    out = Path(args.out or beside(Path(args.model)))
    write_json(out, about)
    print(f"{result}\nwrote {out}")
    return 0
