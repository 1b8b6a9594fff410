"""How two printed texts are compared: words exactly, numbers to the last place that is printed."""

import re
from decimal import Decimal

NUMBER = re.compile(r" *(?<![\w.])[-+−]?[0-9]+(?:\.[0-9]+)?(?:e[-+]?[0-9]+)?(?!\w|\.[0-9])")


class Printed(str):
    """A text that equals another where the words are the same and each number differs by at most one unit of its last place.

    The last place is that of the number which is printed with more of them: 0.1 and 0.0999, both of a format that drops
    zeros, differ by 0.0001. Whole numbers count something, and must be equal. What a number is padded with does not matter.
    Digits that belong to a word (float32, v1.2.3, 07_ddpm) are words.
    """

    def __eq__(self, other) -> bool:
        here, there = NUMBER.findall(self), NUMBER.findall(other)
        same_words = NUMBER.split(self) == NUMBER.split(other)
        return same_words and len(here) == len(there) and all(map(same_number, here, there))

    def __ne__(self, other) -> bool:
        return not self == other

    __hash__ = None


def same_number(a: str, b: str) -> bool:
    "Whether two printed numbers are one number to the last place of the finer of them, or the same whole number."
    a, b = (Decimal(text.strip().replace("−", "-")) for text in (a, b))
    place = min(a.as_tuple().exponent, b.as_tuple().exponent)
    whole = a.as_tuple().exponent == b.as_tuple().exponent == 0
    return abs(a - b) <= (0 if whole else Decimal(1).scaleb(place))
