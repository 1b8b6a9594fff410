"""The formulas that are copied most are read as they stand in the notebooks, and give what the library computes, at random numbers in float64."""

import json
import math
import re
import tomllib
from pathlib import Path

import pytest
import torch
from latex import Unreadable, read, tokens

from diffusion_nb import denoisers, forward, grids, guidance, schedules, variances
from diffusion_nb.denoisers import Denoiser, Prediction
from diffusion_nb.forward import posterior_steps
from diffusion_nb.losses import bound, consistency, distillation, score, simple, vdm
from diffusion_nb.nets import unet
from diffusion_nb.samplers import heun, langevin, linear, sde
from diffusion_nb.training import ema
from diffusion_nb.util.checks import expand_as

ROOT = Path(__file__).resolve().parents[1]
FORMULAS = tomllib.loads((Path(__file__).parent / "formulas.toml").read_text(encoding="utf-8"))["formula"]
IDS = [f"{row['id']} {row['notebook']} {i}" for i, row in enumerate(FORMULAS)]
T = 40
STEPS = (3, 17, T)  # of the chain of T steps, for the upper time t
MODULES = (unet, denoisers, forward, grids, guidance, schedules, variances, bound, consistency, distillation, score, simple, vdm, heun, langevin, linear, sde, ema)  # fmt: skip
LIBRARY = {name: value for module in MODULES for name, value in vars(module).items() if not name.startswith("__")}
LIBRARY |= {"flow_velocity": denoisers.velocity, "sde_velocity": sde.velocity}


class Guess(Denoiser):
    "Whose guess of x_0 is `x0` at time `first`, and `later` at any other."

    def __init__(self, schedule, first, x0, later):
        super().__init__()
        self.schedule, self.first, self.guesses = schedule, first, (x0, later)

    def forward(self, x_t, t, **cond):
        alpha, sigma = (expand_as(c, x_t) for c in self.schedule(torch.as_tensor(t, dtype=torch.float64)))
        x0 = (
            self.guesses[0] if abs(float(torch.as_tensor(t).flatten()[0]) - self.first) < 1e-9 else self.guesses[1]
        )
        return Prediction(x_t, alpha, sigma, x0.expand_as(x_t))


class Always(Denoiser):
    "Whose prediction is the same, whatever it is asked."

    def __init__(self, schedule, pred):
        super().__init__()
        self.schedule, self.pred = schedule, pred

    def forward(self, x_t, t, **cond):
        return self.pred


def slope(f, t):
    "df/dt at each of the times t."
    t = t.clone().requires_grad_()
    return torch.autograd.grad(f(t).sum(), t)[0]


