"""Reads settings.ini."""

import configparser
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from diffusion_nb.util.storage import shipped


def ints(text: str) -> tuple[int, ...]:
    "'1, 2, 2' → (1, 2, 2): a settings type."
    return tuple(int(v) for v in text.split(","))


def one_of(*names: str) -> Callable[[str], str]:
    "A settings type: one of these words."

    def choice(text: str) -> str:
        if text not in names:
            raise ValueError(text)
        return text

    choice.__name__ = f"choice of {', '.join(names)}"
    return choice


def settings(section: str, **types: Callable) -> SimpleNamespace:
    """The settings of one notebook: `settings("07_ddpm", steps=int, lr=float).steps`.

    The file is the library's settings.ini, or the one that DIFFUSION_NB_SETTINGS names. Values come from `[section]`, then `[section.gpu]` if DIFFUSION_NB_PROFILE=gpu, then DIFFUSION_NB_SET, which holds
    `section.key=value` items parted by ';'. Raises ValueError naming the key, the value and what was expected.
    """
    ini = configparser.ConfigParser(interpolation=None)
    ini.optionxform = str  # keys are as they are written
    path = Path(os.environ.get("DIFFUSION_NB_SETTINGS") or shipped("settings.ini"))
    ini.read_string(path.read_text(encoding="utf-8"), str(path))
    profile = os.environ.get("DIFFUSION_NB_PROFILE", "cpu")
    if profile not in ("cpu", "gpu"):
        raise ValueError(f"DIFFUSION_NB_PROFILE: expected cpu or gpu, got {profile!r}")
    if section not in ini:
        raise ValueError(f"settings.ini has no section [{section}]; it has {', '.join(ini.sections())}")
    values = dict(ini[section])
    if profile == "gpu" and f"{section}.gpu" in ini:
        values |= dict(ini[f"{section}.gpu"])
    values |= _overrides(section, ini.sections())
    for key in sorted(values.keys() ^ types.keys()):
        problem = "is not a setting" if key in values else "is missing"
        raise ValueError(f"settings [{section}]: {key!r} {problem}; the settings are {', '.join(types)}")
    return SimpleNamespace(**{key: _parse(section, key, values[key], kind) for key, kind in types.items()})


def _overrides(section: str, sections: list[str]) -> dict[str, str]:
    found = {}
    for item in filter(None, (i.strip() for i in os.environ.get("DIFFUSION_NB_SET", "").split(";"))):
        name, equals, value = item.partition("=")
        owner, dot, key = name.strip().rpartition(".")
        if not (equals and dot and owner in sections) or owner.endswith((".cpu", ".gpu")):
            raise ValueError(
                f"DIFFUSION_NB_SET: expected 'section.key=value' with a section of settings.ini (without .gpu), got {item!r}"
            )
        if owner == section:
            found[key] = value.strip()
    return found


def _parse(section: str, key: str, text: str, kind: Callable):
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"settings [{section}]: {key} = {text!r} is not a valid {kind.__name__}") from None


def floats(text: str) -> list[float]:
    "'0, 1.5' → [0.0, 1.5]: a settings type."
    return [float(v) for v in text.split(",")]
