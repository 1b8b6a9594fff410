"""Write diffusion_nb/__init__.pyi, from which editors and type checkers know the names of `import diffusion_nb as dn`. --check only compares."""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STUB = ROOT / "diffusion_nb/__init__.pyi"


def stub() -> str:
    "The text of the file: each name as that of its module, whose types are the real ones."
    sys.path.insert(0, str(ROOT))
    from diffusion_nb import FACE

    lines = [
        f"from diffusion_nb.{module} import {name} as {name}"
        for module, names in FACE.items()
        for name in names.split()
    ]
    head = [
        "# Made from FACE in __init__.py by tools/stub.py: change that, then run make export.",
        "",
        "__version__: str",
        "FACE: dict[str, str]",
        "HOME: dict[str, str]",
        "",
    ]
    return "\n".join([*head, *lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 where the file is not up to date")
    if not parser.parse_args().check:
        STUB.write_text(stub(), encoding="utf-8")
    elif STUB.read_text(encoding="utf-8") != stub():
        print(f"{STUB.name} is not up to date with FACE: run make export", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
