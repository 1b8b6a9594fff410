"""What an ancestral sampler costs beside the network: microseconds a step with the network replaced by zeros, batch 4×3×32×32.

Run: python benchmarks/samplers.py   (writes benchmarks/results/samplers.json)
"""

import contextlib
import io
from types import SimpleNamespace

import torch
from common import report, seconds

from diffusion_nb.core import Noise
from diffusion_nb.denoiser import Denoiser, NetDenoiser, Pred
from diffusion_nb.forward import DDPMSchedule, linear_betas
from diffusion_nb.posterior import posterior_steps
from diffusion_nb.samplers.ddpm import ddpm, time_grid

N, SHAPE = 1000, (3, 32, 32)
noise = Noise(range(4), SHAPE)
x_T, zeros = noise(0), torch.zeros(4, *SHAPE)
schedule, ts = DDPMSchedule(linear_betas(N)), time_grid(N)


class Zeros(torch.nn.Module):
    def forward(self, x, *args, **kw):
        return zeros


class ZeroGuess(Denoiser):
    "Guesses x0 = 0 and evaluates nothing: what is left is the sampler."

    def __init__(self):
        super().__init__()
        self.schedule, self.one = schedule, torch.ones(())

    def forward(self, x_t, t):
        return Pred(x_t, self.one, self.one, zeros)


@torch.no_grad()
def bare(net, noise):
    "The shortest loop there is: coefficients precomputed as Python numbers."
    step = posterior_steps(schedule, ts[1:], ts[:-1])
    alpha, sigma = schedule(ts[:-1])
    rows = zip(
        (1 / alpha).tolist(),
        (sigma / alpha).tolist(),
        step.a.tolist(),
        step.b.tolist(),
        step.small.sqrt().tolist(),
        strict=True,
    )
    x = x_T
    for i, (c1, c2, a, b, std) in enumerate(rows):
        x0 = c1 * x - c2 * net(x)
        x = a * x + b * x0 + std * noise(i + 1)
    return x


def with_diffusers():
    from diffusers import DDPMScheduler

    scheduler, x = DDPMScheduler(clip_sample=False), x_T
    for t in scheduler.timesteps:
        x = scheduler.step(zeros, t, x).prev_sample


def with_azula():
    from azula.denoise import Denoiser as AzulaDenoiser
    from azula.denoise import DiracPosterior
    from azula.noise import VPSchedule
    from azula.sample import DDPMSampler

    class Zero(AzulaDenoiser):
        schedule = VPSchedule()

        def forward(self, x_t, t, **kw):
            return DiracPosterior(zeros)

    DDPMSampler(Zero(), steps=N, silent=True)(x_T)


def with_smalldiffusion():
    from smalldiffusion import ScheduleDDPM, samples

    model = SimpleNamespace(predict_eps=lambda x, *a, **k: zeros, predict_eps_cfg=lambda x, *a, **k: zeros)
    model.rand_input, model.eval = lambda n: torch.randn(n, *SHAPE), lambda: None
    for _ in samples(
        model, ScheduleDDPM(N).sample_sigmas(N), gam=1, mu=0.5, xt=x_T, accelerator=SimpleNamespace(device="cpu")
    ):
        pass


def main():
    torch.set_num_threads(1)
    net = NetDenoiser(Zeros(), schedule)
    difference = (bare(Zeros(), noise) - ddpm(net, x_T, ts, noise=noise)).abs().max().item()
    assert difference < 1e-2, (
        difference
    )  # the same chain: float32 rounding through 1000 steps that divide by alpha
    randn = lambda k: torch.randn(4, *SHAPE)  # what the peers use
    contenders = {
        "bare loop": lambda: bare(Zeros(), randn),
        "diffusion_nb ddpm": lambda: ddpm(ZeroGuess(), x_T, ts, noise=randn),
        "diffusion_nb ddpm with NetDenoiser": lambda: ddpm(net, x_T, ts, noise=randn),
        "diffusers DDPMScheduler": with_diffusers,
        "azula DDPMSampler": with_azula,
        "smalldiffusion samples": with_smalldiffusion,
        "bare loop, seeded noise": lambda: bare(Zeros(), noise),
        "diffusion_nb ddpm, seeded noise": lambda: ddpm(ZeroGuess(), x_T, ts, noise=noise),
        "diffusion_nb ddpm with NetDenoiser, seeded noise": lambda: ddpm(net, x_T, ts, noise=noise),
    }
    with contextlib.redirect_stderr(io.StringIO()):
        rows = {name: round(1e6 * s / N, 1) for name, s in seconds(contenders).items()}
    report(
        "samplers",
        "µs a step",
        rows,
        {
            name: round(v / rows["bare loop, seeded noise" if "seeded" in name else "bare loop"], 2)
            for name, v in rows.items()
        },
    )


if __name__ == "__main__":
    main()
