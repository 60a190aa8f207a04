import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from latent_dmmd.discrepancy import linear_mmd2, linear_witness, mmd2, witness
from latent_dmmd.kernels import GaussianKernel, LinearKernel, RationalQuadraticKernel

KERNELS = [LinearKernel(), GaussianKernel(0.8), RationalQuadraticKernel(1.0, 1.5)]


def samples(n=6, m=8, dim=3, shift=0.5):
    torch.manual_seed(0)
    return torch.randn(n, dim, dtype=torch.float64) + shift, torch.randn(m, dim, dtype=torch.float64)


def brute_force(x, y, kernel, estimator):
    k = lambda a, b: kernel(a[None], b[None])[0, 0]  # noqa: E731
    skip = estimator == "u"
    xx = [k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if not (skip and i == j)]
    yy = [k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if not (skip and i == j)]
    xy = [k(a, b) for a in x for b in y]
    return sum(xx) / len(xx) + sum(yy) / len(yy) - 2 * sum(xy) / len(xy)


@pytest.mark.parametrize("estimator", ["u", "v"])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_mmd2_is_the_sum_over_pairs(kernel, estimator):
    x, y = samples()
    torch.testing.assert_close(mmd2(x, y, kernel, estimator), brute_force(x, y, kernel, estimator))


def test_v_minus_u_is_the_trace_of_covariances():
    x, y = samples(7, 7)
    traces = torch.cov(x.T).trace() + torch.cov(y.T).trace()
    torch.testing.assert_close(mmd2(x, y, estimator="v") - mmd2(x, y, estimator="u"), traces / 7)
    torch.testing.assert_close(mmd2(x, y, estimator="v"), (x.mean(0) - y.mean(0)).square().sum())


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_mean_witness_difference_is_mmd2(kernel):
    x, y = samples()
    difference = witness(x, x, y, kernel).mean() - witness(y, x, y, kernel).mean()
    torch.testing.assert_close(difference, mmd2(x, y, kernel, "v"))


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_derivatives(kernel):
    x, y = (a.requires_grad_() for a in samples(3, 3))
    for function in (lambda a, b: mmd2(a, b, kernel, "u"), lambda a, b: witness(a[:2], a, b, kernel)):
        assert gradcheck(function, (x, y))
        assert gradgradcheck(function, (x, y))


@pytest.mark.parametrize("dim, sigma, s_2", [(1, 1.0, 1.0), (3, 0.8, 0.8), (2, 0.7, 1.2)])
def test_gaussians_against_the_closed_form(dim, sigma, s_2):
    """Facts 1 and 2: k = α^(−d) exp(−‖x−y‖²/2α²) between N(μ, s₁²I) and N(0, s₂²I), at 4 standard errors."""
    alpha, mu, n = 1.1, 0.9, 200
    mean = torch.zeros(dim, dtype=torch.float64)
    mean[0] = mu
    within = sum((alpha**2 + 2 * s**2) ** (-dim / 2) for s in (sigma, s_2))
    c = alpha**2 + sigma**2 + s_2**2
    exact = within - 2 * c ** (-dim / 2) * math.exp(-(mu**2) / (2 * c))
    kernel = GaussianKernel(alpha)
    generator = torch.Generator().manual_seed(0)
    estimates = []
    for _ in range(60):
        x = mean + sigma * torch.randn(n, dim, generator=generator, dtype=torch.float64)
        y = s_2 * torch.randn(n, dim, generator=generator, dtype=torch.float64)
        estimates.append(mmd2(x, y, kernel, "u") * alpha**-dim)
    estimates = torch.stack(estimates)
    error = estimates.std() / len(estimates) ** 0.5
    assert abs(estimates.mean() - exact) < 4 * error
    assert error < 0.1 * exact


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_u_statistic_is_unbiased_at_equality(kernel):
    """Fact 8: mean 0 when P = Q, at 4 standard errors; the V-statistic is far outside."""
    torch.manual_seed(0)
    pairs = [torch.randn(2, 20, 3, dtype=torch.float64) for _ in range(300)]
    u = torch.stack([mmd2(x, y, kernel, "u") for x, y in pairs])
    v = torch.stack([mmd2(x, y, kernel, "v") for x, y in pairs])
    error = u.std() / len(u) ** 0.5
    assert abs(u.mean()) < 4 * error
    assert v.mean() > 10 * error


def test_linear_forms_broadcast_over_levels():
    torch.manual_seed(0)
    x, y, z = torch.randn(4, 5, 3), torch.randn(4, 6, 3), torch.randn(4, 7, 3)
    stacked = torch.stack([mmd2(a, b) for a, b in zip(x, y)])
    torch.testing.assert_close(linear_mmd2(x, y), stacked)
    delta = x.mean(1) - y.mean(1)
    stacked = torch.stack([witness(c, a, b) for a, b, c in zip(x, y, z)])
    torch.testing.assert_close(linear_witness(z, delta), stacked)


def test_float32_under_bf16_autocast():
    torch.manual_seed(0)
    x, y = 100 + torch.randn(50, 4) / 50, 100.01 + torch.randn(50, 4) / 50
    expected = mmd2(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(mmd2(x, y), expected)


def test_refuses_what_cannot_be():
    x, y = samples()
    with pytest.raises(ValueError, match="estimator"):
        mmd2(x, y, estimator="w")
    with pytest.raises(ValueError, match="at least 2"):
        mmd2(x[:1], y)
