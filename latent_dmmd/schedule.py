"""Which steps a flow takes: their noise levels, from high to low, and their order.

**Second order.** Gradients change along the way, so a step of first order (Euler) is off by the curvature of the path.
The velocity dz/dt of a step of length h is extrapolated to its middle from the step before, of length h',

    v ← v + h / (2 h') (v − v'),

the method of Adams and Bashforth, which costs no evaluation. The first step and the one to the data stay of first
order.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from latent_dmmd.embeddings import MeanEmbeddings

Sampler = Literal["exact", "approximate", "hybrid"]
SolverOrder = Literal[1, 2]


@dataclass
class SamplingDefaults:
    """How a DMMD pipeline generates where a call does not say; a saved pipeline carries its own.

    Args:
        sampler: "approximate" (stored mean embeddings, independent particles), which suits any number of images;
            "exact" (mean embeddings of the particles, which interact), for large batches; or "hybrid" (exact for the
            last levels).
        num_noise_levels: Noise levels K of the flow.
        steps_per_level: Gradient steps N_s at each.
        solver_order: Order of the steps, 1 or 2; 2 uses the step before as well and costs no evaluation. Other forward
            processes than the linear one have 1.
    """

    sampler: Sampler = "approximate"
    num_noise_levels: int = 25
    steps_per_level: int = 2
    solver_order: SolverOrder = 2


@dataclass(frozen=True)
class FlowStep:
    """One step, from noise level `start` to `end`, by the witness of the stored level with index `level`."""

    level: int
    start: float
    end: float


def flow_schedule(
    embeddings: MeanEmbeddings, num_noise_levels: int, steps_per_level: int | list[int], start: float = 1.0
) -> list[FlowStep]:
    """All steps of a flow, from high noise to low.

    Args:
        embeddings: The stored mean embeddings.
        num_noise_levels: K, at most the number of stored levels up to `start`, which are thinned evenly.
        steps_per_level: N_s, at every level or at each of them, from high noise to low.
        start: Noise level of the initial particles, in (0, 1]; the flow begins at the highest stored level up to it.

    Raises:
        ValueError: If an argument is out of range; the message names it.
    """
    available = num_levels_up_to(start, embeddings)
    if not 1 <= num_noise_levels <= available:
        up_to = "" if available == len(embeddings.levels) else f" up to {start:g}"
        raise ValueError(
            f"num_noise_levels must be in [1, {available}], the stored levels{up_to}; got {num_noise_levels}"
        )
    counts = steps_per_level if isinstance(steps_per_level, list) else [steps_per_level] * num_noise_levels
    if len(counts) != num_noise_levels or min(counts) < 1:
        raise ValueError(f"steps_per_level must be at least 1; got {steps_per_level}")
    levels = [-(-k * available // num_noise_levels) - 1 for k in range(num_noise_levels, 0, -1)]
    times = embeddings.levels.double().tolist()
    steps = []
    for level, following, count in zip(levels, levels[1:] + [None], counts):
        t, end = times[level], 0.0 if following is None else times[following]
        at = [t + (end - t) * i / count for i in range(count + 1)]
        steps += [FlowStep(level, here, there) for here, there in zip(at, at[1:])]
    return steps


def num_levels_up_to(start: float, embeddings: MeanEmbeddings) -> int:
    """How many stored levels are not above `start`. Raises ValueError if none is."""
    count = int((embeddings.levels <= start + 1e-6).sum())
    if not count or start > 1:
        raise ValueError(f"start must be in [{embeddings.levels.min().item():g}, 1]; got {start}")
    return count


def steps_for_nfe(nfe: int, num_stored_levels: int) -> tuple[int, list[int]]:
    """K noise levels, as many as there are and the NFE allows, and the steps at each, which add up to the NFE.

    Steps that do not divide by K are taken at low noise.

    Raises ValueError if the NFE is not positive.
    """
    check_nfe(nfe)
    levels = min(nfe, num_stored_levels)
    each, more = divmod(nfe, levels)
    return levels, [each] * (levels - more) + [each + 1] * more


def check_nfe(nfe: int) -> None:
    """Raise ValueError unless it is positive."""
    if nfe < 1:
        raise ValueError(f"num_inference_steps must be at least 1; got {nfe}")


def set_sigmas(
    scheduler: FlowMatchEulerDiscreteScheduler, nfe: int, start: float = 1.0, device: torch.device | None = None
) -> list[float]:
    """Give a scheduler of flow matching equal steps from a noise level to 0, moved by its `shift`.

    Its own steps end one early, at its smallest sigma.

    Args:
        scheduler: The scheduler.
        nfe: Steps.
        start: The first noise level, in (0, 1].
        device: Where the scheduler keeps its levels.

    Returns:
        The noise levels before the first step and after each.

    Raises:
        ValueError: If an argument is out of range.
    """
    check_nfe(nfe)
    if not 0 < start <= 1:
        raise ValueError(f"start must be in (0, 1]; got {start}")
    first = start / (scheduler.shift - (scheduler.shift - 1) * start)
    scheduler.set_timesteps(sigmas=np.linspace(first, 0, nfe + 1)[:-1].tolist(), device=device)
    return scheduler.sigmas.tolist()


class Multistep:
    """Velocities of a flow's steps, in turn, extrapolated to the middle of each from the step before.

    A step that does not begin where the one before ended is the first of another flow.

    Args:
        order: 1 leaves them as they are (Euler); 2 is the method of Adams and Bashforth.

    Raises:
        ValueError: If the order is neither.
    """

    def __init__(self, order: SolverOrder) -> None:
        if order not in (1, 2):
            raise ValueError(f"solver_order must be 1 or 2; got {order!r}")
        self.order = order
        self._previous: tuple[Tensor, float, float] | None = None

    def __call__(self, velocity: Tensor, start: float, end: float) -> Tensor:
        """The velocity to use from noise level `start` to `end`, shaped like the one at `start`."""
        if self.order == 1:
            return velocity
        before, self._previous = self._previous, (velocity, start, end)
        if before is None or end == 0 or not math.isclose(before[2], start, abs_tol=1e-6):
            return velocity
        previous, previous_start, previous_end = before
        return velocity + (start - end) / (2 * (previous_start - previous_end)) * (velocity - previous)
