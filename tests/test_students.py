"""Students of the model of MNIST: their objective, their walks, their scores."""

import torch

from diffusion_nb.denoisers import DenoiserConsistency
from diffusion_nb.experiments.judge import mnist_judge
from diffusion_nb.experiments.pictures import mnist_denoiser
from diffusion_nb.experiments.students import CALLS, SIGMAS, group_scores, mnist_students, one_call, walks
from diffusion_nb.metrics.features import frechet_distance
from diffusion_nb.noise import Noise

SHAPE = (1, 28, 28)


@torch.no_grad()
def test_the_first_student_learns_what_guidance_guesses():
    teacher, w = mnist_denoiser(), 0.7
    x0, eps = (Noise(range(3), SHAPE)(k) for k in (0, 1))
    y, t = torch.tensor([2, 0, 9]), torch.tensor([0.1, 0.5, 0.95], dtype=torch.float64)
    a, s = (c.float().reshape(3, 1, 1, 1) for c in teacher.schedule(t))
    x_t = a * x0 + s * eps
    own, null = teacher(x_t, t, y=y).x0, teacher(x_t, t, y=torch.full((3,), 10)).x0
    want = ((1 + w) * own - w * null).clamp(-1, 1)
    weight = torch.maximum((a / s) ** 2, torch.ones(())).flatten()
    loss = one_call(teacher, w)(teacher, x0, t, eps, y=y)
    torch.testing.assert_close(loss, weight * (own - want).square().flatten(1).mean(1), rtol=2e-4, atol=1e-6)


@torch.no_grad()
def test_every_way_takes_its_calls_and_one_step_of_ddim_is_the_guess():
    teacher, y, noise = mnist_denoiser(), torch.tensor([3, 7]), Noise(range(2), SHAPE)
    calls, f = [], DenoiserConsistency(teacher)
    teacher.net.register_forward_hook(lambda *a: calls.append(len(a[2])))
    ways = walks(teacher, 0.5, dict.fromkeys(CALLS, teacher), f)
    for name, draw in ways.items():
        for n in CALLS:
            calls.clear()
            draw(n, noise, y)
            assert sum(calls) == n * len(y) * (2 if name.startswith("teacher") else 1), (name, n)
    one = torch.ones((), dtype=torch.float64)
    guess = teacher(teacher.schedule(one)[1].float() * noise(0), one, y=y).x0.clamp(-1, 1)
    torch.testing.assert_close(ways["progressive distillation"](1, noise, y), guess, rtol=0, atol=2e-4)
    assert all(len(sigmas) == n and sigmas[0] == 80 for n, sigmas in SIGMAS.items())


def test_scores_are_of_groups_of_300():
    judge, x = mnist_judge(), Noise(range(600), SHAPE)(0).clamp(-1, 1)
    real, features = judge.features(x.flip(2)), judge.features(x)
    y = judge(x).argmax(1)
    y[300:400] = (y[300:400] + 1) % 10
    first, second = group_scores(judge, real, x, y)
    assert first == [1.0, frechet_distance(features[:300], real)]
    assert second == [200 / 300, frechet_distance(features[300:], real)]


def test_what_is_stored_is_what_the_notebooks_say():
    found = mnist_students()
    assert found["scores"].shape == (4, 3, 3, 2) and found["held"].shape == (3, 2)
    distances = found["scores"][..., 1].mean(2)
    assert (distances[2] < distances[3]).all() and distances[2, 0] < distances[0, 0] / 10
    assert all(v.dtype == torch.uint8 and len(v) == 20 for k, v in found.items() if "." in k)
