import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from latent_dmmd.discrepancy import (
    KALE,
    MMD,
    get_discrepancy,
    kale,
    kale_dual,
    kale_witness,
    linear_mmd2,
    linear_witness,
    mmd2,
    mmd_witness,
    witness,
)
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


def test_median_bandwidth_is_one_for_all_terms():
    """Three Gram matrices of three bandwidths would not be an MMD."""
    x, y = samples()
    y = 3 * y
    fixed = GaussianKernel("median").fitted(x, y)
    for estimator in ("u", "v"):
        torch.testing.assert_close(mmd2(x, y, GaussianKernel("median"), estimator), mmd2(x, y, fixed, estimator))
    torch.testing.assert_close(witness(x[:3], x, y, GaussianKernel("median")), witness(x[:3], x, y, fixed))
    torch.testing.assert_close(kale(x, y, GaussianKernel("median"), 0.7), kale(x, y, fixed, 0.7))


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_norm_of_the_witness_is_the_mmd(kernel):
    x, y = samples()
    f = mmd_witness(x, y, kernel)
    torch.testing.assert_close(f.norm().square(), mmd2(x, y, kernel, "v"))
    torch.testing.assert_close(f.scaled(-2.0).norm(), 2 * f.norm())
    torch.testing.assert_close(f.scaled(-2.0)(x), -2 * witness(x, x, y, kernel))


@pytest.mark.parametrize("discrepancy", [MMD(GaussianKernel("median")), KALE(GaussianKernel(1.1), 0.5), KALE(lam=2.0)])
def test_discrepancies_broadcast_over_levels(discrepancy):
    torch.manual_seed(0)
    x, y, z = torch.randn(4, 5, 3), torch.randn(4, 6, 3), torch.randn(4, 7, 3)
    stacked = torch.stack([discrepancy.value(a, b) for a, b in zip(x, y)])
    torch.testing.assert_close(discrepancy.value(x, y), stacked)
    stacked = torch.stack([discrepancy.witness(a, b)(c) for a, b, c in zip(x, y, z)])
    torch.testing.assert_close(discrepancy.witness(x, y)(z), stacked, rtol=1e-4, atol=1e-5)
    stacked = torch.stack([discrepancy.witness(a, b).norm() for a, b in zip(x, y)])
    torch.testing.assert_close(discrepancy.witness(x, y).norm(), stacked, rtol=1e-4, atol=1e-5)


def primal(h_x, h_y, norm, lam):
    return (1 + lam) * (1 + h_x.mean() - h_y.exp().mean() - lam / 2 * norm**2)


