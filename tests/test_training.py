"""The parts of a training step, one by one."""

import pytest
import torch
from torch import nn

from diffusion_nb.core import Noise
from diffusion_nb.denoiser import NetDenoiser, denoising_loss
from diffusion_nb.forward import CosineSchedule
from diffusion_nb.training import TARGETS, Trainer, continuous_times, flip_half, warmup_constant, warmup_cosine

N = 50
PICTURES = torch.arange(N).reshape(N, 1, 1, 1).expand(N, 1, 2, 2) / N
LABELS = torch.arange(N)


class Scale(nn.Module):
    "A network of one number."

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(3.0))

    def forward(self, x, t, y=None):
        return self.w * x


def trainer(**options) -> Trainer:
    denoiser = NetDenoiser(Scale(), CosineSchedule())
    return Trainer(denoiser, PICTURES, **dict(steps=20, lr=lambda k: 0.1, batch=16, device="cpu") | options)


def test_average_follows_its_recursion():
    run = trainer(ema=0.3)
    want = run.params[0].item()
    for k in range(20):
        run.train_step()
        decay = min(0.3, (1 + k) / (10 + k))
        want = decay * want + (1 - decay) * run.params[0].item()
        assert abs(run.averages[0].item() - want) < 1e-5


def test_learning_rates():
    cosine, constant = warmup_cosine(2.0, 10, 1000), warmup_constant(2.0, 10)
    assert [cosine(k) for k in (0, 4, 500, 1000)] == pytest.approx([0.2, 1.0, 1.0, 0.0])
    assert [constant(k) for k in (0, 4, 9, 1000)] == pytest.approx([0.2, 1.0, 2.0, 2.0])
    run = trainer(lr=lambda k: 0.1 + k)
    for k in range(3):
        run.train_step()
        assert run.optimizer.param_groups[0]["lr"] == 0.1 + k


def test_gradients_are_clipped():
    run = trainer(clip=0.01)
    run.train_step()
    assert run.optimizer.state[run.params[0]]["exp_avg"].abs().item() == pytest.approx(
        0.001
    )  # 0.1 of the gradient


def test_labels_belong_to_their_pictures():
    x0, _, _, cond = trainer(cond={"y": LABELS}).draw(0)
    assert torch.equal(x0, PICTURES[cond["y"]]) and len(cond["y"].unique()) > 5


def test_share_of_labels_dropped():
    run = trainer(cond={"y": LABELS}, null=N, drop=0.2, batch=20_000)
    share = (run.draw(0)[3]["y"] == N).double().mean()
    assert abs(share - 0.2) < 5 * (0.2 * 0.8 / 20_000) ** 0.5


def test_training_never_draws_time_0():
    t = continuous_times(torch.tensor([0.0, 0.25, 1 - 2**-53], dtype=torch.float64))
    assert t.tolist() == [1, 0.75, 2**-53]


def test_half_of_the_pictures_are_mirrored():
    x = torch.arange(8.0).reshape(2, 1, 2, 2)
    assert flip_half(x, torch.tensor([0.1, 0.9])).flatten().tolist() == [1, 0, 3, 2, 4, 5, 6, 7]


@pytest.mark.parametrize("target", TARGETS)
def test_a_recipes_loss_is_the_plain_error_of_its_target(target):
    row, weight = TARGETS[target]
    model, eps, t = NetDenoiser(Scale(), CosineSchedule(), row), Noise(range(N), (1, 2, 2))(0), torch.tensor(0.3)
    alpha, sigma = (c.item() for c in model.schedule(t))
    truth = {"eps": eps, "v": alpha * eps - sigma * PICTURES}[target]
    error = model.net(alpha * PICTURES + sigma * eps, t) - truth
    got = denoising_loss(model, PICTURES, t, eps, weight)
    torch.testing.assert_close(got, error.square().flatten(1).mean(1), rtol=1e-4, atol=1e-6)
