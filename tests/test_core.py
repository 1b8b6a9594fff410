"""Artifacts, fingerprints, atomic writes, evidence: what goes wrong is noticed."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import pytest
import sympy
import torch

from diffusion_nb.book import claims
from diffusion_nb.book.claims import claim
from diffusion_nb.experiments import artifacts
from diffusion_nb.experiments.artifacts import artifact, fingerprint
from diffusion_nb.noise import GAMMA, splitmix64
from diffusion_nb.util import storage

HANGS = 1800  # seconds: what takes so long on any machine, hangs

ROOT = Path(__file__).resolve().parents[1]

# splitmix64


def test_splitmix64_known_answers():
    # The first outputs of the generator by Steele, Lea and Flood (in Vigna's C code), from state 0 and from 1234567.
    known = {
        0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC],
        1234567: [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431],
    }
    for state, want in known.items():
        got = splitmix64(torch.arange(1, 5) * GAMMA + state)
        assert [v % 2**64 for v in got.tolist()] == want


def test_splitmix64_agrees_with_whole_numbers():
    def slow(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    states = [0, 1, 2, -1, -2, 2**63 - 1, -(2**63), 2**31, -(2**31), 0x0123456789ABCDEF]
    assert [v % 2**64 for v in splitmix64(torch.tensor(states)).tolist()] == [slow(s % 2**64) for s in states]


# writing


def test_write_atomically(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    storage.write_atomically(path, lambda p: p.write_text("old"))
    assert path.read_text() == "old"

    def interrupted(p):
        p.write_text("half of the n")
        assert path.read_text() == "old"  # what readers see meanwhile
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage.write_atomically(path, interrupted)
    assert path.read_text() == "old"
    with pytest.raises(FileNotFoundError):
        storage.write_atomically(path, lambda p: None)  # nothing was written
    assert path.read_text() == "old"
    with open(path, encoding="utf-8") as reader:
        storage.write_atomically(path, lambda p: p.write_text("new"))
        assert reader.read() == "old"  # who has it open keeps what was there
    assert path.read_text() == "new"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_weights_are_as_readable_as_other_new_files(tmp_path):
    (tmp_path / "plain").touch()
    storage.save_tensors(tmp_path / "net.safetensors", {"w": torch.ones(2)}, {})
    assert (tmp_path / "net.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


# artifacts


class Maker:
    "A `make` that counts how often it is called, and can be told to fail."

    def __init__(self):
        self.made, self.fails = [], False

        def make(r):
            size, scale = r["size"], r.get("scale", 1.0)
            self.made.append(size)
            if self.fails:
                raise RuntimeError("out of luck")
            return {"w": scale * torch.arange(size, dtype=torch.float32).requires_grad_()}, {"score": 0.5}

        self.make = make


@pytest.fixture
def maker(project):
    return Maker()


def files(project):
    return sorted(p.suffix for p in (project / "home/artifacts").iterdir() if p.suffix != ".lock")


def the_file(project, suffix=".safetensors"):
    (path,) = (project / "home/artifacts").glob(f"a-*{suffix}")
    return path


def test_artifact_is_made_once(maker, project, capsys):
    tensors, card = artifact("a", maker.make, {"size": 3})
    assert capsys.readouterr().out == "making a (there is none yet)\n"
    again, card_again = artifact("a", maker.make, {"size": 3})
    assert capsys.readouterr().out == ""
    assert maker.made == [3] and card == card_again
    assert tensors["w"].tolist() == again["w"].tolist() == [0, 1, 2] and not again["w"].requires_grad
    assert (card["name"], card["recipe"], card["metrics"]) == ("a", {"size": 3}, {"score": 0.5})
    assert files(project) == [".json", ".safetensors"]


def test_each_recipe_has_an_artifact_of_its_own(maker, capsys):
    recipes = ({"size": 3}, {"size": 4}, {"size": 4, "scale": 2.0}, {"size": 4, "scale": 3.0})
    for recipe in (*recipes, *recipes):
        tensors, card = artifact("a", maker.make, recipe)
        assert tensors["w"].tolist() == [recipe.get("scale", 1.0) * i for i in range(recipe["size"])]
        assert card["recipe"] == recipe
    assert maker.made == [3, 4, 4, 4]


def test_artifact_takes_tuples_in_its_recipe(project):
    made = []

    def make(r):
        made.append(r["sizes"])
        return {"w": torch.ones(r["sizes"])}, {}

    for _ in range(2):
        artifact("a", make, {"sizes": (1, 2)})
    assert made == [(1, 2)]  # once, although a card's tuples come back as lists


def test_artifact_made_by_other_code_is_made_again(maker, monkeypatch):
    artifact("a", maker.make, {"size": 3})
    monkeypatch.setattr(artifacts, "fingerprint", lambda *_: "of other code")
    artifact("a", maker.make, {"size": 3})
    artifact("a", maker.make, {"size": 3})
    assert maker.made == [3, 3]


@pytest.fixture
def shipped(maker, tmp_path, monkeypatch):
    "A folder in the place of data/artifacts, with the artifact `a`, that must stay as it is."
    place = tmp_path / "shipped"
    monkeypatch.setattr(artifacts, "shipped", lambda name: place)
    artifacts.put_artifact(place / "a.safetensors", "a", maker.make, {"size": 3})
    maker.made.clear()
    before = {p.name: p.read_bytes() for p in place.iterdir()}
    yield place
    assert {p.name: p.read_bytes() for p in place.iterdir()} == before


def test_what_is_shipped_is_read_where_nothing_can_be_written(shipped, maker, project, monkeypatch):
    monkeypatch.setenv("DIFFUSION_NB_HOME", str(project / "settings.ini"))  # a file: no folder can be made there
    tensors, card = artifact("a", maker.make, {"size": 3})
    assert len(tensors["w"]) == 3 and not maker.made and card["recipe"] == {"size": 3}


def test_what_is_shipped_is_never_written(shipped, maker, project, capsys):
    tensors, card = artifact("a", maker.make, {"size": 4})
    assert capsys.readouterr().out == "making a (its recipe has changed)\n"
    assert len(tensors["w"]) == 4 and card["recipe"] == {"size": 4} and files(project) == [".json", ".safetensors"]


def test_what_is_shipped_of_other_code_is_made_again(shipped, maker, monkeypatch, capsys):
    monkeypatch.setattr(artifacts, "fingerprint", lambda *_: "of other code")
    artifact("a", maker.make, {"size": 3})
    assert capsys.readouterr().out == "making a (its code has changed)\n" and maker.made == [3]


def test_long_trainings_are_not_begun_unasked(shipped, maker, project, monkeypatch):
    card = json.loads((shipped / "a.json").read_text()) | {"seconds": 100}
    place = project / "slow"
    place.mkdir()
    (place / "a.json").write_text(json.dumps(card))
    (place / "a.safetensors").write_bytes((shipped / "a.safetensors").read_bytes())
    monkeypatch.setattr(artifacts, "shipped", lambda name: place)
    with pytest.raises(
        RuntimeError, match=r"its recipe has changed\), and making it took 100 s.*DIFFUSION_NB_MAKE=1"
    ):
        artifact("a", maker.make, {"size": 4})
    assert not maker.made
    monkeypatch.setenv("DIFFUSION_NB_MAKE", "1")
    assert len(artifact("a", maker.make, {"size": 4})[0]["w"]) == 4


@pytest.mark.parametrize("harm", ["one bit", "truncated", "empty", "gone"])
def test_damaged_file_is_made_again(maker, project, capsys, harm):
    want, _ = artifact("a", maker.make, {"size": 3})
    path = the_file(project)
    raw = path.read_bytes()
    capsys.readouterr()
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes({"one bit": raw[:-1] + bytes([raw[-1] ^ 1]), "truncated": raw[:-1], "empty": b""}[harm])
    got, _ = artifact("a", maker.make, {"size": 3})
    assert (
        capsys.readouterr().out
        == f"making a ({'there is none yet' if harm == 'gone' else 'its file is damaged'})\n"
    )
    assert maker.made == [3, 3] and torch.equal(got["w"], want["w"])
    assert path.read_bytes() == raw


@pytest.mark.parametrize("card", ["", "{", "{}", '{"recipe": {"size": 3}}', "gone", "[]"])
def test_damaged_card_is_made_again(maker, project, card):
    artifact("a", maker.make, {"size": 3})
    path = the_file(project, ".json")
    whole = json.loads(path.read_text())
    path.unlink() if card == "gone" else path.write_text(card)
    artifact("a", maker.make, {"size": 3})
    artifact("a", maker.make, {"size": 3})
    assert maker.made == [3, 3]
    assert json.loads(path.read_text())["sha256"] == whole["sha256"]


def test_interrupted_make_leaves_the_others_usable(maker, project):
    artifact("a", maker.make, {"size": 3})
    before = {p.name: p.read_bytes() for p in (project / "home/artifacts").iterdir()}
    maker.fails = True
    with pytest.raises(RuntimeError, match="out of luck"):
        artifact("a", maker.make, {"size": 4})
    assert {p.name: p.read_bytes() for p in (project / "home/artifacts").iterdir() if p.name in before} == before
    tensors, _ = artifact("a", maker.make, {"size": 3})  # as it was, and not made again
    assert tensors["w"].tolist() == [0, 1, 2] and maker.made == [3, 4]
    maker.fails = False
    artifact("a", maker.make, {"size": 4})  # the lock was given back
    assert maker.made == [3, 4, 4]


def test_killed_between_file_and_card(maker, project, monkeypatch):
    "The new file is there and its card is not."
    write = storage.write_atomically

    def killed_before_the_card(path, fill):
        if path.suffix == ".json":
            raise KeyboardInterrupt
        write(path, fill)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(artifacts, "write_atomically", killed_before_the_card)
        artifact("a", maker.make, {"size": 4})
    for _ in range(2):
        assert len(artifact("a", maker.make, {"size": 4})[0]["w"]) == 4
    assert maker.made == [4, 4]


RACE = """
import sys, time
from pathlib import Path
import torch
from diffusion_nb.experiments.artifacts import artifact

