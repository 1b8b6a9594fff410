"""Commands about the book: run, ledger, data, artifacts."""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from diffusion_nb.cli.folders import check_own
from diffusion_nb.experiments.catalogue import artifact_makers


@dataclass
class Run:
    notebooks: Positional[tuple[str, ...]] = ()
    "The first letters of their names, such as 03 or 07_ddpm; all if none is given."
    book: str | None = None
    "Folder of the notebooks, if not nbs of the repository."
    out: str | None = None
    "Folder to write, if not _book beside it."
    jobs: int | None = None
    "Notebooks at a time, if not one per core, and fewer where memory is short."
    fresh: bool = False
    "Run all of them, also those that an interrupted run has finished."
    profile: Literal["cpu", "gpu"] | None = None
    "The size of the experiments, see settings.ini."


def run(args: Run) -> int:
    "Execute the notebooks side by side, each in a fresh kernel, and write the book as web pages; goes on where an earlier run stopped."
    from importlib.util import find_spec

    from diffusion_nb.book.run import Record, chosen, how_many, run_book, state_of
    from diffusion_nb.util.storage import project_root

    if lack := [name for name in ("nbclient", "ipykernel", "sympy", "latex2mathml") if not find_spec(name)]:
        raise ImportError(f"the book needs what the library does not, {', '.join(lack)}: pip install 'diffusion_nb[book,emoji]'")  # fmt: skip
    if args.jobs is not None and args.jobs < 1:
        raise ValueError(f"--jobs: expected at least 1 notebook at a time, got {args.jobs}")
    nbs, start = Path(args.book or project_root() / "nbs"), time.perf_counter()
    os.environ["DIFFUSION_NB_PROFILE"] = args.profile or os.environ.get("DIFFUSION_NB_PROFILE", "cpu")
    book, out = chosen([], nbs), Path(args.out or nbs.absolute().parent / "_book")
    record = Record(out, book, state_of(nbs))
    check_own(out, ("index.html", *(p.name for p in book)), "problems")
    record.write()
    paths = chosen(args.notebooks, nbs) if args.notebooks else book if args.fresh else record.left()
    if len(paths) < len(book) and not args.notebooks:
        print(f"{len(book) - len(paths)} of {len(book)} notebooks ran already; --fresh runs them again")
    print(f"as they are finished, the pages are linked in {out / 'index.html'}", flush=True)
    problems = run_book(paths, record, args.jobs or how_many())
    failed = [name for name, problem in problems.items() if problem]
    print(", ".join(f"{p.stem} {record.seconds[p.stem]:.0f} s" for p in paths))
    print(
        f"{len(paths) - len(failed)} of {len(paths)} notebooks ran well in {(time.perf_counter() - start) / 60:.0f} min"
        + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    print(f"open {out / 'index.html'}")
    return 1 if failed else 0


@dataclass
class Data:
    names: Positional[tuple[str, ...]] = ()
    "digits, mnist, fashion-mnist or cifar10."


def data(args: Data) -> int:
    "List the data sets with size, state and licence; with names, fetch and verify them."
    from diffusion_nb.data import DATA_SETS, data_set

    for d in [data_set(name) for name in args.names]:
        x = d.load()
        print(f"{d.name}: {len(x.x):,} + {len(x.x_test):,} pictures of {'×'.join(map(str, d.shape))}, {d.state()}")
    if not args.names:
        print(f"{'name':14} {'pictures':16} {'size':8} {'state':10} {'licence':14} from")
        for d in DATA_SETS:
            pictures, size = f"{d.sizes[0]:,} + {d.sizes[1]:,}", "×".join(map(str, d.shape))
            print(f"{d.name:14} {pictures:16} {size:8} {d.state():10} {d.licence:14} {d.provenance}")
        print("fetch or verify: diffusion-nb data NAME ...")
    return 0


def lacking(source: str) -> str:
    "What has to be done before this data set can be used; '' if it is here."
    from diffusion_nb.data import data_set
    from diffusion_nb.emoji import package_versions

    if source == "emoji":
        try:
            package_versions()
        except ImportError as e:
            return str(e)
        return ""
    here = data_set(source).state() in ("built in", "verified")
    return "" if here else f"{source} is not here (diffusion-nb data {source} fetches it)"


def artifacts() -> int:
    "Train the small networks that come with the book again, and compare with their cards."
    import torch

    from diffusion_nb.experiments.artifacts import ship_artifact
    from diffusion_nb.util.storage import project_root

    torch.set_num_threads(1)  # sums in one order: the same weights every time on one machine
    for name, (make, r) in artifact_makers().items():
        sources = getattr(r, "data", "digits")
        if missing := [why for s in ([sources] if isinstance(sources, str) else sources) if (why := lacking(s))]:
            print(f"{name}: left as it is, for {'; '.join(missing)}")
            continue
        path = project_root() / "data" / "artifacts" / f"{name}.json"
        old = json.loads(path.read_text(encoding="utf-8"))["metrics"] if path.exists() else {}
        if (device := old.get("trained on", "a CPU")) != "a CPU" and not torch.cuda.is_available():
            print(f"{name}: left as it is, for it was trained on an {device}, and here is no GPU")
            continue
        card = ship_artifact(name, make, r)
        print(f"{name}: {card['seconds']} s")
        for metric, value in card["metrics"].items():
            print(f"  {metric:36} {value}   was {old.get(metric)}")
    return 0


@dataclass
class Ledger:
    out: str | None = None
    "File to write instead."


def ledger(args: Ledger) -> int:
    "Print which statement of which paper is shown where, by which code and how well, as a table in Markdown; fails for what is shown less well than claims.toml asks for."
    from diffusion_nb.book.ledger import gaps, ledger
    from diffusion_nb.util.storage import write_atomically

    table, missing = ledger().markdown(), gaps()
    if args.out:
        write_atomically(Path(args.out), lambda p: p.write_text(table, encoding="utf-8"))
        print(f"wrote {args.out}")
    else:
        print(table, end="")
    print(*missing, sep="\n", end="\n" if missing else "", file=sys.stderr)
    return 1 if missing else 0
