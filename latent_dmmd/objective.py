"""Training objectives for the features: the paper's, and witness matching.

A step sees L noise levels and B pairs (x_0, x_t) at each. With the linear kernel the witness of level t is
f_t(z) = ⟨φ(z, t), Δ_t⟩, Δ_t = E φ(x_t, t) − E φ(x_0, t), and its gradient is looked at on the segments of the forward
path, x̃_u = (1 − u) x_0 + u x_t with u ~ U[0, 1].

**DMMD** (Galashov et al., 2025) maximises MMD² under a gradient penalty:

    L = −MMD²_u[x_t, x_0] + λ_∇ E (‖∇f_t(x̃_u)‖ − c)² + λ_ℓ2 (E ‖φ(x_0, t)‖² + E ‖φ(x_t, t)‖²),      c = 1 or 0

**Witness matching** is the same objective for c = 0 with a far better estimator. Along every pair
f(x_t) − f(x_0) = ∫₀¹ ⟨∇f(x̃_u), x_t − x_0⟩ du, hence for any λ

    −(E f(x_t) − E f(x_0)) + ½ λ E ‖∇f(x̃_u)‖² = ½ λ E ‖∇f(x̃_u) − (x_t − x_0) / λ‖² − E ‖x_t − x_0‖² / (2λ)

and the right-hand side needs φ at x̃_u alone: a least-squares regression of the witness gradient on the displacement,
that is, flow matching restricted to gradients of witnesses. Two choices make it well scaled: the witness is normalised,
f = ⟨φ, Δ_t / ‖Δ_t‖⟩, the unit-ball witness of MMD instead of MMD², and λ_t = (E ‖x_t − x_0‖²)^½, so that the regression
target has unit length at every level and the loss is the unexplained fraction of the displacement.
"""

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from latent_dmmd.discrepancy import linear_mmd2, linear_witness
from latent_dmmd.forward import ForwardProcess, noise_levels


class Batch(NamedTuple):
    """What one training step draws.

    x_0: clean particles, with shape (L, B, C, H, W). level: indices into the noise levels, with shape (L). eps:
    standard normal noise, shaped like x_0. u: positions on the segments in [0, 1], with shape (L, B).
    """

    x_0: Tensor
    level: Tensor
    eps: Tensor
    u: Tensor


class Terms(NamedTuple):
    """A loss: `total` is minimised, `named` holds its parts and diagnostics as detached scalars, to be logged."""

    total: Tensor
    named: dict[str, Tensor]


def across_ranks(phi: Tensor) -> Tensor:
    """Features (L, B, F) of all W ranks as (L, W B, F), with gradient.

    MMD is a statistic of the whole batch: the mean of the ranks' own estimates is another, noisier one. Summed over
    ranks, the backward pass gives W times the gradient, which the averaging of gradients over ranks undoes.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return phi
    return torch.cat(all_gather(phi.contiguous()), dim=1)


class Objective(nn.Module):
    """Base class: the features, the forward process and the grid of noise levels.

    The whole loss is computed in `forward`, so that wrappers which synchronise gradients see every use of φ.

    Args:
        feature_net: φ, from (B, C, H, W) and (B) to (B, F).
        process: The forward process.
        num_noise_levels: Size T of the grid t_k = k / T.
    """

    def __init__(self, feature_net: nn.Module, process: ForwardProcess, num_noise_levels: int) -> None:
        super().__init__()
        self.feature_net = feature_net
        self.process = process
        self.register_buffer("levels", noise_levels(num_noise_levels), persistent=False)

    def forward(self, batch: Batch) -> Terms:
        raise NotImplementedError

    def noisy(self, batch: Batch) -> Tensor:
        """x_t of the batch, with shape (L, B, C, H, W)."""
        t = self.levels[batch.level].repeat_interleave(batch.x_0.shape[1])
        x_t = self.process.sample(batch.x_0.flatten(0, 1), t, batch.eps.flatten(0, 1))
        return x_t.unflatten(0, batch.x_0.shape[:2])

    def features(self, x: Tensor, level: Tensor, net: nn.Module | None = None) -> Tensor:
        """φ at the batch's levels: (L, B, C, H, W) and (L) to (L, B, F)."""
        t = self.levels[level].repeat_interleave(x.shape[1])
        return (net or self.feature_net)(x.flatten(0, 1), t).unflatten(0, x.shape[:2])

    def witness_gradient(self, x_0: Tensor, x_t: Tensor, u: Tensor, level: Tensor, delta: Tensor) -> Tensor:
        """∇f_t(x̃_u) for the witness ⟨φ(·, t), delta⟩, in a graph for a second derivative, with shape (L, B, C H W)."""
        u = rearrange(u, "l b -> l b 1 1 1")
        x_u = ((1 - u) * x_0 + u * x_t).detach().requires_grad_()
        f = linear_witness(self.features(x_u, level), delta)
        (gradient,) = torch.autograd.grad(f.sum(), x_u, create_graph=True)
        return gradient.to(torch.promote_types(gradient.dtype, torch.float32)).flatten(2)

    def gradient_length(self) -> Tensor | None:
        """λ_t such that ∇f_t ≈ (x_t − x_0) / λ_t where the objective says so, with shape (T); None to measure it."""
        return None