def world(row: dict, i: int) -> tuple[dict, dict]:
    "(names in Python, symbols in LaTeX) at step i of the chain: random pictures, guesses and noises, three of four pixels."
    g = torch.Generator().manual_seed(i)
    draw = lambda: torch.randn(3, 4, generator=g, dtype=torch.float64)
    names = LIBRARY | {"torch": torch, "math": math, "T": T, "i": i, "Prediction": Prediction, "Always": Always, "slope": slope}  # fmt: skip
    schedule = eval(row.get("schedule", "SubVPSchedule()"), names)
    one = row.get("chain", False)  # one step of the chain, or many
    t, s, mid = (torch.tensor(k / T, dtype=torch.float64) for k in (i, i - 1 if one else i // 3, i / 2))
    (alpha, sigma), (alpha_s, sigma_s), (alpha_m, sigma_m) = schedule(t), schedule(s), schedule(mid)
    x0, eps, z, guess0, later = (draw() for _ in range(5))
    x_t = alpha * x0 + sigma * eps
    denoiser, exact = Guess(schedule, float(t), guess0, later), Guess(schedule, float(t), x0, x0)
    pred, pred0 = denoiser(x_t, t), exact(x_t, t)
    step = posterior_steps(schedule, s, t)
    names |= dict(schedule=schedule, s=s, t=t, mid=mid, alpha=alpha, sigma=sigma, alpha_s=alpha_s, sigma_s=sigma_s, alpha_m=alpha_m, sigma_m=sigma_m, x0=x0, eps=eps, z=z,
                  x_t=x_t, denoiser=denoiser, exact=exact, pred=pred, pred0=pred0, step=step, later=later, zero=torch.zeros_like(x0), eta=0.6, w=1.7,
                  random=draw, own=row, mean=lambda v: v.mean(), ts=torch.stack([t, s]), noise=lambda k: z, silent=lambda k: torch.zeros_like(z))  # fmt: skip
    snr = lambda a, b: a**2 / b**2
    symbols = {
        r"\alpha": alpha, r"\sigma": sigma, r"\alpha_t": alpha, r"\sigma_t": sigma, r"\alpha_s": alpha_s, r"\sigma_s": sigma_s,
        r"\alpha_{t|s}": alpha / alpha_s, r"\sigma_{t|s}^2": sigma**2 - (alpha / alpha_s * sigma_s) ** 2,
        r"\sigma^2_{t|s}": sigma**2 - (alpha / alpha_s * sigma_s) ** 2, r"\lambda_t": snr(alpha, sigma).log(), r"\lambda_s": snr(alpha_s, sigma_s).log(),
        r"\mathrm{SNR}(t)": snr(alpha, sigma), r"\mathrm{SNR}(s)": snr(alpha_s, sigma_s), r"\mathrm{SNR}": snr(alpha, sigma),
        "x_0": x0, "x_t": x_t, r"\varepsilon": eps, r"\hat x_0": pred.x0, r"\hat\varepsilon": pred.eps, "z": z, "I": 1, "D": 4, "E": names["mean"],
        r"\mathbb E": names["mean"], r"\eta": names["eta"], "w": names["w"], "e": math.e, r"\pi": math.pi, "t": t,
        r"\tilde\beta_t": step.small, r"\tilde\beta": step.small,
    }  # fmt: skip
    if one:
        symbols |= {
            r"\beta_t": 1 - (alpha / alpha_s) ** 2,
            r"\bar\alpha_t": alpha**2,
            r"\bar\alpha_{t-1}": alpha_s**2,
        }
    for name, expression in row.get("let", {}).items():
        names[name] = eval(expression, names)
    return names, symbols | {latex: eval(text, names) for latex, text in row.get("where", {}).items()}


def displayed(notebook: str) -> str:
    "All displayed formulas of a notebook, one a line."
    cells = json.loads((ROOT / f"nbs/{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return "\n".join(" ".join(formula.split()) for formula in re.findall(r"(?s)\$\$(.+?)\$\$", text))


def words_of(row: dict) -> list[str]:
    "The tokens of the notebook's formula that follow `after`."
    parts = displayed(row["notebook"]).split(row["after"])
    nth = row.get("nth", 1)
    assert len(parts) > nth, (
        f"{row['notebook']} has no formula {row['after']!r} any more: follow it in tests/formulas.toml"
    )
    assert nth > 1 or len(parts) == 2 or row.get("first"), f"{row['after']!r} begins {len(parts) - 1} formulas of {row['notebook']}: say which, nth = 1 and first = true"  # fmt: skip
    return tokens(parts[nth].split("\n")[0])


def same(values: list[list], row: dict, names: dict) -> bool:
    "Whether the values read are those that the library computes, all members of each chain."
    for chain, expression in zip(values, row["is"], strict=True):
        want = torch.as_tensor(eval(expression, names), dtype=torch.float64)
        for got in chain:
            try:
                got, other = torch.broadcast_tensors(got, want)
            except RuntimeError:
                return False
            if not torch.isfinite(other).all() or not ((got - other).abs() <= 1e-9 * (1 + other.abs())).all():
                return False
    return True


def holds(row: dict, words: list[str]) -> tuple[bool, list[int]]:
    "(whether the formula gives at each step what the library computes, which tokens were read)."
    for i in row.get("steps", STEPS):
        names, symbols = world(row, i)
        values, places = read(words, symbols, len(row["is"]), row.get("members", 99))
        if not same(values, row, names):
            return False, places
    return True, places


@pytest.mark.parametrize("row", FORMULAS, ids=IDS)
def test_a_formula_says_what_the_library_computes(row):
    words = words_of(row)
    right, places = holds(row, words)
    assert right, (
        f"{row['notebook']}: {row['after']} {''.join(words[: places[-1] + 1])} is not {' and '.join(row['is'])}"
    )


def test_every_formula_belongs_to_a_row_of_the_ledger():
    listed = {entry["id"] for entry in tomllib.loads((ROOT / "claims.toml").read_text(encoding="utf-8"))["claim"]}
    assert {row["id"] for row in FORMULAS} <= listed


@pytest.mark.parametrize("latex, want", [
    (r"\frac12 a b^2", 9.0), (r"\frac1{a}-\frac b2", -1.0), (r"a/b", 2 / 3), (r"-a^2+b", -1.0), (r"10.5a", 21.0), (r"\sqrt{a+7}b", 9.0),
    (r"\hat a_{t-1}^2\,b", 75.0), (r"\log\frac{b}{a}+\exp(a-2)", 1 + math.log(1.5)), (r"\cos^2\!\Bigl(\pi\cdot a\Bigr)", 1.0),
    (r"\underbrace{a\,b}_{\text{all}}+\max(a, b)", 9.0), (r"\|x\|^2", 25.0), (r"x\cdot x", 25.0), (r"\sum_i x_i", 7.0), (r"f(a, b)\,a", 12.0),
    (r"f b", 9.0),
])  # fmt: skip
def test_the_reader_does_arithmetic(latex, want):
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    table = {
        "a": 2,
        "b": 3,
        r"\hat a_{t-1}": 5,
        r"\pi": math.pi,
        "x": x,
        "x_i": x,
        "f": lambda *v: sum(v) + (1 if len(v) > 1 else 6),
    }
    assert float(read(tokens(latex), table)[0][0][0]) == pytest.approx(want)


@pytest.mark.parametrize("latex", [r"a/b c", r"a + q", r"a + \unknown", r"(a", r"a +", r"a \mid b", r"\hat b"])
def test_what_is_no_arithmetic_is_refused(latex):
    with pytest.raises(Unreadable):
        read(tokens(latex), {"a": 2, "b": 3, "c": 4})


OTHER = {"+": "-", "-": "+", r"\sigma": r"\alpha", r"\alpha": r"\sigma", "s": "t", "t": "s", "0": "t", "1": "2", "2": "3", r"\varepsilon": "x_0"}  # fmt: skip


def unnoticed(row: dict) -> tuple[list[str], int]:
    "(which changes of one sign, index, power or letter change nothing, how many were tried)."
    words = words_of(row)
    places = [k for k in holds(row, words)[1] if words[k] in OTHER]
    missed = []
    for k in places:
        try:
            right, _ = holds(row, words[:k] + tokens(OTHER[words[k]]) + words[k + 1 :])
        except Unreadable:
            right = False
        if right:
            missed.append(f"{words[k]} → {OTHER[words[k]]} at …{''.join(words[k : k + 8])}")
    return missed, len(places)


@pytest.mark.parametrize("row", FORMULAS, ids=IDS)
def test_a_changed_sign_index_or_power_is_noticed(row):
    missed, tried = unnoticed(row)
    assert tried and not missed, f"{row['after']}: of {tried} misprints these go unnoticed: {missed}"
