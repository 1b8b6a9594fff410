"""Run the notebooks as other processors would, and say which cell differs and which claim is close to failing.

    python tools/anywhere.py [words for pytest ...] [--python ANOTHER/bin/python]

Roundings differ between processors, numbers of threads and versions of torch. A stored output may not hang on them, and a
claim must hold by more than they move it: one whose margin is under three times the spread between the settings is weak.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "no vectors": {"ATEN_CPU_CAPABILITY": "default", "DNNL_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "two threads": {"OMP_NUM_THREADS": "2"},
    "another seed": {"DIFFUSION_NB_KERNEL_SEED": "1"},  # of what a notebook draws before it has set one
}


def tested(python: str, what: list[str], setting: dict[str, str], folder: Path) -> tuple[list, list[dict], str]:
    "What failed under one setting, as (test, how); what was claimed, by how much; and pytest's last line."
    env = {"OMP_NUM_THREADS": "1"} | os.environ | setting | {"DIFFUSION_NB_MARGINS": str(folder / "margins.jsonl")}
    command = [
        python,
        "-m",
        "pytest",
        "-q",
        "-n",
        str(max(1, 2 // int(env["OMP_NUM_THREADS"]))),  # more threads than cores take far longer
        "--dist",
        "loadfile",
        "--no-loadscope-reorder",
        "--color=no",
        f"--junitxml={folder}/junit.xml",
    ]
    done = subprocess.run(
        [*command, *what], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    failed = []
    if (folder / "junit.xml").exists():
        for case in ET.parse(folder / "junit.xml").iter("testcase"):
            for bad in (*case.findall("failure"), *case.findall("error")):
                failed.append((f"{case.get('classname')} {case.get('name')}", bad.text or ""))
    margins = folder / "margins.jsonl"
    claims = (
        [json.loads(line) for line in margins.read_text(encoding="utf-8").splitlines()] if margins.exists() else []
    )
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "pytest said nothing"
    return failed or ([("pytest", done.stdout[-3000:])] if done.returncode else []), claims, last


def weak(claims: dict[str, list[dict]]) -> list[str]:
    "A line for each piece of evidence whose margin is under three times its spread between the settings."
    found = defaultdict(dict)
    for setting, rows in claims.items():
        count = defaultdict(int)
        for r in rows:
            if r["id"] == "demo":  # made to fail, in the notebook on claims
                continue
            key = r["id"], count[r["id"]]
            count[r["id"]] += 1
            found[key][setting] = r
    lines = []
    for (id, k), by in found.items():
        values = [r["got"] for r in by.values()]
        spread = max(values) - min(values)
        margin = min(min(r["got"] - r["low"], r["high"] - r["got"]) for r in by.values())
        if math.isfinite(margin) and margin < 3 * spread:
            r = next(iter(by.values()))
            said = ", ".join(f"{name} {v['got']:.4g}" for name, v in by.items())
            lines.append(
                f"{id}, evidence {k + 1} ({r['kind']}): margin {margin:.2g}, spread {spread:.2g}: {said}; claimed in [{r['low']:.4g}, {r['high']:.4g}]"
            )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", default=["nbs"], help="for pytest (default: nbs)")
    parser.add_argument(
        "--python", help="another environment's python, such as one with another torch: its run comes last"
    )
    parser.add_argument("--only", choices=SETTINGS, action="append", help="these settings only")
    args = parser.parse_args()
    runs = {name: (sys.executable, s) for name, s in SETTINGS.items() if not args.only or name in args.only}
    if args.python:
        runs["the other python"] = args.python, {}
    claims, red = {}, 0
    for name, (python, setting) in runs.items():
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            failed, claims[name], last = tested(python, args.what, setting, Path(folder))
        red += len(failed)
        print(
            f"\n== {name} ({' '.join(f'{k}={v}' for k, v in setting.items()) or python}): {last}, {time.perf_counter() - start:.0f} s",
            flush=True,
        )
        for test, how in failed:
            print(f"-- {test}\n{how.strip()[:1500]}", flush=True)
    lines = weak(claims)
    print(
        f"\n{len(lines)} of {sum(map(len, claims.values())) // max(1, len(claims))} pieces of evidence are weak: their margin is under three times the spread"
    )
    print(*lines, sep="\n")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
