import pytest
import torch
from torch import nn

from latent_dmmd.discrepancy import MMD, get_discrepancy, kale_witness, mmd2, witness
from latent_dmmd.features import MeanEmbeddings
from latent_dmmd.flow import (
    FlowStep,
    calibrate_on_particles,
    flow_schedule,
    gradient_flow,
    measure_embeddings,
    measure_gradients,
    steps_for_nfe,
    witness_gradient,
)


class Identity(nn.Module):
    """φ(x, t) = x, flattened: the witness gradient is the same for all particles."""

    def forward(self, x, t):
        return x.flatten(1)


class Smooth(nn.Module):
    def __init__(self, dim=8, features=5):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(dim, 16), nn.Linear(16, features)

    def forward(self, x, t):
        return self.b(torch.tanh(self.a(x.flatten(1))) * (1 + t.reshape(-1, 1)))


def embeddings_for(clean, noisy, levels=(0.25, 0.5, 0.75, 1.0), scale=1.0):
    stored = MeanEmbeddings(len(levels), clean.shape[-1]).to(clean.dtype)
    stored.levels.copy_(torch.tensor(levels))
    stored.displacement.copy_(torch.tensor(levels))
    stored.gradient_scale.fill_(scale)
    stored.clean.copy_(clean)
    stored.noisy.copy_(noisy)
    return stored


def particles(n=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 2, 2, 2, generator=generator, dtype=dtype)


def test_identity_features_shrink_the_mean_gap_and_keep_the_covariance():
    """Fact 5: k steps of size η multiply the mean gap by (1 − η)^k."""
    z, target = particles(), torch.arange(8, dtype=torch.float64)
    stored = embeddings_for(target, 0 * target)
    moved = gradient_flow(Identity(), z, stored, [FlowStep(0, 0.3, exact=True)] * 5, rescale=False)
    gap = moved.flatten(1).mean(0) - target
    torch.testing.assert_close(gap, 0.7**5 * (z.flatten(1).mean(0) - target))
    torch.testing.assert_close(torch.cov(moved.flatten(1).T), torch.cov(z.flatten(1).T))


def test_dissipation():
    """Fact 6: d/dt ½ MMD² = −E ‖∇f‖² along the exact flow, by central differences."""
    net, z = Smooth().double(), particles()
    clean = torch.randn(5, dtype=torch.float64)
    stored = embeddings_for(clean, 0 * clean)
    t = stored.levels[1]
    half_mmd2 = lambda z: 0.5 * (net(z, t).mean(0) - clean).square().sum()  # noqa: E731
    gradient = witness_gradient(net, z, stored, 1, exact=True, rescale=False)
    step = 1e-5
    slope = (half_mmd2(z - step * gradient) - half_mmd2(z + step * gradient)) / (2 * step)
    torch.testing.assert_close(slope, -gradient.square().flatten(1).sum(1).mean(), rtol=1e-6, atol=0)


def test_approximate_is_exact_with_equal_means():
    """Fact 4."""
    net, z = Smooth().double(), particles()
    clean = torch.randn(5, dtype=torch.float64)
    stored = embeddings_for(clean, net(z, torch.tensor(0.5)).mean(0).detach())
    for rescale in (False, True):
        exact = witness_gradient(net, z, stored, 1, exact=True, rescale=rescale)
        torch.testing.assert_close(exact, witness_gradient(net, z, stored, 1, exact=False))


def test_exact_gradient_is_that_of_mmd2():
    """N/2 · ∂ MMD²/∂z_i = ∇f(z_i), from autograd on the V-statistic itself."""
    net, z = Smooth().double(), particles().requires_grad_()
    clean = torch.randn(5, dtype=torch.float64)
    stored = embeddings_for(clean, 0 * clean)
    mmd2 = (net(z, stored.levels[2]).mean(0) - clean).square().sum()
    (gradient,) = torch.autograd.grad(mmd2, z)
    exact = witness_gradient(net, z, stored, 2, exact=True, rescale=False)
    torch.testing.assert_close(exact, gradient * len(z) / 2)


