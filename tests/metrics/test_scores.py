"""Scores of features against loops."""

import math

import pytest
import torch

from latent_dmmd.metrics.scores import density_and_coverage


def loops(generated, real, k):
    """Density and coverage by their definition, one pair at a time."""
    count, covered = 0, 0
    for i, centre in enumerate(real):
        radius = sorted(math.dist(centre, other) for j, other in enumerate(real) if j != i)[k - 1]
        inside = sum(math.dist(centre, point) < radius for point in generated)
        count, covered = count + inside, covered + (inside > 0)
    return {"density": count / (k * len(generated)), "coverage": covered / len(real)}


@pytest.mark.parametrize("n, m, k", [(7, 12, 1), (20, 30, 2), (3, 20, 3)])
def test_density_and_coverage_against_loops(n, m, k):
    generator = torch.Generator().manual_seed(n)
    generated, real = (torch.randn(size, 3, generator=generator) for size in (n, m))
    generated *= 0.2  # a set that misses the outskirts
    found = density_and_coverage(generated, real, k)
    assert found == pytest.approx(loops(generated.tolist(), real.tolist(), k))
    assert 0 < found["coverage"] < 1


def test_density_and_coverage_at_their_ends():
    real = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    assert density_and_coverage(real, real)["coverage"] == 1
    assert density_and_coverage(real + 100, real) == {"density": 0, "coverage": 0}
    assert density_and_coverage(real[:1].repeat(9, 1), real)["coverage"] < 0.5  # one image again and again
    assert density_and_coverage(real, real[:3])["coverage"] == 1  # fewer real images than neighbours
