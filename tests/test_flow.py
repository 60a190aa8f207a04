from functools import partial

import pytest
import torch
from torch import nn

from latent_dmmd.calibration import calibrate_on_particles, measure_embeddings, measure_gradients
from latent_dmmd.discrepancy import MMD, get_discrepancy, mmd2
from latent_dmmd.embeddings import MeanEmbeddings
from latent_dmmd.flow import ApproximateFlow, ExactFlow, Flow, HybridFlow, get_flow, run_in_step
from latent_dmmd.schedule import FlowStep, flow_schedule, steps_for_nfe


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


def embeddings_for(clean, noisy, levels=(0.25, 0.5, 0.75, 1.0), scale=1.0, **options):
    stored = MeanEmbeddings(len(levels), clean.shape[-1], **options).to(clean.dtype)
    stored.levels.copy_(torch.as_tensor(levels))
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
    moved = ExactFlow(Identity(), stored, step_size=0.3).run(z, [FlowStep(0, 0.25, 0.0)] * 5)
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
    gradient = ExactFlow(net, stored, rescale=False).gradient(z, 1)
    step = 1e-5
    slope = (half_mmd2(z - step * gradient) - half_mmd2(z + step * gradient)) / (2 * step)
    torch.testing.assert_close(slope, -gradient.square().flatten(1).sum(1).mean(), rtol=1e-6, atol=0)


def test_approximate_is_exact_with_equal_means():
    """Fact 4."""
    net, z = Smooth().double(), particles()
    clean = torch.randn(5, dtype=torch.float64)
    stored = embeddings_for(clean, net(z, torch.tensor(0.5)).mean(0).detach())
    for rescale in (False, True):
        exact = ExactFlow(net, stored, rescale=rescale).gradient(z, 1)
        torch.testing.assert_close(exact, ApproximateFlow(net, stored).gradient(z, 1))


def test_exact_gradient_is_that_of_mmd2():
    """N/2 · ∂ MMD²/∂z_i = ∇f(z_i), from autograd on the V-statistic itself."""
    net, z = Smooth().double(), particles().requires_grad_()
    clean = torch.randn(5, dtype=torch.float64)
    stored = embeddings_for(clean, 0 * clean)
    mmd2 = (net(z, stored.levels[2]).mean(0) - clean).square().sum()
    (gradient,) = torch.autograd.grad(mmd2, z)
    exact = ExactFlow(net, stored, rescale=False).gradient(z, 2)
    torch.testing.assert_close(exact, gradient * len(z) / 2)


FLOWS = {
    "exact": partial(ExactFlow, rescale=True),
    "unscaled": partial(ExactFlow, rescale=False),
    "approximate": ApproximateFlow,
    "hybrid": partial(HybridFlow, exact_below=0.5),
}


@pytest.mark.parametrize("step_size", [0.2, None])
@pytest.mark.parametrize("build", FLOWS.values(), ids=FLOWS)
def test_chunks_change_nothing_and_order_is_kept(build, step_size):
    """Fact 9, and chunked = whole."""
    net, z = Smooth().double(), particles(7)
    clean = torch.randn(5, dtype=torch.float64)
    stored = embeddings_for(clean, clean + torch.randn(5, dtype=torch.float64))
    steps = [FlowStep(3, 1.0, 0.75), FlowStep(2, 0.75, 0.5), FlowStep(2, 0.5, 0.25), FlowStep(0, 0.25, 0.0)]
    whole = build(net, stored, step_size=step_size).run(z, steps)
    chunked = build(net, stored, step_size=step_size, chunk_size=3).run(z, steps)
    torch.testing.assert_close(chunked, whole)
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    torch.testing.assert_close(build(net, stored, step_size=step_size).run(z[order], steps), whole[order])


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
    stored.gradient_scale.fill_(0.3)
    stored.clean.normal_()
    stored.noisy.normal_().add_(1)
    return stored


