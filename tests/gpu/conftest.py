"""How the checks of a GPU run: skipped without one, and alike, without TF32, with nothing compiled before.

`make gpu` runs them without the rest of the tests. DIFFUSION_NB_GPU_TESTS_ON=cpu tries their logic on a CPU: it shows nothing of a GPU.
"""

import os

import pytest
import torch

DEVICE = os.environ.get("DIFFUSION_NB_GPU_TESTS_ON", "cuda")
if DEVICE.startswith("cuda"):
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # read when CUDA starts; else its products may differ


@pytest.fixture(scope="session", autouse=True)
def a_gpu():
    "None; the tests of this folder are skipped where there is no GPU."
    if DEVICE.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device; DIFFUSION_NB_GPU_TESTS_ON=cpu tries the logic of these tests without one")


@pytest.fixture(autouse=True)
def exact_and_fresh(a_gpu):
    "None; float32 is float32, nothing is compiled yet, and a function that is compiled too often is an error."
    import torch._dynamo as dynamo

    dynamo.reset()
    dynamo.utils.counters.clear()
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    with dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch.backends.cudnn.allow_tf32 = before
