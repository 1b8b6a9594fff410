"""Loads the models that commands name."""

import json
from pathlib import Path


def device_name(device) -> str:
    "What a person would call this device."
    import platform

    import torch

    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )


def write_json(path: Path, value: dict) -> None:
    from diffusion_nb.util.storage import write_atomically

    write_atomically(path, lambda p: p.write_text(json.dumps(value, indent=1) + "\n"))


def load_model(folder: str):
    "The denoiser in a folder that `train` wrote, or the digit model that comes with the book; and its recipe."
    import torch

    from diffusion_nb.experiments.digits import digit_denoiser
    from diffusion_nb.recipes.diffusion import recipe, recipe_denoiser
    from diffusion_nb.recipes.vdm import vdm_denoiser
    from diffusion_nb.util.storage import check_fits, read_weights

    if folder == "digits" and Path(folder).exists():
        raise ValueError(
            "digits is the model that comes with the book, and also a folder here: say ./digits for the folder"
        )
    if folder == "digits":
        return digit_denoiser(), recipe("digits"), (1, 8, 8)
    path = Path(folder)
    for name in ("run.json", "model.safetensors"):
        if not (path / name).exists():
            raise ValueError(
                f"{path} holds no {name}: expected a folder written by `diffusion-nb train`, or the word digits"
            )
    try:
        about = json.loads((path / "run.json").read_text())
        denoiser = (vdm_denoiser if about["vdm"] else recipe_denoiser)(about["recipe"], about["shape"])
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise ValueError(f"{path / 'run.json'} is damaged, or not written by `diffusion-nb train`: {e!r}") from e
    own = dict((denoiser if about["vdm"] else denoiser.net).named_parameters())
    saved = read_weights(path / "model.safetensors")
    check_fits(own, saved, f"{path / 'model.safetensors'}, by its run.json,")
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(saved[name])
    return denoiser.eval().requires_grad_(False), about["recipe"], tuple(about["shape"])
