import pytest
import torch
from torch import nn

from latent_dmmd.features import MeanEmbeddings
from latent_dmmd.flow import FlowStep, flow_schedule, gradient_flow, measure_embeddings, witness_gradient


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
    clean, noisy, scale = measure_embeddings(Square(), pairs, torch.tensor(1.0))
    half = lambda x: x.flatten(1).square().sum(1).mean() / 2  # noqa: E731
    torch.testing.assert_close(clean[0], half(x_0))
    torch.testing.assert_close(noisy[0], half(x_t))
    g = (half(x_t) - half(x_0)) * x_t
    torch.testing.assert_close(scale, ((g * (x_t - x_0)).sum() / g.square().sum()).item())
    assert measure_embeddings(Square(), [(x_0, x_0)], torch.tensor(1.0))[2] == 0  # no gradient at all


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
