"""Samplers of second order: the same numbers as diffusers, step by step; the right distribution; orders; bad input."""

import math

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMEulerScheduler,
    HeunDiscreteScheduler,
)
from diffusers.schedulers import scheduling_edm_euler

from diffusion_nb.denoisers import Denoiser, Prediction
from diffusion_nb.forward import posterior_steps
from diffusion_nb.grids import edm_grid, time_at, time_grid
from diffusion_nb.metrics.samples import energy_distance, typicality
from diffusion_nb.mixtures import GaussianMixture, GMMDenoiser, random_mixture, ring_mixture
from diffusion_nb.noise import BrownianPath, Noise
from diffusion_nb.samplers.heun import churned, heun
from diffusion_nb.samplers.linear import (
    _parabola,
    ddim,
    ddpm,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_3m,
    dpmpp_3m_sde,
    linear_walk,
    ode_steps,
    sde_steps,
)
from diffusion_nb.samplers.singlestep import down_and_up, dpmpp_2s
from diffusion_nb.schedules import (
    CosineSchedule,
    DDPMSchedule,
    EDMSchedule,
    VESchedule,
    VPSchedule,
    cosine_betas,
    linear_betas,
)

F64 = torch.float64
CHAIN = DDPMSchedule(linear_betas(1000))
MIXTURE = random_mixture(3)
NOISE = Noise(range(20), (2,), dtype=F64)
SCHEDULES = {
    "vp": VPSchedule(),
    "ve": VESchedule(),
    "edm": EDMSchedule(),
    "cosine": CosineSchedule(),
    "ddpm": CHAIN,
}
RUNS = {
    "heun": heun,
    "2m": dpmpp_2m,
    "2m sde": dpmpp_2m_sde,
    "3m": dpmpp_3m,
    "3m sde": dpmpp_3m_sde,
    "2s": dpmpp_2s,
}


class Counted(GMMDenoiser):
    "Remembers the times at which it is called."

    def __init__(self, *args):
        super().__init__(*args)
        self.times = []

    def forward(self, x_t, t, **cond):
        self.times.append(float(t))
        return super().forward(x_t, t, **cond)


# diffusers


def their_sigmas(scheduler, ts):
    "The scheduler's sigmas, which it keeps in float32, in float64, for our times."
    alpha, sigma = CHAIN(ts)
    scheduler.sigmas = sigma / alpha
    return scheduler


@pytest.mark.parametrize("n", [3, 10, 20])
@pytest.mark.parametrize("kind", ["dpmsolver++", "sde-dpmsolver++"])
def test_2m_is_theirs(kind, n):
    theirs = DPMSolverMultistepScheduler(1000, algorithm_type=kind, solver_order=2, solver_type="midpoint",
                                         prediction_type="sample", final_sigmas_type="zero")  # fmt: skip
    theirs.set_timesteps(n)
    ts = torch.cat([(theirs.timesteps + 1) / 1000, torch.zeros(1)]).double()
    theirs = their_sigmas(theirs, ts)
    best = GMMDenoiser(MIXTURE, CHAIN)
    want = x = NOISE(0)
    for i, (t, label) in enumerate(zip(ts[:-1], theirs.timesteps, strict=True)):
        want = theirs.step(best(want, t).x0, label, want, variance_noise=NOISE(i + 1)).prev_sample
    if kind == "dpmsolver++":
        got = dpmpp_2m(best, x, ts)
    else:
        got = dpmpp_2m_sde(best, x, ts, noise=NOISE)
    # Theirs rounds the state to float32 in each step, 6e-8 of values up to 4; the walk spreads errors a little.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [4, 10, 20])