def make(r):
    with open("made", "a") as f:
        f.write("x")
    time.sleep(1)
    return {"w": torch.arange(r["size"])}, {}

Path(f"ready{sys.argv[1]}").touch()
while not Path("go").exists():
    time.sleep(0.01)
print(artifact("a", make, {"size": 3})[0]["w"].sum().item())
"""


def test_two_processes_at_once_make_it_once(project):
    (project / "race.py").write_text(RACE)
    command = [sys.executable, "race.py"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    racers = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True, env=env) for i in range(2)]
    try:
        deadline = time.monotonic() + HANGS
        while not all((project / f"ready{i}").exists() for i in range(2)):
            assert time.monotonic() < deadline and all(r.poll() is None for r in racers), "a racer did not start"
            time.sleep(0.01)
        (project / "go").touch()  # both have imported everything and now ask in the same moment
        said = [r.communicate(timeout=HANGS)[0] for r in racers]
    finally:
        for r in racers:
            r.kill()
    assert [r.returncode for r in racers] == [0, 0]
    assert sorted(said) == ["3\n", "making a (there is none yet)\n3\n"]
    assert (project / "made").read_text() == "x"
    assert files(project) == [".json", ".safetensors"]


@pytest.mark.parametrize("bad", [Path("a"), torch.float32, {1, 2}])
def test_recipe_that_no_card_can_hold_is_refused_before_the_training(maker, bad):
    with pytest.raises((TypeError, ValueError)):
        artifact("a", maker.make, {"size": 3, "scale": bad})
    assert not maker.made


# fingerprints

number = count()
CODE = """
import torch

