from jaxtyping import Float
from torch import Tensor, nn


def reconstruction(x: Float[Tensor, "b *d"], made: Float[Tensor, "b *d"]) -> Float[Tensor, " b"]:
    "The mean squared error per number of a picture."
    return (made - x).square().flatten(1).mean(1)


def kl_loss(autoencoder: nn.Module, x0: Float[Tensor, "b *d"], t: Tensor, eps: Float[Tensor, "b *d"], weight: float = 0.01) -> Float[Tensor, " b"]:  # fmt: skip
    """Reconstruction from a sampled latent + weight · KL from the standard normal distribution, in nats per number of a picture. (Rombach et al. 2022, appendix G)

    Called as `Trainer` calls a loss: the latent's noise is the first numbers of eps, the time t is not read.
    """
    code = autoencoder.encode(x0)
    noise = eps.flatten(1)[:, : code.mean[0].numel()].reshape(code.mean.shape)
    return reconstruction(x0, autoencoder.decode(code.sample(noise))) + weight * code.kl() / x0[0].numel()


def vq_loss(autoencoder: nn.Module, x0: Float[Tensor, "b *d"], t: Tensor, eps: Float[Tensor, "b *d"], commitment: float = 0.25) -> Float[Tensor, " b"]:  # fmt: skip
    """Reconstruction from rounded latents, codes drawn to the latents, and latents held to their codes. (van den Oord et al. 2017, eq. 3)

    Called as `Trainer` calls a loss; neither t nor eps is read.
    """
    z, q = autoencoder.encode(x0), autoencoder.quantiser
    codes = q.vectors(q.index(z))
    to_latents, to_codes = reconstruction(z.detach(), codes), reconstruction(z, codes.detach())
    return reconstruction(x0, autoencoder.decode(z)) + to_latents + commitment * to_codes
