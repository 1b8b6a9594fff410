"""Loads the models that commands name."""

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


def load_model(name: str):
    "The `Model` of a folder or a file of weights, or the digit model that comes with the book."
    from diffusion_nb.experiments.digits import digit_denoiser
    from diffusion_nb.models.model import About, Model
    from diffusion_nb.recipes.diffusion import recipe

    if name != "digits":
        return Model.load(name)
    if Path(name).exists():
        raise ValueError(
            "digits is the model that comes with the book, and also a folder here: say ./digits for the folder"
        )
    return Model(digit_denoiser(), About("diffusion", recipe("digits"), (1, 8, 8), 17))
