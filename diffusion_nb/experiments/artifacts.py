"""Small trained networks and tables, with cards that say what made them."""

import ast
import dis
import hashlib
import inspect
import json
import os
import textwrap
import time
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import CodeType, FunctionType

import torch
from filelock import FileLock
from safetensors.torch import load, save_file
from torch import Tensor

from diffusion_nb.recipes.diffusion import Recipe, chosen, chosen_network
from diffusion_nb.util.storage import project_root, shipped, user_folder, write_atomically


def _parts(obj) -> list[FunctionType]:
    "The functions that make up a function or a class (what dataclass and NamedTuple generate aside)."
    members = [obj] if isinstance(obj, FunctionType) else vars(obj).values()
    members = [inspect.unwrap(getattr(m, "fget", None) or getattr(m, "__func__", m)) for m in members]
    return [m for m in members if isinstance(m, FunctionType) and not m.__code__.co_filename.startswith("<string")
            and m.__module__ == obj.__module__]  # fmt: skip


def _plain(node) -> str:
    "A syntax tree as text, the same in every version of Python: ast.dump is not."
    if isinstance(node, ast.AST):
        fields = (f"{name}={_plain(v)}" for name, v in ast.iter_fields(node) if v is not None and v != [])
        return f"{type(node).__name__}({', '.join(fields)})"
    return f"[{', '.join(map(_plain, node))}]" if isinstance(node, list) else repr(node)


class _NoErrors(ast.NodeTransformer):
    "Leaves out what is raised: it cannot be in a finished artifact."

    def visit_Raise(self, node):
        return ast.Pass()


