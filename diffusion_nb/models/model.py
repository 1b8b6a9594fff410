"""A trained model with what is needed to use it, in a folder."""

import json
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion_nb.denoisers import DenoiserConsistency
from diffusion_nb.recipes.captions import CaptionRecipe, caption_denoiser
from diffusion_nb.recipes.cascade import UpsamplerRecipe, upsampler_denoiser
from diffusion_nb.recipes.cold import ColdModel, ColdRecipe
from diffusion_nb.recipes.control import ControlRecipe, control_denoiser
from diffusion_nb.recipes.diffusion import Recipe, Training, recipe_denoiser
from diffusion_nb.recipes.dit import DiTCaptionRecipe, DiTRecipe, dit_denoiser
from diffusion_nb.recipes.latent import AutoencoderRecipe, LatentRecipe, fresh_codec, latent_denoiser
from diffusion_nb.recipes.settings import typed
from diffusion_nb.recipes.text import TextRecipe, text_denoiser
from diffusion_nb.recipes.unclip import UnclipNets, unclip_model
from diffusion_nb.recipes.vdm import VDMRecipe, vdm_denoiser
from diffusion_nb.recipes.words import WordsRecipe
from diffusion_nb.util.checks import check_numbers
from diffusion_nb.util.storage import check_fits, own_tensors, read_weights, save_tensors, write_json

FAMILIES = {  # the kind of recipe, and what builds its network
    "diffusion": (Recipe, recipe_denoiser),
    "vdm": (VDMRecipe, vdm_denoiser),
    "captions": (CaptionRecipe, caption_denoiser),
    "tokens": (LatentRecipe, latent_denoiser),  # pictures, by a network that reads captions word by word
    "dit": (DiTRecipe, dit_denoiser),
    "dit-captions": (DiTCaptionRecipe, dit_denoiser),
    "control": (ControlRecipe, control_denoiser),
    "codec": (AutoencoderRecipe, fresh_codec),
    "latent": (LatentRecipe, latent_denoiser),
    "text": (TextRecipe, text_denoiser),
    "upsampler": (UpsamplerRecipe, lambda r, shape: upsampler_denoiser(r, shape[0])),
    "unclip": (UnclipNets, unclip_model),
    "cold": (ColdRecipe, ColdModel),
    "words": (WordsRecipe, lambda r, shape: r.fresh()),
    "student": (Recipe, recipe_denoiser),  # of progressive distillation
    "consistency": (Recipe, lambda r, shape: DenoiserConsistency(recipe_denoiser(r, shape))),
}
FILES = "model.safetensors", "checkpoint.safetensors"


@dataclass(frozen=True)
class About:
    "What model.json says: the family, the recipe of the network, the shape and grey levels of its pictures, of a student its steps, and the weights from which its training started, if not from fresh ones."

    family: str
    recipe: Training
    shape: tuple[int, int, int]
    levels: int = 256
    steps: int = 0
    start: str | None = None

    def fresh(self) -> nn.Module:
        "The network, not trained."
        return FAMILIES[self.family][1](self.recipe, self.shape)

    def save(self, folder: Path | str) -> None:
        write_json(Path(folder) / "model.json", asdict(self))