@pytest.mark.parametrize("discrepancy", [{}, *DISCREPANCIES], ids=str)
def test_every_witness_in_chunks_is_the_whole(discrepancy):
    """Exact = chunked, for every kernel and KALE."""
    net, z, stored = Smooth().double(), particles(7), stored_features(discrepancy)
    whole = ExactFlow(net, stored).gradient(z, 1)
    for size in (1, 3, 6):
        torch.testing.assert_close(ExactFlow(net, stored, chunk_size=size).gradient(z, 1), whole)
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    torch.testing.assert_close(ExactFlow(net, stored).gradient(z[order], 1), whole[order])


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
    exact = ExactFlow(net, stored, rescale=False).gradient(z, 1)
    torch.testing.assert_close(exact, gradient * len(z))


@pytest.mark.parametrize("discrepancy", DISCREPANCIES, ids=str)
def test_approximate_is_exact_with_equal_features(discrepancy):
    """Fact 4 for other kernels and KALE: the particles are the stored draws."""
    net, z, stored = Smooth().double(), particles(6), stored_features(discrepancy)
    stored.noisy[0, 1] = net(z, stored.levels[1]).detach()
    for rescale in (False, True):
        exact = ExactFlow(net, stored, rescale=rescale).gradient(z, 1)
        torch.testing.assert_close(exact, ApproximateFlow(net, stored).gradient(z, 1))


def test_embeddings_know_two_targets():
    assert MeanEmbeddings(2, 3).config.target == "displacement"
    with pytest.raises(ValueError, match="target must be"):
        MeanEmbeddings(2, 3, target="velocity")


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
    seen = []
    ExactFlow(Identity(), stored, rescale=False).run(
        direction.reshape(1, 2, 2, 2),
        flow_schedule(stored, 4, steps_per_level),
        callback=lambda i, step, z: seen.append(z.norm().item()) or z,
    )
    expected = torch.linspace(1, 0, 4 * steps_per_level + 1)[1:]
    torch.testing.assert_close(torch.tensor(seen), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["linear", "vp-cosine", "vp-linear"])