def _tree(f: FunctionType) -> ast.AST:
    "The syntax tree of f without docstrings and errors."
    tree = _NoErrors().visit(ast.parse(textwrap.dedent(inspect.getsource(f))))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def _mentioned(f: FunctionType) -> dict:
    "The global names that f reads, with their values, and its default arguments."
    codes, names = [f.__code__], set()
    while codes:
        code = codes.pop()
        names |= {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
        codes += [c for c in code.co_consts if isinstance(c, CodeType)]
    defaults = dict(enumerate(f.__defaults__ or ())) | (f.__kwdefaults__ or {})
    return {n: f.__globals__[n] for n in names if n in f.__globals__ and not n.startswith("__")} | defaults


def _leaves(value) -> list:
    "What is in a dictionary, list or tuple, at any depth; else the value itself."
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else None
    return [value] if inside is None else [leaf for v in inside for leaf in _leaves(v)]


PLUMBING = tuple(
    f"diffusion_nb.{room}"
    for room in ("book", "cli", "generation", "experiments.artifacts", "recipes.settings", "training.checkpoints",
                 "recipes.diffusion.chosen", "training.hooks", "util.checks", "util.interrupts", "util.profiling", "util.storage")
)  # fmt: skip


def fingerprint(*objects) -> str:
    """A hash of the code of these functions and classes, of everything of this project that they mention, and so on.

    What a notebook defines and the library's copy of it count once. It stops at plumbing, which decides no number, and does not see docstrings, comments and messages of errors.
    """
    seen, found, todo = set(), set(), list(objects)
    while todo:
        obj = inspect.unwrap(todo.pop())
        if (
            obj in seen
            or not isinstance(obj, FunctionType | type)
            or (obj.__module__ or "").split(".")[0] not in ("diffusion_nb", "__main__")
            or f"{obj.__module__}.{obj.__qualname__}".startswith(PLUMBING)
        ):
            continue
        seen.add(obj)
        mentioned = [
            (str(name), leaf)
            for f in _parts(obj)
            for name, value in _mentioned(f).items()
            for leaf in _leaves(value)
        ]
        constants = sorted({f"{name}={v!r}" for name, v in mentioned if isinstance(v, int | float | str)})
        found.add("\0".join([obj.__qualname__, *(_plain(_tree(f)) for f in _parts(obj)), *constants]))
        todo += [v for v in (*(v for _, v in mentioned), *getattr(obj, "__bases__", ())) if callable(v)]
    return hashlib.sha256(json.dumps(sorted(found)).encode()).hexdigest()[:16]


def made_of(make: Callable, recipe) -> str:
    "The fingerprint of what makes an artifact: `make`, and of the tables of schedules and targets what the recipe names, so that one more in a table changes nothing."
    r = recipe if isinstance(recipe, Recipe) else Recipe()  # the other experiments start from the digits' model
    return fingerprint(make, type(recipe), chosen_network(r), *chosen(r))


def as_plain(recipe) -> dict:
    "A recipe, a dataclass or a dict, as its card will hold it."
    return json.loads(json.dumps(asdict(recipe) if is_dataclass(recipe) else recipe))


def artifact(name: str, make: Callable, recipe) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the card of a trained artifact: the one that comes with the library, or one that `make(recipe)` made here.

    recipe: a dataclass, or a dict. `make` returns (tensors, metrics). A file is used only if it is whole (its checksum is on the card) and was made from this
    very recipe by this very code. Otherwise one is made, in the user's folder, and a line says why; what comes with the
    library is never written. Any number of processes may ask at once: one makes it, the others wait.
    Raises RuntimeError where that would take over a minute, by the card, and DIFFUSION_NB_MAKE=1 does not ask for it.
    """
    asked, made_by = as_plain(recipe), made_of(make, recipe)
    first = shipped("artifacts") / f"{name}.safetensors"
    problem = _problem(first, asked, made_by)
    if not problem:
        return _read(first)
    key = hashlib.sha256(json.dumps([asked, made_by], sort_keys=True).encode()).hexdigest()[:10]
    path = user_folder() / "artifacts" / f"{name}-{key}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if own := _problem(path, asked, made_by):
            _check_asked(name, problem, first.with_suffix(".json"))
            print(f"making {name} ({own if path.exists() else problem})")
            put_artifact(path, name, make, recipe)
        return _read(path)


def put_artifact(path: Path, name: str, make: Callable, recipe) -> None:
    "Make an artifact and write it with its card."
    start = time.perf_counter()
    tensors, metrics = make(recipe)
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    write_atomically(path, lambda p: save_file(tensors, p))
    card = dict(name=name, recipe=as_plain(recipe), code=made_of(make, recipe), sha256=_sha256(path), metrics=metrics,
                seconds=round(time.perf_counter() - start), torch=torch.__version__)  # fmt: skip
    write_atomically(
        path.with_suffix(".json"), lambda p: p.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    )


def ship_artifact(name: str, make: Callable, recipe) -> dict:
    "Make an artifact anew in data/artifacts of the repository; returns its card."
    path = project_root() / "data/artifacts" / f"{name}.safetensors"
    put_artifact(path, name, make, recipe)
    return _read(path)[1]


def _read(path: Path) -> tuple[dict[str, Tensor], dict]:
    return load(path.read_bytes()), json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))


def _check_asked(name: str, problem: str, card: Path) -> None:
    "Nothing is trained for over a minute unasked."
    seconds = json.loads(card.read_text(encoding="utf-8")).get("seconds", 0) if card.exists() else 0
    if seconds > 60 and os.environ.get("DIFFUSION_NB_MAKE") != "1":
        raise RuntimeError(
            f"{name} is not as this code and recipe would make it ({problem}), and making it took {seconds} s. "
            f"Set DIFFUSION_NB_MAKE=1 to have it made in {user_folder() / 'artifacts'}; what comes with the library stays as it is."
        )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _problem(path: Path, recipe: dict, made_by: str) -> str | None:
    "Why the file at `path` cannot be used, or None."
    if not path.exists() or not path.with_suffix(".json").exists():
        return "there is none yet"
    try:
        card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        recipe_then, code_then, sha256 = card["recipe"], card["code"], card["sha256"]
    except (ValueError, TypeError, KeyError):
        return "its card is damaged"
    if (recipe_then, code_then) != (recipe, made_by):
        return "its recipe has changed" if recipe_then != recipe else "its code has changed"
    return None if sha256 == _sha256(path) else "its file is damaged"
