import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from latent_dmmd.kernels import GaussianKernel, LinearKernel, RationalQuadraticKernel, get_kernel, median_distance

KERNELS = [
    LinearKernel(),
    GaussianKernel(0.7),
    GaussianKernel([0.5, 2.0]),
    RationalQuadraticKernel(alpha=0.5, bandwidth=1.3),
]


def points(n, m=None, dim=3):
    torch.manual_seed(0)
    return torch.randn(n, dim, dtype=torch.float64), torch.randn(m or n, dim, dtype=torch.float64)


def test_values_against_loops():
    x, y = points(4, 5)
    expected = {
        0: lambda a, b: a @ b,
        1: lambda a, b: torch.exp(-(a - b).square().sum() / (2 * 0.7**2)),
        2: lambda a, b: sum(torch.exp(-(a - b).square().sum() / (2 * s**2)) for s in (0.5, 2.0)),
        3: lambda a, b: (1 + (a - b).square().sum() / (2 * 0.5 * 1.3**2)) ** -0.5,
    }
    for i, kernel in enumerate(KERNELS):
        by_hand = torch.stack([torch.stack([expected[i](a, b) for b in y]) for a in x])
        torch.testing.assert_close(kernel(x, y), by_hand)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_first_and_second_derivatives(kernel):
    x, y = (a.requires_grad_() for a in points(2))
    assert gradcheck(kernel, (x, y))
    assert gradgradcheck(kernel, (x, y))


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_second_derivative_of_coinciding_points_is_finite(kernel):
    x = points(200)[0].requires_grad_()
    (gradient,) = torch.autograd.grad(kernel(x, x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    assert second.isfinite().all()


def test_float32_under_bf16_autocast():
    x, y = (100 + a.float() / 100 for a in points(6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for kernel in KERNELS:
            gram = kernel(x, y)
            assert gram.dtype == torch.float32
            with torch.autocast("cpu", enabled=False):
                torch.testing.assert_close(gram, kernel(x, y))


def test_the_median_distance_does_not_depend_on_autocast_or_on_where_points_lie():
    x, y = (a.float() for a in points(6))
    expected = median_distance(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(median_distance(x, y), expected)
        torch.testing.assert_close(median_distance(x + 1000, y + 1000), expected, rtol=1e-3, atol=0)
        torch.testing.assert_close(median_distance(x.bfloat16(), y.bfloat16()), expected, rtol=0.02, atol=0)


def test_rational_quadratic_tends_to_gaussian():
    x, y = points(5)
    torch.testing.assert_close(RationalQuadraticKernel(1e7, 0.9)(x, y), GaussianKernel(0.9)(x, y), rtol=1e-5, atol=1e-7)


def test_median_heuristic():
    x, y = points(7, 8)
    pooled = torch.cat([x, y])
    distances = torch.pdist(pooled)
    torch.testing.assert_close(median_distance(x, y), distances.median())
    bandwidth = distances.median().item()
    torch.testing.assert_close(GaussianKernel("median")(x, y), GaussianKernel(bandwidth)(x, y))


@pytest.mark.parametrize("kernel", [*KERNELS, GaussianKernel("median")], ids=str)
def test_leading_dimensions_are_independent_problems(kernel):
    torch.manual_seed(0)
    x, y = torch.randn(3, 4, 2), torch.randn(3, 5, 2) * torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    torch.testing.assert_close(kernel(x, y), torch.stack([kernel(a, b) for a, b in zip(x, y)]))


def test_fitted_is_settled_on_the_pooled_points():
    x, y = points(7, 8)
    kernel = GaussianKernel("median").fitted(x, y)
    torch.testing.assert_close(kernel(x, x), GaussianKernel(median_distance(x, y).item())(x, x))
    assert kernel.fitted(x, x) is kernel
    assert all(k.fitted(x, y) is k for k in KERNELS)


def test_by_name():
    x, y = points(3)
    torch.testing.assert_close(get_kernel("gaussian", bandwidth=0.7)(x, y), KERNELS[1](x, y))
    torch.testing.assert_close(get_kernel("rational-quadratic", alpha=0.5, bandwidth=1.3)(x, y), KERNELS[3](x, y))
    with pytest.raises(ValueError, match="linear, gaussian"):
        get_kernel("laplace")
    with pytest.raises(ValueError, match="one bandwidth"):
        get_kernel("rational-quadratic", bandwidth="median")


def test_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="positive"):
        GaussianKernel(0.0)
    with pytest.raises(ValueError, match="median"):
        GaussianKernel("mean")
    with pytest.raises(ValueError, match="positive"):
        RationalQuadraticKernel(-1.0)
    with pytest.raises(ValueError, match="features must be"):
        LinearKernel()(torch.zeros(2, 3), torch.zeros(2, 4))
