"""Writes texts with a trained network."""

import time
from dataclasses import asdict
from pathlib import Path

from diffusion_nb.cli.models import asked_in_turn, device_name

READ = (
    "model",
    "n",
    "steps",
    "seed",
    "prompt",
    "temperature",
    "out",
    "device",
    "batch",
)  # the options of `sample` that are of texts, too


def sample_texts(args, model, device, out: Path) -> None:
    "Write texts, into samples.txt, with a record of how. Raises ValueError for what cannot be asked of a network of texts."
    from diffusion_nb.cli.sample import Sample
    from diffusion_nb.util.storage import write_atomically, write_json

    plain = asdict(Sample())
    if other := [k for k, v in asdict(args).items() if k not in READ and v != plain[k] and k != "replace"]:
        raise ValueError(f"--{', --'.join(other)}: not for a network of texts")
    r, start = model.about.recipe, time.perf_counter()
    wanted = (
        [r.length * "_"] * args.n
        if args.prompt is None
        else asked_in_turn(args.prompt, args.n, "a text with holes, such as s___e")
    )
    found = written(model.denoiser.to(device), r, wanted, args.seed, args.steps, args.temperature)
    here = dict(seconds=round(time.perf_counter() - start, 1), device=device_name(device))
    write_json(out / "run.json", asdict(args) | here | dict(recipe=asdict(r)))
    write_atomically(out / "samples.txt", lambda p: p.write_text("\n".join([*found, ""]), encoding="utf-8"))
    print(" ".join(found[:64]) + (" …" if len(found) > 64 else ""))
    print(f"{args.n} texts: {out / 'samples.txt'}, and run.json")


def written(net, r, wanted: list[str], first: int, steps: int | None, temperature: float = 1.0) -> list[str]:
    "Texts with their holes filled; the i-th has seed first + i, whatever the others are."
    import torch

    from diffusion_nb.recipes.words import fill_holes

    try:
        x = r.tokens(wanted)
    except ValueError as e:
        raise ValueError(f"--prompt: {e}") from None
    holes, device = (x == len(r.letters)).sum(1), next(net.parameters()).device
    for m in holes.unique():
        which = (holes == m).nonzero()[:, 0]
        for part in which.split(500):
            x[part] = fill_holes(r, net, x[part].to(device), first + part, steps, temperature).cpu()
    return r.texts(torch.as_tensor(x))