@pytest.mark.parametrize("exact", [False, True])
def test_chunks_change_nothing_and_order_is_kept(exact):
    """Fact 9, and chunked = whole."""
    net, z = Smooth().double(), particles(7)
    clean = torch.randn(5, dtype=torch.float64)
    stored = embeddings_for(clean, clean + torch.randn(5, dtype=torch.float64))
    steps = [FlowStep(k, 0.2, exact) for k in (3, 2, 2, 0)]
    whole = gradient_flow(net, z, stored, steps)
    torch.testing.assert_close(gradient_flow(net, z, stored, steps, chunk_size=3), whole)
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    torch.testing.assert_close(gradient_flow(net, z[order], stored, steps), whole[order])


DISCREPANCIES = [
    {"name": "mmd", "kernel": "gaussian", "bandwidth": 1.5},
    {"name": "mmd", "kernel": "gaussian", "bandwidth": "median"},
    {"name": "mmd", "kernel": "rational-quadratic", "bandwidth": 2.0},
    {"name": "kale", "kernel": "linear", "lam": 2.0},
    {"name": "kale", "kernel": "gaussian", "bandwidth": 1.5, "lam": 0.5},
]


def stored_features(discrepancy, num_points=6, features=5):
    """Embeddings that hold features, not means; the linear MMD's hold means."""
    torch.manual_seed(3)
    means_only = get_discrepancy(**discrepancy).needs_means_only
    stored = MeanEmbeddings(2, features, 0 if means_only else num_points, discrepancy=discrepancy).double()
    stored.levels.copy_(torch.tensor([0.5, 1.0]))
    stored.displacement.copy_(stored.levels)
    stored.gradient_scale.fill_(0.3)
    stored.clean.normal_()
    stored.noisy.normal_().add_(1)
    return stored


@pytest.mark.parametrize("self_term", ["include", "leave-one-out", "independent"])
@pytest.mark.parametrize("discrepancy", [{}, *DISCREPANCIES], ids=str)
def test_every_witness_in_chunks_is_the_whole(discrepancy, self_term):
    """Exact = chunked, for every kernel, KALE and self-term."""
    net, z, stored = Smooth().double(), particles(7), stored_features(discrepancy)
    whole = witness_gradient(net, z, stored, 1, exact=True, self_term=self_term)
    for size in (1, 3, 6):
        chunked = witness_gradient(net, z, stored, 1, exact=True, self_term=self_term, chunk_size=size)
        torch.testing.assert_close(chunked, whole)
    if self_term != "independent":  # whose halves are by position
        order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
        permuted = witness_gradient(net, z[order], stored, 1, exact=True, self_term=self_term)
        torch.testing.assert_close(permuted, whole[order])


@pytest.mark.parametrize("discrepancy", [{}, *DISCREPANCIES], ids=str)
def test_exact_gradient_is_that_of_the_discrepancy(discrepancy):
    """Brute force: N ∂D/∂z_i from autograd on D itself, ½ MMD² (V-statistic) or KALE, with stored clean features."""
    net, z, stored = Smooth().double(), particles().requires_grad_(), stored_features(discrepancy)
    level = stored.at_level(1)
    phi = net(z, level.t)
    if discrepancy.get("name") == "kale":
        value = level.discrepancy.value(phi, level.clean)
    else:
        value = 0.5 * mmd2(phi, level.clean, level.discrepancy.kernel, "v")
    (gradient,) = torch.autograd.grad(value, z)
    exact = witness_gradient(net, z, stored, 1, exact=True, rescale=False)
    torch.testing.assert_close(exact, gradient * len(z))


@pytest.mark.parametrize("discrepancy", DISCREPANCIES, ids=str)
def test_approximate_is_exact_with_equal_features(discrepancy):
    """Fact 4 for other kernels and KALE: the particles are the stored draws."""
    net, z, stored = Smooth().double(), particles(6), stored_features(discrepancy)
    stored.noisy[1] = net(z, stored.levels[1]).detach()
    for rescale in (False, True):
        exact = witness_gradient(net, z, stored, 1, exact=True, rescale=rescale)
        torch.testing.assert_close(exact, witness_gradient(net, z, stored, 1, exact=False))


