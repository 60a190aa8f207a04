"""Scores of two sets of features.

With features φ of mean μ and covariance Σ, and φ₁ generated, φ₂ real:

    Fréchet distance       ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½)                       (Heusel et al., 2017)
    KID                    MMD² (unbiased) of k(x, y) = (⟨x, y⟩ / d + 1)³ over subsets  (Bińkowski et al., 2018)
    precision, recall      share of one set within the 3-neighbour balls of the other   (Kynkäänniemi et al., 2019)
"""

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
NUM_KID_SUBSETS = 100


def frechet_distance(features_1: Tensor, features_2: Tensor) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½) of two sets of features (N, d), N ≥ 2 (Heusel et al., 2017).

    Biased upwards for N < 2048; below 0 only by rounding.
    """
    statistics_1, statistics_2 = (fid_features_to_statistics(f) for f in (features_1, features_2))
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
