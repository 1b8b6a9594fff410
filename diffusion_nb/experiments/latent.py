"""Autoencoders and latent diffusion models of MNIST and of emoji (notebook 19)."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from diffusion_nb.codecs import Codec, fit_codec, latents
from diffusion_nb.data import data_set
from diffusion_nb.denoisers import Clip, NetDenoiser
from diffusion_nb.emoji import Emoji, emoji, vocabulary
from diffusion_nb.experiments.artifacts import artifact
from diffusion_nb.experiments.emoji import emoji_judge, judge_captions, train_emoji, training_pictures
from diffusion_nb.experiments.judge import accuracy_of, mnist_judge
from diffusion_nb.experiments.pictures import by_2m, from_bytes, halved, in_bytes, trained_on
from diffusion_nb.experiments.reference import ReferenceRecipe, against, features, make_references, reference
from diffusion_nb.guidance import CFG
from diffusion_nb.metrics.features import frechet_distance
from diffusion_nb.recipes.captions import CaptionRecipe
from diffusion_nb.recipes.latent import (
    AutoencoderRecipe,
    LatentRecipe,
    autoencoder_trainer,
    latent_denoiser,
    latent_trainer,
)
from diffusion_nb.recipes.settings import settings
from diffusion_nb.training.batches import flip_half
from diffusion_nb.util.checks import default_device

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


# autoencoders


def psnr(x: Float[Tensor, "n *d"], made: Float[Tensor, "n *d"]) -> float:
    "Peak signal to noise in decibels, of pictures in [-1, 1]: from the mean squared error of all of them."
    return 10 * math.log10(4 / (x - made).square().mean().item())


@torch.no_grad()
def there_and_back(codec: Codec, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    "The pictures, encoded to the means of their latents and decoded again."
    return torch.cat([codec.decode(codec.encode(part)).clamp(-1, 1) for part in x.split(100)])


def packed(codec: Codec) -> dict[str, Tensor]:
    "A codec as an artifact keeps it: the network's weights in float16, shift and scale."
    return halved(codec.autoencoder) | {"shift": codec.shift, "scale": codec.scale}


def unpacked(r: AutoencoderRecipe, channels: int, tensors: dict[str, Tensor]) -> Codec:
    "The codec that `packed` kept, in eval mode, without gradients."
    tensors = dict(tensors)
    shift, scale, net = tensors.pop("shift"), tensors.pop("scale"), r.fresh(channels)
    net.load_state_dict(tensors)
    return Codec(net.eval().requires_grad_(False), shift, scale)


def in_halves(r: AutoencoderRecipe, net: nn.Module, x: Float[Tensor, "n c h w"]) -> Codec:
    "The codec of a trained autoencoder, its weights rounded to float16, with shift and scale of the pictures x."
    rounded = unpacked(r, x.shape[1], packed(Codec(net, torch.zeros(1), torch.ones(1))))
    return fit_codec(rounded.autoencoder, x)


def train_mnist_codec(r: AutoencoderRecipe, **options) -> tuple[dict, dict]:
    "An autoencoder of MNIST with shift and scale, 40 held-out digits as bytes, and what the judge says of 1,500."
    data = data_set("mnist").load()
    net = autoencoder_trainer(r, data.x, device=default_device(), **options).fit().cpu()
    codec, judge, x, y = in_halves(r, net, data.x[:12_000]), mnist_judge(), data.x_test[:1500], data.y_test[:1500]
    made, real = there_and_back(codec, x), features(judge, x)
    said = {
        "PSNR": psnr(x, made), "recognised": accuracy_of(judge, made, y), "recognised as they are": accuracy_of(judge, x, y),
        "Fréchet distance": frechet_distance(features(judge, made), real),
        "Fréchet distance of training pictures": frechet_distance(features(judge, data.x[:1500]), real),
    }  # fmt: skip
    some = torch.cat([(data.y_test[:300] == d).nonzero()[:4, 0] for d in range(10)])
    kept = {"digits": ((data.x_test[some] + 1) * 127.5).round().byte(), "labels": data.y_test[some]}
    return packed(codec) | kept, rounded(said | code_numbers(codec, x)) | trained_on()


@torch.no_grad()
def code_numbers(codec: Codec, x: Float[Tensor, "n c h w"]) -> dict[str, float]:
    "Of an autoencoder with noise: nats of KL per picture. Of a quantiser: how many codes are used, and bits per picture at their frequencies."
    ae = codec.autoencoder
    if ae.quantiser is None:
        return {"KL in nats per picture": ae.encode(x).kl().mean().item()}
    index = ae.quantiser.index(ae.encode(x))
    p = torch.bincount(index.flatten(), minlength=len(ae.quantiser.book)) / index.numel()
    entropy = -(p * p.clamp_min(1e-12).log2()).sum().item()
    return {"codes used": int((p > 0).sum()), "bits per picture": entropy * index[0].numel()}


def rounded(said: dict) -> dict:
    "Numbers to four decimals, within dictionaries, too."
    return {k: rounded(v) if isinstance(v, dict) else round(v, 4) for k, v in said.items()}


def mnist_codec(kind: str = "kl") -> tuple[Codec, Tensor, Tensor]:
    "The autoencoder of MNIST (artifact `mnist_kl` or `mnist_vq`), and 40 held-out digits with their labels."
    r = settings("codec.mnist-vq" if kind == "vq" else "codec.mnist", AutoencoderRecipe)
    tensors = dict(artifact(f"mnist_{kind}", train_mnist_codec, r)[0])
    digits, labels = tensors.pop("digits") / 127.5 - 1, tensors.pop("labels")
    return unpacked(r, 1, tensors), digits, labels


def train_emoji_codec(r: AutoencoderRecipe, **options) -> tuple[dict, dict]:
    "An autoencoder of emoji at 64×64 with shift and scale, and its errors on what was held out."
    data = emoji(64)
    x, judge = data.x[data.train], emoji_judge()
    net = autoencoder_trainer(r, x, augment=flip_half, device=default_device(), **options).fit().cpu()
    codec, said = in_halves(r, net, x), {}
    for name, which in (("held-out pictures", data.held_pictures), ("held-out combinations", data.held_combinations), ("training pictures", data.train)):  # fmt: skip
        real = data.x[which][:400]
        made = there_and_back(codec, real)
        seen = against(features(judge, avg_pool2d(data.x[data.train], 2)), features(judge, avg_pool2d(made, 2)))
        said[name] = {"PSNR": psnr(real, made)} | seen
    return packed(codec), rounded(said) | trained_on()


def emoji_codec() -> Codec:
    "The autoencoder of emoji at 64×64 (artifact `emoji_kl`)."
    r = settings("codec.emoji", AutoencoderRecipe)
    return unpacked(r, 3, artifact("emoji_kl", train_emoji_codec, r)[0])


def emoji_latent_shape() -> tuple[int, int, int]:
    "The shape of the latents of an emoji of 64×64."
    return settings("codec.emoji", AutoencoderRecipe).latent, 8, 8


# diffusion models of their latents


def draw_latents(
    denoiser: NetDenoiser,
    texts: Sequence[str],
    shape: Sequence[int],
    w: float = 1.0,
    steps: int = 20,
    first: int = 0,
) -> Float[Tensor, "n c h w"]:
    "Latents of this shape for each text, by DPM-Solver++ 2M with guidance weight w; the i-th has seed `first` + i."
    reader = denoiser.net.context
    guided = Clip(CFG(denoiser, w, reader.null) if w else denoiser, -6.0, 6.0)
    return by_2m(guided, len(texts), shape, steps, first, batch=100, y=reader.told(texts))


@torch.no_grad()
def draw_through(
    codec: Codec, denoiser: NetDenoiser, texts: Sequence[str], shape: Sequence[int], w: float = 1.0, steps: int = 20, first: int = 0
) -> Float[Tensor, "n c h w"]:  # fmt: skip
    "Pictures of texts: latents as `draw_latents` draws them, decoded."
    z = draw_latents(denoiser, texts, shape, w, steps, first)
    return torch.cat([codec.decode(part).clamp(-1, 1) for part in z.split(100)])


def spelling(r: LatentRecipe) -> LatentRecipe:
    "The recipe, with the letters of the names of digits as words."
    return replace(r, words=tuple(sorted(set("".join(NAMES)))))


def train_mnist_latent(r: LatentRecipe, **options) -> tuple[dict, dict]:
    "A latent diffusion model of MNIST that reads the spelled names of digits, and what the judge says of 500 drawings at each weight of guidance."
    data, (codec, *_) = data_set("mnist").load(), mnist_codec()
    z, texts = latents(codec, data.x), [NAMES[i] for i in data.y.tolist()]
    denoiser = latent_trainer(spelling(r), z, texts, device=default_device(), **options).fit().cpu()
    weights, judge, y, said = halved(denoiser.net), mnist_judge(), torch.arange(500) % 10, {}
    denoiser.net.load_state_dict(weights)
    real, held = reference("mnist").real.float(), data.x_test[:500]
    for w in (0.0, 1.0, 2.0):
        x = draw_through(codec, denoiser.eval(), [NAMES[i] for i in y], tuple(z[0, :4].shape), w, first=2**20)
        drawn = features(judge, x)
        said[f"w = {w:g}"] = {
            "recognised": accuracy_of(judge, x, y),
            "Fréchet distance": frechet_distance(drawn, real),
        }
    for name, x in (("held-out pictures", held), ("held-out pictures, encoded and decoded", there_and_back(codec, held))):  # fmt: skip
        said[name] = {"Fréchet distance": frechet_distance(features(judge, x), real)}
    return weights, rounded(said) | trained_on()


def mnist_latent() -> NetDenoiser:
    "The latent diffusion model of MNIST (artifact `mnist_latent`), in eval mode."
    r = settings("latent.mnist", LatentRecipe)
    denoiser = latent_denoiser(spelling(r), (4, 7, 7))
    denoiser.net.load_state_dict(artifact("mnist_latent", train_mnist_latent, r)[0])
    return denoiser.eval().requires_grad_(False)


def train_emoji_latent(r: LatentRecipe, **options) -> tuple[dict, dict]:
    "A latent diffusion model of emoji at 64×64 that reads captions, in 8 bits, and what the judge says of its drawings at half the size."
    data, codec = emoji(64), emoji_codec()
    r, (x, captions) = replace(r, words=vocabulary(data.captions)), training_pictures(data)
    denoiser = latent_trainer(r, latents(codec, x), captions, device=default_device(), **options).fit().cpu()
    weights = in_bytes(denoiser.net)
    denoiser.net.load_state_dict(from_bytes(weights))
    letters = torch.tensor(list("\n".join(denoiser.net.context.vocabulary).encode()), dtype=torch.uint8)
    return weights | {"words": letters}, rounded(judged_latent(codec, denoiser.eval(), data)) | trained_on()


def judged_latent(codec: Codec, denoiser: NetDenoiser, data: Emoji, w: float = 2.0) -> dict[str, dict[str, float]]:
    "What the judge of 32×32 emoji says of drawings at half their size: of held-out captions, and of 200 that were trained on; as `judged_model` asks."
    judge, small, said, halves = emoji_judge(), emoji(32), {}, []
    trained = data.train.nonzero()[:, 0]
    for name, which in (
        ("held-out combinations", data.held_combinations.nonzero()[:, 0]),
        ("held-out pictures", data.held_pictures.nonzero()[:, 0]),
        ("trained on", trained[:: len(trained) // 200][:200]),
    ):
        x = draw_through(codec, denoiser, [data.captions[i] for i in which], emoji_latent_shape(), w, first=2**20)
        halves.append(avg_pool2d(x, 2))
        said[name] = judge_captions(judge, small, halves[-1], which.tolist())
    held, real = torch.cat(halves[:2]), features(judge, small.x[data.train])
    return said | {"all held-out captions": against(real, features(judge, held))}


def emoji_latent_model() -> tuple[NetDenoiser, LatentRecipe]:
    "The latent diffusion model of emoji (artifact `emoji_latent`), in eval mode, and its recipe with its words."
    r = settings("latent.emoji", LatentRecipe)
    tensors = dict(artifact("emoji_latent", train_emoji_latent, r)[0])
    r = replace(r, words=tuple(bytes(tensors.pop("words").tolist()).decode().split("\n")))
    denoiser = latent_denoiser(r, emoji_latent_shape())
    denoiser.net.load_state_dict(from_bytes(tensors))
    return denoiser.eval().requires_grad_(False), r


def emoji_latent() -> NetDenoiser:
    "The latent diffusion model of emoji, in eval mode."
    return emoji_latent_model()[0]


MADE = {
    "mnist_kl": (train_mnist_codec, "codec.mnist", AutoencoderRecipe),
    "mnist_vq": (train_mnist_codec, "codec.mnist-vq", AutoencoderRecipe),
    "emoji_kl": (train_emoji_codec, "codec.emoji", AutoencoderRecipe),
    "mnist_latent": (train_mnist_latent, "latent.mnist", LatentRecipe),
    "emoji_latent": (train_emoji_latent, "latent.emoji", LatentRecipe),
    "emoji": (train_emoji, "recipe.emoji", CaptionRecipe),
}  # what makes each artifact of this module, and the model it is compared with, by the recipe of which section


def pixel_scores() -> dict[str, dict]:
    "Of the model of emoji at 32×32: what the judge said in the course of its training, and of all held-out captions at its end, and of held-out emoji."
    end = artifact("references", make_references, settings("references", ReferenceRecipe))[1]["metrics"]["emoji"]
    return metrics("emoji") | {"all held-out captions": end["drawn"], "held-out emoji": end["held out"]}


def card(name: str) -> dict:
    "The card of one of the artifacts in MADE."
    make, section, kind = MADE[name]
    return artifact(name, make, settings(section, kind))[1]


def metrics(name: str) -> dict:
    "What the card of one of the artifacts in MADE says of it."
    return card(name)["metrics"]
