"""Rows of the ledger that were changed since somebody read statement, claim and docstrings side by side.

    python tools/reviewed.py                 (which, and what of them)
    python tools/reviewed.py DDPM-4 VDM-3    (show them, and record in tests/reviewed.toml that they were read)

Whether three sentences say the same, no program sees. What it sees is that one of them is another than the one that was read.
"""

import hashlib
import json
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("row of claims.toml", "claim", "code")


def short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def sides(row) -> tuple[str, str, str]:
    "What stands side by side: the row of claims.toml, what its claim says and shows, the first lines of its code."
    claim = f"{row.claim.says} · {', '.join(row.claim.kinds)}" if row.claim else "no claim yet"
    checks = f"asked for: {', '.join(row.checks)}, in {row.notebook}"
    return f"{row.statement} ({row.source}; {checks})", claim, "\n".join(f"{k}: {v}" for k, v in row.code.items())


def marks(row) -> str:
    "Three short hashes, one of each side."
    return " ".join(map(short, sides(row)))


def record(root: Path) -> dict[str, str]:
    path = root / "tests/reviewed.toml"
    return tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def changed(root: Path = ROOT) -> dict[str, str]:
    "{row: what of it was changed since it was read}."
    from diffusion_nb.book.ledger import ledger

    read, found = record(root), {}
    for row in ledger(root):
        now, before = marks(row).split(), read.get(row.id, "- - -").split()
        if what := [part for part, a, b in zip(PARTS, now, before, strict=True) if a != b]:
            found[row.id] = " and ".join(what)
    return found


def read_now(names: list[str], root: Path = ROOT) -> str:
    "The rows of these ids, as they stand side by side; they count as read. Raises ValueError for an unknown id."
    from diffusion_nb.book.ledger import ledger

    rows = {row.id: row for row in ledger(root)}
    if unknown := [name for name in names if name not in rows]:
        raise ValueError(f"no row {', '.join(unknown)} in claims.toml")
    kept = {id: read for id, read in record(root).items() if id in rows} | {id: marks(rows[id]) for id in names}
    lines = [f"{json.dumps(id)} = {json.dumps(kept[id])}\n" for id in rows if id in kept]
    top = "# Rows of the ledger as they were when somebody last read statement, claim and docstrings side by side (tools/reviewed.py).\n"
    (root / "tests/reviewed.toml").write_text(top + "".join(lines), encoding="utf-8")
    texts = [zip(PARTS, sides(rows[name]), strict=True) for name in names]
    return "\n".join(f"{id}\n" + "".join(f"  {k}: {v}\n" for k, v in text) for id, text in zip(names, texts, strict=True))  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:]:
        print(read_now(sys.argv[1:]))
    else:
        print(*(f"{id}: {what}" for id, what in changed().items()), sep="\n")