SCALE = 3

def helper(x):
    return x + 1

class Base:
    def f(self, x):
        return helper(x)

class Thing(Base):
    "What it is."

    @property
    def g(self):
        return 5

    @staticmethod
    def h():
        return 6

def make(x):
    "Makes it."
    return Thing().f(x)

@torch.no_grad()
def decorated(x):
    return helper(x)
"""


def of(code: str, tmp_path, name="make") -> str:
    "The fingerprint of a function of this code, as a module of the package."
    path = tmp_path / f"m{next(number)}.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location(f"diffusion_nb.{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return fingerprint(getattr(module, name))


def changed(old: str, new: str) -> str:
    assert old in CODE
    return CODE.replace(old, new)


@pytest.mark.parametrize(
    "old, new",
    [
        ("return Thing().f(x)", "return -Thing().f(x)"),  # itself
        ("def make(x):", "def make(x, y=0):"),
        (
            "return helper(x)\n\nclass Thing",
            "return -helper(x)\n\nclass Thing",
        ),  # a method of the base of what it calls
        ("return x + 1", "return x + 2"),  # what that calls
        ("return 5", "return 7"),  # a property
        ("return 6", "return 7"),  # a static method
    ],
)
def test_fingerprint_sees_code(tmp_path, old, new):
    assert of(CODE, tmp_path) != of(changed(old, new), tmp_path)


@pytest.mark.parametrize(
    "old, new",
    [
        ("return x + 1", "return x + 1  # one more"),
        ("return x + 1", "return (x\n            + 1)"),
        ('"Makes it."', '"Makes it, and how."'),
        ('    "Makes it."\n', ""),
        ('"What it is."', '"What it really is."'),
        ("def helper", "UNUSED = 1\n\ndef helper"),
    ],
)
def test_fingerprint_does_not_see_words(tmp_path, old, new):
    assert of(CODE, tmp_path) == of(changed(old, new), tmp_path)


def test_fingerprint_is_the_same_in_another_process(tmp_path):
    (tmp_path / "prog.py").write_text(
        CODE + "\nfrom diffusion_nb.experiments.artifacts import fingerprint\nprint(fingerprint(make))\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "1"}  # here it is another
    done = subprocess.run([sys.executable, "prog.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == of(CODE, tmp_path), done.stderr


def test_fingerprint_of_a_decorated_function_itself(tmp_path):
    old = "def decorated(x):\n    return helper(x)"
    assert of(CODE, tmp_path, "decorated") != of(changed(old, old + " * 2"), tmp_path, "decorated")


def test_fingerprint_sees_through_a_decorator(tmp_path):
    assert of(CODE, tmp_path, "decorated") != of(changed("x + 1", "x + 2"), tmp_path, "decorated")


# evidence

nan, inf = float("nan"), float("inf")


@pytest.mark.parametrize("check", [claims.oracle, claims.limit])
def test_oracle(check):
    assert check(torch.tensor([1.0, 2.0]), [1.0, 2.0]).holds
    assert check(1 + 1e-10, 1.0).holds and not check(1 + 1e-8, 1.0).holds
    assert check(1e12 + 1, 1e12).holds and not check(1e6 + 1, 1e6).holds  # relative above 1
    assert check(0.1, 0.0, tol=0.11).holds and not check(0.1, 0.0, tol=0.09).holds
    assert not check([1.0, 2.0, 3.1], [1.0, 2.0, 3.0]).holds  # one entry is enough
    for got, want in [
        (nan, 1.0),
        (1.0, nan),
        (nan, nan),
        (inf, 1.0),
        (1.0, inf),
        (inf, inf),
        ([1.0, nan], [1.0, 1.0]),
    ]:
        assert not check(got, want).holds, (got, want)
    with pytest.raises(ValueError, match="same shape"):
        check(torch.zeros(3), torch.zeros(4))
    assert check(0.0, 0.0).kind == {claims.oracle: "oracle", claims.limit: "limit"}[check]


@pytest.mark.parametrize("check", [claims.within, claims.experiment])
def test_within(check):
    assert check(1.0, 1.0, 2.0).holds and check(2.0, 1.0, 2.0).holds and check(5.0, low=1.0).holds
    assert not check(0.99, 1.0, 2.0).holds and not check(2.01, 1.0, 2.0).holds
    assert not check(nan).holds and not check(nan, 0, 1).holds


def test_monte_carlo():
    x = torch.randn(10_000, 2, generator=torch.Generator().manual_seed(0))
    assert claims.monte_carlo(x, 0.0).holds and claims.monte_carlo(x + torch.tensor([0.0, 3.0]), [0.0, 3.0]).holds
    assert not claims.monte_carlo(x + 0.1, 0.0).holds  # ten standard errors
    assert not claims.monte_carlo(x + torch.tensor([0.0, 0.1]), 0.0).holds
    assert claims.monte_carlo(x + 0.1, 0.0, k=20).holds
    assert claims.monte_carlo(torch.ones(100), 1.0).holds
    assert not claims.monte_carlo(torch.ones(100), 1.001).holds  # no variance, wrong mean
    for bad in (torch.cat([x, torch.full((1, 2), nan)]), torch.full((100,), inf)):
        assert not claims.monte_carlo(bad, 0.0).holds
    assert not claims.monte_carlo(x, nan).holds
    with pytest.raises(ValueError, match="at least 100 samples"):
        claims.monte_carlo(x[:99], 0.0)
    with pytest.raises(ValueError, match="shape of a sample"):
        claims.monte_carlo(x, torch.zeros(3))


def test_symbolic():
    x = sympy.Symbol("x")
    assert claims.symbolic((x + 1) ** 2, x**2 + 2 * x + 1).holds and claims.symbolic(x - x).holds
    assert not claims.symbolic((x + 1) ** 2, x**2 + 1).holds
    assert not claims.symbolic(sympy.sqrt(x**2), x).holds  # x may be negative
    assert not claims.symbolic(sympy.nan).holds


def test_claim(capsys):
    good, bad = claims.within(1.0, 0, 2), claims.oracle(1.0, 2.0)
    claim("X-1", good, claims.oracle(1.0, 1.0), claims.limit(1.0, 1.0), says="one is one")
    assert capsys.readouterr().out == "✓ X-1 one is one · bound, oracle, limit\n"
    for evidence in ([bad], [good, bad], [bad, good]):
        with pytest.raises(claims.ClaimError, match=re.escape("X-1 (one is two) does not hold, oracle: ")):
            claim("X-1", *evidence, says="one is two")
    with pytest.raises(ValueError, match="nothing was given"):
        claim("X-1", says="anything")
    assert capsys.readouterr().out == ""


def test_a_claim_says_what_its_stochastic_checks_can_see(capsys):
    spread = torch.arange(200.0) % 2  # mean ½, standard deviation ½, standard error 0.035
    claim("X-1", claims.monte_carlo(spread, 0.5), claims.statistic(1.0, -5, 5, sees="2 % too much"), claims.oracle(1.0, 1.0), says="so")  # fmt: skip
    said = "Monte Carlo (n = 200; standard error 0.04; sees 0.4 | 2 % too much), oracle"
    assert capsys.readouterr().out == f"✓ X-1 so · {said}\n"