def test_3m_with_half_the_curvature_is_theirs(n):
    theirs = DPMSolverMultistepScheduler(1000, algorithm_type="dpmsolver++", solver_order=3, prediction_type="sample", solver_type="heun",
                                         final_sigmas_type="sigma_min", lower_order_final=False)  # fmt: skip
    theirs.set_timesteps(n)
    ts = torch.cat([(theirs.timesteps + 1) / 1000, torch.tensor([0.001])]).double()
    theirs, best = their_sigmas(theirs, ts), GMMDenoiser(MIXTURE, CHAIN)
    want = x = NOISE(0)
    for t, label in zip(ts[:-1], theirs.timesteps, strict=True):
        want = theirs.step(best(want, t).x0, label, want).prev_sample
    a, b, h = ode_steps(CHAIN, ts[1:], ts[:-1])
    reach, bend = _parabola(h, curve=0.5)
    got = linear_walk(best, x, ts, a, b, None, None, None, {}, reach=reach, bend=bend)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


class Parabola(Denoiser):
    "Guesses 0.2 + 0.3 λ - 0.1 λ², whatever the state."

    schedule = VPSchedule()

    def forward(self, x_t, t, **cond):
        lam = self.schedule.logsnr(t) / 2
        return Prediction(x_t, *self.schedule(t), (0.2 + 0.3 * lam - 0.1 * lam**2).expand_as(x_t), None)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_3m_is_exact_for_a_guess_on_a_parabola(eta):
    "Against the integral by which the equation is solved, from the third step on; without its noise."
    ts = torch.tensor([0.9, 0.7, 0.62, 0.45, 0.2, 0.15], dtype=F64)
    alpha, lam, states = VPSchedule()(ts)[0], VPSchedule().logsnr(ts) / 2, []
    nothing = dict(
        noise=lambda k: torch.zeros(1, 1, dtype=F64), callback=lambda i, x, pred: states.append(x.item())
    )
    dpmpp_3m_sde(Parabola(), torch.ones(1, 1, dtype=F64), ts, eta=eta, lower_order_final=False, **nothing)
    u = torch.linspace(lam[2].item(), lam[-1].item(), 40_001, dtype=F64)
    c = 1 + eta
    guess = 0.2 + 0.3 * u - 0.1 * u**2
    grown = torch.trapezoid(c * (c * (u - lam[-1])).exp() * guess, u)
    # x/alpha obeys d(x/alpha) = c (guess - x/alpha) dλ
    want = alpha[-1] * ((-c * (lam[-1] - lam[2])).exp() * states[1] / alpha[2] + grown)
    assert states[-1] == pytest.approx(want.item(), abs=1e-8)


def test_3m_holds_its_last_guess_unless_told_otherwise():
    best, ts = GMMDenoiser(MIXTURE, VPSchedule()), time_grid(6, end=0.01)
    for run in (dpmpp_3m, dpmpp_3m_sde):
        states, preds = [], []
        keep = lambda i, x, pred, s=states, p=preds: (s.append(x), p.append(pred))
        run(best, NOISE(0), ts, noise=lambda k: 0 * NOISE(k), callback=keep)
        a, b, _, _ = sde_steps(best.schedule, ts[-1:], ts[-2:-1], float(run is dpmpp_3m_sde))
        torch.testing.assert_close(states[-1], a * states[-2] + b * preds[-1].x0)