@pytest.mark.parametrize("sampler", ["exact", "approximate", "hybrid"])
def test_calibrated_flow_keeps_to_the_forward_process(name, sampler):
    """One clean point 0 and one ε: with φ = identity the witness gradient is x_t − x_0; every level ends on x_t'."""
    torch.manual_seed(0)
    eps = torch.randn(1, 2, 2, 2, dtype=torch.float64)
    stored = MeanEmbeddings(4, 8, forward_process=name).double()
    stored.levels.copy_(torch.arange(1, 5, dtype=torch.float64) / 4)
    stored.gradient_scale.fill_(1.0)
    sigma = stored.process.sigma(stored.levels)
    stored.noisy.copy_(sigma[:, None] * eps.flatten())
    ends = {}
    z = get_flow(sampler, Identity(), stored).run(
        sigma[-1] * eps,
        flow_schedule(stored, 4, 3),
        callback=lambda i, step, z: ends.update({step.level: z}) or z,
    )
    for level in (3, 2, 1):
        torch.testing.assert_close(ends[level], sigma[level - 1] * eps, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(z, torch.zeros_like(z), rtol=0, atol=1e-9)


class HalfSquare(nn.Module):
    """φ = (‖x‖² / 2, 0, 0): the witness of data at 0, whose gradient is the way that is left."""

    def forward(self, x, t):
        f = x.flatten(1).square().sum(1) / 2
        return torch.stack([f, 0 * f, 0 * f], 1)


def unit_particles():
    z = particles(3)
    return z / z.flatten(1).norm(dim=1)[:, None, None, None]


def restoring_embeddings(name):
    """Of data at 0 and noise of unit length, for `HalfSquare`: s_t ∇f_t(z) = z."""
    stored = MeanEmbeddings(4, 3, forward_process=name, target="restoring").double()
    stored.levels.copy_(torch.arange(1, 5, dtype=torch.float64) / 4)
    square = stored.process.sigma(stored.levels).square()
    stored.noisy[0, :, 0] = square / 2
    stored.gradient_scale.copy_(2 / square)
    return stored


@pytest.mark.parametrize("name", ["linear", "vp-cosine", "vp-linear"])
@pytest.mark.parametrize("sampler", ["exact", "approximate", "hybrid"])
@pytest.mark.parametrize("lag", [1.0, 1.2])
def test_restoring_steps_go_the_fraction_of_the_way_that_is_left(name, sampler, lag):
    """Every step ends on the forward process, and in proportion where particles began too far away."""
    stored, eps = restoring_embeddings(name), unit_particles()
    steps, z = flow_schedule(stored, 4, 3), lag * stored.process.sigma(stored.levels[-1]) * eps
    flow = get_flow(sampler, HalfSquare(), stored)
    for step in steps:
        z = flow.step(z, step)
        expected = lag * stored.process.sigma(torch.tensor(step.end, dtype=torch.float64)) * eps
        torch.testing.assert_close(z, expected, rtol=1e-6, atol=1e-9)


def test_restoring_steps_without_rescaling_undo_the_weakening():
    stored, eps = restoring_embeddings("linear"), unit_particles()
    flow, z = ExactFlow(HalfSquare(), stored, rescale=False), eps
    for step in flow_schedule(stored, 4, 3):
        z = flow.step(z, step)
        torch.testing.assert_close(z, step.end * eps, rtol=1e-6, atol=1e-9)


def test_rescaling_keeps_the_stored_length():
    net, z = Identity(), particles()
    clean, noisy = torch.zeros(8, dtype=torch.float64), torch.full((8,), 2.0, dtype=torch.float64)
    stored = embeddings_for(clean, noisy)
    gradient = ExactFlow(net, stored).gradient(z, 0)
    torch.testing.assert_close(gradient[0].norm(), noisy.norm())
    plain = ExactFlow(net, stored, rescale=False).gradient(z, 0)
    torch.testing.assert_close(gradient / gradient.norm(), plain / plain.norm())


@pytest.mark.parametrize("num_noise_levels, steps_per_level", [(4, 1), (4, 3), (2, 2), (3, 1), (1, 5)])
@pytest.mark.parametrize("sampler", ["exact", "approximate", "hybrid"])
def test_calibrated_steps_arrive(num_noise_levels, steps_per_level, sampler):
    """For φ = identity and one clean point the gradient at level t is d(t) along a unit vector; steps sum to d(1)."""
    direction = torch.zeros(8, dtype=torch.float64)
    direction[2] = 1.0
    levels = torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    stored = embeddings_for(torch.zeros(4, 8, dtype=torch.float64), levels[:, None] * direction)
    z = direction.reshape(1, 2, 2, 2)
    steps, flow = flow_schedule(stored, num_noise_levels, steps_per_level), get_flow(sampler, Identity(), stored)
    assert len(steps) == num_noise_levels * steps_per_level
    before = flow.run(z, steps[:-1])
    scale, step_size = flow.coefficients(steps[-1])
    assert scale == 1 and before.norm() > 0.1 * step_size  # not there before the last step
    end = flow.step(before, steps[-1])
    torch.testing.assert_close(end, torch.zeros_like(end), atol=1e-12, rtol=0)


def test_schedule_thins_levels_from_the_top_and_leaves_no_gap():
    stored = embeddings_for(torch.zeros(3), torch.ones(3))
    steps = flow_schedule(stored, 2, 2)
    assert [s.level for s in steps] == [3, 3, 1, 1]
    assert [(s.start, s.end) for s in steps] == [(1, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0)]
    assert flow_schedule(stored, 2, 1, start=0.8) == [FlowStep(2, 0.75, 0.5), FlowStep(1, 0.5, 0.0)]


@pytest.mark.parametrize("options", [{}, {"exact_below": 0.5}, {"exact_below": 0.0}, {"step_size": 0.1}], ids=str)
def test_hybrid_switches_from_the_stored_witness_to_the_exact_one(options):
    net, z = Smooth().double(), particles()
    clean = torch.randn(5, dtype=torch.float64)
    stored = embeddings_for(clean, clean + torch.randn(5, dtype=torch.float64), scale=0.5)
    hybrid = HybridFlow(net, stored, **options)
    below, common = options.get("exact_below", 0.3), {k: v for k, v in options.items() if k == "step_size"}
    exact, approximate = ExactFlow(net, stored, **common), ApproximateFlow(net, stored, **common)
    for step in flow_schedule(stored, 4, 1):
        moved = {flow: flow.step(z, step) for flow in (exact, approximate)}
        assert not torch.allclose(*moved.values(), rtol=1e-3)
        expected = moved[exact if stored.levels[step.level] <= below else approximate]
        assert torch.equal(hybrid.step(z, step), expected)


@pytest.mark.parametrize("sampler", ["exact", "approximate", "hybrid"])
def test_a_constant_step_is_the_same_at_every_level(sampler):
    """And exact witnesses then have their own length, as in the paper."""
    net, z = Smooth().double(), particles()
    clean = torch.randn(5, dtype=torch.float64)
    stored = embeddings_for(clean, clean + torch.randn(5, dtype=torch.float64))
    flow = get_flow(sampler, net, stored, step_size=0.1)
    assert {flow.coefficients(step) for step in flow_schedule(stored, 4, 2)} == {(1.0, 0.1)}
    own = ApproximateFlow(net, stored) if sampler == "approximate" else ExactFlow(net, stored, rescale=False)
    torch.testing.assert_close(flow.step(z, FlowStep(0, 0.25, 0.0)), z - 0.1 * own.gradient(z, 0))


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

    def length(z, level):
        return ApproximateFlow(net, stored).gradient(z, level).flatten(1).square().sum(1).mean().sqrt()

    wanted = [1.1 * length(z, level).item() for level in range(4)]
    calibrate_on_particles(net, stored, wanted, z)
    # the flow with steps of full length: each level's factor is the ratio at the particles that reach it
    flow = ApproximateFlow(net, stored)
    for step in flow_schedule(stored, 4, 1):
        expected = wanted[step.level] / length(z, step.level)
        assert 0.5 < expected < 2
        torch.testing.assert_close(stored.lengthening[0, step.level].double(), expected, rtol=1e-5, atol=0)
        z = z - expected * (1 - step.end / step.start) * flow.gradient(z, step.level)
    assert (stored.lengthening[0, :3] - 1.1).abs().min() > 1e-3  # it did depend on them
    assert stored.gradient_scale.eq(1).all()


@pytest.mark.parametrize("target", ["displacement", "restoring"])
@pytest.mark.parametrize("sampler", ["exact", "approximate", "hybrid"])
def test_short_steps_are_lengthened_and_a_step_to_the_data_is_not(sampler, target):
    stored = embeddings_for(torch.zeros(8), torch.ones(8), target=target)
    flow, longer = (get_flow(sampler, Identity(), stored) for _ in range(2))
    steps = flow_schedule(stored, 4, 3)
    before = [flow.coefficients(step)[1] for step in steps]
    stored.lengthening.fill_(1.5)
    for step, size in zip(steps, before):
        left = step.end / step.start
        assert longer.coefficients(step)[1] == pytest.approx(size * (1 + 0.5 * left**4), rel=1e-6)
    assert longer.coefficients(FlowStep(3, 1.0, 0.0))[1] == pytest.approx(1.0)


def test_calibration_is_bounded_and_leaves_what_has_no_gradient():
    z = particles(8)
    gap = torch.tensor([3.0, 4.0, 0, 0, 0, 0, 0, 0], dtype=torch.float64)  # gradients of length 5 everywhere
    stored = embeddings_for(0 * gap, gap)
    calibrate_on_particles(Identity(), stored, [5.0, 6.0, 50.0, 0.5], z)
    torch.testing.assert_close(stored.lengthening[0], torch.tensor([1.0, 1.2, 2.0, 0.5]).double())
    still = embeddings_for(0 * gap, 0 * gap)
    calibrate_on_particles(Identity(), still, [5.0] * 4, z)
    assert still.lengthening[0].tolist() == [1.0] * 4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_noise_levels": 5}, r"in \[1, 4\]"),
        ({"num_noise_levels": 0}, r"in \[1, 4\]"),
        ({"num_noise_levels": 4, "start": 0.8}, r"in \[1, 3\], the stored levels up to 0.8"),
        ({"steps_per_level": 0}, "at least 1"),
        ({"start": 0.2}, r"start must be in \[0.25, 1\]"),
        ({"start": 1.1}, r"start must be in \[0.25, 1\]"),
    ],
)
def test_refuses_schedules_that_cannot_be(options, message):
    stored = embeddings_for(torch.zeros(3), torch.ones(3))
    with pytest.raises(ValueError, match=message):
        flow_schedule(stored, **{"num_noise_levels": 2, "steps_per_level": 1, **options})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"step_size": -1.0}, "positive"),
        ({"step_size": 0.0}, "positive"),
        ({"label": 0}, "has no classes"),
    ],
)
@pytest.mark.parametrize("sampler", ["exact", "approximate", "hybrid"])
def test_refuses_flows_that_cannot_be(sampler, options, message):
    with pytest.raises(ValueError, match=message):
        get_flow(sampler, Identity(), embeddings_for(torch.zeros(3), torch.ones(3)), **options)


