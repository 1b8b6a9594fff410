"""What a sampler costs beside the network: microseconds a step with the network replaced by zeros, batch 4×3×32×32.

Run: python benchmarks/samplers.py   (writes benchmarks/results/samplers.json, the ancestral step, and solvers.json, the others)
"""

import contextlib
import io
from types import SimpleNamespace

import torch
from common import report, seconds

from diffusion_nb.denoisers import Denoiser, NetDenoiser, Prediction
from diffusion_nb.forward import posterior_steps
from diffusion_nb.grids import time_grid
from diffusion_nb.noise import Noise
from diffusion_nb.samplers.heun import heun
from diffusion_nb.samplers.linear import ddim, ddpm, dpmpp_2m, dpmpp_2m_sde, ode_steps
from diffusion_nb.schedules import DDPMSchedule, linear_betas

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
        return Prediction(x_t, self.one, self.one, zeros)


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


# the solvers


def numbers(ts):
    "Python numbers for the bare loops: what turns noise into x0, and the steps."
    alpha, sigma = schedule(ts)
    a, b, h = ode_steps(schedule, ts[1:], ts[:-1])
    reach = torch.zeros_like(h)
    reach[1:-1] = h[1:-1] / h[:-2] / 2
    bar = sigma / alpha
    columns = (1 / alpha[:-1], bar[:-1], a, b, reach, alpha[:-1], alpha[1:], bar.diff())
    return list(zip(*(c.tolist() for c in columns), strict=True))


@torch.no_grad()
def bare_ddim(net, x, ts):
    for c1, c2, a, b, *_ in numbers(ts):
        x = a * x + b * (c1 * x - c2 * net(x))
    return x


@torch.no_grad()
def bare_heun(net, x, ts):
    rows = numbers(ts)
    x = x / schedule(ts[0])[0].item()
    for i, (*_, alpha_t, alpha_s, change) in enumerate(rows):
        d = net(alpha_t * x)
        ahead = x + change * d
        x = ahead if i == len(rows) - 1 else x + change / 2 * (d + net(alpha_s * ahead))
    return schedule(ts[-1])[0].item() * x


@torch.no_grad()
def bare_2m(net, x, ts):
    last = None
    for c1, c2, a, b, reach, *_ in numbers(ts):
        guess = c1 * x - c2 * net(x)
        x, last = a * x + b * (guess if last is None else guess + reach * (guess - last)), guess
    return x


def their_solver(name, **options):
    import diffusers

    scheduler, x = getattr(diffusers, name)(N, **options), x_T
    scheduler.set_timesteps(N)
    for t in scheduler.timesteps:
        x = scheduler.step(zeros, t, scheduler.scale_model_input(x, t)).prev_sample


def azula_solver(name, **options):
    import azula.sample
    from azula.denoise import Denoiser as AzulaDenoiser
    from azula.denoise import DiracPosterior
    from azula.noise import VPSchedule

    class Zero(AzulaDenoiser):
        schedule = VPSchedule()

        def forward(self, x_t, t, **kw):
            return DiracPosterior(zeros)

    getattr(azula.sample, name)(Zero(), steps=N, silent=True, **options)(x_T)


def smalldiffusion_ddim():
    from smalldiffusion import ScheduleDDPM, samples

    model = SimpleNamespace(predict_eps_cfg=lambda x, *a, **k: zeros, eval=lambda: None)
    model.rand_input = lambda n: torch.randn(n, *SHAPE)
    for _ in samples(model, ScheduleDDPM(N).sample_sigmas(N), xt=x_T, accelerator=SimpleNamespace(device="cpu")):
        pass


def solvers():
    "The families, each beside its bare loop; the contenders of a family start with its name."
    guess, zero = ZeroGuess(), Zeros()
    return {
        "DDIM: bare loop": lambda: bare_ddim(zero, x_T, ts),
        "DDIM: diffusion_nb": lambda: ddim(guess, x_T, ts),
        "DDIM: diffusers DDIMScheduler": lambda: their_solver("DDIMScheduler", clip_sample=False),
        "DDIM: azula DDIMSampler": lambda: azula_solver("DDIMSampler"),
        "DDIM: smalldiffusion samples": smalldiffusion_ddim,
        "Heun: bare loop": lambda: bare_heun(zero, x_T, ts),
        "Heun: diffusion_nb heun": lambda: heun(guess, x_T, ts),
        "Heun: diffusers HeunDiscreteScheduler": lambda: their_solver("HeunDiscreteScheduler"),
        "Heun: azula HeunSampler": lambda: azula_solver("HeunSampler"),
        "2M: bare loop": lambda: bare_2m(zero, x_T, ts),
        "2M: diffusion_nb dpmpp_2m": lambda: dpmpp_2m(guess, x_T, ts),
        "2M: diffusers DPMSolverMultistepScheduler": lambda: their_solver("DPMSolverMultistepScheduler"),
        "2M: azula xEABSampler": lambda: azula_solver("xEABSampler"),
        "2M SDE: diffusion_nb dpmpp_2m_sde": lambda: dpmpp_2m_sde(guess, x_T, ts, noise=lambda k: torch.randn(4, *SHAPE)),
    }  # fmt: skip


def check_bare_loops():
    "They are the same walks as ours, with a network that is not zero, in float64."
    few, x = time_grid(12, 0.9), x_T.double()
    net = NetDenoiser(Sine(), schedule)
    for run, bare_run in ((ddim, bare_ddim), (heun, bare_heun), (dpmpp_2m, bare_2m)):
        torch.testing.assert_close(run(net, x, few), bare_run(torch.sin, x, few), rtol=0, atol=1e-7)


class Sine(torch.nn.Module):
    def forward(self, x, t):
        return x.sin()


def main():
    torch.set_num_threads(1)
    check_bare_loops()
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
    with contextlib.redirect_stderr(io.StringIO()):
        rows = {name: round(1e6 * s / N, 1) for name, s in seconds(solvers()).items()}
    bare_of = lambda name: rows.get(name.split(":")[0] + ": bare loop")
    ratios = {name: round(v / bare_of(name), 2) for name, v in rows.items() if bare_of(name)}
    report("solvers", "µs a step (Heun: of two calls)", rows, ratios)


if __name__ == "__main__":
    main()
