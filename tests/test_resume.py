"""A training that is killed, at any moment, goes on as if nothing had happened: the same weights, bit for bit, with one process and with two."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusion_nb.util.storage import load_tensors
from tools.kernels import SERVER

HANGS = 1800  # seconds: what takes so long on any machine, hangs

STEPS = 40
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
CLI = [sys.executable, "-m", "diffusion_nb"]


def accelerate(processes):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    return [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes), "--num_machines", "1",
            "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port, "-m", "diffusion_nb"]  # fmt: skip


def words(out, *more):
    return ["train", "--data", "digits", "--out", str(out), "--steps", str(STEPS),
            "--batch", "16", "--width", "8", "--every", "5", "--device", "cpu", *more]  # fmt: skip


def work(words, env, log):
    "The command line, in a forked process."
    from diffusion_nb.cli.main import main

    os.environ.update(env)
    for fd in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    sys.exit(main(words))


class Run:
    "One process, or `world` of them that train together, as a launcher would start them."

    def __init__(self, words, world=1):
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = str(s.getsockname()[1])
        self.log = Path(tempfile.mkstemp()[1])
        about = dict(MASTER_ADDR="localhost", MASTER_PORT=port, WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
        envs = [about | {"RANK": str(r), "LOCAL_RANK": str(r)} if world > 1 else {} for r in range(world)]
        self.processes = [SERVER.Process(target=work, args=(words, env, self.log)) for env in envs]
        for process in self.processes:
            process.start()

    def alive(self):
        return all(process.is_alive() for process in self.processes)

    def kill(self, sig, rank=None):
        for process in self.processes if rank is None else [self.processes[rank]]:
            os.kill(process.pid, sig)

    def end(self):
        "Waits; returns the exit statuses and what was said."
        for process in self.processes:
            process.join(HANGS)
        text = self.log.read_text()
        self.log.unlink()
        return [process.exitcode for process in self.processes], text


def weights(out):
    return load_file(out / "model.safetensors")


def same(out, reference):
    found = weights(out)
    return found.keys() == reference.keys() and all(found[k].equal(v) for k, v in reference.items())


def difference(out, reference):
    return max((weights(out)[k] - v).abs().max().item() for k, v in reference.items())


def train(out, *more, world=1):
    codes, said = Run(words(out, *more), world).end()
    assert codes == [0] * world, said
    return said


def launch(out, *more, by):
    done = subprocess.run([*by, *words(out, *more)], env=ENV, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr


def losses(out):
    return [loss for _, loss in json.loads((out / "run.json").read_text())["losses"]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    train(out)
    return out


@pytest.fixture(scope="module")
def uninterrupted(whole):
    return weights(whole)


@pytest.fixture(scope="module")
def whole_pair(tmp_path_factory):
    out = tmp_path_factory.mktemp("pair")
    launch(out, by=accelerate(2))  # which starts processes as torchrun does
    return out


@pytest.fixture(scope="module")
def uninterrupted_pair(whole_pair):
    return weights(whole_pair)


def rows(out) -> int:
    "How often the loss was written down, every five steps."
    return (out / "log.jsonl").read_bytes().count(b"\n") if (out / "log.jsonl").exists() else 0


def start(out, *more, world=1, read=1):
    "Start training and wait for the first checkpoint, and until the loss was read so often."
    run = Run(words(out, *more), world)
    while not (out / "checkpoint.safetensors").exists() or rows(out) < read:
        assert run.alive(), run.end()
        time.sleep(0.002)
    return run


def start_and_signal(out, sig, read=1, after=0.0):
    "Start training, wait for the loss to be read so often and a little longer, send the signal; returns (exit status, what was said)."
    run = start(out, read=read)
    time.sleep(after)
    run.kill(sig)
    (code,), said = run.end()
    return code, said


def moment(kill: int) -> tuple[int, float]:
    "How often the loss is read before a kill, and how much later the kill comes: somewhere in a step, or as a checkpoint is written."
    return 1 + 2 * kill, 0.02 * float(torch.rand(1, generator=torch.Generator().manual_seed(kill)))


def steps_here(out):
    return json.loads((out / "run.json").read_text())["steps_here"]


@pytest.mark.parametrize("kill", range(3))
def test_killed_training_resumes_bit_for_bit(kill, uninterrupted, tmp_path):
    code, _ = start_and_signal(tmp_path, signal.SIGKILL, *moment(kill))
    assert code == -signal.SIGKILL, "it had ended before it was killed: nothing was tested"
    assert not (tmp_path / "model.safetensors").exists()
    train(tmp_path)
    assert 0 < steps_here(tmp_path) <= STEPS - 5  # it did not start again
    assert same(tmp_path, uninterrupted)
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS  # the log holds each step once


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_an_asked_stop_saves_and_says_how_to_go_on(sig, uninterrupted, tmp_path):
    code, text = start_and_signal(tmp_path, sig)
    assert code == 130
    said = re.search(rf"stopped after step (\d+) of {STEPS}; run again to go on from", text)
    assert load_tensors(tmp_path / "checkpoint.safetensors")[1]["step"] == said[1]
    train(tmp_path)
    assert steps_here(tmp_path) == STEPS - int(said[1])
    assert same(tmp_path, uninterrupted)


def test_a_truncated_checkpoint_is_passed_over(uninterrupted, tmp_path):
    start_and_signal(tmp_path, signal.SIGKILL, 4)
    checkpoint = tmp_path / "checkpoint.safetensors"
    if not Path(f"{checkpoint}.1").exists():
        shutil.copy(checkpoint, f"{checkpoint}.1")
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    said = train(tmp_path)
    assert "checkpoint.safetensors is damaged" in said and "going on from checkpoint.safetensors.1" in said
    assert steps_here(tmp_path) < STEPS
    assert same(tmp_path, uninterrupted)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    start_and_signal(tmp_path, signal.SIGKILL)
    codes, said = Run(words(tmp_path, "--seed", "5")).end()
    assert codes == [1] and "is of another run (seed 0 → 5)" in said


# two processes


def test_two_processes_train_as_one(whole, whole_pair, tmp_path):
    short, sharded = tmp_path / "one", tmp_path / "two"
    train(short, "--steps", "15")
    train(sharded, "--steps", "15", "--shard", "--accumulate", "2", world=2)
    for out, one in ((whole_pair, whole), (sharded, short)):
        assert losses(out) == pytest.approx(losses(one), abs=1e-5)
        assert difference(out, weights(one)) < 1e-4
        assert json.loads((out / "run.json").read_text())["processes"] == 2
    steps = [json.loads(line)["step"] for line in (sharded / "log.jsonl").read_text().splitlines()]
    assert steps == [5, 10, 15]  # written by one of them


@pytest.mark.parametrize("kill", range(2))
def test_a_killed_pair_resumes_bit_for_bit(kill, uninterrupted_pair, tmp_path):
    read, after = moment(kill)
    run = start(tmp_path, world=2, read=read)
    time.sleep(after)
    run.kill(signal.SIGKILL)
    run.end()
    assert not (tmp_path / "model.safetensors").exists(), "it had ended before it was killed: nothing was tested"
    train(tmp_path, world=2)
    assert 0 < steps_here(tmp_path) <= STEPS - 5
    assert same(tmp_path, uninterrupted_pair)


@pytest.mark.parametrize("rank", [0, 1])
def test_when_one_of_two_dies_the_other_stops_and_one_alone_goes_on(rank, uninterrupted, tmp_path):
    run = start(tmp_path, world=2)
    run.kill(signal.SIGKILL, rank)
    codes, said = run.end()  # no hang
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1
    assert re.search(rf"process {1 - rank} of 2 stops after step \d+: .*\nIf another process died", said), said
    train(tmp_path)  # another number of processes
    assert 0 < steps_here(tmp_path) < STEPS
    assert difference(tmp_path, uninterrupted) < 1e-4


def test_a_pair_that_is_asked_to_stop_saves_together(uninterrupted_pair, tmp_path):
    run = start(tmp_path, world=2)
    run.kill(signal.SIGTERM)
    codes, said = run.end()
    assert codes == [130, 130]
    step = re.search(rf"stopped after step (\d+) of {STEPS}; run again", said)
    assert load_tensors(tmp_path / "checkpoint.safetensors")[1]["step"] == step[1]
    train(tmp_path, world=2)
    assert same(tmp_path, uninterrupted_pair)


def sample(out, world=1):
    codes, said = Run(
        ["sample", "--pictures", "14", "--steps", "3", "--batch", "4", "--device", "cpu", "--out", str(out)], world
    ).end()
    assert codes == [0] * world, said
    return said


def test_two_processes_draw_the_pictures_of_one(tmp_path):
    sample(tmp_path / "one")
    assert sample(tmp_path / "two", world=2).count("14 pictures:") == 1
    one, two = (load_file(tmp_path / k / "samples.safetensors") for k in ("one", "two"))
    assert one["seeds"].tolist() == list(range(14)) and one["labels"].tolist() == [i % 10 for i in range(14)]
    assert one.keys() == two.keys() and all(two[k].equal(v) for k, v in one.items())
    assert "all 14 pictures are there already" in sample(tmp_path / "two")


# a disk that is full, in earnest


def on_a_small_disk(folder, mount):
    "The start of a command that runs with a small disk at `folder`, or a skip where the system does not let us."
    words = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    able = shutil.which("unshare") and subprocess.run([*words, f"mount -t tmpfs {mount} tmpfs {folder}"], capture_output=True).returncode == 0  # fmt: skip
    if not able:
        pytest.skip("no right to mount a small disk")
    return lambda line: subprocess.run([*words, f"mount -t tmpfs {mount} tmpfs {folder} && {line}"], env=ENV, capture_output=True, text=True)  # fmt: skip


def test_a_full_disk_is_said_at_the_start(tmp_path):
    done = on_a_small_disk(tmp_path, "-o size=1m")(" ".join([*CLI, *words(tmp_path)]))
    assert done.returncode == 1
    assert "there must be room for 3 checkpoints of" in done.stderr


def test_a_read_only_folder_is_said_at_the_start(tmp_path):
    done = on_a_small_disk(tmp_path, "-o ro")(" ".join([*CLI, *words(tmp_path)]))
    assert done.returncode == 1
    assert "no checkpoint can be written there (Read-only file system)" in done.stderr