def test_refuses_other_samplers():
    with pytest.raises(ValueError, match="sampler must be"):
        get_flow("euler", Identity(), embeddings_for(torch.zeros(3), torch.ones(3)))


@pytest.mark.parametrize(
    "nfe, expected", [(1, [1]), (10, 10 * [1]), (25, 25 * [1]), (26, 24 * [1] + [2]), (100, 25 * [4])]
)
def test_levels_and_steps_of_an_nfe(nfe, expected):
    assert steps_for_nfe(nfe, 25) == (len(expected), expected)


@pytest.mark.parametrize("nfe", [7, 13, 29, 31, 58])
def test_every_nfe_passes_through_the_levels(nfe):
    """Also one that no number of levels divides: the witness of t = 1 does not lead to the data."""
    stored = embeddings_for(torch.zeros(3), torch.ones(3), torch.arange(1, 13) / 12)
    steps = flow_schedule(stored, *steps_for_nfe(nfe, 12))
    assert len(steps) == nfe and len({step.level for step in steps}) == min(nfe, 12)
    assert all(stored.levels[step.level] >= step.start - 1e-6 > step.end for step in steps)
    ends = [step.end for step in steps]
    assert [step.start for step in steps[1:]] == pytest.approx(ends[:-1]) and ends[-1] == 0


