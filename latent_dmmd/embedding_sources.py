"""Where the mean embeddings of a training step come from.

Three sources estimate the distributions of X_t and X_0 in feature space, behind one interface: the batch with gradient
(the paper's: three forwards of φ per step), the batch through the averaged network without (one forward with gradient,
two without), and running embeddings per level from the averaged network, refreshed every few steps (one forward with
gradient, and the least noise).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from latent_dmmd.discrepancy import Witness
from latent_dmmd.embeddings import add_class_dimension


class EmbeddingSource(nn.Module):
    """Base class of the three sources: the witnesses of a batch's levels, estimated one way or another."""

    def forward(self, objective: nn.Module, batch: NamedTuple, x_t: Tensor) -> Witness:
        """The witnesses of a batch's levels, whose points have shape (L, M, F).

        Args:
            objective: The `WitnessObjective` that asks.
            batch: Its `Batch`.
            x_t: The batch's noisy particles, with shape (L, B, C, H, W).
        """
        raise NotImplementedError


class BatchEmbeddings(EmbeddingSource):
    """The batch itself, with gradient, as in the paper: 2 B more forwards of φ per level, and the noise of B pairs."""

    def forward(self, objective: nn.Module, batch: NamedTuple, x_t: Tensor) -> Witness:
        phi_0, phi_t = objective.both_features(batch, x_t)
        return objective.discrepancy.witness(phi_t, phi_0)


class AveragedEmbeddings(EmbeddingSource):
    """The batch through the averaged network, without gradient: 2 B more forwards, none of them kept for backward.

    Args:
        averaged_net: The averaged network (EMA of φ).
    """

    def __init__(self, averaged_net: nn.Module) -> None:
        super().__init__()
        self._net = (averaged_net,)  # in a tuple: not a submodule, its weights are the EMA's to save

    @torch.no_grad()
    def forward(self, objective: nn.Module, batch: NamedTuple, x_t: Tensor) -> Witness:
        phi_0, phi_t = objective.both_features(batch, x_t, self._net[0])
        return objective.discrepancy.witness(phi_t, phi_0)


class RunningEmbeddings(EmbeddingSource):
    """Running embeddings per level from the averaged network, refreshed every few steps.

    Where means are enough, `clean` and `noisy` (C + 1, T, F) are running means: a plain average at first, then
    exponential.
    Otherwise they are the features of the latest M draws, with shape (C + 1, T, M, F). Either way they are what the
    samplers store; the last row is for any class.

    Args:
        averaged_net: The averaged network (EMA of φ).
        num_noise_levels: T.
        num_features: F.
        num_classes: C; 0 if particles have no classes.
        num_points: M; 0 keeps means.
        momentum: Weight of the past in the running means, in [0, 1).
        refresh_every: Steps between two refreshes.
    """

    def __init__(
        self,
        averaged_net: nn.Module,
        num_noise_levels: int,
        num_features: int,
        num_classes: int = 0,
        num_points: int = 0,
        momentum: float = 0.97,
        refresh_every: int = 4,
    ) -> None:
        super().__init__()
        self._net = (averaged_net,)
        self.num_points, self.momentum, self.refresh_every = num_points, momentum, refresh_every
        rows, points = (num_classes + 1, num_noise_levels), (num_points,) if num_points else ()
        self.register_buffer("clean", torch.zeros(*rows, *points, num_features))
        self.register_buffer("noisy", torch.zeros(*rows, *points, num_features))
        self.register_buffer("num_updates", torch.zeros(rows, dtype=torch.long))
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.long))
        add_class_dimension(self)

    @torch.no_grad()
    def forward(self, objective: nn.Module, batch: NamedTuple, x_t: Tensor) -> Witness:
        label = torch.full_like(batch.level, len(self.clean) - 1) if batch.label is None else batch.label
        row = (label, batch.level)
        if self.num_steps % self.refresh_every == 0 or not self.num_updates[row].all():
            clean, noisy = objective.both_features(batch, x_t, self._net[0])
            update = self.replace_oldest if self.num_points else self.average
            # one after the other: a step may draw a level twice
            for *k, new_clean, new_noisy in zip(*(index.tolist() for index in row), clean, noisy):
                k = tuple(k)
                past = int(self.num_updates[k])
                update(self.clean[k], past, new_clean.to(self.clean))
                update(self.noisy[k], past, new_noisy.to(self.noisy))
                self.num_updates[k] += 1
        self.num_steps += 1
        clean, noisy = self.clean[row], self.noisy[row]
        if not self.num_points:
            clean, noisy = clean[:, None], noisy[:, None]
        return objective.discrepancy.witness(noisy, clean)

    def average(self, mean: Tensor, past: int, draws: Tensor) -> None:
        """Let draws (B, F) into a running mean (F) of `past` batches before."""
        weight = min(past / (past + 1), self.momentum)  # a plain average until it is as long as the exponential one
        mean.copy_(weight * mean + (1 - weight) * draws.mean(0))

    def replace_oldest(self, points: Tensor, past: int, draws: Tensor) -> None:
        """Put draws (B, F) in the place of the oldest of points (M, F); the first batch fills all of them."""
        if past == 0:
            points.copy_(draws[torch.arange(self.num_points, device=draws.device) % len(draws)])
        index = past * len(draws) + torch.arange(len(draws), device=draws.device)
        points[index % self.num_points] = draws
