"""Files: written atomically, tensors as safetensors."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from platformdirs import user_cache_path
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PACKAGE = Path(__file__).resolve().parents[1]


def checkout() -> Path | None:
    "The folder of the repository that this package is part of; None where it was installed from a wheel."
    return PACKAGE.parent if (PACKAGE.parent / "nbs/modules.toml").exists() else None


def project_root() -> Path:
    "The folder of the repository. Raises FileNotFoundError where the package was installed from a wheel."
    if root := checkout():
        return root
    raise FileNotFoundError(
        "this needs the notebooks, which an installed package does not have: clone the repository"
    )


def shipped(name: str) -> Path:
    "A file or folder that comes with the library, to be read only: settings.ini, artifacts, words.txt, words7.txt or lines.txt."
    if root := checkout():
        return root / (name if name == "settings.ini" else f"data/{name}")
    return PACKAGE / "shipped" / name


def user_folder() -> Path:
    "Where what is made or downloaded is kept: DIFFUSION_NB_HOME, else the system's place for a user's caches."
    return Path(os.environ.get("DIFFUSION_NB_HOME") or user_cache_path("diffusion_nb"))


def downloads() -> Path:
    "Where data sets are: data/ of the repository, else of the user's folder; DIFFUSION_NB_DATA names another place."
    return Path(os.environ.get("DIFFUSION_NB_DATA") or (checkout() or user_folder()) / "data")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    "Let `write` fill a temporary file beside `path`, flush it to disk, then rename it: readers see all of it or nothing."
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        draft.touch()
        mode = draft.stat().st_mode  # what new files are here; safetensors makes them private
        draft.unlink()
        write(draft)
        draft.chmod(mode)
        with open(draft, "rb+") as f:  # Windows flushes only what may be written
            os.fsync(f.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def own_tensors(module: nn.Module, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    "The parameters and persistent buffers of a module, or what `state` holds of them, each once, also where it is shared by several parts."
    names = {name for values in (module.named_parameters(), module.named_buffers()) for name, _ in values}
    return {name: v for name, v in (state or module.state_dict()).items() if name in names}


def write_json(path: Path, value: dict) -> None:
    "Write it whole or not at all, indented."
    write_atomically(path, lambda p: p.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8"))


def checksum(tensors: dict[str, Tensor], about: dict[str, str]) -> str:
    "SHA-256 of the names, types, shapes and bytes of these tensors, and of what is said about them."
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, v in sorted(tensors.items()):
        digest.update(f"{name} {v.dtype} {tuple(v.shape)}".encode())
        digest.update(v.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    "Write a safetensors file with its checksum: whole or not at all. Raises OSError where it cannot be written."
    tensors = {k: v.detach().contiguous() for k, v in tensors.items()}
    sealed = about | {"sha256": checksum(tensors, about)}
    try:
        write_atomically(path, lambda draft: save_file(tensors, draft, metadata=sealed))
    except (OSError, SafetensorError) as e:
        raise OSError(f"{path} could not be written ({e})") from e


def load_tensors(path: Path, device="cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    "The tensors of a file that `save_tensors` wrote, and what is said about them. Raises ValueError where it is damaged."
    try:
        with safe_open(path, "pt", device=str(device)) as f:
            tensors, about = {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}  # noqa: SIM118
    except SafetensorError as e:
        raise ValueError(f"{path} is damaged ({e})") from e
    if about.pop("sha256", None) != checksum(tensors, about):
        raise ValueError(f"{path} is damaged (its checksum is not that of its content)")
    return tensors, about


def check_fits(own: dict[str, Tensor], found: dict[str, Tensor], what: str) -> None:
    "Raise ValueError, naming names and shapes, unless both hold tensors of the same names and shapes."
    shapes, expected = ({k: tuple(v.shape) for k, v in part.items()} for part in (found, own))
    differ = [f"{k} {shapes.get(k, 'missing')}, expected {expected.get(k, 'none of this name')}"
              for k in sorted(own.keys() | found.keys()) if shapes.get(k) != expected.get(k)]  # fmt: skip
    if differ:
        more = f"; and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise ValueError(f"{what} does not fit the network: {'; '.join(differ[:5])}{more}")


def is_pickle(path: Path) -> bool:
    "Whether the file is, by its first bytes, a pickle or an archive of torch.save, and not safetensors: the length of a header, then a brace."
    with open(path, "rb") as f:
        start = f.read(9)
    return start[8:] != b"{" and start.startswith(
        (b"PK\x03\x04", *(b"\x80" + bytes([version]) for version in range(2, 6)))
    )


def read_weights(path: Path | str, allow_pickle: bool = False) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name, on the CPU; with `allow_pickle`, also of a torch.save of such a dictionary, read without running its code.

    Raises FileNotFoundError, and ValueError for a pickle that was not allowed or wants to run something, and for a file that is damaged or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file of weights")
    if not is_pickle(path):
        try:
            return load_file(path)
        except SafetensorError as e:
            raise ValueError(
                f"{path} is no whole safetensors file ({e}): expected one, not cut short; fetch or write it again"
            ) from e
    if not allow_pickle:
        raise ValueError(
            f"{path} is a pickle, which can run code as it is read: expected safetensors; if you trust its origin, ask for allow_pickle=True"
        )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # whatever a damaged or hostile file can cause
        raise ValueError(
            f"{path} is damaged, or holds more than tensors, which is not run ({str(e).splitlines()[0]}); turn it into safetensors where it came from"
        ) from e
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        inside = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise ValueError(
            f"{path}: expected a dictionary of tensors; it holds {inside[:200]}. Take the part with the weights out, and save it as safetensors"
        )
    return found


def load_weights(path: Path | str, module: nn.Module, allow_pickle: bool = False) -> None:
    "Fill `module` with the weights of a file, as `read_weights` reads them. Raises ValueError, too, where names or shapes differ, which it lists; the module is then as it was."
    found, own = read_weights(path, allow_pickle), module.state_dict()
    check_fits(own, found, str(path))
    with torch.no_grad():
        for name, v in own.items():
            v.copy_(found[name])
