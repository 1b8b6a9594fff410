"""Small trained networks and tables, with cards that say what made them."""

import ast
import dis
import hashlib
import inspect
import json
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FunctionType

import torch
from filelock import FileLock
from safetensors.torch import load, save_file
from torch import Tensor

from diffusion_nb.util.storage import project_root, write_atomically


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


def _tree(f: FunctionType) -> ast.AST:
    "The syntax tree of f without docstrings."
    tree = ast.parse(textwrap.dedent(inspect.getsource(f)))
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


def fingerprint(*objects) -> str:
    "A hash of the code of these functions and classes, of everything of this project that they mention, and so on."
    seen, found, todo = set(), [], list(objects)
    while todo:
        obj = inspect.unwrap(todo.pop())
        if (
            obj in seen
            or not isinstance(obj, FunctionType | type)
            or (obj.__module__ or "").split(".")[0] not in ("diffusion_nb", "__main__")
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
        found.append([obj.__qualname__, *(_plain(_tree(f)) for f in _parts(obj)), *constants])
        todo += [v for v in (*(v for _, v in mentioned), *getattr(obj, "__bases__", ())) if callable(v)]
    return hashlib.sha256(json.dumps(sorted(found)).encode()).hexdigest()[:16]


def artifact(name: str, make: Callable, recipe: dict, fresh: bool = False) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the card of a trained artifact: read from data/artifacts, or made by `make(**recipe)`.

    `make` returns (tensors, metrics). The file is used only if it is whole (its checksum is on the card) and was made from this
    very recipe by this very code; otherwise it is made again and replaced, and a line says why. Any number of processes
    may ask at once: one makes it, the others wait. `fresh=True` makes it again in any case.
    """
    asked = json.loads(json.dumps(recipe))  # as the card will hold it
    path = project_root() / "data" / "artifacts" / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    made_by = fingerprint(make)
    with FileLock(path.with_suffix(".lock")):
        problem = "asked for anew" if fresh else _problem(path, asked, made_by)
        if problem:
            print(f"making {name} ({problem})")
            start = time.perf_counter()
            tensors, metrics = make(**recipe)
            tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
            write_atomically(path, lambda p: save_file(tensors, p))
            card = dict(name=name, recipe=asked, code=made_by, sha256=_sha256(path), metrics=metrics,
                        seconds=round(time.perf_counter() - start), torch=torch.__version__)  # fmt: skip
            write_atomically(path.with_suffix(".json"), lambda p: p.write_text(json.dumps(card, indent=1) + "\n"))
        return load(path.read_bytes()), json.loads(path.with_suffix(".json").read_text())


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _problem(path: Path, recipe: dict, made_by: str) -> str | None:
    "Why the file at `path` cannot be used, or None."
    if not path.exists() or not path.with_suffix(".json").exists():
        return "there is none yet"
    try:
        card = json.loads(path.with_suffix(".json").read_text())
        recipe_then, code_then, sha256 = card["recipe"], card["code"], card["sha256"]
    except (ValueError, TypeError, KeyError):
        return "its card is damaged"
    if (recipe_then, code_then) != (recipe, made_by):
        return "its recipe has changed"
    return None if sha256 == _sha256(path) else "its file is damaged"
