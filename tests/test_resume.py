"""A training that is killed, at any moment, goes on as if nothing had happened: the same weights, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

STEPS = 60
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(out):
    return [Path(sys.executable).with_name("diffusion-nb"), "train", "--data", "digits", "--out", str(out), "--steps", str(STEPS),
            "--batch", "16", "--width", "8", "--every", "5", "--device", "cpu"]  # fmt: skip


def weights(out):
    return load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    subprocess.run(command(out), env=ENV, check=True, capture_output=True)
    return weights(out)


def start_and_signal(out, sig, after):
    "Start training, wait for the first checkpoint and a little longer, send the signal; returns the process, ended."
    run = subprocess.Popen(command(out), env=ENV, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while not (out / "checkpoint.safetensors").exists():
        assert run.poll() is None, run.communicate()
        time.sleep(0.002)
    time.sleep(after)
    run.send_signal(sig)
    run.said = run.communicate(timeout=120)
    return run


@pytest.mark.parametrize("kill", range(3))
def test_killed_training_resumes_bit_for_bit(kill, uninterrupted, tmp_path):
    delay = float(torch.rand(1, generator=torch.Generator().manual_seed(kill))) * 0.6
    run = start_and_signal(tmp_path, signal.SIGKILL, delay)
    assert run.returncode == -signal.SIGKILL, "it had ended before it was killed: nothing was tested"
    assert not (tmp_path / "model.safetensors").exists()
    subprocess.run(command(tmp_path), env=ENV, check=True, capture_output=True)
    about = json.loads((tmp_path / "run.json").read_text())
    assert 0 < about["steps_here"] <= STEPS - 5  # it did not start again
    resumed = weights(tmp_path)
    assert resumed.keys() == uninterrupted.keys()
    assert all(resumed[k].equal(v) for k, v in uninterrupted.items())


def test_ctrl_c_saves_and_says_how_to_go_on(uninterrupted, tmp_path):
    run = start_and_signal(tmp_path, signal.SIGINT, 0.05)
    assert run.returncode == 130
    assert f"of {STEPS}; run again to go on from" in run.said[1]
    subprocess.run(command(tmp_path), env=ENV, check=True, capture_output=True)
    assert all(weights(tmp_path)[k].equal(v) for k, v in uninterrupted.items())


def test_a_truncated_checkpoint_is_named(tmp_path):
    start_and_signal(tmp_path, signal.SIGKILL, 0)
    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    run = subprocess.run(command(tmp_path), env=ENV, capture_output=True, text=True)
    assert run.returncode == 1
    assert "checkpoint.safetensors is damaged" in run.stderr and "delete it" in run.stderr


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    start_and_signal(tmp_path, signal.SIGKILL, 0)
    other = [*command(tmp_path), "--seed", "5"]
    run = subprocess.run(other, env=ENV, capture_output=True, text=True)
    assert run.returncode == 1
    assert "is of another run (seed 0 → 5)" in run.stderr