@pytest.mark.parametrize("lam", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_kale_dual_is_the_primal_at_its_witness_and_nothing_exceeds_it(kernel, lam):
    x, y = samples()
    value, h = kale(x, y, kernel, lam), kale_witness(x, y, kernel, lam)
    torch.testing.assert_close(value, primal(h(x), h(y), h.norm(), lam), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(kale_dual(x, y, kernel, lam), h(y), rtol=1e-7, atol=1e-9)
    torch.manual_seed(1)
    for _ in range(5):
        other = type(h)(kernel, h.points, h.weights + 0.3 * torch.randn_like(h.weights))
        assert primal(other(x), other(y), other.norm(), lam) < value


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_kale_tends_to_half_mmd2(kernel):
    """Fact 7, λ → ∞, for the value and for the flow's witness (1 + λ) h."""
    x, y = samples()
    torch.testing.assert_close(kale(x, y, kernel, 1e6), 0.5 * mmd2(x, y, kernel, "v"), rtol=1e-4, atol=0)
    torch.testing.assert_close(KALE(kernel, 1e6).witness(x, y)(x), witness(x, x, y, kernel), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lam", [1e3, 1e6])
def test_kale_does_not_cancel_in_float32(lam):
    x, y = samples()
    torch.testing.assert_close(kale(x.float(), y.float(), lam=lam).double(), kale(x, y, lam=lam), rtol=1e-4, atol=0)


def test_kale_tends_to_the_kullback_leibler_divergence():
    """Fact 7, λ → 0: on three atoms a Gaussian kernel has full rank, and KALE is KL of the two histograms."""
    atoms = torch.tensor([[0.0], [1.0], [2.5]], dtype=torch.float64)
    p, q = torch.tensor([5, 3, 2]), torch.tensor([2, 4, 4])
    x, y = atoms.repeat_interleave(p, 0), atoms.repeat_interleave(q, 0)
    p, q = p / 10, q / 10
    divergence = (p * (p / q).log()).sum().double()
    torch.testing.assert_close(kale(x, y, GaussianKernel(0.5), 1e-5), divergence, rtol=1e-3, atol=0)
    ratio = (p / q).repeat_interleave(torch.tensor([2, 4, 4])).double()
    torch.testing.assert_close(kale_dual(x, y, GaussianKernel(0.5), 1e-5).exp(), ratio, rtol=1e-2, atol=0)


def test_kale_of_two_points_in_closed_form():
    """One sample of each: w solves log w + (k(y,y) w − k(y,x)) / λ = 0, which is Lambert's W function."""

    def lambertw(z):  # w e^w = z > 0, by bisection
        low, high = 0.0, 1 + math.log(1 + z)
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if middle * math.exp(middle) < z else (low, middle)
        return low

    x, y, lam = torch.tensor([[0.3, -0.2]]).double(), torch.tensor([[1.0, 0.7]]).double(), 0.4
    for kernel in KERNELS:
        k_xx, k_xy, k_yy = (kernel(a, b).item() for a, b in ((x, x), (x, y), (y, y)))
        w = lam / k_yy * lambertw(k_yy / lam * math.exp(k_xy / lam))
        value = (1 + lam) * (w * math.log(w) - w + 1 + (k_xx - 2 * w * k_xy + w**2 * k_yy) / (2 * lam))
        assert kale(x, y, kernel, lam).item() == pytest.approx(value, rel=1e-9)
    assert kale(x, x, KERNELS[1], lam).item() == pytest.approx(0, abs=1e-12)


def test_donsker_varadhan_is_never_below():
    """E_P h − log E_Q e^h ≥ 1 + E_P h − E_Q e^h for any h, with equality at the optimum λ → 0, where E_Q e^h = 1."""
    x, y = samples()
    bounds = lambda h: (h(x).mean() - h(y).exp().mean().log(), 1 + h(x).mean() - h(y).exp().mean())  # noqa: E731
    for lam in (0.1, 1.0, 10.0):
        h = kale_witness(x, y, GaussianKernel(0.8), lam)
        donsker_varadhan, ours = bounds(h)
        assert donsker_varadhan > ours
    atoms = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    x, y = atoms[[0, 0, 0, 1]], atoms[[0, 1, 1, 1]]
    torch.testing.assert_close(*bounds(kale_witness(x, y, GaussianKernel(0.5), 1e-8)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_kale_derivatives(kernel):
    """Through the solved dual, first and second; and the first variation: N ∂ KALE / ∂x_i = (1 + λ) ∇h(x_i)."""
    x, y = (a.requires_grad_() for a in samples(3, 4))
    assert gradcheck(lambda a, b: kale(a, b, kernel, 0.5), (x, y))
    assert gradgradcheck(lambda a, b: kale(a, b, kernel, 0.5), (x, y))
    assert gradcheck(lambda a, b: kale_witness(a, b, kernel, 0.5)(a[:2]), (x, y))
    (variation,) = torch.autograd.grad(kale(x, y, kernel, 0.5), x)
    z = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(KALE(kernel, 0.5).witness(x.detach(), y.detach())(z).sum(), z)
    torch.testing.assert_close(len(x) * variation, gradient)


def test_kale_is_float32_under_autocast_and_extreme_values_are_finite():
    torch.manual_seed(0)
    x, y = 30 * torch.randn(40, 4) + 20, 30 * torch.randn(40, 4)
    expected = kale(x, y, lam=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(kale(x, y, lam=0.1), expected)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(kale(x, y, lam=0.1), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    assert expected.isfinite() and second.isfinite().all()


def test_discrepancies_by_name():
    x, y = samples()
    torch.testing.assert_close(get_discrepancy().value(x, y), mmd2(x, y))
    rational = get_discrepancy("mmd", "rational-quadratic", bandwidth=1.5)
    torch.testing.assert_close(rational.value(x, y), mmd2(x, y, KERNELS[2]))
    assert get_discrepancy().needs_means_only and not rational.needs_means_only
    built = get_discrepancy("kale", "gaussian", bandwidth=0.8, lam=0.3)
    torch.testing.assert_close(built.value(x, y), kale(x, y, GaussianKernel(0.8), 0.3))
    assert not get_discrepancy("kale").needs_means_only
    for arguments, message in ((("wasserstein",), "mmd or kale"), (("kale", "linear", 1.0, 1.0, 0.0), "λ > 0")):
        with pytest.raises(ValueError, match=message):
            get_discrepancy(*arguments)


def test_refuses_what_cannot_be():
    x, y = samples()
    with pytest.raises(ValueError, match="estimator"):
        mmd2(x, y, estimator="w")
    with pytest.raises(ValueError, match="at least 2"):
        mmd2(x[:1], y)
    with pytest.raises(ValueError, match="λ > 0"):
        kale(x, y, lam=0.0)
