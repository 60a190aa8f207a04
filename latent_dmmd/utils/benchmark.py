"""Time and peak memory of tasks that take turns.

Each measurement is the median of several repetitions, and repetitions of what is compared take turns, so that a machine
that slows down does so for all of them. Peak memory is that of the accelerator's allocator, or on Linux the growth of
the process's resident set at its highest.
"""

import ctypes
import gc
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Cost:
    """Seconds (median over repetitions) and peak memory in MB, None where it cannot be measured."""

    seconds: float
    peak_mb: float | None


class PeakMemory:
    """Context that measures the peak memory of what runs in it, as `.mb`."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.mb = device, None

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        self.before = None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif os.access("/proc/self/clear_refs", os.W_OK):
            if hasattr(ctypes.CDLL(None), "malloc_trim"):
                ctypes.CDLL(None).malloc_trim(0)  # what earlier tasks freed goes back, and counts again
            Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak
            self.before = self.resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            after = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else self.resident("VmHWM")
            self.mb = max(0.0, (after - self.before) / 2**20)

    @staticmethod
    def resident(field: str) -> int:
        return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def peak_memory_mb(device: torch.device) -> float | None:
    """Peak memory in MB: of the GPU, or of this process; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if os.access("/proc/self/status", os.R_OK):  # on Linux `ru_maxrss` begins with the peak of the parent
        return PeakMemory.resident("VmHWM") / 2**20
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**10 if sys.platform != "darwin" else 2**20)


def measure(tasks: dict[str, Callable[[], object]], device: torch.device, repeats: int = 5) -> dict[str, Cost]:
    """The cost of each task; one round to warm up and for memory, then `repeats` rounds in which they take turns."""
    peaks, seconds = {}, {name: [] for name in tasks}
    for name, task in tasks.items():
        with PeakMemory(device) as peak:
            task()
        peaks[name] = peak.mb
    for _ in range(repeats):
        for name, task in tasks.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            task()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: Cost(statistics.median(seconds[name]), peaks[name]) for name in tasks}


def fitted_exponent(sizes: list[int], values: list[float], last: int = 3) -> float:
    """The slope of log value over log size, by least squares on the `last` largest sizes."""
    x, y = ([math.log(v) for v in a[-last:]] for a in (sizes, values))
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    return sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y)) / sum((a - x_mean) ** 2 for a in x)
