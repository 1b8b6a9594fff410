"""Distillation: one step is two, told three ways; the loop, stopped and resumed; the student that is told w; bad input."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_nb.data import Pictures
from diffusion_nb.denoisers import Clip, Denoiser, NetDenoiser, Prediction, predict_v
from diffusion_nb.forward import q_sample
from diffusion_nb.guidance import CFG
from diffusion_nb.losses.distillation import distill_target, distillation_loss, guided_loss, random_guidance_weight
from diffusion_nb.losses.simple import ones, truncated_snr
from diffusion_nb.mixtures import GMMDenoiser, random_mixture
from diffusion_nb.nets.conditioning import GuidanceConditionedUNet
from diffusion_nb.nets.unet import UNet
from diffusion_nb.noise import Noise
from diffusion_nb.recipes import distillation as recipes
from diffusion_nb.recipes.distillation import distill_recipe
from diffusion_nb.samplers.linear import ddim, ddim_step
from diffusion_nb.schedules import CosineSchedule, DDPMSchedule, EDMSchedule, VESchedule, VPSchedule, linear_betas
from diffusion_nb.time_samplers import chain_times
from diffusion_nb.training.distill import distill, halvings
from diffusion_nb.util.checks import expand_as

F64 = torch.float64
NOISE = Noise(range(8), (2,), dtype=F64)
MIXTURE = random_mixture(3)
SCHEDULES = (DDPMSchedule(linear_betas()), CosineSchedule(), VPSchedule(), VESchedule(), EDMSchedule())
PICTURES = Noise(range(40), (1, 8, 8))(0).tanh()
LABELS = torch.arange(40) % 10


def states(schedule, t, seed=0):
    x0, _ = MIXTURE.sample(8, seed)
    return q_sample(schedule, x0, torch.as_tensor(t, dtype=F64), NOISE(seed))


def network(seed=0, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = UNet(1, 8, (1, 2), 1, (), classes=10, **options)
        torch.nn.init.normal_(net.head[2].weight, std=0.1)
    return NetDenoiser(net, CosineSchedule(), predict_v).eval().requires_grad_(False)


class Perfect(Denoiser):
    "The student that hits every target."

    def __init__(self, teacher, n):
        super().__init__()
        self.teacher, self.schedule, self.n = teacher, teacher.schedule, n

    def forward(self, x_t, t, **cond):
        alpha, sigma = (expand_as(c, x_t) for c in self.schedule(t))
        t = torch.as_tensor(t, dtype=F64)
        want = distill_target(self.teacher, x_t, t, t - 0.5 / self.n, (t - 1 / self.n).clamp(min=0), **cond)
        return Prediction(x_t, alpha, sigma, want)


# the target


@settings(max_examples=60, deadline=None)
@given(
    which=st.integers(0, len(SCHEDULES) - 1),
    t=st.floats(0.05, 1),
    middle=st.floats(0.1, 0.9),
    end=st.floats(0, 0.9),
    seed=st.integers(0, 99),
)
def test_one_step_lands_where_two_do(which, t, middle, end, seed):
    schedule = SCHEDULES[which]
    down = torch.tensor([t, t * (end + (1 - end) * middle), t * end], dtype=F64)
    teacher, x = GMMDenoiser(MIXTURE, schedule), states(schedule, t, seed)
    alpha, sigma = schedule(down[0])
    landed = ddim_step(Prediction(x, alpha, sigma, distill_target(teacher, x, *down)), schedule, down[2])
    torch.testing.assert_close(landed, ddim(teacher, x, down), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_the_same_target_in_terms_of_the_noise(schedule):
    """Divided by alpha, a step adds ε̂ times the change of σ/α, so that the student's noise is the average of the teacher's two;
    and x̃ = (x - σ ε̃) / α. Nothing of `distill_target` is used."""
    down = torch.tensor([0.8, 0.55, 0.3], dtype=F64)
    teacher, x = GMMDenoiser(MIXTURE, schedule), states(schedule, 0.8)
    (a, b, c), (sa, sb, sc) = schedule(down)
    first = teacher(x, down[0])
    second = teacher(b * (x / a + (sb / b - sa / a) * first.eps), down[1])
    noise = ((sa / a - sb / b) * first.eps + (sb / b - sc / c) * second.eps) / (sa / a - sc / c)
    torch.testing.assert_close(distill_target(teacher, x, *down), (x - sa * noise) / a, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("i", [64, 40, 2])
def test_two_steps_of_diffusers_are_one(i):
    schedule, T = DDPMSchedule(linear_betas(64)), 64
    fine, coarse = (DDIMScheduler(T, trained_betas=linear_betas(T).numpy(), clip_sample=False, prediction_type="sample") for _ in "ab")  # fmt: skip
    fine.set_timesteps(64), coarse.set_timesteps(32)
    teacher, x = GMMDenoiser(MIXTURE, schedule), states(schedule, i / T)
    t, mid, s = torch.tensor([i, i - 1, i - 2], dtype=F64) / T
    between = fine.step(teacher(x, t).x0, i - 1, x).prev_sample
    two = fine.step(teacher(between, mid).x0, i - 2, between).prev_sample
    one = coarse.step(distill_target(teacher, x, t, mid, s), i - 1, x).prev_sample
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)  # theirs computes in float32


def test_many_times_are_one_after_the_other():
    schedule = SCHEDULES[0]
    t = torch.arange(1, 9, dtype=F64) / 8
    teacher, x = GMMDenoiser(MIXTURE, schedule), states(schedule, t)
    together = distill_target(teacher, x, t, t - 1 / 16, t - 1 / 8)
    alone = [distill_target(teacher, x[i : i + 1], t[i], t[i] - 1 / 16, t[i] - 1 / 8) for i in range(8)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


def test_the_target_of_the_last_step_is_the_second_guess():
    t, mid, s = torch.tensor([0.25, 0.125, 0.0], dtype=F64)
    teacher, x = GMMDenoiser(MIXTURE, SCHEDULES[0]), states(SCHEDULES[0], 0.25)
    between = ddim(teacher, x, torch.stack([t, mid]))
    torch.testing.assert_close(distill_target(teacher, x, t, mid, s), teacher(between, mid).x0)


# the loss


@pytest.mark.parametrize("n", [1, 3, 4])
def test_a_perfect_student_has_no_loss_and_the_teacher_has_one(n):
    teacher = GMMDenoiser(MIXTURE, CosineSchedule())
    x0, _ = MIXTURE.sample(8)
    t = chain_times(n)(torch.linspace(0, 0.99, 8, dtype=F64))
    loss = distillation_loss(teacher, n)
    assert loss(Perfect(teacher, n), x0, t, NOISE(1)).max() < 1e-20
    assert loss(teacher, x0, t, NOISE(1)).min() > 0


def test_the_weight_is_on_the_error_of_the_picture():
    teacher, t = GMMDenoiser(MIXTURE, CosineSchedule()), torch.arange(1, 9, dtype=F64) / 8
    x0, _ = MIXTURE.sample(8)
    plain, truncated = (distillation_loss(teacher, 8, w)(teacher, x0, t, NOISE(1)) for w in (ones, truncated_snr))
    torch.testing.assert_close(truncated, truncated_snr(teacher.schedule, t) * plain)
    want = Perfect(teacher, 8)(q_sample(teacher.schedule, x0, t, NOISE(1)), t).x0
    torch.testing.assert_close(plain, (teacher(q_sample(teacher.schedule, x0, t, NOISE(1)), t).x0 - want).square().mean(1))  # fmt: skip


def test_only_the_student_learns():
    teacher, student = network(), network(1).requires_grad_(True)
    teacher.requires_grad_(True)
    loss = distillation_loss(teacher, 2)(student, PICTURES[:4], torch.tensor([0.5, 1, 0.5, 1], dtype=F64), PICTURES[4:8], y=LABELS[:4])  # fmt: skip
    loss.mean().backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in student.parameters())


# the loop

OPTIONS = dict(steps=lambda n: 12, lr=1e-2, batch=8, cond={"y": LABELS}, null=10, ema=0.9, device="cpu")


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(v.equal(b[k]) for k, v in a.items())


def test_each_student_is_the_next_teacher():
    seen, first = [], network()

    def objective(teacher, n):
        seen.append((teacher, n))
        return distillation_loss(teacher, n)

    before = copy.deepcopy(first)
    students = distill(first, PICTURES, 8, objective=objective, **OPTIONS)
    assert list(students) == [n for _, n in seen] == halvings(8)[1:]
    assert all(isinstance(teacher, Clip) for teacher, _ in seen)
    teachers = [teacher.denoiser for teacher, _ in seen]
    assert same(teachers[0], before) and same(first, before)
    assert same(teachers[1], students[4]) and same(teachers[2], students[2])
    assert not same(students[4], before) and not same(students[2], students[4])


def test_students_start_from_their_teachers_weights():
    students = distill(network(), PICTURES, 4, **OPTIONS | dict(steps=lambda n: 1, lr=0.0))
    assert all(same(student, network()) for student in students.values())


def test_seeds_differ_and_repeat():
    one, again, other = (distill(network(), PICTURES, 2, seed=seed, **OPTIONS)[1] for seed in (0, 0, 1))
    assert same(one, again) and not same(one, other)


class Watched:
    "A loss, and what is done before it."

    def __init__(self, loss, look):
        self.loss, self.look = loss, look

    def __call__(self, *args, **cond):
        self.look()
        return self.loss(*args, **cond)


@pytest.fixture(scope="module")
def whole():
    "The students of a distillation that nothing stopped."
    return distill(network(), PICTURES, 8, **OPTIONS)


@pytest.mark.parametrize("stage, step", [(4, 7), (2, 3), (1, 11)])
def test_a_stopped_distillation_resumes_bit_for_bit(stage, step, whole, tmp_path):
    def cut(teacher, n):
        count = iter(range(100))

        def look():
            if n == stage and next(count) == step:
                raise KeyboardInterrupt

        return Watched(distillation_loss(teacher, n), look)

    with pytest.raises(KeyboardInterrupt):
        distill(network(), PICTURES, 8, folder=tmp_path, save_every=2, objective=cut, **OPTIONS)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 + halvings(4).index(stage)
    calls = []

    def counted(teacher, n):
        return Watched(distillation_loss(teacher, n), lambda: calls.append(n))

    resumed = distill(network(), PICTURES, 8, folder=tmp_path, save_every=2, objective=counted, **OPTIONS)
    assert all(same(resumed[n], whole[n]) for n in whole)
    assert calls.count(stage) == 12 - step // 2 * 2  # not from the start
    assert all(n <= stage for n in calls)


@pytest.mark.parametrize("name, channels, size", [("cifar10", 3, 32), ("mnist", 1, 28)])
def test_the_recipes_at_toy_size(name, channels, size, tmp_path, monkeypatch):
    "The documented command, with little data and small networks, twice: the second time nothing is left to do."

    class Toy:
        @staticmethod
        def load():
            x = Noise(range(12), (channels, size, size))(0).tanh()
            return Pictures(x, torch.arange(12) % 10, x[:2], torch.arange(2))

    teacher = {"cifar10": "cifar10-v"}.get(name, name)
    changes = {f"recipe.{teacher}": "width=8 mults=1,2 blocks=1 attention=1 steps=2 batch=4",
               f"distill.{name}": "n_from=4 n_to=2 steps=2 last=2 batch=4"}  # fmt: skip
    monkeypatch.setattr(recipes, "data_set", lambda name: Toy)
    monkeypatch.setenv("DIFFUSION_NB_SET", ";".join(f"{section}.{item}" for section, items in changes.items() for item in items.split()))  # fmt: skip
    made, again = (distill_recipe(name, tmp_path, device="cpu", bf16=name == "cifar10") for _ in range(2))
    assert list(made) == [2] and same(made[2], again[2])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["student-2.safetensors", "teacher.safetensors"]


def test_students_of_another_teacher_are_not_taken_for_those_of_this_one(tmp_path):
    options = OPTIONS | dict(folder=tmp_path)
    one, other = network(), network()
    with torch.no_grad():
        next(other.parameters()).mul_(1.01)
    distill(one, PICTURES, 4, 2, **options)
    with pytest.raises(ValueError, match="is of another run .*loss"):
        distill(other, PICTURES, 4, 2, **options)
    distill(one, PICTURES, 4, 2, **options)  # goes on, and has nothing to do


# a guided teacher


@pytest.mark.parametrize("patch", [1, 2])
def test_who_is_told_w_starts_deaf_and_learns_to_listen(patch):
    model = network(patch=patch)
    t, y, x = torch.tensor(0.5, dtype=F64), LABELS[:4], PICTURES[:4]
    told = NetDenoiser(GuidanceConditionedUNet(model.net, 4.0), model.schedule, model.predict)
    for w in (0.0, 4.0, torch.tensor([0.0, 1.0, 2.0, 4.0])):
        torch.testing.assert_close(told(x, t, y=y, w=w).x0, model(x, t, y=y).x0, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        told.net.net.stem.weight[:, -(patch**2) :] += 1
    low, high = (told(x, t, y=y, w=w).x0 for w in (0.0, 2.0))
    torch.testing.assert_close(low, model(x, t, y=y).x0, rtol=1e-5, atol=1e-5)
    assert (low - high).abs().max() > 1e-3
    mixed = told(x, t, y=y, w=torch.tensor([0.0, 2.0, 0.0, 2.0])).x0  # one w a sample
    torch.testing.assert_close(mixed, torch.stack([low[0], high[1], low[2], high[3]]), rtol=1e-4, atol=1e-5)


def test_guided_loss_is_nought_for_cfg_and_only_for_its_w():
    teacher, t = GMMDenoiser(MIXTURE, CosineSchedule()), torch.tensor(0.6, dtype=F64)
    x0, _ = MIXTURE.sample(8)
    w, y = torch.linspace(0, 4, 8, dtype=F64), torch.arange(8) % 3

    class Guided(Denoiser):
        def __init__(self, more):
            super().__init__()
            self.schedule, self.more = teacher.schedule, more

        def forward(self, x_t, t, y, w):
            own, free, w = teacher(x_t, t, y=y), teacher(x_t, t), w[:, None] + self.more
            return own._replace(x0=(w + 1) * own.x0 - w * free.x0)

    loss = guided_loss(teacher, 3)
    assert loss(Guided(0.0), x0, t, NOISE(1), y, w).max() < 1e-20
    assert loss(Guided(0.1), x0, t, NOISE(1), y, w).max() > 1e-6


def test_any_weight_draws_w_anew_for_each_sample():
    seen = []
    loss = random_guidance_weight(lambda denoiser, x0, t, eps, w, y: seen.append((w, y, t, eps)), most=3.0)
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        loss(None, torch.zeros(2000, 1), "t", "eps", y="kept")
    (a, *kept), (b, *_), (c, *_) = seen
    assert kept == ["kept", "t", "eps"] and a.equal(b) and not a.equal(c)
    assert a.shape == (2000,) and len(a.unique()) > 1900 and a.min() >= 0 and a.max() <= 3
    assert abs(a.mean() - 1.5) < 5 * 3 / 12**0.5 / 2000**0.5


# bad input


@pytest.mark.parametrize("n_from, n_to", [(48, 5), (9, 1), (6, 1), (8, 8), (1, 1), (4, 0), (4, 8), (-8, -4)])
def test_numbers_of_steps_that_do_not_halve(n_from, n_to):
    with pytest.raises(ValueError, match=f"n_from: expected n_to times 2, 4, 8.*n_from = {n_from}, n_to = {n_to}"):
        distill(network(), PICTURES, n_from, n_to, **OPTIONS)


@pytest.mark.parametrize("n", [0, -2, 1.5])
def test_a_number_of_steps_that_is_none(n):
    with pytest.raises(ValueError, match=f"n: expected the student's number of steps.*got {n}"):
        distillation_loss(network(), n)


def test_a_teacher_of_another_schedule():
    x0, _ = MIXTURE.sample(8)
    teacher, student = GMMDenoiser(MIXTURE, VPSchedule()), GMMDenoiser(MIXTURE, CosineSchedule())
    with pytest.raises(ValueError, match="the student has another schedule"):
        distillation_loss(teacher, 1)(student, x0, torch.ones(8), NOISE(1))


def test_a_time_off_the_students_grid():
    x0, _ = MIXTURE.sample(8)
    best = GMMDenoiser(MIXTURE, CosineSchedule())
    with pytest.raises(
        ValueError, match=r"a student of 3 steps learns at 1/3, …, 1 \(time_sampler=chain_times\(3\)\)"
    ):
        distillation_loss(best, 3)(best, x0, torch.full((8,), 0.5), NOISE(1))


def test_times_out_of_order():
    best = GMMDenoiser(MIXTURE, CosineSchedule())
    for down in ([0.5, 0.7, 0.3], [0.5, 0.5, 0.3], [0.5, 0.4, 0.4], [0.5, 0.4, float("nan")]):
        with pytest.raises(ValueError, match="expected two steps down"):
            distill_target(best, NOISE(0), *torch.tensor(down, dtype=F64))


@pytest.mark.parametrize("w", [-0.1, 4.1, float("nan")])
def test_a_weight_that_was_not_learned(w):
    told = NetDenoiser(GuidanceConditionedUNet(network().net), CosineSchedule(), predict_v)
    with pytest.raises(ValueError, match="w: this network knows weights from 0 to 4"):
        told(PICTURES[:2], torch.tensor(0.5), y=LABELS[:2], w=w)


def test_guidance_of_no_class_is_refused():
    with pytest.raises(ValueError, match="y: expected labels to guide to"):
        guided_loss(network(), 10)(network(), PICTURES[:2], torch.tensor(0.5), PICTURES[:2], torch.tensor([3, 10]), torch.ones(2))  # fmt: skip
    assert CFG(network(), 1.0, 10)(PICTURES[:2], torch.tensor(0.5), y=LABELS[:2]).x0.isfinite().all()
