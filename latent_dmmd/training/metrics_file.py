"""metrics.jsonl: the figures of a run, one JSON object per line, and their curves."""

import json
import time
from pathlib import Path

import torch
from torch import Tensor

from latent_dmmd.utils.files import write_aside


def check_finite(step: int, named: dict[str, Tensor], total: Tensor, norm: Tensor) -> None:
    """Raise FloatingPointError, naming step and term, before the update is made."""
    if torch.isfinite(total) and torch.isfinite(torch.as_tensor(norm, device=total.device)):
        return
    bad = [name for name, value in named.items() if not torch.isfinite(value)] or ["gradient"]
    raise FloatingPointError(f"step {step}: {', '.join(bad)} not finite; the last checkpoint is from before")


def readable_lines(path: Path) -> list[dict]:
    """The objects of a file of JSON lines, without a last line that was cut off when its writer was killed."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


class MetricsFile:
    """metrics.jsonl of a run folder. Lines after the step that a run resumes from are dropped first.

    Args:
        path: The file.
        first_step: Steps that are done.
        enabled: Whether this process writes it.
    """

    def __init__(self, path: Path, first_step: int, enabled: bool) -> None:
        self.path, self.enabled, self.start = path, enabled, time.monotonic()
        self.seconds = 0.0
        if not enabled:
            return
        kept = [line for line in readable_lines(path) if line["step"] <= first_step]
        self.seconds = kept[-1]["seconds"] if kept else 0.0
        write_aside(path, lambda aside: aside.write_text("".join(json.dumps(line) + "\n" for line in kept)))

    def write(self, figures: dict[str, float]) -> None:
        if not self.enabled:
            return
        seconds = round(self.seconds + time.monotonic() - self.start, 2)
        with self.path.open("a") as file:
            file.write(json.dumps({**figures, "seconds": seconds}) + "\n")


def plot_losses(metrics: Path, path: Path) -> None:
    """Curves of every term in a metrics.jsonl, one panel each, over steps."""
    from matplotlib.figure import Figure  # not pyplot, whose backend is the caller's

    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    skipped = ("step", "seconds", "samples_per_second")
    names = [name for name in lines[0] if name not in skipped] if lines else []
    width = 3.6 * max(1, len(names))
    figure = Figure(figsize=(width, 3))
    axes = figure.subplots(1, max(1, len(names)), squeeze=False)
    figure.subplots_adjust(left=0.6 / width, right=1 - 0.15 / width, bottom=0.16, top=0.9, wspace=0.25)
    for axis, name in zip(axes[0], names):
        values = torch.tensor([line.get(name, float("nan")) for line in lines], device="cpu")
        axis.plot([line["step"] for line in lines], values, linewidth=1)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
