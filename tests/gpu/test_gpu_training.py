"""Training on a GPU: every objective in bfloat16, compiled and channels last; stopped and gone on with; and in memory that does not grow."""

import math
import signal

import pytest
import torch
from cases import (
    CLASSES,
    DEVICE,
    ON_GPU,
    SHAPE,
    TASKS,
    Small,
    denoiser,
    in_use,
    near,
    pictures,
    task,
    trainer,
    unet,
)

from diffusion_nb.denoisers import DenoiserConsistency
from diffusion_nb.grids import time_grid
from diffusion_nb.noise import Noise
from diffusion_nb.samplers.consistency import consistency_sample
from diffusion_nb.training.distill import distill
from diffusion_nb.training.ema import PowerEMA
from diffusion_nb.training.hooks import JsonLogger, SampleGrids, Throughput, fixed_draws, read_rows

CPU = torch.device("cpu")


def losses_of(run, n=4):
    return torch.stack([run.train_step() for _ in range(n)]).cpu()


@pytest.mark.parametrize("name", TASKS)
def test_float32_training_is_the_cpus(name):
    "Adam divides small gradients by themselves, so the weights are compared by how far they have gone."
    start = [p.detach().clone() for p in task(name, CPU).model.parameters()]
    runs = [trainer(task(name, d), d) for d in (DEVICE, CPU)]
    got, want = (losses_of(run) for run in runs)
    near(got, want, 1e-3)
    there, here = ([p.detach().cpu() for p in run.denoiser.parameters()] for run in runs)
    gone = sum((a - b).abs().sum() for a, b in zip(here, start, strict=True))
    apart = sum((a - b).abs().sum() for a, b in zip(there, here, strict=True))
    assert gone > 0 and apart < 0.05 * gone


@pytest.mark.parametrize("name", TASKS)
def test_bf16_compiled_channels_last_and_a_fast_teacher(name):
    "The first losses are those of float32 on a CPU within a tenth: bfloat16 has three digits. One task with a U-Net, which takes long to compile."
    net = unet if name == "v" else Small
    run = trainer(task(name, DEVICE, True, net), bf16=True, compile=True)
    kernels = [p for p in run.denoiser.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert kernels
    if ON_GPU:
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    got, want = losses_of(run), losses_of(trainer(task(name, CPU, net=net), CPU))
    near(got / want, torch.ones(4), 0.1)
    assert all(p.dtype in (torch.float32, torch.float64) and p.isfinite().all() for p in run.denoiser.parameters())
    if ON_GPU:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.fixture
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


RESUMED = {"v": {}, "importance": {}, "vdm": {}, "consistency training": {}, "v, bf16, compiled": dict(bf16=True, compile=True), "v, in parts": dict(accumulate=2, skip=True)}  # fmt: skip


@pytest.mark.parametrize("kind", RESUMED)
def test_a_stopped_training_goes_on_bit_for_bit(kind, deterministic, tmp_path):
    name, options = kind.split(", ")[0], RESUMED[kind] | dict(steps=12, save_every=4)

    def run(stop=0, **more):
        hook = lambda run: signal.raise_signal(signal.SIGTERM) if run.step == stop else None
        given = task(name)
        if name == "v":  # dropout draws from the GPU's generator
            given = given._replace(model=denoiser(unet(dropout=0.1), "cosine"))
        return trainer(given, hooks=[hook], **options, **more)

    whole, stopped = run(), run(stop=6, checkpoint=tmp_path / "c.safetensors")
    whole.fit()
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    again = run(checkpoint=tmp_path / "c.safetensors")
    assert 0 < again.step < 12
    again.fit()
    for part in ("denoiser", "average"):
        want, got = getattr(whole, part).state_dict(), getattr(again, part).state_dict()
        assert want.keys() == got.keys() and all(got[k].equal(v) for k, v in want.items()), part


MEMORY = {"plain": {}, "bf16, compiled": dict(bf16=True, compile=True), "bytes, in parts": dict(accumulate=2, skip=True)}  # fmt: skip


@pytest.mark.parametrize("options", MEMORY)
def test_memory_is_flat(options):
    "The smallest tensor takes 512 bytes of a GPU: not one stays behind in each of 200 steps."
    seen = {}

    def hook(run):
        seen[run.step] = in_use()

    trainer(task("v"), hooks=[hook], steps=250, log_every=25, **MEMORY[options]).fit()
    grown = seen[250] - seen[50]
    assert grown < 200 * (512 if ON_GPU else 3000), f"{grown / 200:.0f} bytes a step stay behind"


def test_training_learns():
    run = trainer(task("v"), bf16=True, compile=True, steps=200, lr=lambda k: 3e-3, log_every=20)
    run.fit()
    first, *_, last = [loss for _, loss in run.losses]
    assert len(run.losses) == 10 and last < 0.8 * first


def test_hooks(tmp_path):
    given = task("eps")  # under a chain's schedule, which holds a table
    grids = SampleGrids(tmp_path, fixed_draws(SHAPE, 4, classes=CLASSES, calls=3), every=5)
    speed, average = Throughput(peak=1e15), PowerEMA(given.model)
    run = trainer(given, hooks=[grids, JsonLogger(tmp_path / "log"), speed, average], steps=10, log_every=5)
    run.fit()
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["step-00000005.png", "step-00000010.png"]
    rows = read_rows(tmp_path / "log")
    assert [row["step"] for row in rows] == [5, 10] and all(math.isfinite(row["loss"]) for row in rows)
    assert "GFLOP a picture" in speed.report(run) and all(
        v.isfinite().all() for v in average.average(0.1).values()
    )


def test_a_chain_of_students():
    "Ten are trained in one process, each compiled."
    model = denoiser(Small(), "linear betas")
    x0 = pictures()
    cond = dict(cond={"y": torch.arange(len(x0)) % CLASSES}, null=CLASSES)
    students = distill(model, x0, 2**10, 1, steps=lambda n: 2, lr=1e-3, batch=8, device=DEVICE, bf16=True, compile=ON_GPU, **cond)  # fmt: skip
    assert sorted(students) == [2**i for i in range(10)]
    f, noise = DenoiserConsistency(students[1].eval()), Noise(range(4), SHAPE, DEVICE)
    x = consistency_sample(f, noise(0), time_grid(1), y=torch.arange(4, device=DEVICE))
    assert x.shape == (4, *SHAPE) and x.isfinite().all()


def test_data_larger_than_memory_stay_where_they_are(monkeypatch):
    "Where less than twice the data is free, they stay on the CPU, and the steps are the same."
    near_by = trainer(task("v"))
    if ON_GPU:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (1, 1))
    far = trainer(task("v"))
    near(losses_of(far), losses_of(near_by), 1e-4)
