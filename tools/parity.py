"""Write the page that says how the library compares with the papers' programs, of docs/parity.toml.

python tools/parity.py FILE
"""

import ast
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Row(NamedTuple):
    programs: str
    what: str
    apart: str
    held: str

    @property
    def choice(self) -> str | None:
        return self.held.removeprefix("choice: ") if self.held.startswith("choice: ") else None


def rows(root: Path = ROOT) -> list[Row]:
    "The rows, with the programs by their names. Raises KeyError for a program that has none."
    said = tomllib.loads((root / "docs/parity.toml").read_text(encoding="utf-8"))
    full = lambda names: ", ".join(said["programs"][name] for name in names.split(", "))
    return [Row(full(programs), *rest) for programs, *rest in said["row"]]


def missing(root: Path = ROOT) -> list[str]:
    "Tests that are named and are not there."
    named = {r.held for r in rows(root) if not r.choice}
    there = {f"{p.stem}::{node.name}" for p in (root / "tests").glob("test_*.py")
             for node in ast.parse(p.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}  # fmt: skip
    return sorted(named - there)


def page(root: Path = ROOT) -> str:
    "The page, in Markdown."
    found = rows(root)
    chosen = sum(r.choice is not None for r in found)
    lines = [f"| {r.programs} | {r.what} | {r.apart} | {r.choice or f'`{r.held}`'} |" for r in found]
    return "\n".join([
        "# Beside the programs of the papers", "",
        f"{len(found)} comparisons: {len(found) - chosen} agree, and {chosen} are choices, with the reason. *Apart* is the largest |a − b| / (1 + |b|) that was measured with",
        "both programs side by side on the same inputs, in float64 where theirs allows. The test named holds the formula since, without their program: against formulas,",
        "`torch.distributions`, diffusers, or numbers that the program printed.", "",
        "| program | what | apart | test, or choice |", "|---|---|---|---|", *lines, ""])  # fmt: skip


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