class DMMD(Objective):
    """The paper's objective (Galashov et al., 2025, Algorithm 1), with the U-statistic and the linear kernel.

    Terms: `mmd2`, `gradient_penalty`, `feature_penalty`, and the diagnostic `gradient_norm`.

    Args:
        gradient_weight: λ_∇.
        gradient_center: c, the norm the penalty asks of the witness gradient: 1 (paper) or 0.
        feature_weight: λ_ℓ2.
    """

    def __init__(
        self,
        feature_net: nn.Module,
        process: ForwardProcess,
        num_noise_levels: int,
        gradient_weight: float = 1.0,
        gradient_center: float = 1.0,
        feature_weight: float = 1e-3,
    ) -> None:
        super().__init__(feature_net, process, num_noise_levels)
        self.gradient_weight, self.gradient_center = gradient_weight, gradient_center
        self.feature_weight = feature_weight

    def forward(self, batch: Batch) -> Terms:
        x_t = self.noisy(batch)
        phi = self.features(torch.cat([batch.x_0, x_t], dim=1), batch.level)
        phi_0, phi_t = (across_ranks(half) for half in phi.chunk(2, dim=1))
        mmd2 = linear_mmd2(phi_t, phi_0, estimator="u").mean()

        delta = phi_t.mean(1) - phi_0.mean(1)
        gradient = self.witness_gradient(batch.x_0, x_t, batch.u, batch.level, delta)
        norm = (gradient.square().sum(-1) + 1e-12).sqrt()  # the plain norm has no derivative at 0
        penalty = self.gradient_weight * (norm - self.gradient_center).square().mean()
        features = self.feature_weight * (phi_0.square().sum(-1).mean() + phi_t.square().sum(-1).mean())
        named = {"mmd2": mmd2, "gradient_penalty": penalty, "feature_penalty": features, "gradient_norm": norm.mean()}
        return Terms(-mmd2 + penalty + features, {name: value.detach() for name, value in named.items()})


MeanEmbeddingSource = Literal["running", "ema", "batch"]


