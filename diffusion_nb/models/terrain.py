"""A published consistency model: heights of terrain, 128×128, in one call (package adaptive-terrain-diffusion, MIT)."""

import hashlib
import importlib.util
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffusion_nb.denoisers import told_time
from diffusion_nb.schedules import EDMSchedule

SHA256 = "95be54b4a39d58320e187a7ec533351c957f16a00be58773c86074828ee67887"  # of the network's file
PACKAGE, FILE = "terrain_diffusion", "weights/terrain_consistency_unet_difficulty100.onnx"


class TerrainConsistency(nn.Module):
    """f(x_t, t, y): the terrain at the end of the curve through x_t, (n, 1, 128, 128), from -1 at its lowest to 1; y: how rough, whole numbers from 1 to 100.

    session: runs the network, `session.run(names, inputs)` as ONNX Runtime's. `consistency_sample` takes this as it takes `Consistency`.
    """

    def __init__(self, session):
        super().__init__()
        self.session, self.schedule, self.smallest = session, EDMSchedule(0.002, 80.0), 0.002

    def forward(self, x: Float[Tensor, "n 1 128 128"], t: Float[Tensor, "*n"], y: Int[Tensor, " n"]) -> Float[Tensor, "n 1 128 128"]:  # fmt: skip
        self.check_y(y)
        sigma = told_time(self.schedule(t)[1], x)
        inputs = {"noisy": x, "sigma": sigma, "difficulty": (y - 1) / 99}
        said = self.session.run(["denoised"], {name: v.detach().float().contiguous().numpy() for name, v in inputs.items()})  # fmt: skip
        return torch.from_numpy(said[0]).to(x.dtype)

    def check_y(self, y: Int[Tensor, " n"]) -> None:
        "Raise ValueError unless these are whole numbers from 1 to 100."
        if y.is_floating_point() or y.min() < 1 or y.max() > 100:
            raise ValueError(f"y: expected whole numbers from 1 to 100; got {y.tolist()}")


def load_terrain() -> TerrainConsistency:
    "The published model. Raises ImportError where its package or ONNX Runtime is not installed, ValueError for another file than the published one."
    package = importlib.util.find_spec(PACKAGE)
    if package is None or importlib.util.find_spec("onnxruntime") is None:
        raise ImportError("the model of terrain needs pip install adaptive-terrain-diffusion onnxruntime")
    file = Path(package.submodule_search_locations[0]) / FILE
    if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
        raise ValueError(f"{file} is not the published file: expected SHA-256 {SHA256}")
    from onnxruntime import InferenceSession

    return TerrainConsistency(InferenceSession(str(file), providers=["CPUExecutionProvider"]))
