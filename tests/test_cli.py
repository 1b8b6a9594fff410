"""The command line: what it says and how it exits."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusion_nb.book.run import how_many, in_order
from diffusion_nb.cli import sample as cli_sample
from diffusion_nb.cli.main import main
from diffusion_nb.cli.samplers import SAMPLERS
from diffusion_nb.data import digits
from diffusion_nb.denoisers import Clip
from diffusion_nb.grids import truncated_grid
from diffusion_nb.likelihood.bits import bits_per_dim
from diffusion_nb.likelihood.continuous import vdm_bits
from diffusion_nb.mixtures import GaussianMixture, GMMDenoiser
from diffusion_nb.models.model import About, Model
from diffusion_nb.recipes.diffusion import Recipe, recipe
from diffusion_nb.recipes.vdm import vdm_denoiser
from diffusion_nb.schedules import CosineSchedule
from diffusion_nb.training.folder import PictureFolder, PictureTable
from diffusion_nb.training.report import memory_check
from diffusion_nb.variances import fixed_large, fixed_small


@pytest.fixture
def book(tmp_path, monkeypatch):
    "A project whose first notebook works, whose second fails and whose third works."
    (tmp_path / "nbs").mkdir()
    for name, source in (("01_good", "import os; print(f\"profile {os.environ['DIFFUSION_NB_PROFILE']}, {os.environ['OMP_NUM_THREADS']} thread\")"),
                         ("02_bad", "raise SystemError('no such formula')"), ("03_good", "1 + 1")):  # fmt: skip
        stored = nbformat.v4.new_output("stream", text="✓ stored\n")
        cells = [nbformat.v4.new_markdown_cell(f"# {name}\n\nwhere $x_t$"), nbformat.v4.new_code_cell(source)]
        if name == "02_bad":
            cells.append(nbformat.v4.new_code_cell("print('✓ stored')", outputs=[stored], execution_count=3))
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / f"nbs/{name}.ipynb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFUSION_NB_PROFILE", "cpu")
    return tmp_path


def run(book, *words: str) -> int:
    return main(["run", "--book", str(book / "nbs"), *words])


def pages(book):
    return sorted(p.name for p in (book / "_book").glob("*.html"))


def test_run_names_what_failed_and_finishes_the_others(book, capsys):
    assert run(book, "--profile", "gpu") == 1
    said = capsys.readouterr()
    assert "02_bad.ipynb failed" in said.err and "no such formula" in said.err
    assert (
        "2 of 3 notebooks ran well" in said.out and "failed: 02_bad" in said.out and "_book/index.html" in said.out
    )
    assert pages(book) == ["01_good.html", "02_bad.html", "03_good.html", "index.html"]
    failed = nbformat.read(book / "_book/02_bad.ipynb", 4).cells
    assert (
        "failed**, in the section “02_bad”" in failed[0].source
        and "failed</strong>" in (book / "_book/02_bad.html").read_text()
    )
    assert not failed[-1].outputs, "what is stored below the cell that failed was not shown by this run"
    outputs = nbformat.read(book / "_book/01_good.ipynb", 4).cells[1].outputs
    assert outputs[0].text == "profile gpu, 1 thread\n"
    assert not nbformat.read(book / "nbs/01_good.ipynb", 4).cells[1].outputs  # the book itself is not touched
    assert "<math" in (book / "_book/01_good.html").read_text()
    index = (book / "_book/index.html").read_text()
    assert index.count("<a href") == 3 and index.count(">failed") == 1 and "http-equiv" not in index


def test_run_goes_on_with_what_is_left_unless_something_changed(book, capsys):
    assert run(book) == 1
    capsys.readouterr()
    assert run(book) == 1  # 02 again, alone
    said = capsys.readouterr()
    assert "2 of 3 notebooks ran already" in said.out and "01_good" not in said.err
    assert run(book, "--fresh", "--jobs", "1") == 1
    assert "0 of 1" not in (said := capsys.readouterr().out) and "2 of 3 notebooks ran well" in said
    cells = nbformat.read(book / "nbs/02_bad.ipynb", 4)
    cells.cells[1].source = "1"
    nbformat.write(cells, book / "nbs/02_bad.ipynb")
    assert run(book) == 0
    assert "3 of 3 notebooks ran well" in capsys.readouterr().out


def test_run_is_stopped_by_ctrl_c_keeps_what_ran_and_goes_on(book):
    (slow := nbformat.read(book / "nbs/02_bad.ipynb", 4)).cells[1].source = (
        "import os, pathlib, time\n"
        "if not pathlib.Path('been').exists():\n"
        "    pathlib.Path('been').write_text(str(os.getpid()))\n"
        "    time.sleep(600)"
    )
    nbformat.write(slow, book / "nbs/02_bad.ipynb")
    command = [sys.executable, "-m", "diffusion_nb", "run", "--book", str(book / "nbs"), "--jobs", "2"]
    heard = partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # also where the tests run in the background, which ignores it
    process = subprocess.Popen(
        command, cwd=book, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=heard
    )
    while len(pages(book)) < 3 or not (book / "nbs/been").exists():
        assert process.poll() is None, process.communicate()[0]
        index = (book / "_book/index.html").read_text() if (book / "_book/index.html").exists() else "http-equiv"
        assert "http-equiv" in index  # it looks again by itself
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[0]
    assert process.returncode == 130 and "stopped" in said and "Traceback" not in said, said
    assert not psutil.pid_exists(int((book / "nbs/been").read_text()))
    assert pages(book) == ["01_good.html", "03_good.html", "index.html"]
    done = subprocess.run(command, cwd=book, capture_output=True, text=True)
    assert done.returncode == 0 and "2 of 3 notebooks ran already" in done.stdout, done.stderr
    assert "1 of 1 notebooks ran well" in done.stdout and len(pages(book)) == 4


def test_notebooks_that_take_long_are_not_left_for_the_end():
    paths = [Path(f"{i}.ipynb") for i in range(6)]
    seconds = {str(i): s for i, s in enumerate([5, 90, 5, 5, 5, 80])}
    assert [p.stem for p in in_order(paths, seconds, 2)] == ["0", "1", "5", "2", "3", "4"]
    assert in_order(paths, {}, 2) == paths


def test_fewer_notebooks_at_a_time_where_memory_is_short(monkeypatch):
    for free, jobs in ((2**40, 3), (5 * 2**30, 2), (2**20, 1)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
        assert how_many() == jobs


def test_run_some(book, capsys):
    assert run(book, "01", "03") == 0
    assert run(book, "07") == 1
    assert "no notebook '07'; there are 01_good, 02_bad, 03_good" in capsys.readouterr().err


@pytest.mark.parametrize("words, said", [
    (["train", "--data", "letters"], "there is no folder or file letters, and it is no data set; those are emoji, words, digits, mnist, fashion-mnist, cifar10"),
    (["sample", "--model", "nowhere"], "nowhere holds no model.json"),
    (["sample", "--label", "10"], "this model knows the labels 0 to 9"),
    (["sample", "--sampler", "magic"], "--sampler: expected one of ddpm, ddim, heun"),
    (["sample", "--n", "0"], "expected numbers of at least 1"),
    (["train", "--every", "0"], "every: expected a whole number of at least 1, got 0"),
    (["bits", "--n", "1"], "expected --n and --steps of at least 2"),
    (["bits", "--steps", "1"], "expected --n and --steps of at least 2"),
    (["bits", "--end", "1.5"], "--end from 0 to below 1"),
    (["bits", "--model", "nowhere"], "nowhere holds no model.json"),
])  # fmt: skip
def test_mistakes_are_named(words, said, capsys, tmp_path):
    assert main(words if words[0] == "train" else [*words, "--out", str(tmp_path)]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["draw"], ["train", "--steps", "many"], ["sample", "--format", "magic"]])
def test_words_that_make_no_sense(words):
    with pytest.raises(SystemExit) as e:
        main(words)
    assert e.value.code == 2


@pytest.mark.parametrize(
    "words",
    [["--help"], *([c, "--help"] for c in ("run", "train", "sample", "bits", "data", "artifacts", "ledger"))],
)
def test_help(words, capsys):
    with pytest.raises(SystemExit) as e:
        main(words)
    assert e.value.code == 0 and "usage: diffusion-nb" in capsys.readouterr().out


def test_what_was_run_is_written_down(tmp_path):
    assert main(["sample", "--n", "3", "--steps", "2", "--seed", "5", "--label", "7", "--out", str(tmp_path)]) == 0
    about = json.loads((tmp_path / "run.json").read_text())
    assert (about["n"], about["steps"], about["seed"], about["label"], about["sampler"]) == (3, 2, 5, "7", "ddpm")
    assert (tmp_path / "grid.png").read_bytes()[:4] == b"\x89PNG"


def test_pictures_do_not_depend_on_the_batch(tmp_path, monkeypatch):
    exact = GMMDenoiser(GaussianMixture([1.0], torch.zeros(1, 64), torch.eye(64)[None]), CosineSchedule())
    monkeypatch.setattr(
        cli_sample, "load_model", lambda folder: Model(exact, About("diffusion", Recipe(classes=0), (1, 8, 8)))
    )
    for batch in ("2", "4"):
        words = ["--n", "4", "--steps", "2", "--batch", batch, "--device", "cpu", "--out", str(tmp_path / batch)]
        assert main(["sample", *words]) == 0
    parted, whole = (load_file(tmp_path / batch / "samples.safetensors")["pictures"] for batch in ("2", "4"))
    torch.testing.assert_close(parted, whole)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_samplers_without_fresh_noise_keep_the_data(sampler, tmp_path, monkeypatch):
    "Narrow data come out narrow. (2M's grid ends at log SNR 2 with the guess, which is narrower still.)"
    exact = GMMDenoiser(GaussianMixture([1.0], torch.zeros(1, 64), 0.01 * torch.eye(64)[None]), CosineSchedule())
    monkeypatch.setattr(
        cli_sample, "load_model", lambda folder: Model(exact, About("diffusion", Recipe(classes=0), (1, 8, 8)))
    )
    words = ["--n", "64", "--steps", "100", "--sampler", sampler, "--device", "cpu", "--out", str(tmp_path)]
    assert main(["sample", *words]) == 0
    x = load_file(tmp_path / "samples.safetensors")["pictures"]
    assert abs(x.std() - 0.1) < (0.01 if sampler == "ddim" else 0.08) and x.mean().abs() < 0.02
    assert json.loads((tmp_path / "run.json").read_text())["sampler"] == sampler


def test_bits_are_those_of_the_library(tmp_path, monkeypatch):
    exact = GMMDenoiser(GaussianMixture([1.0], torch.zeros(1, 64), torch.eye(64)[None]), CosineSchedule())
    monkeypatch.setattr(
        cli_sample,
        "load_model",
        lambda folder: Model(exact, About("diffusion", Recipe(classes=0), (1, 8, 8))),
    )
    out = tmp_path / "bits.json"
    for end, decoder in ((0.0, fixed_small), (0.1, fixed_large)):
        asked = ["bits", "--n", "3", "--steps", "4", "--end", str(end), "--device", "cpu", "--out", str(out)]
        assert main(asked) == 0
        want = bits_per_dim(
            Clip(exact),
            digits().x_test[:3],
            truncated_grid(4, end),
            levels=17,
            var=fixed_large,
            decoder_var=decoder,
        )
        about = json.loads(out.read_text())
        assert about["bits_per_dim"] == pytest.approx(want.total.mean().item(), rel=1e-9)
    assert about["bits_per_dim"] == pytest.approx(
        about["prior"] + about["steps_cost"] + about["decoder"], rel=1e-9
    )
    assert (about["pictures"], about["levels"], about["held_out_of"]) == (3, 17, "digits")


def test_a_learned_schedule_is_trained_kept_measured_and_drawn_with(tmp_path, capsys):
    words = ["--device", "cpu", "--out", str(tmp_path)]
    assert main(["train", "--vdm", "--steps", "2", "--batch", "4", "--width", "8", *words]) == 0
    loaded = Model.load(tmp_path)
    model, shape = loaded.denoiser, loaded.about.shape
    fresh = dict(vdm_denoiser(loaded.about.recipe, shape).named_parameters())
    assert shape == (1, 8, 8) and not any(
        torch.equal(p, fresh[n]) for n, p in model.named_parameters() if "ends" in n
    )
    out = tmp_path / "bits.json"
    assert (
        main(["bits", "--model", str(tmp_path), "--n", "3", "--steps", "4", "--device", "cpu", "--out", str(out)])
        == 0
    )
    d = digits()
    want, about = vdm_bits(Clip(model), d.x_test[:3], 17, times=4, y=d.y_test[:3]), json.loads(out.read_text())
    assert about["bits_per_dim"] == pytest.approx(want.total.mean().item(), rel=1e-6)
    assert about["diffusion"] == pytest.approx(want.diffusion.mean().item(), rel=1e-6)
    drawn = tmp_path / "drawn"
    assert (
        main(
            [
                "sample",
                "--model",
                str(tmp_path),
                "--n",
                "2",
                "--steps",
                "2",
                "--device",
                "cpu",
                "--out",
                str(drawn),
            ]
        )
        == 0
    )
    assert load_file(drawn / "samples.safetensors")["pictures"].isfinite().all()


def test_a_student_needs_its_teacher(tmp_path, capsys):
    assert main(["distill", "--data", "mnist", "--consistency", "--out", str(tmp_path)]) == 1
    assert "holds no teacher; first: diffusion-nb train --data mnist" in capsys.readouterr().err


def test_weights_of_another_network_are_refused(tmp_path, capsys):
    words = ["train", "--steps", "1", "--batch", "2", "--device", "cpu"]
    assert main([*words, "--width", "8", "--out", str(tmp_path / "a")]) == 0
    assert main([*words, "--width", "12", "--out", str(tmp_path / "b")]) == 0
    (tmp_path / "b/model.safetensors").replace(tmp_path / "a/model.safetensors")
    assert main(["bits", "--model", str(tmp_path / "a")]) == 1
    assert "does not fit the network" in capsys.readouterr().err


DIGITS = asdict(recipe("digits"))
GOOD = dict(family="diffusion", recipe={}, shape=[1, 8, 8], levels=17, steps=0)


@pytest.mark.parametrize("record", [
    "{}", "[]", "not json", "\xff", json.dumps(GOOD), json.dumps(GOOD | {"family": "magic"}), json.dumps(GOOD | {"recipe": {"width": 0}, "shape": []}),
    json.dumps(GOOD | {"recipe": {k: v for k, v in DIGITS.items() if k != "target"}}),  # of which the default would be silently another model
])  # fmt: skip
def test_a_damaged_description_is_named(record, tmp_path, capsys):
    (tmp_path / "model.json").write_text(record, encoding="latin-1")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert main(["bits", "--model", str(tmp_path)]) == 1
    assert "model.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("change, said", [
    ({"shape": [1, 8, 0]}, "width: expected a whole number of at least 1"), ({"shape": [2**40, 8, 8]}, "cannot be meant"),
    ({"recipe": DIGITS | {"width": 0}}, "width: expected a whole number of at least 1"),
    ({"recipe": DIGITS | {"target": "magic"}}, "magic"), ({"shape": [1, 8, "x"]}, "expected a whole number"),
])  # fmt: skip
def test_a_description_of_what_cannot_be_meant(change, said, tmp_path, capsys):
    (tmp_path / "model.json").write_text(json.dumps(GOOD | {"recipe": DIGITS} | change))
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert main(["sample", "--model", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert said in capsys.readouterr().err


def test_a_training_stopped_by_the_clock_goes_on(tmp_path, capsys):
    words = ["train", "--steps", "3", "--batch", "2", "--width", "8", "--device", "cpu", "--out", str(tmp_path)]
    assert main([*words, "--minutes", "1e-9"]) == 0
    assert "step 1 of 3; the same command goes on" in capsys.readouterr().out
    assert main(words) == 0 and json.loads((tmp_path / "run.json").read_text())["losses"][-1][0] == 3


SMALL = ["train", "--steps", "2", "--width", "8", "--batch", "4", "--device", "cpu"]


def test_a_finished_run_keeps_its_record(tmp_path, capsys):
    words = [*SMALL, "--out", str(tmp_path)]
    assert main(words) == 0
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert main(words) == 0
    assert "holds this run, finished" in capsys.readouterr().out
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("command, name", [(["sample", "--model", "words", "--n", "2"], "samples.txt"), ([*SMALL], "model.json"), ([*SMALL], "run.json"), ([*SMALL], "log.jsonl")])  # fmt: skip
def test_files_of_others_stop_a_command_before_it_writes(command, name, tmp_path, capsys):
    (tmp_path / name).write_text('{"mine": 1}')
    assert main([*command, "--out", str(tmp_path)]) == 1
    assert f"holds {name}, which this command did not write" in capsys.readouterr().err
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {name: '{"mine": 1}'}


def test_a_training_that_died_before_its_first_checkpoint_begins_again(tmp_path, monkeypatch):
    def dies(trainer):
        raise FloatingPointError("the loss is nan")

    with monkeypatch.context() as m:
        m.setattr("diffusion_nb.training.trainer.Trainer.train_step", dies)
        assert main([*SMALL, "--out", str(tmp_path)]) == 1
    assert not (tmp_path / "checkpoint.safetensors").exists()
    assert main([*SMALL, "--out", str(tmp_path)]) == 0


def test_bits_are_written_beside_a_model_and_in_runs_for_one_of_the_book(tmp_path):
    from diffusion_nb.cli.sample import beside

    (tmp_path / "model.safetensors").touch()
    assert beside(tmp_path) == beside(tmp_path / "model.safetensors") == tmp_path / "bits.json"
    assert str(beside(Path("mnist"))) == "runs/bits-mnist.json"


def test_drawings_do_not_replace_the_record_of_a_training(tmp_path, capsys):
    assert main([*SMALL, "--out", str(tmp_path)]) == 0
    before = (tmp_path / "run.json").read_bytes()
    assert main(["sample", "--model", str(tmp_path), "--n", "2", "--steps", "2", "--out", str(tmp_path)]) == 1
    assert "holds run.json, which this command did not write" in capsys.readouterr().err
    assert (tmp_path / "run.json").read_bytes() == before


def test_a_run_does_not_write_over_notebooks(tmp_path, capsys):
    source = tmp_path / "00_core.ipynb"
    source.write_text(json.dumps({"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    before = source.read_bytes()
    assert main(["run", "--book", str(tmp_path), "--out", str(tmp_path)]) == 1
    assert "holds 00_core.ipynb, which this command did not write" in capsys.readouterr().err
    assert source.read_bytes() == before


def test_texts_are_written_again_over_texts(tmp_path):
    words = ["sample", "--model", "words", "--n", "2", "--out", str(tmp_path)]
    assert main(words) == 0 == main([*words, "--seed", "5"])
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 5


def test_another_recipe_is_not_written_over_the_weights_of_this_one(tmp_path, capsys, monkeypatch):
    assert main([*SMALL, "--out", str(tmp_path)]) == 0
    before = (tmp_path / "run.json").read_bytes()
    for change in ("target=eps", "schedule=linear", "ema=0.5", "decay=constant"):
        monkeypatch.setenv("DIFFUSION_NB_SET", f"recipe.digits.{change}")
        assert main([*SMALL, "--out", str(tmp_path)]) == 1
        assert re.search("is of another run|does not fit the network", capsys.readouterr().err)
    monkeypatch.delenv("DIFFUSION_NB_SET")
    assert main([*SMALL, "--lr", "0.5", "--out", str(tmp_path)]) == 1
    assert (tmp_path / "run.json").read_bytes() == before
    assert main([*SMALL[:2], "4", *SMALL[3:], "--out", str(tmp_path)]) == 0  # more steps go on
    assert json.loads((tmp_path / "run.json").read_text())["steps_here"] == 2


@pytest.mark.parametrize("words", [["--steps", "0"], ["--width", "0"], ["--batch", "-4"], ["--steps", "-3"]])
def test_numbers_that_cannot_be_meant(words, tmp_path, capsys):
    assert main([*SMALL, *words, "--out", str(tmp_path)]) == 1
    assert f"{words[0][2:]}: expected a whole number of at least 1, got {words[1]}" in capsys.readouterr().err


def test_a_folder_named_like_the_model_of_the_book(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*SMALL, "--out", "digits"]) == 0
    assert main(["sample", "--model", "digits", "--n", "1", "--steps", "2"]) == 1
    assert "say ./digits for the folder" in capsys.readouterr().err
    assert main(["sample", "--model", "./digits", "--n", "1", "--steps", "2", "--out", "s"]) == 0


# pictures of one's own, and models of every family


@pytest.fixture
def folder(tmp_path):
    "Two classes of three coloured pictures, not square: reds, then greens."
    for name, colour in (("a red", (200, 10, 10)), ("green", (10, 200, 10))):
        (tmp_path / "own" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (20 + i, 16), colour).save(tmp_path / "own" / name / f"{i}.png")
    return tmp_path / "own"


def test_a_folder_of_pictures_is_read_by_class(folder, capsys):
    found = PictureFolder(folder, 8)
    assert len(found) == 6 and found.classes == ["a red", "green"] and found.labels == [0, 0, 0, 1, 1, 1]
    for i in (0, 5):
        x, y = found[i]
        assert (
            x.shape == (3, 8, 8)
            and x.dtype == torch.uint8
            and x[:, 4, 4].tolist() == [[200, 10, 10], [10, 200, 10]][y]
        )
    from diffusion_nb.cli.tasks import asked_pictures

    assert asked_pictures(SimpleNamespace(data=str(folder), size=8)).classes == 2
    assert capsys.readouterr().out == "classes, for --label: 0 a red, 1 green\n"
    (folder / "lost.png").write_bytes((folder / "green/0.png").read_bytes())
    with pytest.raises(ValueError, match="one or the other, a subfolder for each class"):
        PictureFolder(folder, 8)


def test_pictures_are_taken_as_they_are_seen(tmp_path):
    "Transparent ones on white, 16 bits as 8, and upright where the camera was held on its side."
    clear, sides = Image.new("RGBA", (4, 4), (200, 0, 0, 0)), Image.new("RGB", (4, 4), (255, 0, 0))
    clear.putpixel((0, 0), (200, 0, 0, 255))
    clear.save(tmp_path / "a.png")
    Image.fromarray(np.full((4, 4), 30_000, dtype=np.uint16)).save(tmp_path / "b.png")
    sides.paste((0, 0, 255), (0, 0, 2, 4))  # blue on the left, red on the right
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90° clockwise: blue is above
    sides.save(tmp_path / "c.png", exif=turned)
    clear.convert("P").save(tmp_path / "d.png", transparency=0)
    a, b, c, d = (x for x, _ in (PictureFolder(tmp_path, 4)[i] for i in range(4)))
    assert a[:, 0, 0].tolist() == [200, 0, 0] and a[:, 3, 3].tolist() == [255, 255, 255]
    assert b.unique().tolist() == [round(30_000 / 257)]
    assert c[:, 0, 1].tolist() == [0, 0, 255] and c[:, 3, 1].tolist() == [255, 0, 0]
    assert d[:, 3, 3].tolist() == [255, 255, 255]


TOY = ["--batch", "4", "--width", "8", "--device", "cpu"]


def test_a_model_of_ones_own_pictures(folder, tmp_path, capsys, monkeypatch):
    "From a folder, from its checkpoint, from other weights, with two readers or none: the same."
    monkeypatch.setenv(
        "DIFFUSION_NB_SET", "recipe.pictures.mults=1,2;recipe.pictures.attention=1;recipe.pictures.blocks=1"
    )
    words = ["train", "--data", str(folder), *TOY, "--size", "8"]
    for out, more in (("one", ["--workers", "2"]), ("two", ["--workers", "0"])):
        assert main([*words, "--steps", "3", *more, "--out", str(tmp_path / out)]) == 0, capsys.readouterr().err
    one, two = (Model.load(tmp_path / out) for out in ("one", "two"))
    assert one.about.shape == (3, 8, 8) and one.about.recipe.classes == 2
    assert all(v.equal(two.denoiser.state_dict()[k]) for k, v in one.denoiser.state_dict().items())
    checkpoint = Model.load(tmp_path / "one/checkpoint.safetensors").denoiser.state_dict()
    assert all(v.equal(checkpoint[k]) for k, v in one.denoiser.state_dict().items())
    tuned = ["--steps", "1", "--lr", "1e-12", "--from", str(tmp_path / "one"), "--out", str(tmp_path / "tuned")]
    assert main([*words, *tuned]) == 0
    for k, v in Model.load(tmp_path / "tuned").denoiser.state_dict().items():
        torch.testing.assert_close(v, one.denoiser.state_dict()[k], rtol=0, atol=1e-6)
    assert main([*words, *tuned[:4], "--from", str(tmp_path / "two"), *tuned[-2:], "--steps", "2"]) == 1
    assert "holds a run that began from" in capsys.readouterr().err
    drawn = ["--n", "4", "--steps", "2", "--device", "cpu", "--out", str(tmp_path / "drawn")]
    assert main(["sample", "--model", str(tmp_path / "one"), *drawn, "--format", "npz"]) == 0
    assert (
        main(
            [
                "train",
                "--data",
                str(tmp_path / "drawn/samples.npz"),
                *TOY,
                "--steps",
                "1",
                "--out",
                str(tmp_path / "npz"),
            ]
        )
        == 0
    )
    assert Model.load(tmp_path / "npz").about.recipe.classes == 2  # the labels came along


class Column:
    "A feature of a Hugging Face data set, as far as it is looked at."

    def __init__(self, names=()):
        self.names = list(names)


Image_, ClassLabel = (type(name, (Column,), {}) for name in ("Image", "ClassLabel"))


class Table(list):
    features = {"image": Image_(), "label": ClassLabel(["red", "green"])}


def rows(folder) -> list[dict]:
    return [
        {"image": Image.open(p), "label": int("green" in p.parent.name)} for p in sorted(folder.rglob("*.png"))
    ]


def test_a_hugging_face_data_set_is_read_as_the_folder_is(folder):
    found, files = PictureTable(Table(rows(folder)), 8), PictureFolder(folder, 8)
    assert found.classes == ["red", "green"] and len(found) == len(files)
    assert all(a[0].equal(b[0]) and a[1] == b[1] for a, b in zip(found, files, strict=True))
    bare = Table([{"image": row["image"]} for row in rows(folder)])
    bare.features = {"image": Image_()}
    assert PictureTable(bare, 8)[5][1] == 0 and PictureTable(bare, 8).classes == [""]
    bare.features = {"a": Image_(), "b": Image_()}
    for wrong in (bare, Table()):
        with pytest.raises(
            ValueError, match="expected rows with one column of pictures and at most one of labels"
        ):
            PictureTable(wrong, 8)


def test_training_on_a_hugging_face_data_set(folder, tmp_path, capsys, monkeypatch):
    "The same weights as from the folder with the same pictures."
    monkeypatch.setenv("DIFFUSION_NB_SET", "recipe.pictures.mults=1,2;recipe.pictures.attention=1;recipe.pictures.blocks=1")  # fmt: skip
    table, words = Table(rows(folder)), [*TOY, "--steps", "2", "--workers", "0"]
    fake = SimpleNamespace(load_dataset=lambda name, split: {("me/own", "train"): table}[name, split])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    for data, out in ((str(folder), "a"), ("hf:me/own", "b")):
        assert main(["train", "--data", data, "--size", "8", *words, "--out", str(tmp_path / out)]) == 0
    a, b = (Model.load(tmp_path / out).denoiser.state_dict() for out in ("a", "b"))
    assert all(v.equal(b[k]) for k, v in a.items())
    monkeypatch.setitem(sys.modules, "datasets", None)
    for more, said in ((["--size", "8"], "pip install datasets"), ([], "--size: say to how many pixels")):
        assert main(["train", "--data", "hf:me/own", *more, *words, "--out", str(tmp_path / "c")]) == 1
        assert said in capsys.readouterr().err


def test_the_report_tells_copies_from_drawings():
    data = torch.randint(0, 256, (40, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    as_floats = data / 127.5 - 1
    x = torch.cat([as_floats[[7, 30]] + 0.01, -as_floats[[3]]])
    for source in (data, as_floats, torch.utils.data.TensorDataset(data, torch.zeros(40, dtype=torch.long))):
        said, near = memory_check(x, source)
        assert near.index[:2].tolist() == [7, 30] and near.picture[:2].allclose(as_floats[[7, 30]])
        far = (as_floats[None, :] - x[:, None]).square().mean((2, 3, 4)).sqrt()
        assert near.distance.allclose(far.amin(1), atol=1e-5)
        theirs = (as_floats[None, :] - as_floats[[0, 13, 26], None]).square().mean((2, 3, 4)).sqrt()
        theirs[[0, 1, 2], [0, 13, 26]] = 9
        assert list(said.values()) == pytest.approx([0.01, theirs.amin(1).median().item(), 2 / 3], abs=1e-3)


def test_a_training_with_its_report(tmp_path):
    out, words = tmp_path / "run", ["--steps", "1", "--report", "--out", str(tmp_path / "run")]
    assert main(["train", *TOY, *words]) == 0
    told = json.loads((out / "run.json").read_text())["report"]
    assert told["share of drawings nearer than half of that"] == 0 and told["distance to the nearest training picture"] > 0.3  # fmt: skip
    assert Image.open(out / "report.png").size == (16 * 65 - 1, 4 * 65 - 1)


def test_a_folder_named_like_a_data_set(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder.rename("digits")
    assert main(["train", *TOY, "--steps", "1", "--size", "8"]) == 1
    assert "say ./digits for the latter" in capsys.readouterr().err


@pytest.mark.parametrize("words, said", [
    (["--data", "{own}"], "--size: say to how many pixels"), (["--data", "{own}/green/0.png"], "expected an .npz file"),
    (["--data", "{own}/..", "--size", "8", "--vdm"], "expected the pictures as a tensor|no section"), (["--from", "nowhere"], "nowhere holds no model.json"),
    (["--recipe", "magic"], "no section"), (["--size", "8"], "--size: it is of a folder"),
])  # fmt: skip
def test_mistakes_about_ones_own_pictures(words, said, folder, tmp_path, capsys):
    assert main(["train", *(w.format(own=folder) for w in words), *TOY, "--out", str(tmp_path / "out")]) == 1
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s not in ("consistency", "cold")])
def test_every_sampler_draws_the_data(sampler, tmp_path, monkeypatch):
    "Data N(0.3, 0.1²), exactly denoised: mean and spread, to what 100 steps and the last guess leave."
    exact = GMMDenoiser(
        GaussianMixture([1.0], torch.full((1, 64), 0.3), 0.01 * torch.eye(64)[None]), CosineSchedule()
    )
    monkeypatch.setattr(
        cli_sample, "load_model", lambda folder: Model(exact, About("diffusion", Recipe(classes=0), (1, 8, 8)))
    )
    words = ["--n", "32", "--steps", "100", "--sampler", sampler, "--device", "cpu", "--out", str(tmp_path)]
    assert main(["sample", *words]) == 0
    x = load_file(tmp_path / "samples.safetensors")["pictures"]
    assert abs(x.mean() - 0.3) < 0.02 and 0.01 < x.std() < 0.13, (x.mean(), x.std())


def test_students_and_consistency_models_draw_in_their_own_way(tmp_path, capsys):
    r = replace(recipe("digits"), width=8)
    for family, steps in (("student", 2), ("consistency", 0)):
        about = About(family, r, (1, 8, 8), 17, steps)
        Model(about.fresh(), about).save(tmp_path / family)
        out = tmp_path / f"{family} drawn"
        assert (
            main(["sample", "--model", str(tmp_path / family), "--n", "3", "--device", "cpu", "--out", str(out)])
            == 0
        )
        assert load_file(out / "samples.safetensors")["pictures"].isfinite().all()
        record = json.loads((out / "run.json").read_text())
        assert (record["sampler"], record["steps"]) == {"student": ("ddim", 2), "consistency": ("consistency", 1)}[
            family
        ]
    assert main(["bits", "--model", str(tmp_path / "consistency")]) == 1
    assert (
        main(
            [
                "sample",
                "--model",
                str(tmp_path / "student"),
                "--sampler",
                "consistency",
                "--out",
                str(tmp_path / "x"),
            ]
        )
        == 1
    )
    assert "no other model does" in capsys.readouterr().err


@pytest.mark.parametrize("sampler", ["ddpm", "heun"])
def test_the_film_ends_with_the_pictures(sampler, tmp_path):
    words = ["sample", "--n", "5", "--steps", "4", "--film", "--sampler", sampler, "--out", str(tmp_path)]
    assert main([*words, "--seed", "3", "--device", "cpu"]) == 0
    film, pictures = Image.open(tmp_path / "film.gif"), load_file(tmp_path / "samples.safetensors")["pictures"]
    assert film.n_frames == 5 and film.size == (8 * (5 * 9 - 1), 8 * (2 * 9 - 1))  # 4 steps and the end
    film.seek(4)
    shown = (
        torch.frombuffer(bytearray(film.convert("L").tobytes()), dtype=torch.uint8)
        .reshape(film.height, film.width)
        .int()
    )
    for row in (0, 1):
        for k, x in enumerate(pictures):
            place = shown[72 * row :, 72 * k :][:64:8, :64:8]
            assert (place - (x[0].clamp(-1, 1) + 1) * 127.5).abs().max() < 3  # of 255; a GIF has 256 colours


def test_a_consistency_model_has_no_film(tmp_path, capsys):
    about = About("consistency", recipe("digits"), (1, 8, 8), 17)
    model = SimpleNamespace(about=about, denoiser=SimpleNamespace(schedule=CosineSchedule()), codec=None)
    with pytest.raises(ValueError, match="--film: a consistency model maps noise to pictures at once"):
        cli_sample.walk_of(cli_sample.Sample(film=True, sampler="consistency"), model)
