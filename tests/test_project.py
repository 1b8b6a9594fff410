"""The files around the library: workflows, templates, changes, versions."""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import diffusion_nb as dn

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def commands(workflow: Path) -> str:
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    return "\n".join(step.get("run", "") for job in jobs.values() for step in job["steps"])


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda p: p.stem)
def test_workflows_call_what_there_is(workflow):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\bmake ([a-z-]+)", commands(workflow))) <= targets
    for job in yaml.safe_load(workflow.read_text())["jobs"].values():
        assert 0 < job["timeout-minutes"] <= 180


def test_the_workflows_test_every_python_that_is_promised():
    low, high = re.search(
        r'requires-python = ">=3\.(\d+),<3\.(\d+)"', (ROOT / "pyproject.toml").read_text()
    ).groups()
    found = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]["book"]["strategy"][
        "matrix"
    ]
    assert found["python"] == [f"3.{k}" for k in range(int(low), int(high))]


def test_a_release_is_stopped_where_the_tag_is_not_the_version(tmp_path):
    script = re.search(r"grep -q .*\n\s*grep -q .*", commands(ROOT / ".github/workflows/release.yml"))[0]
    (tmp_path / "diffusion_nb").mkdir()
    (tmp_path / "diffusion_nb/__init__.py").write_text('__version__ = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text("## 1.2.3 (2030-01-01)\n")
    for tag, good in (("v1.2.3", True), ("v1.2.4", False), ("v1.2", False)):
        run = subprocess.run(["bash", "-ec", script], cwd=tmp_path, env={"GITHUB_REF_NAME": tag, "PATH": "/usr/bin:/bin"})  # fmt: skip
        assert (run.returncode == 0) == good, tag


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_the_checkout_has_the_style_it_asks_for():
    for words in (["check", "."], ["format", "--check", "."]):
        done = subprocess.run([sys.executable, "-m", "ruff", *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_notebooks_and_checkout_stay_small():
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")  # fmt: skip
    size = {name: (ROOT / name).stat().st_size for name in names if (ROOT / name).is_file()}
    assert sum(size.values()) < 56 * 2**20
    assert not [name for name, n in size.items() if name.startswith("nbs/") and n >= 2 * 2**20]


def test_no_notebook_keeps_progress_bars():
    kept = [p.name for p in sorted((ROOT / "nbs").glob("*.ipynb")) if "widget-" in p.read_text(encoding="utf-8")]
    assert not kept


def test_a_notebook_is_stored_as_the_book_keeps_it(tmp_path):
    from nbformat import v4

    from tools.store import run

    code = "from tqdm.auto import tqdm\nfor i in tqdm(range(3)): pass\nprint(6 * 7)"
    done = run(v4.new_notebook(cells=[v4.new_code_cell(code)]), tmp_path)
    assert [out.text for out in done.cells[0].outputs if out.get("name") == "stdout"] == ["42\n"]
    assert all("widget" not in kind for out in done.cells[0].outputs for kind in out.get("data", {})) and "widgets" not in done.metadata  # fmt: skip


def test_forms_and_container_can_be_read():
    for form in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        assert {"name", "description", "body"} <= yaml.safe_load(form.read_text()).keys()
    made = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())["postCreateCommand"]
    assert made.split()[1] == ".venv/.installed" and "STAMP := .venv/.installed" in (ROOT / "Makefile").read_text()


def test_the_command_says_its_versions():
    said = subprocess.run([sys.executable, "-m", "diffusion_nb", "--version"], capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert said.split(",")[0] == f"diffusion_nb {dn.__version__}" and f"torch {version('torch')}" in said


def test_types_travel_with_the_package():
    assert (Path(dn.__file__).parent / "py.typed").exists()


WITHOUT_THE_BOOK = """
import importlib.abc, importlib.util, sys
names = {"jupyterlab", "ipywidgets", "nbclient", "nbformat", "latex2mathml", "IPython", "ipykernel"}
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in names:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in names else real(name, *a)
from diffusion_nb.cli.main import main
import diffusion_nb as dn
print(len(dn.__all__), main(["sample", "--n", "2", "--steps", "2", "--device", "cpu"]), main(["run"]))
"""


def test_the_library_needs_nothing_of_the_book(tmp_path):
    done = subprocess.run([sys.executable, "-c", WITHOUT_THE_BOOK], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"{len(dn.__all__)} 0 1", done.stderr
    assert (
        "pip install 'diffusion_nb[book,emoji]'" in done.stderr and (tmp_path / "runs/samples/grid.png").exists()
    )


# notebooks that run alone


def test_every_notebook_begins_with_the_cell_that_fetches_the_library():
    done = subprocess.run([sys.executable, ROOT / "tools/first_cell.py", "--check"], capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.fixture
def first_cell():
    "The source of that cell."
    sys.path.insert(0, str(ROOT / "tools"))
    from first_cell import first_cell

    return "".join(first_cell()["source"])


def test_the_first_cell_does_nothing_where_the_library_is(first_cell, tmp_path):
    done = subprocess.run([sys.executable, "-c", first_cell], cwd=tmp_path, env={"PATH": "", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0 and not done.stderr and not list(tmp_path.iterdir())


ELSEWHERE = """
import importlib.util, subprocess, sys
real, asked = importlib.util.find_spec, []
importlib.util.find_spec = lambda name, *a: None if name == "diffusion_nb" else real(name, *a)
subprocess.run = lambda words, check: asked.append([str(w) for w in words])
{cell}
print(asked[0][:5], asked[0][5], asked[1][1:4], asked[1][5], sys.path[0])
"""


def test_the_first_cell_clones_and_installs_where_it_is_not(first_cell, tmp_path):
    run = subprocess.run([sys.executable, "-c", ELSEWHERE.format(cell=first_cell)], cwd=tmp_path, capture_output=True, text=True)  # fmt: skip
    there, repository = tmp_path / "diffusion_nb_book", "https://github.com/diffusion-nb/diffusion_nb"
    want = ["git", "clone", "-q", "--depth", "1"], repository, ["-m", "pip", "install"], "-e", there
    assert run.stdout.split("\n")[0] == " ".join(map(str, want)), run.stderr


@pytest.mark.parametrize("card", sorted((ROOT / "data/artifacts").glob("*.json")), ids=lambda p: p.stem)
def test_each_artifact_is_in_the_table_of_what_ships(card):
    rows = [line.split("|")[1] for line in (ROOT / "data/README.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]  # fmt: skip
    assert card.stem in {name.strip() for row in rows for name in row.split(",")}


def test_the_table_says_what_is_kept_in_8_bits():
    _, below_the_sets = (ROOT / "data/README.md").read_text(encoding="utf-8").split("## words.txt")
    for row in (line for line in below_the_sets.splitlines() if line.startswith("| ")):
        for name in map(str.strip, row.split("|")[1].split(",")):
            path = ROOT / f"data/artifacts/{name}.safetensors"
            if path.exists() and any(v.dtype == torch.int8 for v in load_file(path).values()):
                assert "8 bits" in row, name