@pytest.mark.parametrize("discrepancy", [{}, *DISCREPANCIES], ids=str)
def test_leave_one_out_and_independent_against_loops(discrepancy):
    net, z, stored = Smooth().double(), particles(5), stored_features(discrepancy)
    level = stored.at_level(0)
    phi = net(z, level.t).detach()
    kernel, lam = level.discrepancy.kernel, discrepancy.get("lam")

    def gradient(i, others, f):
        x = z[i : i + 1].clone().requires_grad_()
        (g,) = torch.autograd.grad(f(net(x, level.t), others).sum(), x)
        return g[0]

    if lam is None:
        f = lambda query, others: witness(query, others, level.clean, kernel)  # noqa: E731
    else:  # the dual of all particles; the own term is left out of the mean over particles alone
        dual = kale_witness(phi, level.clean, kernel, lam).scaled(1 + lam)
        clean = lambda query: kernel(query, level.clean) @ dual.weights[len(phi) :]  # noqa: E731
        f = lambda query, others: (1 + lam) / lam * kernel(query, others).mean(1) + clean(query)  # noqa: E731
    expected = [gradient(i, phi[torch.arange(5) != i], f) for i in range(5)]
    left_out = witness_gradient(net, z, stored, 0, exact=True, rescale=False, self_term="leave-one-out")
    torch.testing.assert_close(left_out, torch.stack(expected))
    included = witness_gradient(net, z, stored, 0, exact=True, rescale=False)
    assert not torch.allclose(left_out, included, rtol=1e-3)

    if lam is not None:
        f = lambda query, others: (  # noqa: E731
            kale_witness(others, level.clean, kernel, lam).scaled(1 + lam)(query)
        )
    expected = [gradient(i, phi[2:] if i < 2 else phi[:2], f) for i in range(5)]
    independent = witness_gradient(net, z, stored, 0, exact=True, rescale=False, self_term="independent")
    torch.testing.assert_close(independent, torch.stack(expected))


def test_noise_injection_takes_the_gradient_elsewhere():
    net, z, stored = Smooth().double(), particles(), stored_features({})
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(4), dtype=z.dtype)
    injected = witness_gradient(
        net, z, stored, 0, exact=False, noise_injection=0.3, generator=torch.Generator().manual_seed(4)
    )
    torch.testing.assert_close(injected, witness_gradient(net, z + 0.3 * noise, stored, 0, exact=False))
    # the exact witness is still that of the particles themselves, not of the displaced ones
    injected = witness_gradient(
        net, z, stored, 0, exact=True, noise_injection=0.3, generator=torch.Generator().manual_seed(4), rescale=False
    )
    x = (z + 0.3 * noise).requires_grad_()
    delta = (net(z, stored.levels[0]).mean(0) - stored.clean[0]).detach()
    (expected,) = torch.autograd.grad((net(x, stored.levels[0]) @ delta).sum(), x)
    torch.testing.assert_close(injected, expected)


@pytest.mark.parametrize("self_term", ["leave-one-out", "independent"])
def test_self_terms_need_company(self_term):
    with pytest.raises(ValueError, match="at least 2 particles"):
        witness_gradient(Smooth().double(), particles(1), stored_features({}), 0, exact=True, self_term=self_term)


def test_flow_options_are_checked():
    for options, message in (({"self_term": "none"}, "self_term"), ({"noise_injection": -1.0}, "noise_injection")):
        with pytest.raises(ValueError, match=message):
            gradient_flow(Smooth().double(), particles(), stored_features({}), [], **options)


def test_embeddings_of_another_kernel_need_features():
    with pytest.raises(ValueError, match="num_points > 0"):
        MeanEmbeddings(2, 3, discrepancy={"name": "kale"})


@pytest.mark.parametrize("steps_per_level", [1, 4])
def test_calibrated_steps_without_rescaling_undo_the_weakening(steps_per_level):
    """φ = identity, one particle: the exact gradient shrinks with the distance; the steps grow to match, and arrive."""
    direction = torch.zeros(8, dtype=torch.float64)
    direction[2] = 1.0
    levels = torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    stored = embeddings_for(torch.zeros(4, 8, dtype=torch.float64), levels[:, None] * direction)
    steps = flow_schedule(stored, "exact", 4, steps_per_level, rescale=False)
    seen = []
    gradient_flow(
        Identity(),
        direction.reshape(1, 2, 2, 2),
        stored,
        steps,
        callback=lambda i, step, z: seen.append(z.norm().item()) or z,
        rescale=False,
    )
    expected = torch.linspace(1, 0, 4 * steps_per_level + 1)[1:]
    torch.testing.assert_close(torch.tensor(seen), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["linear", "vp-cosine", "vp-linear"])