class WitnessMatching(Objective):
    """Regression of the normalised witness gradient on the displacement x_t − x_0.

    Terms: `matching`, in [0, 1] for any sensible field: 1 is the zero field; and the diagnostics `mmd`, the norm of
    the mean embeddings' difference, and `cosine`, between witness gradient and displacement.

    The direction Δ_t / ‖Δ_t‖ comes from one of three sources. `"batch"`: the mean embeddings of the batch, with
    gradient; 3 forwards of φ. `"ema"`: those of the averaged network, without. `"running"`: a table of running means
    per level from the averaged network, refreshed every few steps: 1 forward, and far less noise. The table is also
    what the approximate sampler uses.

    Args:
        averaged_net: The averaged network (EMA of φ); needed for "ema" and "running".
        mean_embeddings: The source.
        momentum: Weight of the past in the running means.
        refresh_every: Steps between two refreshes of the running means.
    """

    def __init__(
        self,
        feature_net: nn.Module,
        process: ForwardProcess,
        num_noise_levels: int,
        averaged_net: nn.Module | None = None,
        mean_embeddings: MeanEmbeddingSource = "running",
        momentum: float = 0.97,
        refresh_every: int = 4,
    ) -> None:
        super().__init__(feature_net, process, num_noise_levels)
        if mean_embeddings not in ("running", "ema", "batch"):
            raise ValueError(f"mean_embeddings must be 'running', 'ema' or 'batch'; got {mean_embeddings!r}")
        if mean_embeddings != "batch" and averaged_net is None:
            raise ValueError(f"mean_embeddings={mean_embeddings!r} needs the averaged network")
        self.source, self.momentum, self.refresh_every = mean_embeddings, momentum, refresh_every
        self._averaged_net = (averaged_net,)  # in a tuple: not a submodule, its weights are the EMA's to save
        num_features = feature_net.config.num_features
        self.register_buffer("clean_mean", torch.zeros(num_noise_levels, num_features))
        self.register_buffer("noisy_mean", torch.zeros(num_noise_levels, num_features))
        self.register_buffer("num_updates", torch.zeros(num_noise_levels, dtype=torch.long))
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.long))

    def forward(self, batch: Batch) -> Terms:
        x_t = self.noisy(batch)
        if self.source == "batch":
            phi = self.features(torch.cat([batch.x_0, x_t], dim=1), batch.level)
            phi_0, phi_t = (across_ranks(half) for half in phi.chunk(2, dim=1))
            delta = phi_t.mean(1) - phi_0.mean(1)
        else:
            delta = self.averaged_delta(batch, x_t)
        mmd = (delta.square().sum(-1, keepdim=True) + 1e-12).sqrt()

        gradient = self.witness_gradient(batch.x_0, x_t, batch.u, batch.level, delta / mmd)
        displacement = (x_t - batch.x_0).flatten(2)
        target = displacement / rearrange(self.gradient_length()[batch.level], "l -> l 1 1")
        matching = (gradient - target).square().sum(-1).mean()
        with torch.no_grad():
            cosine = torch.cosine_similarity(gradient, displacement, dim=-1).mean()
        return Terms(matching, {"matching": matching.detach(), "mmd": mmd.detach().mean(), "cosine": cosine})

    @torch.no_grad()
    def averaged_delta(self, batch: Batch, x_t: Tensor) -> Tensor:
        """Δ_t at the batch's levels from the averaged network, with shape (L, F); refreshes the running means."""
        level = batch.level
        stale = self.num_steps % self.refresh_every == 0 or not self.num_updates[level].all()
        self.num_steps += 1
        if self.source == "ema" or stale:
            phi = self.features(torch.cat([batch.x_0, x_t], dim=1), level, self._averaged_net[0])
            clean, noisy = (across_ranks(half).mean(1) for half in phi.chunk(2, dim=1))
            if self.source == "ema":
                return noisy - clean
            # a plain average until it is as long as the running one
            clean, noisy = clean.to(self.clean_mean), noisy.to(self.noisy_mean)
            past = self.num_updates[level].float()[:, None]
            weight = torch.minimum(past / (past + 1), torch.full_like(past, self.momentum))
            self.clean_mean[level] = weight * self.clean_mean[level] + (1 - weight) * clean
            self.noisy_mean[level] = weight * self.noisy_mean[level] + (1 - weight) * noisy
            self.num_updates[level] += 1
        return self.noisy_mean[level] - self.clean_mean[level]

    def gradient_length(self) -> Tensor:
        """λ_t = (E ‖x_t − x_0‖²)^½ = d(t) D^½, with shape (T)."""
        config = self.feature_net.config
        dimension = config.in_channels * config.sample_size**2
        return self.process.displacement(self.levels) * dimension**0.5
