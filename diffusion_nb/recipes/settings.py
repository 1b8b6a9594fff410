"""Reads settings.ini into dataclasses."""

import configparser
import os
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from diffusion_nb.util.storage import shipped

T = TypeVar("T")


def settings(section: str, kind: type[T]) -> T:
    """The settings of one section, as `kind`, a dataclass: its defaults, and what differs from them.

    The file is the library's settings.ini, or the one that DIFFUSION_NB_SETTINGS names. What differs comes from `[section]`, then `[section.gpu]` if DIFFUSION_NB_PROFILE=gpu, then DIFFUSION_NB_SET,
    which holds `section.key=value` items parted by ';'. Raises ValueError naming the key, the value and what was expected.
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
    return typed(kind, values | _overrides(section, ini.sections()), f"settings [{section}]")


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


def typed(kind: type[T], values: dict[str, Any], where: str) -> T:
    "The dataclass `kind` with these values, text or not, each in the type of its field. Raises ValueError naming what does not fit."
    types, needed = get_type_hints(kind), {f.name for f in fields(kind) if f.default is MISSING}
    for key in sorted(values.keys() - types.keys()) + sorted(needed - values.keys()):
        problem = "is not a setting" if key in values else "is missing"
        raise ValueError(f"{where}: {key!r} {problem}; the settings are {', '.join(types)}")
    found = {}
    for key, value in values.items():
        try:
            found[key] = _parse(types[key], value)
        except (ValueError, TypeError, OverflowError):
            raise ValueError(f"{where}: {key} = {value!r} is not a valid {_name(types[key])}") from None
    try:
        return kind(**found)
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from None


def _parse(kind, value):
    if get_origin(kind) is tuple:
        values = (value.split(",") if value.strip() else []) if isinstance(value, str) else value
        return tuple(_parse(get_args(kind)[0], v) for v in values)
    parsed = value if get_origin(kind) is Literal else kind(value)
    if (
        not isinstance(value, str)
        and parsed != value
        or get_origin(kind) is Literal
        and value not in get_args(kind)
    ):
        raise ValueError
    return parsed


def _name(kind) -> str:
    if get_origin(kind) is Literal:
        return f"choice of {', '.join(get_args(kind))}"
    return f"list of {get_args(kind)[0].__name__}" if get_origin(kind) is tuple else kind.__name__
