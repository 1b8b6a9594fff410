"""Claims: evidence that is checked where it is printed."""

import json
import math
import os
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Evidence(NamedTuple):
    "What a check found: its kind, whether it holds, the numbers behind that; the number that decides, with the range it must lie in; and what a stochastic check can see."

    kind: str
    holds: bool
    detail: str
    got: float = math.nan
    low: float = -math.inf
    high: float = math.inf
    sees: str = ""


class ClaimError(AssertionError):
    "A statement of the book that does not hold."


def symbolic(lhs, rhs=0) -> Evidence:
    "SymPy proves lhs = rhs."
    import sympy

    residual = sympy.simplify(lhs - rhs)
    return Evidence("symbolic", residual == 0, f"lhs - rhs = {residual}")


def oracle(got, want, tol: float = 1e-9) -> Evidence:
    "Code agrees with a closed form: |got - want| ≤ tol (1 + |want|) everywhere. Not-a-numbers fail."
    got, want = (torch.as_tensor(v, dtype=torch.float64) for v in (got, want))
    if want.ndim and got.shape != want.shape:
        raise ValueError(
            f"expected two of the same shape, or one number to compare with; got {tuple(got.shape)} and {tuple(want.shape)}"
        )
    worst = ((got - want).abs() / (1 + want.abs())).amax().item()
    return Evidence(
        "oracle", worst <= tol, f"largest relative difference {worst:.2g}, allowed {tol:.2g}", worst, high=tol
    )


def within(got: float, low: float = -math.inf, high: float = math.inf) -> Evidence:
    "A number computed from closed forms lies in [low, high], up to rounding."
    said = f"got {got:.6g}, claimed in [{low:.6g}, {high:.6g}]"
    return Evidence("bound", bool(low <= got <= high), said, float(got), float(low), float(high))


def statistic(got: float, low: float = -math.inf, high: float = math.inf, *, sees: str = "") -> Evidence:
    "A statistic of random samples lies in [low, high], a range that a correct program leaves almost never. sees: a small error that it notices, as it was tried."
    return within(got, low, high)._replace(kind="Monte Carlo", sees=sees)


def limit(got, want, tol: float = 1e-9) -> Evidence:
    "Two implementations that must coincide, do, in the sense of `oracle`."
    return oracle(got, want, tol)._replace(kind="limit")


def monte_carlo(samples: Float[Tensor, "n *d"], want, k: float = 5) -> Evidence:
    "The mean over the first axis is within k standard errors of `want`, in every entry. It sees an error of twice that nearly always."
    samples = samples.double()
    n = len(samples)
    if n < 100:
        raise ValueError(f"monte_carlo: expected at least 100 samples for a standard error, got {n}")
    want = torch.as_tensor(want, dtype=torch.float64)
    if want.ndim and want.shape != samples.shape[1:]:
        raise ValueError(
            f"want: expected one number, or the shape of a sample, {tuple(samples.shape[1:])}; got {tuple(want.shape)}"
        )
    error, unit = (samples.mean(0) - want).abs(), samples.std(0) / n**0.5
    z = (error / unit.clamp_min(1e-300)).amax().item()
    said = f"{z:.2f} standard errors from the claimed mean, n = {n}, allowed {k:g}"
    sees = f"n = {n}; standard error {unit.amax():.1g}; sees {2 * k * unit.amax():.1g}"
    return Evidence("Monte Carlo", z <= k, said, z, high=k, sees=sees)


def experiment(got: float, low: float = -math.inf, high: float = math.inf) -> Evidence:
    "A number measured on trained networks or real data lies in [low, high]."
    return within(got, low, high)._replace(kind="experiment")


def claim(id: str, *evidence: Evidence, says: str) -> None:
    """State row `id` of claims.toml: prints one line if all the evidence holds, raises ClaimError otherwise.

    The line holds no number that could differ much between machines, so a stored output can be compared with a fresh one.
    By how much the evidence holds goes to the file that DIFFUSION_NB_MARGINS names, if it is set: a JSON line each.
    """
    if not evidence:
        raise ValueError(f"claim {id}: nothing was given that could show it")
    if file := os.environ.get("DIFFUSION_NB_MARGINS"):
        numbers = [
            dict(id=id, kind=e.kind, got=e.got, low=e.low, high=e.high) for e in evidence if e.kind != "symbolic"
        ]
        with open(file, "a", encoding="utf-8") as f:
            f.write("".join(json.dumps(row) + "\n" for row in numbers))
    for e in evidence:
        if not e.holds:
            raise ClaimError(f"{id} ({says}) does not hold, {e.kind}: {e.detail}")
    kinds = dict.fromkeys(e.kind for e in evidence)
    print(f"✓ {id} {says} · {', '.join(kind + _power(kind, evidence) for kind in kinds)}")


def _power(kind: str, evidence: tuple[Evidence, ...]) -> str:
    "What the stochastic checks of this kind can see, in parentheses."
    sees = dict.fromkeys(e.sees for e in evidence if e.kind == kind and e.sees)
    return f" ({' | '.join(sees)})" if sees else ""


def erratum(id: str, *, printed: Evidence, right: Evidence, where: str, prints: str, holds: str) -> None:
    """A source misprints row `id` of claims.toml: one line if the printed form fails its check and the right one passes.

    Raises ClaimError where the printed form holds after all, and where the right one does not.
    """
    if printed.holds:
        raise ClaimError(f"{id} is no erratum, {where} is right, {printed.kind}: {printed.detail}")
    if not right.holds:
        raise ClaimError(f"{id} ({holds}) does not hold, {right.kind}: {right.detail}")
    print(f"✗→✓ {id} {where}: not {prints}, but {holds} · {', '.join(dict.fromkeys((printed.kind, right.kind)))}")