def test_the_hybrid_flow_is_exact_at_its_own_boundary():
    """Levels are stored in float32, which does not hold 0.3."""
    stored = embeddings_for(torch.zeros(3), torch.ones(3), torch.arange(1, 11) / 10)
    for below in (0.1, 0.3, 0.6, 0.8):
        hybrid = HybridFlow(Smooth(), stored, exact_below=below)
        assert sum(hybrid.at(k) is hybrid.exact for k in range(10)) == round(10 * below)


def test_an_nfe_is_positive():
    with pytest.raises(ValueError, match="at least 1"):
        steps_for_nfe(0, 25)


class Away(Flow):
    """A flow that moves particles by a constant and by their mean, so that it matters which ones it is given."""

    def __init__(self, by):
        self.by = by

    def step(self, z, step):
        return z + self.by + z.mean()


def test_classes_go_in_step_each_down_its_own_flow():
    z, steps, seen = torch.randn(5, 1, 1, 1), [FlowStep(0, 1.0, 0.5), FlowStep(0, 0.5, 0.0)], []
    flows, labels = {1: Away(1.0), None: Away(-3.0)}, [None, 1, 1, None, 1]

    def callback(i, step, z):
        seen.append((i, step, z.clone()))
        return z + 10

    end = run_in_step(flows, labels, z, steps, callback)
    for label, rows in {1: [1, 2, 4], None: [0, 3]}.items():
        alone = flows[label].run(z[rows], steps, lambda i, step, z: z + 10)
        torch.testing.assert_close(end[rows], alone)
    assert [(i, step) for i, step, _ in seen] == list(enumerate(steps)) and all(len(z) == 5 for *_, z in seen)
    one = run_in_step({None: flows[None]}, [None] * 5, z, steps, callback)
    torch.testing.assert_close(one, flows[None].run(z, steps, lambda i, step, z: z + 10))
