"""Draws samples into files; can be interrupted and shared."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from diffusion_nb.denoisers import Denoiser, check_cond
from diffusion_nb.generation.fast import CompiledDenoiser, device_of
from diffusion_nb.generation.formats import FORMS
from diffusion_nb.generation.record import conditions, record
from diffusion_nb.generation.store import ChunkStore, begin, clear, finished, merge
from diffusion_nb.noise import Noise
from diffusion_nb.util.checks import check_eval, expand_as
from diffusion_nb.util.images import to_bytes
from diffusion_nb.util.interrupts import report_on_interrupt
from diffusion_nb.util.profiling import largest_that_fits


def draw(denoiser: Denoiser, sampler: Callable, ts: Float[Tensor, " n+1"], seeds: Int[Tensor, " b"], shape: Sequence[int],
         cond: dict[str, Tensor]) -> Float[Tensor, "b *shape"]:  # fmt: skip
    "One picture a seed: sampler(denoiser, sigma(ts[0]) noise(0), ts, noise=noise, **cond), on the denoiser's device."
    device = device_of(denoiser)
    noise = Noise(seeds, tuple(shape), device)  # type: ignore[arg-type]  # a tensor is one, too
    _, sigma = denoiser.schedule(ts[0].to(device))
    x = noise(0)
    return sampler(
        denoiser, expand_as(sigma, x) * x, ts, noise=noise, **{k: v.to(device) for k, v in cond.items()}
    )


def fitting_chunk(
    denoiser: Denoiser, sampler: Callable, ts: Tensor, shape: Sequence[int], cond: Callable, most: int
) -> int:
    "How many pictures at once: 64 on a CPU, on a GPU the largest that two steps survive, up to 1024; at most `most`."
    if device_of(denoiser).type != "cuda":
        return min(64, most)
    eager = (
        denoiser.denoiser if isinstance(denoiser, CompiledDenoiser) else denoiser
    )  # a recording for each size would fill the memory
    first = torch.zeros(1, dtype=torch.long)
    return largest_that_fits(
        lambda b: draw(eager, sampler, ts[:3], first.expand(b), shape, cond(first.expand(b))), min(1024, most)
    )


def share_of(rank: int | None, world: int | None) -> tuple[int, int, bool]:
    "(rank, world, whether they are those of torch.distributed). Raises ValueError where one is given without the other."
    if (rank is None) != (world is None):
        raise ValueError(f"rank, world: expected both or neither; got rank = {rank} and world = {world}")
    if rank is not None and world is not None:
        return rank, world, False
    team = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size(), True) if team else (0, 1, False)


def check_generate(
    out: Path, n: int, shape: Sequence[int] | None, chunk: int | None, rank: int, world: int, denoiser: Denoiser
) -> None:
    "Raise ValueError, saying what was expected, for arguments that cannot be meant."
    if n < 1:
        raise ValueError(f"n: expected at least 1 picture; got {n}")
    if out.suffix not in FORMS:
        raise ValueError(
            f"out: expected a name that ends in .safetensors or .npz, or a folder for PNG files (no ending); got {out.name!r}"
        )
    if shape and out.suffix != ".safetensors" and not (len(shape) == 3 and shape[0] in (1, 3)):
        raise ValueError(
            f"out: pictures of shape {tuple(shape)} do not fit into {out.suffix or 'PNG'}, which holds (1 or 3, h, w); name a .safetensors file"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk: expected at least 1 picture at a time; got {chunk}")
    if not 0 <= rank < world:
        raise ValueError(f"rank: expected 0 to {world - 1}, since world = {world}; got {rank}")
    check_eval(denoiser)


def check_pictures(x: Float[Tensor, "b *d"], seeds: Int[Tensor, " b"], shape: Sequence[int]) -> None:
    "Raise ValueError where the sampler did not return one picture a seed, and FloatingPointError, naming the seeds, for a NaN or an infinity."
    if not isinstance(x, Tensor) or x.shape != (len(seeds), *shape):
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"sampler: expected pictures of shape {(len(seeds), *shape)}; got {got}")
    bad = seeds[~torch.isfinite(x).flatten(1).all(1).cpu()].tolist()
    if bad:
        raise FloatingPointError(f"{len(bad)} of {len(x)} pictures hold NaN or infinite values, those of seeds {', '.join(map(str, bad[:8]))}"
                                 + (", …" if len(bad) > 8 else "") + ": look at the denoiser at these seeds; nothing of their chunk was kept")  # fmt: skip


def missing(
    n: int, safe: Bool[Tensor, " n"], chunk: int, rank: int, world: int
) -> Iterator[tuple[Int[Tensor, " k"], Int[Tensor, " chunk"]]]:
    "This process's chunks of which a picture is missing, with a progress bar: (which of them are missing, the numbers of all), each whole, so that all have one size, the last filled up with its last picture."
    mine = range(rank * chunk, n, world * chunk)
    total, done = (sum(int(v[k : k + chunk].sum()) for k in mine) for v in (torch.ones_like(safe), safe))
    with tqdm(total=total, initial=done, desc="generating", unit="picture", delay=3, disable=rank > 0 or None) as bar:  # fmt: skip
        for k in mine:
            new = (~safe[k : k + chunk]).nonzero()[:, 0]
            if len(new):
                yield new, torch.arange(k, k + chunk).clamp(max=n - 1)
                bar.update(len(new))


def generate(out: Path | str, denoiser: Denoiser, sampler: Callable, ts: Float[Tensor, " m+1"], n: int, shape: Sequence[int], *,
             cond: Callable | dict[str, Tensor] | None = None, decode: Callable | None = None, first: int = 0, chunk: int | None = None,
             rank: int | None = None, world: int | None = None, replace: bool = False) -> bool:  # fmt: skip
    """Draw the pictures of seeds first … first + n - 1 into `out`; stopped at any moment, the same call goes on. True once all are there.

    Parameters
    ----------
    out: a .safetensors file (float32: pictures, seeds, labels), an .npz file (bytes: arr_0 (n, h, w, c), seeds, labels) or a folder (a PNG a picture).
    Beside it: out.parts, the finished chunks, until all are there; then out.json, the record.
    sampler: called as sampler(denoiser, x, ts, noise=noise, **cond), from sigma(ts[0]) times noise. shape: of one picture.
    cond: seeds (b,) ↦ {name: tensor, one row per seed}, or tensors with one row per picture. Integers `y` (b,) are kept as labels.
    decode: latents (b, *shape) ↦ pictures, such as a codec's, for a model of latents; its parameters' device is the denoiser's.
    chunk: pictures at a time; by default what the run began with, or the largest that fits. With one chunk size all pictures are the same bit for bit
    however often the run was stopped and however many processes there were; with another, to rounding.
    rank, world: this process draws the chunks rank, rank + world, …; from torch.distributed if it is initialised, where rank 0 then puts the parts
    together and the others wait. Independent jobs may share the work, too: the last to finish puts them together.
    replace: delete what is there of another run, or damaged, instead of an error. What has no record is never deleted.
    Raises ValueError for arguments that cannot be meant and where `out` holds another run; FloatingPointError for pictures with NaN, by seed;
    KeyboardInterrupt after Ctrl-C and SIGTERM and OSError for a full disk or a folder that cannot be written, both saying what is safe.
    """
    out, (rank, world, team) = Path(out), share_of(rank, world)
    check_generate(out, n, None if decode else shape, chunk, rank, world, denoiser)
    told = conditions(cond or {}, n, first)
    if isinstance(cond, dict):
        check_cond(denoiser, n, cond)
    drawn_by = (sampler, decode) if decode else sampler
    parts = ChunkStore(out, record(denoiser, drawn_by, ts, n, shape, cond or {}, first))

    with report_on_interrupt(parts.said):
        out.parent.mkdir(parents=True, exist_ok=True)
        with parts.lock:
            if replace:
                clear(parts)
            if done := finished(parts):
                print(f"{out.name}: all {n} pictures are there already")
            else:
                share = -(-n // world)
                size = begin(parts, chunk, lambda: fitting_chunk(denoiser, sampler, ts, shape, told, share))
                safe = parts.there()
        if not done:
            for new, i in missing(n, safe, size, rank, world):
                x = draw(denoiser, sampler, ts, i + first, shape, rows := told(i))
                check_pictures(x, i + first, shape)
                x = decoded(decode, x) if decode else x
                parts.add(kept(x, i + first, rows, new, bytes=out.suffix != ".safetensors"))
        if team:
            dist.barrier()
        if not done and not (team and rank):
            with parts.lock:
                done = finished(parts) or merge(parts)
        if team:
            dist.barrier()
    return done or (team and finished(parts))


@torch.no_grad()
def decoded(decode: Callable, z: Float[Tensor, "b *d"]) -> Float[Tensor, "b c h w"]:
    "The pictures of latents. Raises ValueError where they are no pictures, one for each."
    x = decode(z)
    if x.ndim != 4 or len(x) != len(z):
        raise ValueError(f"decode: expected pictures ({len(z)}, c, h, w); got {tuple(x.shape)}")
    return x


def kept(x: Float[Tensor, "b *shape"], seeds: Int[Tensor, " b"], cond: dict[str, Tensor], new: Int[Tensor, " k"], bytes: bool) -> dict[str, Tensor]:  # fmt: skip
    "What is kept of the new ones among these pictures, a row each: pictures (as bytes if asked), seeds and, where `y` is one integer each, labels."
    found = dict(seeds=seeds, pictures=to_bytes(x) if bytes else x.float())
    if "y" in cond and cond["y"].ndim == 1 and not cond["y"].is_floating_point():
        found["labels"] = cond["y"].long()
    return {name: v.cpu()[new] for name, v in found.items()}
