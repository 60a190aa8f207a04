"""Mean embeddings and step lengths, measured after training.

Witness matching regresses ∇f_t / ‖f_t‖_H on (x_t − x_0) / λ_t, so s_t = λ_t / ‖f_t‖_H should hold; but the averaged
network has shorter gradients than the trained one. Other objectives fix a norm (one-centred penalty) or nothing. So s_t
is measured: the least-squares factor E ⟨∇f_t, x_t − x_0⟩ / E ‖∇f_t‖² on draws of the forward process
(`measure_gradients`); and short steps are lengthened by as much as gradients on a flow's particles are shorter than
there (`calibrate_on_particles`).
"""

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from latent_dmmd.discrepancy import MMD, Discrepancy, Witness
from latent_dmmd.embeddings import MeanEmbeddings
from latent_dmmd.flow import ApproximateFlow
from latent_dmmd.schedule import flow_schedule

Pairs = Sequence[tuple[Tensor, Tensor]]


def conditioned(net: nn.Module, label: int | None) -> Callable[[Tensor, Tensor], Tensor]:
    """φ(x, t) of a class; of any class if None."""
    return net if label is None else lambda x, t: net(x, t, label)


@torch.no_grad()
def measure_embeddings(
    feature_net: nn.Module, pairs: Pairs, t: Tensor, discrepancy: Discrepancy | None = None
) -> tuple[Tensor, Tensor]:
    """Mean embeddings of one level, from pairs of the forward process.

    Args:
        feature_net: φ.
        pairs: Batches of (x_0, x_t), each with shape (B, C, H, W); N pairs in all.
        t: The noise level, with shape ().
        discrepancy: Whose witness it is; the MMD of the linear kernel by default.

    Returns:
        The mean embeddings of X_0 and X_t, as means with shape (F) where these are enough and as features with shape
        (N, F) where not.
    """
    clean = torch.cat([feature_net(x_0, t) for x_0, _ in pairs])
    noisy = torch.cat([feature_net(x_t, t) for _, x_t in pairs])
    if (discrepancy or MMD()).needs_means_only:
        return clean.mean(0), noisy.mean(0)
    return clean, noisy


def measure_gradients(feature_net: nn.Module, pairs: Pairs, t: Tensor, witness: Witness) -> tuple[float, float]:
    """How far the gradients g of a witness reach on the forward process, at x_t.

    Args:
        feature_net: φ.
        pairs: Batches of (x_0, x_t), each with shape (B, C, H, W).
        t: The noise level, with shape ().
        witness: The witness of that level.

    Returns:
        The least-squares scale s = Σ ⟨g, x_t − x_0⟩ / Σ ‖g‖², which is 0 where the gradients do not point along
        x_t − x_0 at all, so that the flow does not move there; and the root mean square of ‖g‖.
    """
    inner = square = count = 0.0
    for x_0, x_t in pairs:
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            (g,) = torch.autograd.grad(witness(feature_net(x, t)).sum(), x)
        inner += (g * (x_t - x_0)).sum().item()
        square += g.square().sum().item()
        count += len(x)
    return (max(0.0, inner / square) if square > 0 else 0.0), (square / count) ** 0.5


@torch.no_grad()
def calibrate_on_particles(
    feature_net: nn.Module,
    embeddings: MeanEmbeddings,
    gradient_norm: list[float],
    z: Tensor,
    label: int | None = None,
) -> None:
    """Make short steps as long on the particles of a flow as on the forward process; fills `embeddings.lengthening`.

    Particles lag behind the forward process, and where they are, gradients are shorter; steps calibrated on the forward
    process alone then let the lag grow. Particles flow down the stored witness, one step per level, and at each level
    the step is multiplied by the ratio r_t of the root mean squares of ‖∇f_t‖ on the forward process and on the
    particles, within [1/2, 2].

    Args:
        feature_net: φ.
        embeddings: The stored mean embeddings, with the scales of `measure_gradients`.
        gradient_norm: Root mean square of ‖∇f_t‖ at x_t for every level, T numbers.
        z: Initial particles, with shape (N, C, H, W).
        label: The class; any class if None.
    """
    flow, row = ApproximateFlow(feature_net, embeddings, label), embeddings.row(label)
    embeddings.lengthening[row] = 1
    for step in flow_schedule(embeddings, len(embeddings.levels), steps_per_level=1):
        scale, step_size = flow.coefficients(step)
        gradient = flow.gradient(z, step.level)
        norm = gradient.flatten(1).square().sum(1).mean().sqrt().item()
        ratio = min(2.0, max(0.5, gradient_norm[step.level] / norm)) if norm > 0 else 1.0
        embeddings.lengthening[row, step.level] = ratio
        z = scale * z - ratio * step_size * gradient


@torch.no_grad()
def measure_all(
    feature_net: nn.Module,
    embeddings: MeanEmbeddings,
    pairs_of: Callable[[int, int | None], list[tuple[Tensor, Tensor]]],
    z: Tensor,
    measured: bool = True,
) -> None:
    """Fill the stored mean embeddings and the gradient scales of every class and noise level.

    Args:
        feature_net: φ.
        embeddings: What is filled; its levels are set.
        pairs_of: Batches of (x_0, x_t) for the index of a level and a class (any class if None).
        z: Initial particles for `calibrate_on_particles`, with shape (N, C, H, W).
        measured: Whether the mean embeddings are measured, and not only the scales.
    """
    levels, labels = embeddings.levels, [*range(embeddings.config.num_classes), None]
    without_direction = set()
    with tqdm(total=len(labels) * len(levels), desc="measuring the witness", unit="level") as progress:
        for label in labels:
            net, row, gradient_norm = conditioned(feature_net, label), embeddings.row(label), []
            for k, t in enumerate(levels):
                pairs = pairs_of(k, label)
                if measured:
                    clean, noisy = measure_embeddings(net, pairs, t, embeddings.discrepancy)
                    embeddings.clean[row, k], embeddings.noisy[row, k] = clean, noisy
                scale, norm = measure_gradients(net, pairs, t, embeddings.at_level(k, label).stored)
                embeddings.gradient_scale[row, k] = scale
                gradient_norm.append(norm)
                progress.update()
            scales = embeddings.gradient_scale[row].tolist()
            without_direction |= {f"{t:.2f}" for t, scale in zip(levels.tolist(), scales) if scale == 0}
            calibrate_on_particles(feature_net, embeddings, gradient_norm, z, label)
    if without_direction:
        at = ", ".join(sorted(without_direction))
        print(f"the witness does not point towards the data at t = {at}: train longer", file=sys.stderr)
