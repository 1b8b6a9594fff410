"""How fast this machine is, as two numbers beside which a time can be read: one thread, float32, the fastest of several rounds.

python benchmarks/machine.py
"""

import statistics
import time

import torch


def best(run, rounds: int = 30) -> tuple[float, float]:
    "The shortest and the usual seconds of a call."
    run()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds), statistics.median(seconds)


@torch.no_grad()
def measures() -> dict[str, float]:
    "GFLOP/s of a product of two 1024×1024 matrices, and ms of a 3×3 convolution, 64 to 64 channels, of 64 pictures of 8×8."
    a, b = torch.randn(2, 1024, 1024)
    conv, x = torch.nn.Conv2d(64, 64, 3, padding=1), torch.randn(64, 64, 8, 8)
    (product, usual), (convolution, usual_convolution) = best(lambda: a @ b), best(lambda: conv(x))
    return {
        "product of 1024×1024 matrices, GFLOP/s a core": 2e-9 * 1024**3 / product,
        "the same, median of the rounds": 2e-9 * 1024**3 / usual,
        "64→64 convolution of 64 pictures of 8×8, ms on one thread": 1e3 * convolution,
        "the same, median of the rounds (convolution)": 1e3 * usual_convolution,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
    for name, value in measures().items():
        print(f"{name}: {value:.1f}")