@pytest.mark.parametrize("exact", [False, True])
def test_calibrated_flow_keeps_to_the_forward_process(name, exact):
    """One clean point 0 and one ε: with φ = identity the witness gradient is x_t − x_0; every level ends on x_t'."""
    torch.manual_seed(0)
    eps = torch.randn(1, 2, 2, 2, dtype=torch.float64)
    stored = MeanEmbeddings(4, 8, forward_process=name).double()
    stored.levels.copy_(torch.arange(1, 5, dtype=torch.float64) / 4)
    stored.gradient_scale.fill_(1.0)
    sigma = stored.process.sigma(stored.levels)
    stored.noisy.copy_(sigma[:, None] * eps.flatten())
    ends = {}
    z = gradient_flow(
        Identity(),
        sigma[-1] * eps,
        stored,
        flow_schedule(stored, "exact" if exact else "approximate", 4, 3),
        callback=lambda i, step, z: ends.update({step.level: z}) or z,
    )
    for level in (3, 2, 1):
        torch.testing.assert_close(ends[level], sigma[level - 1] * eps, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(z, torch.zeros_like(z), rtol=0, atol=1e-9)


def test_rescaling_keeps_the_stored_length():
    net, z = Identity(), particles()
    clean, noisy = torch.zeros(8, dtype=torch.float64), torch.full((8,), 2.0, dtype=torch.float64)
    stored = embeddings_for(clean, noisy)
    gradient = witness_gradient(net, z, stored, 0, exact=True)
    torch.testing.assert_close(gradient[0].norm(), noisy.norm())
    plain = witness_gradient(net, z, stored, 0, exact=True, rescale=False)
    torch.testing.assert_close(gradient / gradient.norm(), plain / plain.norm())


@pytest.mark.parametrize("num_noise_levels, steps_per_level", [(4, 1), (4, 3), (2, 2), (3, 1), (1, 5)])
@pytest.mark.parametrize("exact", [False, True])
def test_calibrated_steps_arrive(num_noise_levels, steps_per_level, exact):
    """For φ = identity and one clean point the gradient at level t is d(t) along a unit vector; steps sum to d(1)."""
    direction = torch.zeros(8, dtype=torch.float64)
    direction[2] = 1.0
    levels = torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    stored = embeddings_for(torch.zeros(4, 8, dtype=torch.float64), levels[:, None] * direction)
    z = direction.reshape(1, 2, 2, 2)
    steps = flow_schedule(stored, "exact" if exact else "approximate", num_noise_levels, steps_per_level)
    assert len(steps) == num_noise_levels * steps_per_level
    end = gradient_flow(Identity(), z, stored, steps[:-1])
    last = steps[-1]
    assert end.norm() > 0.1 * last.step_size  # not there before the last step
    end = end - last.step_size * witness_gradient(Identity(), end, stored, last.level, last.exact)
    torch.testing.assert_close(end, torch.zeros_like(end), atol=1e-12, rtol=0)


def test_schedule_thins_levels_from_the_top_and_hybrid_switches():
    stored = embeddings_for(torch.zeros(3), torch.ones(3))
    assert [s.level for s in flow_schedule(stored, num_noise_levels=2, steps_per_level=2)] == [3, 3, 1, 1]
    hybrid = flow_schedule(stored, "hybrid", num_noise_levels=4, steps_per_level=1, hybrid_level=0.5)
    assert [s.exact for s in hybrid] == [False, False, True, True]
    constant = flow_schedule(stored, num_noise_levels=4, steps_per_level=1, step_size=0.1)
    assert {s.step_size for s in constant} == {0.1}


def test_measured_scale_is_least_squares():
    """φ = (‖x‖²/2, 0, 0): g = Δ x_t; the scale that predicts x_t − x_0 from it is found by the normal equation."""

    class Square(nn.Module):
        def forward(self, x, t):
            value = x.flatten(1).square().sum(1) / 2
            return torch.stack([value, 0 * value, 0 * value], 1)

    x_0, x_t = particles(5), 2 * particles(5) + 1
    pairs = [(x_0[:2], x_t[:2]), (x_0[2:], x_t[2:])]
    clean, noisy = measure_embeddings(Square(), pairs, torch.tensor(1.0))
    witness = MMD().witness(noisy[None], clean[None])
    scale, norm = measure_gradients(Square(), pairs, torch.tensor(1.0), witness)
    half = lambda x: x.flatten(1).square().sum(1).mean() / 2  # noqa: E731
    torch.testing.assert_close(clean[0], half(x_0))
    torch.testing.assert_close(noisy[0], half(x_t))
    g = (half(x_t) - half(x_0)) * x_t
    torch.testing.assert_close(scale, ((g * (x_t - x_0)).sum() / g.square().sum()).item())
    torch.testing.assert_close(norm, g.flatten(1).square().sum(1).mean().sqrt().item())
    away = MMD().witness(clean[None], noisy[None])
    assert measure_gradients(Square(), pairs, torch.tensor(1.0), away)[0] == 0
    assert measure_gradients(Square(), pairs, torch.tensor(1.0), MMD().witness(clean[None], clean[None])) == (0, 0)


def test_calibration_makes_steps_as_long_on_particles_as_on_the_forward_process():
    net, z = Smooth().double(), particles(32)
    noisy = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    stored = embeddings_for(torch.zeros_like(noisy), noisy)
    length = lambda z, level: witness_gradient(net, z, stored, level, False).flatten(1).square().sum(1).mean().sqrt()  # noqa: E731
    wanted = [1.1 * length(z, level).item() for level in range(4)]
    calibrate_on_particles(net, stored, wanted, z)
    # the flow with the new scales: each level's is the ratio at the particles that reach it
    for step in flow_schedule(stored, "approximate", 4, 1):
        expected = wanted[step.level] / length(z, step.level)
        assert 0.5 < expected < 2
        torch.testing.assert_close(stored.gradient_scale[step.level].double(), expected, rtol=1e-5, atol=0)
        z = z - step.step_size * witness_gradient(net, z, stored, step.level, False)
    assert (stored.gradient_scale[:3] - 1.1).abs().min() > 1e-3  # it did depend on them


def test_calibration_is_bounded_and_leaves_what_has_no_gradient():
    z = particles(8)
    gap = torch.tensor([3.0, 4.0, 0, 0, 0, 0, 0, 0], dtype=torch.float64)  # gradients of length 5 everywhere
    stored = embeddings_for(0 * gap, gap)
    calibrate_on_particles(Identity(), stored, [5.0, 6.0, 50.0, 0.5], z)
    assert stored.gradient_scale.tolist() == [1.0, 1.2, 2.0, 0.5]
    still = embeddings_for(0 * gap, 0 * gap)
    calibrate_on_particles(Identity(), still, [5.0] * 4, z)
    assert still.gradient_scale.tolist() == [1.0] * 4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sampler": "euler"}, "sampler must be"),
        ({"num_noise_levels": 5}, r"in \[1, 4\]"),
        ({"num_noise_levels": 0}, r"in \[1, 4\]"),
        ({"num_noise_levels": 4, "steps_per_level": 0}, "at least 1"),
        ({"num_noise_levels": 4, "step_size": -1.0}, "positive"),
    ],
)
def test_refuses_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        flow_schedule(embeddings_for(torch.zeros(3), torch.ones(3)), **options)


@pytest.mark.parametrize("nfe, expected", [(1, (1, 1)), (10, (10, 1)), (25, (25, 1)), (100, (25, 4)), (26, (13, 2))])
def test_levels_and_steps_of_an_nfe(nfe, expected):
    assert steps_for_nfe(nfe, 25) == expected


def test_an_nfe_is_positive():
    with pytest.raises(ValueError, match="at least 1"):
        steps_for_nfe(0, 25)
