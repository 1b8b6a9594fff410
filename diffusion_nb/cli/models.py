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
    "The `Model` of a folder or a file of weights, or one that comes with the book: digits, mnist or cifar10."
    from diffusion_nb.experiments.digits import digit_denoiser
    from diffusion_nb.experiments.pictures import cifar10_denoiser, mnist_denoiser
    from diffusion_nb.models.model import About, Model
    from diffusion_nb.recipes.diffusion import recipe

    own = {
        "digits": (digit_denoiser, "digits", (1, 8, 8), 17),
        "mnist": (mnist_denoiser, "mnist-small", (1, 28, 28), 256),
        "cifar10": (cifar10_denoiser, "cifar10-small", (3, 32, 32), 256),
    }
    if name not in own:
        return Model.load(name)
    if Path(name).exists():
        raise ValueError(
            f"{name} is a model that comes with the book, and also a folder here: say ./{name} for the folder"
        )
    load, section, shape, levels = own[name]
    return Model(load(), About("diffusion", recipe(section), shape, levels))


def label_of(label: str | None, about) -> int | None:
    "The number of a class that is asked for by number or, for CIFAR-10, by name. Raises ValueError naming those there are."
    from diffusion_nb.experiments.pictures import CIFAR10_CLASSES

    if label is None:
        return None
    classes = about.recipe.classes
    names = CIFAR10_CLASSES if classes and about.recipe.data == "cifar10" else ()
    if label in names:
        return names.index(label)
    if label.isdecimal() and int(label) < classes:
        return int(label)
    known = f"the labels 0 to {classes - 1}" + (f", {', '.join(names)}" if names else "")
    raise ValueError(f"--label: this model knows {known if classes else 'no labels'}; got {label}")
