import math

import pytest
import torch

from latent_dmmd.discrepancy import mmd2
from latent_dmmd.experiments.toy2d import (
    TARGETS,
    adaptive_bandwidth,
    energy_distance,
    gaussian_mmd2,
    kernel_flow,
    learned_flow,
    mean_flow,
    measured_bandwidth,
    optimal_bandwidth,
    toy_embeddings,
    train_toy,
)
from latent_dmmd.kernels import GaussianKernel


@pytest.mark.parametrize("gap, sigma, dim", [(5.0, 0.5, 2), (3.0, 0.2, 1), (6.0, 1.0, 4)])
def test_optimal_bandwidth_is_the_steepest(gap, sigma, dim):
    """Fact 1: the gradient in μ is stationary in α at α*, and smaller on both sides."""

    def slope(alpha):
        g = torch.tensor(gap, dtype=torch.float64, requires_grad=True)
        alpha = torch.tensor(alpha, dtype=torch.float64)
        return torch.autograd.grad(gaussian_mmd2(g, sigma, alpha, dim), g)[0].item()

    best = optimal_bandwidth(gap, sigma, dim)
    assert slope(best) > max(slope(0.99 * best), slope(1.01 * best))
    assert (slope(best + 1e-4) - slope(best - 1e-4)) / 2e-4 == pytest.approx(0, abs=1e-6)


def test_optimal_bandwidth_vanishes_close_by():
    threshold = 0.5 * math.sqrt(2 * 4)
    assert optimal_bandwidth(0.999 * threshold, 0.5) == 0 < optimal_bandwidth(1.001 * threshold, 0.5)


def test_closed_form_against_samples():
    generator = torch.Generator().manual_seed(0)
    mu, sigma, alpha = torch.tensor([1.5, 0.0]), 0.6, 0.9
    estimates = []
    for _ in range(40):
        x, y = (sigma * torch.randn(200, 2, generator=generator) for _ in range(2))
        estimates.append(alpha**-2 * mmd2(x + mu, y, GaussianKernel(alpha)))
    estimates = torch.stack(estimates)
    error = estimates.std() / len(estimates) ** 0.5
    assert abs(estimates.mean() - gaussian_mmd2(1.5, sigma, alpha)) < 4 * error < 0.1 * estimates.mean()


def test_measured_bandwidth_is_near_the_formula():
    alphas = torch.linspace(0.2, 3.4, 17)
    assert measured_bandwidth(5.0, 0.5, alphas, 300, seed=0) == pytest.approx(optimal_bandwidth(5.0, 0.5), abs=0.45)


def test_flow_of_the_mean_is_fastest_with_the_best_bandwidth():
    steps_until = lambda gaps: next((i for i, gap in enumerate(gaps) if gap < 0.05), math.inf)  # noqa: E731
    best = steps_until(mean_flow(5.0, 0.5, lambda gap: optimal_bandwidth(gap, 0.5), 2.0, 400))
    fixed = [steps_until(mean_flow(5.0, 0.5, lambda gap, a=alpha: a, 2.0, 400)) for alpha in (0.3, 1.5, 6.0)]
    assert best < min(fixed)


def test_energy_distance():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(500, 2, generator=generator) for _ in range(2))
    assert abs(energy_distance(x, y)) < 0.02 and energy_distance(x, y + 3) > 2
    a, b = torch.tensor([[0.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [1.0, 2.0]])
    assert energy_distance(a, b) == pytest.approx(2 * (1 + math.sqrt(5)) / 2 - 2 - 2)


def test_modes_hit():
    target = TARGETS["eight modes"]
    assert target.modes_hit(target.draw(800, torch.Generator().manual_seed(0)))[1] == 8
    assert target.modes_hit(target.centres[:1].expand(10, 2)) == (1.0, 1)
    assert target.modes_hit(torch.zeros(10, 2) - 9) == (0.0, 0)


def test_narrow_kernels_stall_and_adaptive_ones_arrive():
    target = TARGETS["eight modes"]
    y = target.draw(1000, torch.Generator().manual_seed(9))
    start = energy_distance(torch.randn(64, 2, generator=torch.Generator().manual_seed(0)), y)
    stalled = energy_distance(kernel_flow(target, lambda z, y: 0.3, 1.0, 50, 64, 0), y)
    arrived = energy_distance(kernel_flow(target, adaptive_bandwidth(), 1.0, 50, 64, 0), y)
    assert stalled > 0.5 * start and arrived < 0.05 * start


@pytest.mark.parametrize("name", ["witness matching", "DMMD"])
def test_learned_features_bring_particles_near(name):
    target = TARGETS["Gaussian"]
    y = target.draw(1000, torch.Generator().manual_seed(9))
    objective, net, _ = train_toy(name, target, 60, levels=8, pairs=16)
    stored = toy_embeddings(objective, net, target, 256)
    start = energy_distance(torch.randn(64, 2, generator=torch.Generator().manual_seed(0)), y)
    for sampler in ("exact", "approximate"):
        assert energy_distance(learned_flow(net, stored, sampler, 25, 64, 0), y) < 0.3 * start