@dataclass(frozen=True)
class Model:
    """A trained denoiser, consistency function, codec or network of texts, and what it is; for a model of latents also the codec that makes pictures of them.

    `Model(denoiser, about).save(folder)` writes model.safetensors and model.json, a codec to codec/; `Model.load(folder)` reads them.
    """

    denoiser: nn.Module
    about: About
    codec: "Model | None" = None

    def save(self, folder: Path | str) -> None:
        "Write the folder. Raises OSError where it cannot be written."
        self.about.save(folder)
        save_tensors(Path(folder) / FILES[0], own_tensors(self.denoiser), {})
        if self.codec:
            self.codec.save(Path(folder) / "codec")

    @classmethod
    def load(cls, path: Path | str) -> "Model":
        """The model of a folder, or of a file in one: weights, or a training's checkpoint, of which the averaged weights are taken.

        Its network is in eval mode and without gradients. Raises ValueError where something is missing or damaged, or does not fit.
        """
        path = Path(path)
        folder = path.parent if path.suffix == ".safetensors" else path
        about = read_about(folder / "model.json")
        file = (
            path
            if path != folder
            else next((folder / f for f in FILES if (folder / f).exists()), folder / FILES[0])
        )
        if not file.exists():
            raise ValueError(
                f"{folder} holds no {file.name}: expected a folder written by `diffusion-nb train` or Model.save"
            )
        denoiser, tensors = about.fresh(), read_weights(file)
        averaged = {k.removeprefix("average."): v for k, v in tensors.items() if k.startswith("average.")}
        fill(denoiser, averaged or tensors, f"{file}, by its model.json,")
        codec = cls.load(folder / "codec") if about.family in ("latent", "text") else None
        return cls(denoiser.eval().requires_grad_(False), about, codec)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        "Publish the model on the Hugging Face Hub, with a card that says what it is; returns the address of the commit."
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            (Path(folder) / "README.md").write_text(model_card(self.about, repo_id), encoding="utf-8")
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder))

    @classmethod
    def from_pretrained(
        cls, name: Path | str, *, revision: str | None = None, token: str | None = None
    ) -> "Model":
        "The model of a folder, or of a repository on the Hugging Face Hub (`revision`: a branch, tag or commit). Raises ValueError as `load` does."
        if Path(name).exists():
            return cls.load(name)
        from huggingface_hub import snapshot_download

        files = [FILES[0], "model.json", "codec/*"]
        return cls.load(snapshot_download(str(name), revision=revision, token=token, allow_patterns=files))


def model_card(about: About, repo_id: str) -> str:
    "What stands on a model's page: what it draws, how it was trained, how to use it."
    channels, height, width = about.shape
    steps = f", distilled to {about.steps} steps" if about.steps else ""
    recipe = "\n".join(f"| {k} | {v} |" for k, v in asdict(about.recipe).items())
    return f"""---
library_name: diffusion_nb
tags: [diffusion, {about.family}]
---

# {repo_id}

A {about.family} model of pictures of {height}×{width} with {channels} channel{"s" if channels > 1 else ""}{steps}, trained by diffusion_nb.

```python
from diffusion_nb.models.model import Model

model = Model.from_pretrained("{repo_id}")  # model.denoiser, model.about
```

`diffusion-nb sample --model FOLDER` draws with the folder of these files.

| recipe | |
|---|---|
{recipe}
"""


def fill(module: nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    "Give the module these weights and buffers. Raises ValueError where names or shapes differ; it is then as it was."
    own = own_tensors(module)
    check_fits(own, tensors, what)
    with torch.no_grad():
        for name, v in own.items():
            v.copy_(tensors[name])


def read_about(file: Path) -> About:
    "What a model.json says. Raises ValueError where it is not there, damaged, or asks for what cannot be meant."
    if not file.exists():
        raise ValueError(
            f"{file.parent} holds no {file.name}: expected a folder written by `diffusion-nb train` or Model.save"
        )
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        kind = FAMILIES[said["family"]][0]
        if left_out := {f.name for f in fields(kind)} - said["recipe"].keys():
            raise KeyError(*left_out)
        recipe = typed(kind, said["recipe"], "recipe")
        about = About(**said | {"recipe": recipe, "shape": tuple(said["shape"])})
        channels, height, width = about.shape
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{file} is damaged, or not written by `diffusion-nb train` or Model.save: {e!r}") from e
    check_numbers(channels=(channels, 1), height=(height, 1), width=(width, 1))
    if max(channels * height * width, channels * 2**12) > 2**28:
        raise ValueError(f"{file}: pictures of shape {about.shape} cannot be meant")
    return about
