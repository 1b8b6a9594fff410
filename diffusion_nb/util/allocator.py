"""Keeps memory that PyTorch frees, for the next time it is asked for."""

import ctypes
import os

# glibc gives blocks of megabytes back to the system when they are freed, and the system hands them out again page by page, filled with zeros:
# up to a third of the time of a small network on a CPU.
LIMITS = {
    "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1),
    "MALLOC_TOP_PAD_": (-2, 2**26),
    "MALLOC_MMAP_THRESHOLD_": (-3, 2**25),
}
VARIABLES = {name: str(value) for name, (_, value) in LIMITS.items()}  # for processes that are still to start


def keep_freed_memory() -> None:
    "Set the limits in this process and those that it starts. Nothing happens where the C library is not glibc, or where the user has set them."
    if any(name in os.environ for name in LIMITS):
        return
    os.environ |= VARIABLES
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        for parameter, value in LIMITS.values():
            mallopt(parameter, value)
