"""Scores of two sets of features.

With features φ of mean μ and covariance Σ, and φ₁ generated, φ₂ real:

    Fréchet distance       ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½)                       (Heusel et al., 2017)
    KID                    MMD² (unbiased) of k(x, y) = (⟨x, y⟩ / d + 1)³ over subsets  (Bińkowski et al., 2018)
    precision, recall      share of one set within the 3-neighbour balls of the other   (Kynkäänniemi et al., 2019)
    density, coverage      the same by the 5-neighbour balls of real images alone       (Naeem et al., 2020)
"""

import numpy as np
import torch
from torch import Tensor
from torch_fidelity import (
    KEY_METRIC_FID,
    KEY_METRIC_KID_MEAN,
    KEY_METRIC_KID_STD,
    KEY_METRIC_PRECISION,
    KEY_METRIC_RECALL,
)
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

NUM_NEIGHBOURS = 3
NUM_COVERAGE_NEIGHBOURS = 5
NUM_KID_SUBSETS = 100


def frechet_distance(features_1: Tensor, features_2: Tensor) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½) of two sets of features, (N, d) and (M, d), N, M ≥ 2 (Heusel et al., 2017).

    With centred features X / √(N − 1) and Y / √(M − 1), Σ₁ = XᵀX and Σ₂ = YᵀY. The eigenvalues of Σ₁Σ₂ are 0 and those
    of (XYᵀ)(XYᵀ)ᵀ, so tr (Σ₁Σ₂)^½ is the sum of the singular values of XYᵀ, which has N rows and M columns. It is
    computed so where one set has fewer than d, in float64, and by torch-fidelity from d × d matrices otherwise.

    Biased upwards for N < 2048; below 0 only by rounding.
    """
    n, m, d = len(features_1), len(features_2), features_1.shape[1]
    if min(n, m) >= d:
        return distance_of_statistics(*(fid_features_to_statistics(f) for f in (features_1, features_2)))
    means = [f.double().mean(0) for f in (features_1, features_2)]
    x, y = ((f - mean) / (len(f) - 1) ** 0.5 for f, mean in zip((features_1, features_2), means))
    traces = x.square().sum() + y.square().sum() - 2 * torch.linalg.matrix_norm(x @ y.T, "nuc")
    return ((means[0] - means[1]).square().sum() + traces).item()


def distance_of_statistics(statistics_1: dict[str, np.ndarray], statistics_2: dict[str, np.ndarray]) -> float:
    """The Fréchet distance of means `mu` (d) and covariances `sigma` (d, d), of one floating type each."""
    return fid_statistics_to_metric(statistics_1, statistics_2, verbose=False)[KEY_METRIC_FID]


def score_features(
    features: Tensor, features_real: Tensor, kid_subset_size: int | None = None, seed: int = 0
) -> dict[str, float]:
    """The scores that compare two sets of features, (N, d) generated and (M, d) real.

    Args:
        features: Of generated images.
        features_real: Of real ones.
        kid_subset_size: As for `evaluate`.
        seed: Seed of the subsets of KID.

    Returns:
        `frechet_distance`, `kid_mean`, `kid_std`, `precision` and `recall`.
    """
    n = min(len(features), len(features_real))
    kid = kid_features_to_metric(
        features,
        features_real,
        kid_subsets=NUM_KID_SUBSETS,
        kid_subset_size=min(1000, n // 2) if kid_subset_size is None else kid_subset_size,
        rng_seed=seed,
        verbose=False,
    )
    # torch-fidelity takes the generated set first
    prc = prc_features_to_metric(features, features_real, prc_neighborhood=NUM_NEIGHBOURS, verbose=False)
    return {
        "frechet_distance": frechet_distance(features, features_real),
        "kid_mean": kid[KEY_METRIC_KID_MEAN],
        "kid_std": kid[KEY_METRIC_KID_STD],
        "precision": prc[KEY_METRIC_PRECISION],
        "recall": prc[KEY_METRIC_RECALL],
    }


def density_and_coverage(
    features: Tensor, features_real: Tensor, num_neighbours: int = NUM_COVERAGE_NEIGHBOURS
) -> dict[str, float]:
    """How often generated features (N, d) lie in the open balls of real ones (M, d) (Naeem et al., 2020, eq. 4 and 5).

    The ball of a real image reaches to its k-th nearest real neighbour; k is at most M − 1, M ≥ 2.

    Returns:
        `density`, the mean over generated images of the number of balls around each, by k: about 1 for real images;
        and `coverage`, the share of balls that hold a generated image, in [0, 1].
    """
    real = features_real.double()
    k = min(num_neighbours, len(real) - 1)
    radius = torch.cdist(real, real).kthvalue(k + 1, dim=1).values  # the first is the image itself
    inside = torch.cdist(features.double(), real) < radius
    return {"density": inside.sum(1).double().mean().item() / k, "coverage": inside.any(0).double().mean().item()}


def nearest(features: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean distance to the nearest of `others` (M, d) and its index, for each of `features` (N, d)."""
    distances, index = torch.cdist(features.double(), others.double()).min(1)
    return distances, index


def memorised_share(features: Tensor, training: Tensor, heldout: Tensor, quantile: float = 0.01) -> float:
    """The share of generated images that are nearer to a training image than 99 % of held-out images are.

    Args:
        features: Of generated images, with shape (N, d).
        training: Of the training images, with shape (M, d).
        heldout: Of real images that were not trained on, with shape (K, d): the yardstick.
        quantile: Share of the held-out images that counts as too near, in [0, 1].
    """
    threshold = nearest(heldout, training)[0].quantile(quantile)
    return (nearest(features, training)[0] < threshold).double().mean().item()
