"""Processes that are forked off one which has imported everything: starting Python and importing PyTorch takes seconds, each time.

The suite starts thirty kernels, and trainings and samplings that are killed. There is one server a process, so all of them take this one. `LocalProvisioner.launch_kernel = launch` has Jupyter's kernels made so.
"""

import multiprocessing
import os
import sys

import torch
from jupyter_client.provisioning import LocalProvisioner

# Not matplotlib.pyplot: it arranges with a running IPython, when it is imported, that figures are shown.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["diffusion_nb.cli.main", "diffusion_nb.cli.train", "diffusion_nb.cli.sample", "diffusion_nb.recipes.vdm", "diffusion_nb.training.hooks",
                               "diffusion_nb.training.ema", "diffusion_nb.generation.generate", "diffusion_nb.guidance", "pytest", "PIL.Image", "diffusion_nb.book.claims", "sklearn.datasets", "sklearn.model_selection",
                               "torch._dynamo", "torchdiffeq", "sympy", "scipy.integrate", "matplotlib.figure", "matplotlib.backends.backend_agg",
                               "ipykernel.kernelapp", "ipykernel.ipkernel", "ipywidgets", "tqdm.auto"])  # fmt: skip


def run_kernel(argv: list[str], cwd: str, env: dict[str, str]) -> None:
    "A kernel, in a forked process."
    from ipykernel.kernelapp import IPKernelApp

    from tools.figures import add_to

    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if seed := env.get("DIFFUSION_NB_KERNEL_SEED"):  # `make test-anywhere`: no stored output hangs on it
        torch.manual_seed(int(seed))
    sys.argv = ["ipykernel_launcher", *argv]
    app = IPKernelApp.instance()
    app.initialize(argv)
    add_to(app.shell)
    app.start()


class Forked:
    "A process of multiprocessing, as `subprocess.Popen` would show it."

    stdin = stdout = stderr = None

    def __init__(self, process):
        self.process, self.pid = process, process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int | None:
        self.process.join()
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()

    def terminate(self) -> None:
        self.process.terminate()


async def launch(self: LocalProvisioner, cmd: list[str], **kwargs) -> dict:
    "In place of `LocalProvisioner.launch_kernel`."
    cwd = kwargs.get("cwd") or os.getcwd()
    process = SERVER.Process(target=run_kernel, args=(cmd[3:], str(cwd), dict(kwargs.get("env") or os.environ)))
    process.start()
    self.process, self.pid, self.cwd = Forked(process), process.pid, cwd
    return self.connection_info
