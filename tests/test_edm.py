"""EDM's preconditioning and times: diffusers' numbers, variance one, and the same function under any scale."""

import pytest
import torch
from diffusers import EDMEulerScheduler
from torch import nn

from diffusion_nb.denoisers import NetDenoiser, edm_input, edm_time, predict_edm, predict_v
from diffusion_nb.grids import edm_grid
from diffusion_nb.noise import Noise
from diffusion_nb.schedules import CosineSchedule, EDMSchedule, VPSchedule
from diffusion_nb.time_samplers import log_normal_times

F64 = torch.float64
X = Noise(range(6), (1, 4, 4), dtype=F64)


class Told(nn.Module):
    "Answers with a function of its input and of the time it is told, and keeps both."

    def forward(self, x, time):
        self.x, self.time = x, time
        return (3 * x).sin() + time.reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("sigma", [0.002, 0.3, 5.0, 80.0])
def test_the_numbers_of_diffusers(sigma):
    theirs = EDMEulerScheduler(sigma_data=0.5)
    schedule, net, x = EDMSchedule(0.001, 100), Told(), sigma * X(0)
    t = torch.tensor(((sigma ** (1 / 7)) - 0.001 ** (1 / 7)) / (100 ** (1 / 7) - 0.001 ** (1 / 7)), dtype=F64)
    got = NetDenoiser(net, schedule, predict_edm(0.5), edm_input(0.5), edm_time(schedule))(x, t).x0
    torch.testing.assert_close(net.x, theirs.precondition_inputs(x, sigma), rtol=1e-9, atol=0)
    torch.testing.assert_close(net.time[0].item(), theirs.precondition_noise(sigma).item(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        got, theirs.precondition_outputs(x, net(net.x, net.time), sigma), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("schedule", [VPSchedule(), CosineSchedule(), EDMSchedule()])
@pytest.mark.parametrize("t", [0.05, 0.5, 0.95])
def test_input_and_target_have_variance_one(schedule, t):
    s, (alpha, sigma) = 0.7, schedule(torch.tensor(t, dtype=F64))
    c_skip, c_out = predict_edm(s)(alpha, sigma)
    assert (edm_input(s)(alpha, sigma) ** 2 * (alpha**2 * s**2 + sigma**2)).item() == pytest.approx(1)
    assert (((1 - c_skip * alpha) ** 2 * s**2 + c_skip**2 * sigma**2) / c_out**2).item() == pytest.approx(1)


def test_for_data_of_variance_one_it_is_the_velocity_turned_round():
    alpha, sigma = CosineSchedule()(torch.linspace(0.01, 1, 9, dtype=F64))
    ours, v = predict_edm(1.0)(alpha, sigma), predict_v(alpha, sigma)
    torch.testing.assert_close(ours[0], v[0]), torch.testing.assert_close(ours[1], -v[1])


@pytest.mark.parametrize("schedule", [EDMSchedule(), VPSchedule()])
def test_log_sigma_is_normal(schedule):
    u = (torch.arange(4001, dtype=F64) + 0.5) / 4001
    t = log_normal_times(schedule, -1.0, 0.8)(u, 7)
    alpha, sigma = schedule(t)
    log = (sigma / alpha).log()
    assert log.mean().item() == pytest.approx(-1.0, abs=1e-3) and log.std().item() == pytest.approx(0.8, rel=2e-3)
    assert (t.diff() > 0).all()


def test_edms_grid_on_edms_schedule():
    "Equation 5 of Karras et al. 2022: 80 to 0.002, then 0."
    i = torch.arange(18, dtype=torch.float64)
    want = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    alpha, sigma = EDMSchedule()(edm_grid(EDMSchedule(), 18, 0.002, 80.0))
    torch.testing.assert_close(sigma, torch.cat([want, torch.zeros(1, dtype=torch.float64)]), rtol=1e-12, atol=0)
    assert (alpha == 1).all()
