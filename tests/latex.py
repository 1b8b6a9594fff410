"""Reads the formulas of the notebooks: LaTeX in, numbers out.

SymPy's reader knows neither \\bar\\alpha_{t-1} nor \\sigma_{t|s}^2 nor a norm, and takes α_t x_0 for a function of x_0. Here what a symbol is
worth is said beside it, in a table from LaTeX to a number, a tensor (*b, d) or a function, and the longest entry wins. All else is arithmetic.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

SPACING = {"\\,", "\\;", "\\!", "\\:", "\\ ", "~", "\\left", "\\right", "\\displaystyle", "\\boxed"}
SPACING |= {f"\\{size}{side}" for size in ("big", "Big", "bigg", "Bigg") for side in ("l", "r", "m", "")}
TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|\S")
ENDS = {"", ",", ".", ";", "=", ")", "]", "}", "&", "\\\\", "\\quad", "\\qquad", "\\le", "\\ge", "\\approx", "\\longrightarrow", "\\Rightarrow", "\\Longrightarrow", "\\text", "\\blacksquare"}  # fmt: skip
CLOSING = {"(": ")", "[": "]", "{": "}"}
FUNCTIONS = {"\\log": torch.log, "\\exp": torch.exp, "\\sin": torch.sin, "\\cos": torch.cos}
CHOICES = {"\\min": torch.minimum, "\\max": torch.maximum}


class Unreadable(ValueError):
    "A formula that is no arithmetic of what the table knows."


def tokens(latex: str) -> list[str]:
    "Commands and signs, without what only moves them apart."
    return [t for t in TOKEN.findall(latex) if t not in SPACING]


def as_tensor(value) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)


def is_vector(value: Tensor) -> bool:
    return value.ndim > 1 and value.shape[-1] > 1


class Reader:
    "Values of the formulas that begin with the first of `tokens`; `place` is the first that was not read."

    def __init__(self, words: list[str], table: dict[str, object]):
        known = {tuple(tokens(latex)): value for latex, value in table.items()}
        self.known = dict(sorted(known.items(), key=lambda row: -len(row[0])))
        self.tokens, self.place, self.norms, self.passed = words, 0, 0, set()

    def peek(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self, *wanted: str) -> str:
        found = self.peek()
        if wanted and found not in wanted:
            raise Unreadable(
                f"expected {' or '.join(wanted)} at …{''.join(self.tokens[self.place : self.place + 12])}"
            )
        self.place += 1
        return found

    # what stands side by side

    def chain(self, members: int) -> list[Tensor]:
        "a = b = c ↦ [a, b, c], no more than `members` of them."
        found = [self.sum()]
        while len(found) < members and self.peek() == "=":
            self.take("=")
            found.append(self.sum())
        if self.peek() not in ENDS:
            raise Unreadable(f"cannot go on at …{''.join(self.tokens[self.place : self.place + 12])}")
        return found

    def sum(self) -> Tensor:
        value = -self.product() if self.peek() == "-" and self.take() else self.product()
        while self.peek() in ("+", "-"):
            value = value + self.product() if self.take() == "+" else value - self.product()
        return value

    def product(self) -> Tensor:
        value, divided = self.power(), False
        while True:
            if self.peek() == "/":
                self.take()
                value, divided = value / self.power(), True
            elif self.peek() in ("\\cdot", "\\times", "\\odot"):
                inner = self.take() == "\\cdot"
                other = self.power()
                value = (
                    (value * other).sum(-1) if inner and is_vector(value) and is_vector(other) else value * other
                )
            elif self.begins():
                if divided:
                    raise Unreadable("a / b c may be read in two ways: use \\frac")
                value = value * self.power()
            else:
                return value

    def begins(self) -> bool:
        "Whether a factor begins here."
        token = self.peek()
        if token in ("\\|", "\\lVert"):
            return token == "\\lVert" or not self.norms
        commands = ("\\frac", "\\tfrac", "\\dfrac", "\\sqrt", "\\sum", "\\prod", "\\int", "\\underbrace")
        return token.isdigit() or token in CLOSING or token in FUNCTIONS or token in CHOICES or token in commands or self.entry() is not None  # fmt: skip

    def entry(self) -> tuple[str, ...] | None:
        "The longest entry of the table that stands here."
        here = lambda key: tuple(self.tokens[self.place : self.place + len(key)]) == key
        return next((key for key in self.known if here(key)), None)

    # one factor

    def power(self) -> Tensor:
        value = self.factor()
        while self.peek() == "^":
            self.take()
            value = value ** self.argument()
        return value

    def argument(self) -> Tensor:
        "What a command takes: {…}, or one token."
        if self.peek() == "{":
            return self.group()
        if self.peek().isdigit():
            return as_tensor(self.take())
        return self.factor()

    def group(self) -> Tensor:
        "(…), […] or {…}."
        closing = CLOSING[self.take(*CLOSING)]
        norms, self.norms = self.norms, 0
        value = self.sum()
        self.norms = norms
        self.take(closing)
        return value

    def several(self) -> list[Tensor]:
        "(a, b, c)."
        closing, found = CLOSING[self.take(*CLOSING)], [self.sum()]
        while self.peek() in (",", ";"):
            self.take()
            found.append(self.sum())
        self.take(closing)
        return found

    def number(self) -> Tensor:
        digits = self.take()
        while self.peek().isdigit() or (self.peek() == "." and self.tokens[self.place + 1 : self.place + 2] and self.tokens[self.place + 1].isdigit()):  # fmt: skip
            digits += self.take()
        return as_tensor(float(digits))

    def factor(self) -> Tensor:
        if key := self.entry():
            self.place += len(key)
            value = self.known[key]
            return self.applied(value) if isinstance(value, Callable) else as_tensor(value)
        token = self.peek()
        if token.isdigit():
            return self.number()
        if token in CLOSING:
            return self.group()
        self.place += 1
        if token in ("\\frac", "\\tfrac", "\\dfrac"):
            return self.argument() / self.argument()
        if token == "\\sqrt":
            return self.argument().sqrt()
        if token in FUNCTIONS:
            return self.function(FUNCTIONS[token])
        if token in CHOICES:
            a, b = self.several()
            return CHOICES[token](a, b)
        if token in ("\\sum", "\\prod", "\\int"):
            self.scripts()
            body = self.product()
            return body.prod(-1) if token == "\\prod" else body.sum(-1)
        if token == "\\underbrace":
            value = self.group()
            self.scripts()
            return value
        if token in ("\\|", "\\lVert"):
            return self.norm("\\|" if token == "\\|" else "\\rVert")
        self.place -= 1
        raise Unreadable(f"cannot read …{''.join(self.tokens[self.place : self.place + 12])}")

    def norm(self, closing: str) -> Tensor:
        "Over the last axis: of one vector, or of each of a batch."
        self.norms += 1
        value = self.sum()
        self.norms -= 1
        self.take(closing)
        return value.square().sum(-1).sqrt()

    def function(self, f: Callable) -> Tensor:
        "f^2(x), f(x), or f x y for f of all factors that follow."
        power = None
        if self.peek() == "^":
            self.take()
            power = self.argument()
        if self.peek() in ("(", "["):
            value = f(self.group())
        else:
            argument = self.power()
            while self.begins() and self.peek() not in FUNCTIONS:
                argument = argument * self.power()
            value = f(argument)
        return value if power is None else value**power

    def applied(self, f: Callable) -> Tensor:
        "A function of the table: of what stands in brackets, else of all that is multiplied after it."
        return as_tensor(f(*self.several()) if self.peek() in ("(", "[") else f(self.product()))

    def scripts(self) -> None:
        "Passes over what stands above and below a sign: limits and labels are not read."
        start = self.place
        while self.peek() in ("_", "^"):
            self.take()
            depth = self.take() == "{"
            while depth:
                depth += {"{": 1, "}": -1}.get(self.take() or "}", 0)
        self.passed |= set(range(start, self.place))


def read(words: list[str], table: dict[str, object], items: int = 1, members: int = 99) -> tuple[list[list[Tensor]], list[int]]:  # fmt: skip
    "(the values of a = b, c = d, … : a list for each of `items` that commas part, which of the tokens were read)."
    reader = Reader(words, table)
    found = [reader.chain(members)]
    while len(found) < items:
        reader.take(",")
        found.append(reader.chain(members))
    return found, [k for k in range(reader.place) if k not in reader.passed]
