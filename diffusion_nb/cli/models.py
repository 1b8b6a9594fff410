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
    "The `Model` of a folder or a file of weights, or one that comes with the book: digits, mnist, fashion-mnist, cifar10 or emoji."
    from diffusion_nb.experiments.digits import digit_denoiser
    from diffusion_nb.experiments.emoji import emoji_model
    from diffusion_nb.experiments.pictures import cifar10_denoiser, fashion_denoiser, mnist_denoiser
    from diffusion_nb.models.model import About, Model
    from diffusion_nb.recipes.diffusion import recipe

    own = {
        "digits": (lambda: (digit_denoiser(), recipe("digits")), (1, 8, 8), 17),
        "mnist": (lambda: (mnist_denoiser(), recipe("mnist-small")), (1, 28, 28), 256),
        "fashion-mnist": (lambda: (fashion_denoiser(), recipe("fashion-small")), (1, 28, 28), 256),
        "cifar10": (lambda: (cifar10_denoiser(), recipe("cifar10-small")), (3, 32, 32), 256),
        "emoji": (emoji_model, (3, 32, 32), 256),
    }
    if name not in own:
        return Model.load(name)
    if Path(name).exists():
        raise ValueError(
            f"{name} is a model that comes with the book, and also a folder here: say ./{name} for the folder"
        )
    load, shape, levels = own[name]
    denoiser, r = load()
    return Model(denoiser, About("captions" if name == "emoji" else "diffusion", r, shape, levels))


def names_of(about) -> tuple[str, ...]:
    "The names of a model's classes, where its data set gives them names."
    from diffusion_nb.experiments.pictures import CIFAR10_CLASSES, FASHION_CLASSES

    known = {"cifar10": CIFAR10_CLASSES, "fashion-mnist": FASHION_CLASSES}
    return known.get(about.recipe.data, ()) if about.recipe.classes else ()


def label_of(label: str | None, about) -> int | None:
    "The number of a class that is asked for by number or by name. Raises ValueError naming those there are."
    if label is None:
        return None
    classes, names = about.recipe.classes, names_of(about)
    if label in names:
        return names.index(label)
    if label.isdecimal() and int(label) < classes:
        return int(label)
    known = f"the labels 0 to {classes - 1}" + (f", {', '.join(names)}" if names else "")
    raise ValueError(f"--label: this model knows {known if classes else 'no labels'}; got {label}")


def condition_of(model, n: int, label: str | None, prompt: str | None) -> dict:
    """What each of n pictures is to show: the class or the captions asked for, else all classes, or a few captions, in turn.

    prompt: captions, with a semicolon between them. Raises ValueError for what the model does not know.
    """
    import torch

    from diffusion_nb.experiments.emoji import SOME_CAPTIONS

    if model.about.family == "captions":
        if label is not None:
            raise ValueError("--label: this model draws from captions; say what with --prompt")
        captions = SOME_CAPTIONS if prompt is None else [c for c in map(str.strip, prompt.split(";")) if c]
        if not captions:
            raise ValueError("--prompt: expected a caption, such as 'red apple'; got none")
        return {"y": model.denoiser.net.label.told([captions[i % len(captions)] for i in range(n)])}
    if prompt is not None:
        raise ValueError("--prompt: this model draws from no captions; --model emoji does")
    classes, number = model.about.recipe.classes, label_of(label, model.about)
    every = torch.arange(n) % (classes or 1)
    return {"y": every if number is None else torch.full((n,), number)} if classes else {}


def null_of(model):
    "What stands for any label or any caption, in the model's own terms; None where it knows neither."
    if model.about.family == "captions":
        return model.denoiser.net.label.null
    return model.about.recipe.classes or None
