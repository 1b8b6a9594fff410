"""Loads the models that commands name."""

from pathlib import Path

PICTURES = ".png", ".jpg", ".jpeg", ".bmp", ".webp"


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
    "The `Model` of a folder or a file of weights, or one that comes with the book: digits, mnist, fashion-mnist, cifar10, emoji, emoji-outlines, emoji-codec, emoji-latent, emoji-text, emoji-unclip, emoji-upsampler, scenes, cold-mnist or words."
    from diffusion_nb.cli import systems
    from diffusion_nb.experiments.control import emoji_control_model
    from diffusion_nb.experiments.digits import digit_denoiser
    from diffusion_nb.experiments.emoji import emoji_model
    from diffusion_nb.experiments.imagen import emoji_text_model
    from diffusion_nb.experiments.latent import emoji_codec, emoji_latent_model, emoji_latent_shape
    from diffusion_nb.experiments.pictures import cifar10_denoiser, fashion_denoiser, mnist_denoiser
    from diffusion_nb.experiments.scenes import SHAPE, scene_model
    from diffusion_nb.models.model import About, Model
    from diffusion_nb.recipes.diffusion import recipe
    from diffusion_nb.recipes.latent import AutoencoderRecipe
    from diffusion_nb.recipes.settings import settings

    pictures = lambda name, denoiser, shape, levels=256: lambda: Model(denoiser(), About("diffusion", recipe(name), shape, levels))  # fmt: skip
    emoji_codec_model = lambda: Model(emoji_codec(), About("codec", settings("codec.emoji", AutoencoderRecipe), (3, 64, 64)))  # fmt: skip
    with_recipe = lambda family, made, shape, codec=None: Model(made[0], About(family, made[1], shape), codec)
    own = {
        "digits": pictures("digits", digit_denoiser, (1, 8, 8), 17),
        "mnist": pictures("mnist-small", mnist_denoiser, (1, 28, 28)),
        "fashion-mnist": pictures("fashion-small", fashion_denoiser, (1, 28, 28)),
        "cifar10": pictures("cifar10-small", cifar10_denoiser, (3, 32, 32)),
        "emoji": lambda: with_recipe("captions", emoji_model(), (3, 32, 32)),
        "emoji-outlines": lambda: with_recipe("control", emoji_control_model(), (3, 32, 32)),
        "emoji-codec": emoji_codec_model,
        "emoji-latent": lambda: with_recipe(
            "latent", emoji_latent_model(), emoji_latent_shape(), emoji_codec_model()
        ),
        "emoji-text": lambda: with_recipe("text", emoji_text_model(), emoji_latent_shape(), emoji_codec_model()),
        "emoji-unclip": systems.unclip,
        "emoji-upsampler": systems.upsampler,
        "scenes": lambda: with_recipe("tokens", scene_model(), SHAPE),
        "cold-mnist": systems.cold,
        "words": systems.words,
    }
    if name not in own:
        return Model.load(name)
    if Path(name).exists():
        raise ValueError(
            f"{name} is a model that comes with the book, and also a folder here: say ./{name} for the folder"
        )
    return own[name]()


def reads_captions(model) -> bool:
    "Whether a model draws from captions."
    return model.about.family == "text" or bool(getattr(model.about.recipe, "words", ()))


def reader_of(model):
    "What reads the captions that a model is given: as a bag of words, or as tokens."
    net = model.denoiser.net
    return getattr(net, "context", None) or net.label


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


def told(model, captions: list[str], first: int):
    "What a model is given of these captions: the words, or with unCLIP a picture's vector for each, drawn with seed first + i."
    if model.about.family == "unclip":
        return model.denoiser.vectors(captions, first)
    return reader_of(model).told(captions)


def asked_in_turn(prompt: str, n: int, such_as: str) -> list[str]:
    "What is asked for with semicolons in between, each in turn, n of them. Raises ValueError where there is nothing."
    asked = [c for c in map(str.strip, prompt.split(";")) if c]
    if not asked:
        raise ValueError(f"--prompt: expected {such_as}; got none")
    return [asked[i % len(asked)] for i in range(n)]


def condition_of(model, n: int, label: str | None, prompt: str | None, first: int = 0) -> dict:
    """What each of n pictures is to show: the class or the captions asked for, else all classes, or a few captions, in turn.

    prompt: captions, with a semicolon between them. first: the seed of the first picture. Raises ValueError for what the model does not know.
    """
    import torch

    from diffusion_nb.experiments.emoji import SOME_CAPTIONS

    if reads_captions(model):
        if label is not None:
            raise ValueError("--label: this model draws from captions; say what with --prompt")
        own = (
            tuple(getattr(reader_of(model), "known", ())) or SOME_CAPTIONS
        )  # of a text model those that need no encoder
        asked = "; ".join(own[:16]) if prompt is None else prompt
        return {"y": told(model, asked_in_turn(asked, n, "a caption, such as 'red apple'"), first)}
    if prompt is not None:
        raise ValueError("--prompt: this model draws from no captions; --model emoji does")
    classes, number = model.about.recipe.classes, label_of(label, model.about)
    every = torch.arange(n) % (classes or 1)
    return {"y": every if number is None else torch.full((n,), number)} if classes else {}


def null_of(model):
    "What stands for any label or any caption, in the model's own terms; None where it knows neither."
    if reads_captions(model):
        return reader_of(model).null
    return getattr(model.about.recipe, "classes", 0) or None


def hint_of(model, n: int, path: str | None) -> dict:
    """The hints of n pictures, from a picture or a folder of pictures, in turn: dark lines of a model in colour, bright strokes of a grey one.

    Raises ValueError where the model takes none, and where there are no pictures.
    """
    import numpy as np
    import torch
    from PIL import Image

    from diffusion_nb.training.folder import middle_square

    if path is None:
        return {}
    if model.about.family != "control":
        raise ValueError("--hint: this model takes no hint; --model emoji-outlines does")
    place, (channels, size, _) = Path(path), model.about.shape
    files = sorted(f for f in place.iterdir() if f.suffix.lower() in PICTURES) if place.is_dir() else [place]
    if not files or not files[0].exists():
        raise ValueError(
            f"--hint: expected a picture, or a folder of pictures ({', '.join(PICTURES)}); got {path}"
        )
    seen = [middle_square(Image.open(f).convert("RGB" if channels == 3 else "L"), size) for f in files]
    hints = hints_for(channels)(torch.stack([torch.as_tensor(np.asarray(x)) for x in seen]) / 127.5 - 1)
    return {"hint": hints[torch.arange(n) % len(hints)]}


def hints_for(channels: int):
    "What makes a hint of a picture: outlines of one in colour, strokes of a grey one."
    from diffusion_nb.nets.controlnet import outlines, strokes

    return outlines if channels == 3 else strokes