def test_2s_is_theirs():
    "Theirs has its middle on the grid, so the grid has the middles."
    theirs = DPMSolverSinglestepScheduler(1000, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", prediction_type="sample",
                                          final_sigmas_type="sigma_min", lower_order_final=False)  # fmt: skip
    theirs.set_timesteps(12)
    lam = torch.linspace(-4.0, 3.0, 13, dtype=F64)
    ts = time_at(CHAIN, 2 * lam)
    theirs, best = their_sigmas(theirs, ts), GMMDenoiser(MIXTURE, CHAIN)
    want = NOISE(0)
    for t, label in zip(ts[:-1], theirs.timesteps, strict=True):
        want = theirs.step(best(want, t).x0, label, want).prev_sample
    torch.testing.assert_close(dpmpp_2s(best, NOISE(0), ts[::2]), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("n", [3, 7, 25])  # with 2, a step is so long that ours is Euler's
def test_heun_is_theirs(n):
    theirs = HeunDiscreteScheduler(1000, prediction_type="sample")
    theirs.set_timesteps(n)
    ts = edm_grid(CHAIN, n, 0.05, 20)
    sigmas = their_sigmas(theirs, ts).sigmas
    theirs.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    best, bar = GMMDenoiser(MIXTURE, CHAIN), sigmas[0] * NOISE(0)
    alphas = (1 + theirs.sigmas**2).rsqrt()
    times = torch.cat([ts[:1], ts[1:-1].repeat_interleave(2)])
    for t, sigma_t, alpha in zip(times, theirs.timesteps, alphas[:-1], strict=True):
        bar = theirs.step(best(alpha * bar, t).x0, sigma_t, bar).prev_sample
    got = heun(best, CHAIN(ts[0])[1] * NOISE(0), ts)
    torch.testing.assert_close(got, bar, rtol=0, atol=1e-9)  # in float64 throughout; at the end alpha = 1


@pytest.mark.parametrize("churn", [0.0, 3.0, 100.0])
def test_churn_and_euler_are_theirs(churn, monkeypatch):
    "Walks of a single step of ours, which is Euler's, beside EDMEulerScheduler's step."
    n, schedule = 12, EDMSchedule(0.001, 200)
    theirs = EDMEulerScheduler(0.002, 80, sigma_schedule="karras")
    theirs.set_timesteps(n)
    theirs.is_scale_input_called = True
    ts = time_at(schedule, -2 * theirs.sigmas[:-1].double().log())
    ts = torch.cat([ts, torch.zeros(1)]).double()
    best, x = GMMDenoiser(MIXTURE, schedule), 80 * NOISE(0)
    monkeypatch.setattr(scheduling_edm_euler, "randn_tensor", lambda *_, **__: now)
    for i in range(n - 1):
        now, seen = NOISE(i + 1), []
        step = dict(noise=lambda k, z=now: z, callback=lambda i, x, pred, seen=seen: seen.append(pred.x0))
        ours = heun(best, x, ts[i : i + 2], s_churn=churn / n, s_min=0.05, s_max=50.0, s_noise=1.003, **step)
        want = theirs.step(x, theirs.timesteps[i], x, s_churn=churn, s_tmin=0.05, s_tmax=50.0, s_noise=1.003,
                           pred_original_sample=seen[0]).prev_sample  # fmt: skip
        # theirs is in float32, 6e-8 of values up to 300
        torch.testing.assert_close(ours, want, rtol=1e-6, atol=1e-5)
        x = ours


# distributions


@pytest.mark.parametrize("name", ["vp", "edm"])
@pytest.mark.parametrize("kind", ["heun", "heun with churn", "2m", "2m sde", "3m sde", "2s", "2s ancestral"])
def test_as_direct_samples(kind, name):
    n, schedule = 4000, SCHEDULES[name]
    noise = Noise(range(n), (2,), dtype=F64)
    run, steps, options = {
        "heun": (heun, 30, {}),
        "heun with churn": (heun, 60, dict(s_churn=20.0, s_min=0.05, s_max=40.0)),
        "2m": (dpmpp_2m, 50, {}),
        "2m sde": (dpmpp_2m_sde, 100, {}),
        "3m sde": (dpmpp_3m_sde, 100, {}),
        "2s": (dpmpp_2s, 40, {}),
        "2s ancestral": (dpmpp_2s, 60, dict(eta=1.0)),
    }[kind]
    ts = edm_grid(schedule, steps, 0.01, 79.9)
    x = run(GMMDenoiser(MIXTURE, schedule), schedule(ts[0])[1] * noise(0), ts, noise=noise, **options)
    direct = MIXTURE.sample(100_000, seed=99)[0]
    pairs = [
        energy_distance(MIXTURE.sample(1500, 2 * i)[0], MIXTURE.sample(1500, 2 * i + 1)[0]) for i in range(20)
    ]
    assert abs(typicality(MIXTURE.log_prob, x, direct)) < 5
    assert energy_distance(x[:1500], direct[:1500]) < torch.tensor(pairs).mean() + 6 * torch.tensor(pairs).std()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", RUNS)
def test_gaussian_data_end_where_the_formula_says(kind, name):
    "Data N(0, s²): a point keeps to its number of standard deviations, and with noise the standard deviation is right."
    s, schedule = 0.7, SCHEDULES[name]
    data = GaussianMixture(torch.ones(1), torch.zeros(1, 1), torch.full((1, 1, 1), s**2))
    high, low = torch.tensor([20.0, 0.05], dtype=F64)
    start, end = time_at(schedule, -2 * torch.stack([high, low]).log())
    ts = torch.linspace(start, end, 401, dtype=F64)
    (a_first, a_last), _ = schedule(ts[[0, -1]])
    n = 20_000 if kind.endswith("sde") else 50
    noise = Noise(range(n), (1,), dtype=F64)
    first = a_first * (s**2 + high**2).sqrt() * noise(0)
    got = RUNS[kind](GMMDenoiser(data, schedule), first, ts, noise=noise) / a_last
    want = (s**2 + low**2).sqrt()
    if kind.endswith("sde"):
        assert (
            abs(got.std() / want - 1) < 5 / (2 * n) ** 0.5 + 0.002
        )  # five standard errors, and the bias of 400 steps
    else:
        torch.testing.assert_close(got, want * noise(0), rtol=0, atol=2e-4)


# orders


def order(ends: list) -> float:
    "What n, 2n and 4n steps say of the order p: the first two differ 2^p times as much as the last two."
    first, second = ((a - b).square().mean().sqrt() for a, b in zip(ends, ends[1:], strict=False))
    return math.log2(first / second)


@pytest.mark.parametrize("name", ["vp", "ve", "edm", "cosine"])
@pytest.mark.parametrize("kind", ["heun", "2m", "2s"])
def test_second_order(kind, name):
    schedule, x_bar = SCHEDULES[name], 20 * NOISE(0)
    start, end = time_at(schedule, torch.tensor([-2 * math.log(20), -2 * math.log(0.05)], dtype=F64)).tolist()
    (first, last), _ = schedule(torch.tensor([start, end], dtype=F64))
    best = GMMDenoiser(MIXTURE, schedule)
    n = 320 if kind == "2m" else 80  # Heun is there sooner
    ends = [RUNS[kind](best, first * x_bar, time_grid(k * n, start, end)) / last for k in (1, 2, 4)]
    assert 1.75 < order(ends) < 2.25, order(ends)


@pytest.mark.parametrize("name, curve, p", [("vp", 1.0, 3), ("edm", 1.0, 3), ("ve", 0.5, 2), ("edm", 0.5, 2)])
def test_third_order_and_what_half_the_curvature_costs(name, curve, p):
    schedule, x_bar = SCHEDULES[name], 20 * NOISE(0)
    start, end = time_at(schedule, torch.tensor([-2 * math.log(20), -2 * math.log(0.05)], dtype=F64)).tolist()
    (first, last), _ = schedule(torch.tensor([start, end], dtype=F64))
    best = GMMDenoiser(MIXTURE, schedule)
    ends = []
    for n in (160, 320, 640) if curve == 1 else (320, 640, 1280):
        ts = time_grid(n, start, end)
        a, b, h = ode_steps(schedule, ts[1:], ts[:-1])
        reach, bend = _parabola(h, curve=curve)
        ends.append(
            linear_walk(best, first * x_bar, ts, a, b, None, None, None, {}, reach=reach, bend=bend) / last
        )
        if curve == 1:
            assert ends[-1].equal(dpmpp_3m(best, first * x_bar, ts, lower_order_final=False) / last)
    assert p - 0.3 < order(ends) < p + 0.3, order(ends)


def test_2m_is_exact_for_a_guess_that_moves_with_the_step():
    "With a guess linear in lambda, each inner step is the integral's midpoint: written out here with numbers alone."

    class Line(Denoiser):
        schedule = VESchedule()

        def forward(self, x_t, t):
            alpha, sigma = self.schedule(t)
            return Prediction(x_t, alpha, sigma, -sigma.log() * torch.ones_like(x_t))

    line = Line()
    ts = torch.tensor([0.9, 0.75, 0.5, 0.45, 0.2], dtype=F64)
    lam = -line.schedule(ts)[1].log()
    x = 3.0
    for i in range(4):
        middle = lam[i] if i in (0, 3) else (lam[i] + lam[i + 1]) / 2
        shrink = (lam[i] - lam[i + 1]).exp()
        x = shrink * x + (1 - shrink) * middle
    got = dpmpp_2m(line, torch.full((1, 1), 3.0, dtype=F64), ts)
    torch.testing.assert_close(got.squeeze(), x, rtol=1e-12, atol=0)


# what samplers promise


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("kind", RUNS)
def test_calls_and_callbacks(kind, name):
    best, seen = Counted(MIXTURE, SCHEDULES[name]), []
    ts = edm_grid(best.schedule, 7, 0.05, 20)
    x = RUNS[kind](best, NOISE(0), ts, noise=NOISE, callback=lambda i, x, pred: seen.append((i, x)))
    grid = ts[:-1].tolist()
    twice = sorted([*grid, *grid[1:]], reverse=True)
    assert {"heun": best.times == twice, "2s": best.times[::2] == grid}.get(kind, best.times == grid)
    assert [i for i, _ in seen] == list(range(7)) and seen[-1][1].equal(x)
    assert torch.isfinite(x).all()


def test_nothing_is_added_by_the_step_that_ends_at_time_0():
    "Also where the schedule has noise left there."
    best, ts = GMMDenoiser(MIXTURE, VESchedule()), time_grid(6)
    loud = dpmpp_2m_sde(best, NOISE(0), ts, noise=lambda k: NOISE(k) * (1000.0 if k == 6 else 1.0))
    assert loud.equal(dpmpp_2m_sde(best, NOISE(0), ts, noise=NOISE))


def test_last_step_is_the_guess():
    "Where sigma = 0 at the end."
    best, guesses = GMMDenoiser(MIXTURE, CHAIN), []
    for run in RUNS.values():
        x = run(best, NOISE(0), time_grid(10), noise=NOISE, callback=lambda i, x, pred: guesses.append(pred.x0))
        torch.testing.assert_close(x, guesses[-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", RUNS)
def test_a_picture_depends_on_its_seed_alone_and_labels_arrive(kind):
    best, few = GMMDenoiser(MIXTURE, VPSchedule()), Noise([5, 17], (2,), dtype=F64)
    y, ts = torch.arange(20) % 4, edm_grid(VPSchedule(), 9, 0.05, 20)
    options = dict(s_churn=3.0) if kind == "heun" else {}
    full = RUNS[kind](best, NOISE(0), ts, noise=NOISE, y=y, **options)
    part = RUNS[kind](best, few(0), ts, noise=few, y=y[[5, 17]], **options)
    torch.testing.assert_close(full[[5, 17]], part, rtol=0, atol=1e-12)
    assert (full - RUNS[kind](best, NOISE(0), ts, noise=NOISE, **options)).abs().max() > 0.01


def test_churn_only_in_its_range_and_not_above_the_schedule():
    best = Counted(MIXTURE, EDMSchedule())
    ts = edm_grid(best.schedule, 10, 0.05, 80)
    heun(best, 80 * NOISE(0), ts, noise=NOISE, s_churn=4.0, s_min=0.5, s_max=30.0)
    bars = best.schedule(ts[:-1])[1]
    wanted = torch.where((bars >= 0.5) & (bars <= 30), 1.4 * bars, bars)
    starts = best.schedule(torch.tensor(best.times[::2], dtype=F64))[1]
    torch.testing.assert_close(starts, wanted, rtol=1e-9, atol=0)
    x = heun(best, 80 * NOISE(0), ts, noise=NOISE, s_churn=4.0)
    assert best.times[19] == 1.0 and torch.isfinite(x).all()  # at the top there is nowhere to go


@pytest.mark.parametrize("n", [3, 20])
@pytest.mark.parametrize("lower", [True, False])
def test_the_last_step_of_2m_above_the_data_is_theirs(lower, n):
    theirs = DPMSolverMultistepScheduler(1000, algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", prediction_type="sample",
                                         final_sigmas_type="sigma_min", lower_order_final=lower, euler_at_final=lower)  # fmt: skip
    theirs.set_timesteps(n)
    ts = torch.cat([(theirs.timesteps + 1) / 1000, torch.tensor([0.001])]).double()
    theirs = their_sigmas(theirs, ts)
    best = GMMDenoiser(MIXTURE, CHAIN)
    want = x = NOISE(0)
    for t, label in zip(ts[:-1], theirs.timesteps, strict=True):
        want = theirs.step(best(want, t).x0, label, want).prev_sample
    torch.testing.assert_close(dpmpp_2m(best, x, ts, lower_order_final=lower), want, rtol=0, atol=1e-5)


def test_without_noise_at_the_end_the_last_step_is_the_guess():
    best, ts = GMMDenoiser(MIXTURE, CHAIN), time_grid(7)
    assert dpmpp_2m(best, NOISE(0), ts, lower_order_final=False).equal(dpmpp_2m(best, NOISE(0), ts))


@pytest.mark.parametrize("order", ["2m", "3m"])
def test_eta_is_the_share_of_ddpm_s_noise(order):
    sde, ode = {"2m": (dpmpp_2m_sde, dpmpp_2m), "3m": (dpmpp_3m_sde, dpmpp_3m)}[order]
    best = GMMDenoiser(MIXTURE, VPSchedule())
    ts = time_grid(12)
    torch.testing.assert_close(
        sde(best, NOISE(0), ts, noise=NOISE, eta=0.0), ode(best, NOISE(0), ts), rtol=0, atol=1e-12
    )
    a, b, std, _ = sde_steps(best.schedule, ts[1:], ts[:-1])
    step = posterior_steps(best.schedule, ts[1:], ts[:-1])
    for got, want in ((a, step.a), (b, step.b), (std, step.small.sqrt())):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    a, b, std, _ = sde_steps(best.schedule, ts[1:], ts[:-1], 0.3)
    (alpha_t, sigma_t), (alpha, sigma) = best.schedule(ts[:-1]), best.schedule(ts[1:])
    torch.testing.assert_close(a * alpha_t + b, alpha)  # a point stays a point, and has the noise of s
    torch.testing.assert_close((a * sigma_t) ** 2 + std**2, sigma**2)
    loud = [sde(best, NOISE(0), ts[:2], noise=NOISE, s_noise=s) for s in (0.0, 1.0, 3.0)]
    torch.testing.assert_close(loud[2] - loud[0], 3 * (loud[1] - loud[0]))
    with pytest.raises(ValueError, match="eta: expected 0"):
        sde(best, NOISE(0), ts, noise=NOISE, eta=-0.1)


def test_2s_aims_lower_and_adds_what_is_missing():
    schedule, ts = VPSchedule(), time_grid(9, end=0.1)
    for eta in (0.0, 0.4, 1.0):
        down, up = down_and_up(schedule, ts[1:], ts[:-1], eta)
        bar_t, bar_s, bar = ((-0.5 * schedule.logsnr(t)).exp() for t in (ts[:-1], ts[1:], down))
        torch.testing.assert_close(bar**2 + up**2, bar_s**2)
        torch.testing.assert_close(up, eta * bar_s * (1 - (bar_s / bar_t) ** 2).sqrt())
    best = GMMDenoiser(MIXTURE, schedule)
    loud = [dpmpp_2s(best, NOISE(0), ts[:2], noise=NOISE, eta=1.0, s_noise=s) for s in (0.0, 1.0, 3.0)]
    torch.testing.assert_close(loud[2] - loud[0], 3 * (loud[1] - loud[0]))
    with pytest.raises(ValueError, match="say which"):
        dpmpp_2s(best, NOISE(0), ts, eta=1.0)
    with pytest.raises(ValueError, match="eta: expected 0"):
        dpmpp_2s(best, NOISE(0), ts, noise=NOISE, eta=-1.0)


def test_the_increments_of_a_path():
    noise = Noise(range(4000), (2,), dtype=F64)
    coarse, fine = (
        torch.tensor([1.0, 0.6, 0.1, 0.0], dtype=F64),
        torch.tensor([1.0, 0.75, 0.6, 0.1, 0.03, 0.0], dtype=F64),
    )
    a, b = BrownianPath(noise, coarse), BrownianPath(noise, fine)
    assert a(0).equal(noise(0))
    torch.testing.assert_close(
        0.4**0.5 * a(1), 0.25**0.5 * b(1) + 0.15**0.5 * b(2), rtol=0, atol=2e-3
    )  # times are taken to 2^-20
    torch.testing.assert_close(0.1**0.5 * a(3), 0.07**0.5 * b(4) + 0.03**0.5 * b(5), rtol=0, atol=2e-3)
    z = torch.cat([b(k) for k in range(1, 6)], 1)  # 8000 numbers for each step: standard normal, and independent
    assert (z.mean(0).abs() < 5 / 4000**0.5).all()
    assert (z.T.cov() - torch.eye(10)).abs().max() < 5 * (2 / 4000) ** 0.5
    for bad in ([0.5, 0.5], [0.2, 0.4], [0.5, 0.5 - 1e-9]):
        with pytest.raises(ValueError, match="times that fall"):
            BrownianPath(noise, torch.tensor(bad, dtype=F64))


def test_finer_grids_on_one_path_approach_one_sample():
    best, noise, ends = GMMDenoiser(MIXTURE, VPSchedule()), Noise(range(100), (2,), dtype=F64), []
    for n in (25, 50, 100):
        ts = time_grid(n, end=0.01)
        ends.append(dpmpp_2m_sde(best, noise(0), ts, noise=BrownianPath(noise, ts)))
    first, second = ((a - b).norm(dim=1).median() for a, b in zip(ends, ends[1:], strict=False))
    assert second < 0.7 * first and first < 0.4


def test_no_churn_leaves_the_times_as_they_are():
    ts = time_grid(20)[:-1]
    assert torch.equal(churned(EDMSchedule(), ts, 0.0, 0.0, math.inf), ts)


def test_two_steps_of_2m_are_ddim_and_ddpm():
    best, ts = GMMDenoiser(MIXTURE, CosineSchedule()), torch.tensor([0.9, 0.5, 0.1], dtype=F64)
    torch.testing.assert_close(
        dpmpp_2m_sde(best, NOISE(0), ts, noise=NOISE), ddpm(best, NOISE(0), ts, noise=NOISE)
    )
    x = NOISE(0)
    for s, t in zip(ts[1:], ts[:-1], strict=True):
        alpha, sigma = best.schedule(s)
        pred = best(x, t)
        x = alpha * pred.x0 + sigma * pred.eps
    torch.testing.assert_close(dpmpp_2m(best, NOISE(0), ts), x)


def test_float32_stays_float32_and_near():
    best, ts = GMMDenoiser(MIXTURE, CosineSchedule()), edm_grid(CosineSchedule(), 20, 0.02, 80)
    for run in RUNS.values():
        want = run(best, NOISE(0), ts, noise=NOISE)
        got = run(best, NOISE(0).float(), ts, noise=Noise(range(20), (2,)))
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-3)  # 2²⁴ · 80 and what the walk makes of it


def test_time_at_is_the_inverse():
    t = torch.linspace(0.01, 0.99, 50, dtype=F64)
    for schedule in SCHEDULES.values():
        torch.testing.assert_close(time_at(schedule, schedule.logsnr(t)), t, rtol=0, atol=1e-9)
        assert time_at(schedule, torch.tensor([-1e3, 1e3])).tolist()[0] == 1.0
    assert time_at(EDMSchedule(0.002), torch.tensor(1e3)) == 0


def test_ode_steps_compose_while_the_guess_is_held():
    for schedule in SCHEDULES.values():
        t, m, s = (torch.tensor([v], dtype=F64) for v in (0.8, 0.5, 0.3))
        (a1, b1, h1), (a2, b2, h2) = ode_steps(schedule, m, t), ode_steps(schedule, s, m)
        a, b, h = ode_steps(schedule, s, t)
        torch.testing.assert_close(
            torch.stack([a1 * a2, a2 * b1 + b2, h1 + h2]), torch.stack([a, b, h]), rtol=1e-9, atol=1e-12
        )


# bad input


@pytest.mark.parametrize("kind", RUNS)
def test_bad_input(kind):
    run, best = RUNS[kind], GMMDenoiser(MIXTURE, VPSchedule())
    for ts in (time_grid(5).flip(0), torch.ones(3), torch.ones(1), torch.tensor([0.5, 0.5])):
        with pytest.raises(ValueError, match="times that fall"):
            run(best, NOISE(0), ts, noise=NOISE)
    with pytest.raises(ValueError, match=r"expected times in \[0, 1\]"):
        run(best, NOISE(0), 2 * time_grid(5), noise=NOISE)
    with pytest.raises(ValueError, match="NaN or infinite"):
        run(best, NOISE(0) / 0, time_grid(5), noise=NOISE)
    with pytest.raises(ValueError, match="shaped like x"):
        run(best, NOISE(0)[:3], time_grid(5), noise=NOISE)


def test_bad_options():
    best = GMMDenoiser(MIXTURE, EDMSchedule())
    with pytest.raises(ValueError, match="a source of noise"):
        heun(best, NOISE(0), time_grid(5), s_churn=1.0)
    with pytest.raises(ValueError, match="s_churn >= 0"):
        heun(best, NOISE(0), time_grid(5), noise=NOISE, s_churn=-1.0)
    with pytest.raises(TypeError, match="noise"):
        dpmpp_2m_sde(best, NOISE(0), time_grid(5))
    for smallest, largest in ((0.001, 80), (0.01, 81), (3, 2)):
        with pytest.raises(ValueError, match="the range of sigma/alpha"):
            edm_grid(EDMSchedule(0.002), 5, smallest, largest)


@pytest.mark.parametrize(
    "schedule", [CosineSchedule(), DDPMSchedule(cosine_betas()), VPSchedule(), DDPMSchedule(linear_betas())]
)
def test_heun_on_even_times_from_pure_noise(schedule):
    "The first correction is not bounded there; with it, 20 steps ended at a mean radius of 2.6 where the truth is 1.5."
    ring, noise = ring_mixture(8), Noise(range(2000), (2,), dtype=torch.float64)
    best = GMMDenoiser(ring, schedule)
    radius = [
        run(best, schedule(torch.ones((), dtype=torch.float64))[1] * noise(0), time_grid(20))
        .norm(dim=1)
        .mean()
        .item()
        for run in (heun, ddim)
    ]
    truth = ring.sample(2000)[0].norm(dim=1).mean().item()
    assert abs(radius[0] - truth) < 0.05 and abs(radius[0] - truth) <= abs(radius[1] - truth) + 0.02, (
        radius,
        truth,
    )
