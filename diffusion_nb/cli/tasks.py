"""What a training is asked for: pictures, a recipe, and what makes its trainer."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from diffusion_nb.cli.models import hints_for, load_model, reader_of


@dataclass(frozen=True)
class Asked:
    "The pictures that were asked for: a tensor or a data set, labels, captions, how many classes (None where the recipe says), shape and grey levels."

    x: Any
    y: Any
    captions: list[str] | None
    classes: int | None
    shape: tuple[int, int, int]
    levels: int

    def in_memory(self, what: str):
        "The pictures as a tensor in [-1, 1]. Raises ValueError for those that are read one by one."
        import torch

        if not isinstance(self.x, torch.Tensor):
            raise ValueError(
                f"{what}: expected a data set by name or an .npz file, which fits into memory; got a folder or hf:"
            )
        return self.x if self.x.is_floating_point() else self.x / 127.5 - 1


@dataclass(frozen=True)
class Task:
    """What is trained, and how.

    family, recipe, shape: what model.json will say. trainer: makes the trainer, of options of `Trainer`. denoiser: where it starts, if not from a fresh one.
    finish: the trained network ↦ what is kept. codec: the model that makes pictures of its latents.
    """

    family: str
    recipe: Any
    trainer: Callable
    shape: tuple[int, int, int]
    denoiser: Any = None
    finish: Callable = lambda net: net
    codec: Any = None
    levels: int = 256

    @property
    def classes(self) -> int:
        "How many labels the network knows."
        return getattr(self.recipe, "classes", 0)


def asked_pictures(args) -> Asked:
    "The pictures of a data set by name, of a folder, an .npz file or hf:NAME. Raises ValueError for what cannot be meant."
    from diffusion_nb.data import DATA_SETS, data_set
    from diffusion_nb.training.folder import PictureFolder, PictureTable, read_hub, read_npz

    path, hub = Path(args.data), args.data.removeprefix("hf:") if args.data.startswith("hf:") else None
    named = args.data in {d.name for d in DATA_SETS} | {"emoji", "words"}
    if named and path.exists():
        raise ValueError(
            f"{args.data} is a data set, and also a file or folder here: say ./{args.data} for the latter"
        )
    if args.data == "emoji":
        return asked_emoji(args.size or 32)
    if args.data == "words" or path.suffix == ".txt":
        return asked_texts(args.data)
    if not named and hub is None and not path.exists():
        raise ValueError(f"--data: there is no folder or file {args.data}, and it is no data set; those are emoji, words, {', '.join(d.name for d in DATA_SETS)}")  # fmt: skip
    resized = path.is_dir() or hub is not None
    if bool(args.size) != resized:
        raise ValueError("--size: say to how many pixels the pictures of a folder, or of hf:NAME, are resized, such as --size 32" if resized else
                         "--size: it is of a folder of pictures; data sets and .npz files have their own size")  # fmt: skip
    if resized:
        found = PictureTable(read_hub(hub), args.size) if hub is not None else PictureFolder(path, args.size)
        classes = len(found.classes) if len(found.classes) > 1 else 0
        if classes:
            print("classes, for --label: " + ", ".join(f"{i} {name}" for i, name in enumerate(found.classes)))
        return Asked(found, None, None, classes, (3, args.size, args.size), 256)
    if named:
        data = data_set(args.data)
        pictures = data.load()
        return Asked(pictures.x, pictures.y, None, None, data.shape, data.levels)
    x, y = read_npz(path)
    return Asked(x, y, None, 0 if y is None else int(y.max()) + 1, tuple(x.shape[1:]), 256)


def asked_emoji(size: int) -> Asked:
    "The training pictures of emoji, 32×32 or 64×64, with their captions."
    from diffusion_nb.emoji import emoji
    from diffusion_nb.experiments.emoji import training_pictures

    if size not in (32, 64):
        raise ValueError(f"--size: emoji are 32 or 64 pixels wide; got {size}")
    x, captions = training_pictures(emoji(size))
    return Asked(x, None, captions, None, (3, size, size), 256)


def asked_texts(name: str) -> Asked:
    "The lines of a file, or the common words of notebook 26 without those that are held out. Raises ValueError where there are no texts, or the sign for a mask is in them."
    from diffusion_nb.experiments.words import word_list
    from diffusion_nb.recipes.words import letters_of

    lines = word_list().train if name == "words" else Path(name).read_text(encoding="utf-8").splitlines()
    texts = [line.rstrip() for line in lines if line.strip()]
    if not texts:
        raise ValueError(f"--data: expected a text in each line; {name} has none")
    return Asked(texts, None, None, None, (1, 1, max(map(len, texts))), len(letters_of(texts)))


def given(args, *names: str) -> dict:
    "Those of these options that were given."
    return {k: v for k in names if (v := getattr(args, k)) is not None}


def changed(args, asked: Asked, section: str, kind: type):
    "The recipe of a section of settings.ini for these pictures, with what the command line changes."
    from diffusion_nb.recipes.settings import settings

    own = asked.classes is not None  # pictures of one's own
    r = settings(f"{section}.{args.recipe or ('pictures' if own else Path(args.data).stem)}", kind)
    options = given(args, "steps", "batch", "lr", "width", "seed")
    if "width" in options and not hasattr(r, "width"):
        raise ValueError(
            "--width: this kind of model has several, those of `widths` in its section of settings.ini"
        )
    known = {"data": args.data, "classes": asked.classes} if own else {}
    return replace(r, **{k: v for k, v in known.items() if hasattr(r, k)}, **options)


def plain_task(args, asked: Asked, family: str) -> Task:
    "A model of pictures, with labels where there are some."
    from diffusion_nb.recipes.diffusion import Recipe, recipe_trainer
    from diffusion_nb.recipes.dit import DiTRecipe
    from diffusion_nb.recipes.vdm import VDMRecipe, vdm_trainer

    kinds = {"diffusion": ("recipe", Recipe, recipe_trainer), "vdm": ("vdm", VDMRecipe, vdm_trainer), "dit": ("dit", DiTRecipe, recipe_trainer)}  # fmt: skip
    section, kind, trainer = kinds[family]
    r = changed(args, asked, section, kind)
    return Task(family, r, partial(trainer, r, asked.x, y=asked.y), asked.shape, levels=asked.levels)


def caption_task(args, asked: Asked, family: str) -> Task:
    "A model of pictures that draws from captions, by a U-Net or a transformer."
    from diffusion_nb.emoji import vocabulary
    from diffusion_nb.recipes.captions import CaptionRecipe, caption_trainer
    from diffusion_nb.recipes.dit import DiTCaptionRecipe

    section, kind = ("recipe", CaptionRecipe) if family == "captions" else ("dit", DiTCaptionRecipe)
    r = replace(changed(args, asked, section, kind), words=vocabulary(asked.captions))
    return Task(family, r, partial(caption_trainer, r, asked.x, asked.captions), asked.shape)


def control_task(args, asked: Asked, family: str) -> Task:
    "A control of the model that was asked for. Raises ValueError where the pictures are not those of its kind."
    from diffusion_nb.recipes.control import ControlRecipe, ControlTraining, control_trainer, controlled
    from diffusion_nb.recipes.settings import settings

    base, x = load_model(args.control), asked.in_memory("--control")
    wanted = "captions" if asked.captions else "diffusion"
    if base.about.family != wanted or tuple(base.about.shape) != tuple(asked.shape):
        raise ValueError(f"--control: expected a {wanted} model of pictures of shape {tuple(asked.shape)}; "
                         f"got a {base.about.family} model of {tuple(base.about.shape)}")  # fmt: skip
    options = asdict(settings("control", ControlTraining)) | given(args, "steps", "batch", "lr", "seed")
    r = ControlRecipe(**asdict(base.about.recipe) | options)
    reader = reader_of(base)
    y, null = (reader.told(asked.captions), reader.null) if asked.captions else (asked.y, None)
    trainer = partial(control_trainer, r, x, y, hint=hints_for(asked.shape[0])(x), null=null)
    return Task(family, r, trainer, asked.shape, controlled(base.denoiser, 1, r.levels), levels=asked.levels)


def codec_task(args, asked: Asked, family: str) -> Task:
    "An autoencoder, whose latents another model can draw."
    from diffusion_nb.codecs import fit_codec
    from diffusion_nb.recipes.latent import AutoencoderRecipe, autoencoder_trainer

    r, x = changed(args, asked, "codec", AutoencoderRecipe), asked.in_memory("--codec")
    finish = lambda net: fit_codec(net.cpu(), x[:12_000])
    return Task(
        family,
        r,
        partial(autoencoder_trainer, r, x),
        asked.shape,
        r.fresh(asked.shape[0]),
        finish,
        levels=asked.levels,
    )


def codec_of(name: str, asked: Asked, option: str):
    "The codec of this name. Raises ValueError where it is none of such pictures."
    codec = load_model(name)
    if codec.about.family != "codec" or tuple(codec.about.shape) != tuple(asked.shape):
        raise ValueError(f"{option}: expected a codec of pictures of shape {tuple(asked.shape)}, as train --codec writes it; "
                         f"got a {codec.about.family} model of {tuple(codec.about.shape)}")  # fmt: skip
    return codec


def latent_task(args, asked: Asked, family: str) -> Task:
    "A diffusion model of the latents of a codec. Raises ValueError as `codec_of` does."
    from diffusion_nb.codecs import latents
    from diffusion_nb.emoji import vocabulary
    from diffusion_nb.recipes.latent import LatentRecipe, latent_trainer

    codec, x = codec_of(args.latent, asked, "--latent"), asked.in_memory("--latent")
    r, z = changed(args, asked, "latent", LatentRecipe), latents(codec.denoiser, x)
    labels = 0 if asked.y is None else int(asked.y.max()) + 1
    r = replace(r, classes=labels, words=vocabulary(asked.captions) if asked.captions else ())
    shape = (z.shape[1] // 2, *z.shape[2:])
    return Task(family, r, partial(latent_trainer, r, z, asked.captions or asked.y), shape, codec=codec)


def text_task(args, asked: Asked, family: str) -> Task:
    "A model of the latents of emoji that reads the tokens of the published text encoder. Raises ImportError where that is not installed, ValueError for pictures without captions."
    from diffusion_nb.codecs import latents
    from diffusion_nb.experiments.imagen import fit_tokens
    from diffusion_nb.recipes.text import TextRecipe, text_denoiser, text_trainer

    if not asked.captions:
        raise ValueError("--text: expected captions, as --data emoji --size 64 has them; got pictures without any")
    codec, x = codec_of(args.text, asked, "--text"), asked.in_memory("--text")
    r, z = changed(args, asked, "text", TextRecipe), latents(codec.denoiser, x)
    shape = (z.shape[1] // 2, *z.shape[2:])
    denoiser = text_denoiser(r, shape)
    print(f"the encoder reads {len(asked.captions)} captions, which takes up to a minute")
    fit_tokens(denoiser.net.context, asked.captions)
    y = denoiser.net.context.told(asked.captions)
    trainer = lambda denoiser, **options: text_trainer(r, z, y, denoiser, **options)
    return Task(family, r, trainer, shape, denoiser, codec=codec)


def cold_task(args, asked: Asked, family: str) -> Task:
    "A restorer of blurred pictures, which draws from a grey level."
    from diffusion_nb.recipes.cold import ColdModel, ColdRecipe, cold_trainer, grey_levels

    x = asked.in_memory("--cold")
    r = replace(
        changed(args, asked, "25_cold", ColdRecipe), classes=0 if asked.y is None else int(asked.y.max()) + 1
    )
    denoiser = ColdModel(r, asked.shape, grey_levels(x, asked.y))
    return Task(family, r, partial(cold_trainer, r, x, asked.y), asked.shape, denoiser, levels=asked.levels)


def upsampler_task(args, asked: Asked, family: str) -> Task:
    "A stage that enlarges pictures of half the size. Raises ValueError where that cannot be."
    from torch.nn.functional import avg_pool2d

    from diffusion_nb.recipes.cascade import UpsamplerRecipe, upsampler_trainer

    x = asked.in_memory("--upsampler")
    r = replace(changed(args, asked, "20_cascade", UpsamplerRecipe), classes=0)
    if any(side % (2 * r.patch) for side in asked.shape[1:]):
        raise ValueError(f"--upsampler: expected pictures whose sides are multiples of {2 * r.patch}; got {asked.shape[1]}×{asked.shape[2]}")  # fmt: skip
    trainer = lambda denoiser, **options: upsampler_trainer(
        r, x, avg_pool2d(x, 2), **options
    )  # which makes its own
    return Task(family, r, trainer, asked.shape, levels=asked.levels)


def words_task(args, asked: Asked, family: str) -> Task:
    "A network that writes texts of one length, a letter at a time."
    from diffusion_nb.recipes.words import WordsRecipe, letters_of, words_trainer

    name = args.recipe or "english"
    r = changed(replace(args, recipe=name), asked, "words", WordsRecipe)
    r = replace(r, data=args.data, letters=letters_of(asked.x), length=asked.shape[2])
    return Task(family, r, partial(words_trainer, r, r.tokens(asked.x)), asked.shape, levels=asked.levels)


TASKS = {
    "diffusion": plain_task, "vdm": plain_task, "dit": plain_task, "captions": caption_task, "dit-captions": caption_task, "control": control_task,
    "codec": codec_task, "latent": latent_task, "text": text_task, "cold": cold_task, "upsampler": upsampler_task, "words": words_task,
}  # fmt: skip
KINDS = ("vdm", "dit", "control", "codec", "latent", "text", "cold", "upsampler")  # the options that name a kind of model  # fmt: skip


def family_of(args) -> str:
    "The family of models that was asked for. Raises ValueError for two at once."
    chosen = [name for name in KINDS if getattr(args, name)]
    if len(chosen) > 1:
        raise ValueError(f"--{' and --'.join(chosen)} are kinds of models: say one")
    if args.data == "words" or args.data.endswith(".txt"):
        if chosen:
            raise ValueError(f"--{chosen[0]}: not for texts, which one kind of network writes")
        return "words"
    if args.data == "emoji" and chosen in ([], ["dit"]):
        return "dit-captions" if chosen else "captions"
    return chosen[0] if chosen else "diffusion"


def task_of(args) -> Task:
    "What was asked for. Raises ValueError for what does not go together."
    family = family_of(args)
    of_labels = family in ("diffusion", "vdm", "dit")
    if not of_labels and (args.grids or args.report):
        raise ValueError(f"--grids, --report: they are of models of labelled pictures, not of family {family}")
    if family in ("control", "codec", "text", "cold", "upsampler") and args.from_:
        raise ValueError(f"--from: not with --{family}")
    if args.data == "emoji" and family == "cold":
        raise ValueError("--cold: emoji have captions, not labels, which a restorer does not read")
    if family == "control" and (args.recipe or args.width):
        raise ValueError(
            "--control: not with --recipe and --width, which are those of the model that is controlled"
        )
    if args.data == "emoji" and of_labels:
        raise ValueError(f"--{family}: emoji have captions, not labels; leave it out, or say --codec or --latent")
    return TASKS[family](args, asked_pictures(args), family)
