"""Models of several parts that come with the book, each as one `Model`."""

from dataclasses import asdict, fields

from diffusion_nb.models.model import About, Model


def like(kind, recipe, **changed):
    "A recipe of another kind with what both have in common."
    common = {f.name for f in fields(kind)}
    return kind(**{k: v for k, v in asdict(recipe).items() if k in common} | changed)


def upsampler() -> Model:
    "The stage that enlarges emoji from 32×32 to 64×64 (notebook 20)."
    from diffusion_nb.experiments.cascade import emoji_upsampler
    from diffusion_nb.recipes.cascade import UpsamplerRecipe
    from diffusion_nb.recipes.settings import settings

    r = settings("20_cascade.emoji", UpsamplerRecipe)
    return Model(emoji_upsampler(), About("upsampler", r, (3, 64, 64)))


def unclip() -> Model:
    "The prior and the decoder of emoji, with the encoder of captions of their CLIP (notebook 22)."
    from diffusion_nb.experiments.clip import emoji_clip, emoji_decoder, emoji_prior, prior_recipe
    from diffusion_nb.experiments.emoji import emoji_model
    from diffusion_nb.recipes.unclip import Unclip, UnclipNets

    clip, prior, decoder, of_prior = emoji_clip(), emoji_prior(), emoji_decoder(), prior_recipe()
    text = Unclip(clip.text, prior, decoder).eval()
    r = like(
        UnclipNets, emoji_model()[1], words=clip.text.reader.vocabulary, dim=of_prior.clip.dim, length=clip.text.reader.length,
        text_width=of_prior.clip.words, prior_width=of_prior.width, prior_depth=of_prior.depth, reading=decoder.net.label.layers[0].out_features,
    )  # fmt: skip
    return Model(text, About("unclip", r, (3, 32, 32)))


def cold() -> Model:
    "The restorer of blurred MNIST, which draws from a grey level (notebook 25)."
    from diffusion_nb.experiments.cold import cold_mnist
    from diffusion_nb.recipes.cold import ColdModel, ColdRecipe
    from diffusion_nb.recipes.settings import settings

    (restorer, levels), r = cold_mnist(), settings("25_cold.mnist", ColdRecipe)
    model = ColdModel(r, (1, 28, 28), levels[:, None])
    model.net.load_state_dict(restorer.net.state_dict())
    return Model(model.eval().requires_grad_(False), About("cold", r, (1, 28, 28)))


def words() -> Model:
    "The network of English words with masks (notebook 26)."
    from diffusion_nb.experiments.words import word_net, word_recipe
    from diffusion_nb.recipes.words import WordsRecipe

    net = word_net()
    r = like(WordsRecipe, word_recipe(), length=net.place.num_embeddings)
    return Model(net, About("words", r, (1, 1, r.length), len(r.letters)))
