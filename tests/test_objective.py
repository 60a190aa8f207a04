import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import metrics, tiny_features, weights
from safetensors.torch import load_file, save_file
from torch import nn

from latent_dmmd.discrepancy import KALE, MMD, kale, mmd2
from latent_dmmd.embedding_sources import RunningEmbeddings
from latent_dmmd.forward import LinearInterpolant
from latent_dmmd.kernels import GaussianKernel
from latent_dmmd.objective import DMMD, Batch, WitnessMatching
from latent_dmmd.training.config import Config, parse_config
from latent_dmmd.training.loop import train


class TinyConfig:
    in_channels, sample_size, num_features = 2, 2, 3


class TinyNet(nn.Module):
    """A smooth φ with second derivatives, in float64."""

    config = TinyConfig

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(8, 6).double(), nn.Linear(7, 3).double()

    def forward(self, x, t):
        h = torch.tanh(self.a(x.flatten(1)))
        return self.b(torch.cat([h, t.to(h).expand(len(h))[:, None]], 1))


def make_batch(levels=(1, 3), pairs=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x_0, eps = (torch.randn(len(levels), pairs, 2, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    u = torch.rand(len(levels), pairs, generator=generator, dtype=torch.float64)
    return Batch(x_0, torch.tensor(levels), eps, u)


DISCREPANCIES = {
    "mmd2": MMD(),
    "gaussian": MMD(GaussianKernel(0.7)),
    "median": MMD(GaussianKernel("median")),
    "kale": KALE(lam=0.5),
    "kale-gaussian": KALE(GaussianKernel(0.7), lam=0.5),
}


@pytest.mark.parametrize("discrepancy", list(DISCREPANCIES.values()), ids=list(DISCREPANCIES))
@pytest.mark.parametrize("center", [0.0, 1.0])
def test_dmmd_against_loops(center, discrepancy):
    net, batch = TinyNet(), make_batch()
    objective = DMMD(
        net,
        LinearInterpolant(),
        4,
        gradient_weight=2.0,
        gradient_center=center,
        feature_weight=0.1,
        discrepancy=discrepancy,
    )
    terms = objective(batch)
    values, penalty, features = [], [], []
    for x_0, k, eps, u in zip(*batch[:4]):
        t = (k + 1) / 4
        x_t = (1 - t) * x_0 + t * eps
        phi_0, phi_t = net(x_0, t), net(x_t, t)
        if isinstance(discrepancy, KALE):
            values.append(kale(phi_t, phi_0, discrepancy.kernel, discrepancy.lam))
        else:
            values.append(mmd2(phi_t, phi_0, discrepancy.kernel, estimator="u"))
        f = discrepancy.witness(phi_t, phi_0)
        for i in range(len(x_0)):
            x = ((1 - u[i]) * x_0[i] + u[i] * x_t[i])[None].detach().requires_grad_()
            (g,) = torch.autograd.grad(f(net(x, t)).sum(), x, retain_graph=True)
            penalty.append((g.norm() - center) ** 2)
        features.append(phi_0.square().sum(1).mean() + phi_t.square().sum(1).mean())
    expected = {discrepancy.name: sum(values) / 2, "gradient_penalty": 2 * sum(penalty) / 8}
    expected["feature_penalty"] = 0.1 * sum(features) / 2
    for name, value in expected.items():
        torch.testing.assert_close(terms.named[name], value.detach(), rtol=1e-5, atol=1e-7, check_dtype=False)
    total = -expected[discrepancy.name] + expected["gradient_penalty"] + expected["feature_penalty"]
    torch.testing.assert_close(terms.total, total, rtol=1e-5, atol=1e-7, check_dtype=False)


def test_identity_with_flow_matching():
    """−(E f(x_t) − E f(x_0)) + ½λ E‖∇f‖² = ½λ E‖∇f − (x_t − x_0)/λ‖² − E‖x_t − x_0‖²/2λ for any smooth f, u ~ U[0,1].

    The integral over u is done by Gauss-Legendre quadrature, so both sides agree to rounding.
    """
    net, lam, t = TinyNet(), 0.7, torch.tensor(0.6, dtype=torch.float64)
    x_0, eps = make_batch(pairs=5).x_0[0], make_batch(pairs=5).eps[0]
    x_t = LinearInterpolant().sample(x_0, t.expand(5), eps)
    delta = torch.randn(3, dtype=torch.float64)
    f = lambda z: net(z, t) @ delta  # noqa: E731
    nodes, weights = np.polynomial.legendre.leggauss(20)
    penalty = regression = 0.0
    for node, weight in zip((nodes + 1) / 2, weights / 2):
        x = ((1 - node) * x_0 + node * x_t).detach().requires_grad_()
        (g,) = torch.autograd.grad(f(x).sum(), x)
        penalty += weight * g.square().flatten(1).sum(1).mean()
        regression += weight * (g - (x_t - x_0) / lam).square().flatten(1).sum(1).mean()
    square = (x_t - x_0).square().flatten(1).sum(1).mean()
    left = -(f(x_t).mean() - f(x_0).mean()) + 0.5 * lam * penalty
    right = 0.5 * lam * regression - square / (2 * lam)
    torch.testing.assert_close(left, right.detach(), rtol=1e-10, atol=1e-12)


def test_both_objectives_have_the_gradient_of_the_identity():
    """The zero-centred penalty on the normalised witness and witness matching: same gradient in θ over a grid of u."""
    net, batch = TinyNet(), make_batch(levels=(2,), pairs=3)
    objective = WitnessMatching(net, LinearInterpolant(), 4, mean_embeddings="batch", segment="whole")
    nodes, weights = np.polynomial.legendre.leggauss(20)
    total = 0.0
    for node, weight in zip((nodes + 1) / 2, weights / 2):
        u = torch.full_like(batch.u, node)
        total = total + weight * objective(batch._replace(u=u)).total
    matching = torch.autograd.grad(total, list(net.parameters()), allow_unused=True)

    t, lam = torch.tensor(0.75, dtype=torch.float64), objective.gradient_length()[2]
    x_0 = batch.x_0[0]
    x_t = (1 - t) * x_0 + t * batch.eps[0]
    phi_t, phi_0 = net(x_t, t), net(x_0, t)
    delta = phi_t.mean(0) - phi_0.mean(0)
    unit = delta / delta.norm()
    penalty = 0.0
    for node, weight in zip((nodes + 1) / 2, weights / 2):
        x = ((1 - node) * x_0 + node * x_t).detach().requires_grad_()
        (g,) = torch.autograd.grad((net(x, t) @ unit).sum(), x, create_graph=True)
        penalty = penalty + weight * g.square().flatten(1).sum(1).mean()
    # ½λ · matching = −MMD + ½λ · penalty + constant
    loss = (-delta.norm() + 0.5 * lam * penalty) / (0.5 * lam)
    direct = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    for a, b in zip(matching, direct):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("source, forwards", [("batch", 3 * 8), ("ema", 8), ("running", 8)])
def test_forwards_of_the_trained_network(source, forwards):
    """The saving that the sources make: particles through φ, for 2 levels and 4 pairs."""
    net, averaged = TinyNet(), TinyNet()
    seen = []
    net.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    objective = WitnessMatching(net, LinearInterpolant(), 4, averaged, mean_embeddings=source)
    terms = objective(make_batch())
    assert sum(seen) == forwards
    assert set(terms.named) == {"matching", "mmd", "cosine"}


def test_running_means_are_the_plain_average_at_first_then_exponential():
    net, averaged = TinyNet(), TinyNet(seed=1)
    objective = WitnessMatching(net, LinearInterpolant(), 4, averaged, momentum=0.5, refresh_every=1)
    expected = None
    for i in range(4):
        batch = make_batch(levels=(2,), seed=i)
        objective(batch)
        mean = averaged(batch.x_0[0], torch.tensor(0.75)).mean(0).float()
        weight = min(i / (i + 1), 0.5)
        expected = mean if expected is None else weight * expected + (1 - weight) * mean
    torch.testing.assert_close(objective.source.clean[0, 2], expected.detach())
    assert objective.source.num_updates.tolist() == [[0, 0, 4, 0]]


def test_running_features_are_the_latest_draws():
    """Where means are not enough: the first batch fills all points, later ones take the place of the oldest."""
    net, averaged = TinyNet(), TinyNet(seed=1)
    objective = WitnessMatching(
        net, LinearInterpolant(), 4, averaged, refresh_every=1, discrepancy=MMD(GaussianKernel(0.5)), num_points=6
    )
    seen = []
    for i in range(4):
        batch = make_batch(levels=(2,), seed=i)
        seen.append(averaged(batch.x_0[0], torch.tensor(0.75)).float().detach())
        objective(batch)
        if i == 0:
            torch.testing.assert_close(objective.source.clean[0, 2], seen[0][[0, 1, 2, 3, 0, 1]])
    latest = torch.cat(seen)[-6:]
    stored = objective.source.clean[0, 2]
    torch.testing.assert_close(stored[stored[:, 0].argsort()], latest[latest[:, 0].argsort()])
    assert not objective.source.clean[0, [0, 1, 3]].any()


@pytest.mark.parametrize("source", ["batch", "ema", "running"])
@pytest.mark.parametrize("discrepancy", list(DISCREPANCIES.values()), ids=list(DISCREPANCIES))
def test_witness_matching_of_any_witness_against_loops(discrepancy, source):
    """One level with as many points as pairs: all three sources are the batch, but for what is differentiated."""
    net, batch = TinyNet(), make_batch(levels=(2,))
    objective = WitnessMatching(
        net,
        LinearInterpolant(),
        4,
        TinyNet(),
        mean_embeddings=source,
        discrepancy=discrepancy,
        num_points=4,
        segment="whole",
    )
    terms = objective(batch)
    t, x_0 = torch.tensor(0.75), batch.x_0[0]
    x_t = (1 - t) * x_0 + t * batch.eps[0]
    f = discrepancy.witness(net(x_t, t), net(x_0, t))
    f = f.scaled(1 / f.norm())
    expected = 0.0
    for i in range(4):
        x = ((1 - batch.u[0, i]) * x_0[i] + batch.u[0, i] * x_t[i])[None].detach().requires_grad_()
        (g,) = torch.autograd.grad(f(net(x, t)).sum(), x, retain_graph=True)
        length = (2 * t**2 * 8) ** 0.5  # (E ‖x_t − x_0‖²)^½ = t (2 D)^½
        expected += (g[0] - (x_t[i] - x_0[i]) / length).square().sum() / 4
    torch.testing.assert_close(terms.total, expected.detach(), rtol=1e-5, atol=1e-6, check_dtype=False)
    assert terms.named.keys() == {"matching", discrepancy.name.removesuffix("2"), "cosine"}


def test_segments_of_the_levels_tile_the_way():
    """segment="level" is the whole-segment loss at u moved into [t_{k−1} / t_k, 1]."""
    net, batch = TinyNet(), make_batch(levels=(0, 2))
    level, whole = (
        WitnessMatching(net, LinearInterpolant(), 4, mean_embeddings="batch", segment=segment)
        for segment in ("level", "whole")
    )
    start, end = level.segment_ends()
    torch.testing.assert_close(start, torch.tensor([0.0, 1 / 2, 2 / 3, 3 / 4]))
    assert end.tolist() == [1, 1, 1, 1]
    moved = batch._replace(u=torch.stack([batch.u[0], 2 / 3 + batch.u[1] / 3]))
    torch.testing.assert_close(level(batch).total, whole(moved).total)
    assert not torch.allclose(level(batch).total, whole(batch).total, rtol=1e-3)


def restoring(net=None, source="batch", **options):
    return WitnessMatching(
        net or TinyNet(), LinearInterpolant(), 4, mean_embeddings=source, target="restoring", **options
    )


def test_identity_of_the_restoring_target():
    """½λ E‖∇f(x̃_u) − u (x_t − x_0)/λ‖² is the zero-centred penalty and a discrepancy, for any smooth f, u ~ U[a, b]:

    −b/(b − a) (E f(x̃_b) − E f(m)) + ½λ E‖∇f(x̃_u)‖² + E u² ‖x_t − x_0‖² / 2λ, where m is x̃_a with probability a / b and
    x̃_v, v ~ U[a, b], otherwise: the mixture of the path below x̃_b.
    """
    net, lam, a, b = TinyNet(), 0.7, 0.4, 1.3
    x_0, eps = make_batch(pairs=5).x_0[0], make_batch(pairs=5).eps[0]
    x_t = LinearInterpolant().sample(x_0, torch.tensor(0.6, dtype=torch.float64).expand(5), eps)
    delta = torch.randn(3, dtype=torch.float64)
    f = lambda u: (net((1 - u) * x_0 + u * x_t, torch.tensor(0.6)) @ delta).mean()  # noqa: E731
    nodes, weights = np.polynomial.legendre.leggauss(20)
    regression = penalty = square = path = 0.0
    for u, weight in zip(a + (b - a) * (nodes + 1) / 2, weights / 2):
        x = ((1 - u) * x_0 + u * x_t).detach().requires_grad_()
        (g,) = torch.autograd.grad((net(x, torch.tensor(0.6)) @ delta).sum(), x)
        regression += weight * (g - u * (x_t - x_0) / lam).square().flatten(1).sum(1).mean()
        penalty += weight * g.square().flatten(1).sum(1).mean()
        square += weight * u**2 * (x_t - x_0).square().flatten(1).sum(1).mean()
        path += weight * f(u)
    mixture = a / b * f(a) + (1 - a / b) * path
    right = -b / (b - a) * (f(b) - mixture) + 0.5 * lam * penalty + square / (2 * lam)
    torch.testing.assert_close(0.5 * lam * regression, right.detach(), rtol=1e-10, atol=1e-12)


class HalfSquare(nn.Module):
    """φ = (‖x − c‖² / 2, 0, 0), whose normalised witness is its first number."""

    config = TinyConfig

    def __init__(self, center, length=1.0):
        super().__init__()
        self.center, self.length = center, length

    def forward(self, x, t):
        f = (x - self.center).flatten(1).square().sum(1) / (2 * self.length)
        return torch.stack([f, 0 * f, 0 * f], 1)


@pytest.mark.parametrize("segment", ["level", "whole"])
def test_the_restoring_target_of_one_datum_is_a_quadratic_potential(segment):
    """All data at c: ½‖x − c‖² / λ_t has the target for its gradient at every u, and no loss."""
    batch = make_batch(levels=(1,), pairs=6)
    batch = batch._replace(x_0=torch.full_like(batch.x_0, 0.3))
    net = HalfSquare(0.3)
    objective = restoring(net, segment=segment)
    net.length = objective.gradient_length()[1]
    terms = objective(batch)
    assert terms.total < 1e-10 and terms.named["cosine"] > 1 - 1e-6
    displacement = WitnessMatching(net, LinearInterpolant(), 4, mean_embeddings="batch", segment=segment)
    assert displacement(batch).total > 1e-2


def test_restoring_segments_reach_from_the_level_below_to_the_level_above():
    objective = restoring()
    start, end = objective.segment_ends()
    torch.testing.assert_close(start, torch.tensor([0, 1 / 2, 2 / 3, 3 / 4]))
    torch.testing.assert_close(end, torch.tensor([3 / 2, 3 / 2, 4 / 3, 1]))  # the lowest would be 2


@pytest.mark.parametrize("source", ["batch", "ema", "running"])
def test_the_restoring_target_against_loops(source):
    net, batch = TinyNet(), make_batch(levels=(2,))
    terms = restoring(net, source, averaged_net=TinyNet())(batch)
    t, x_0 = torch.tensor(0.75), batch.x_0[0]
    x_t = (1 - t) * x_0 + t * batch.eps[0]
    f = MMD().witness(net(x_t, t), net(x_0, t))
    f, expected = f.scaled(1 / f.norm()), 0.0
    for i in range(4):
        u = 2 / 3 + (4 / 3 - 2 / 3) * batch.u[0, i]
        x = ((1 - u) * x_0[i] + u * x_t[i])[None].detach().requires_grad_()
        (g,) = torch.autograd.grad(f(net(x, t)).sum(), x, retain_graph=True)
        expected += (g[0] - (x[0] - x_0[i]) / (2 * t**2 * 8) ** 0.5).square().sum() / 4
    torch.testing.assert_close(terms.total, expected.detach(), rtol=1e-5, atol=1e-6, check_dtype=False)


def test_refreshes_every_so_often():
    objective = WitnessMatching(TinyNet(), LinearInterpolant(), 4, TinyNet(1), refresh_every=3)
    for i in range(7):
        objective(make_batch(levels=(0, 2), seed=i))
    assert objective.source.num_updates.tolist() == [[3, 0, 3, 0]]


def test_a_perfect_witness_has_no_loss():
    """Every pair displaced by the same v: ∇f = v / λ is the linear φ, whatever its sign."""

    class Quadratic(nn.Module):
        config = TinyConfig

        def forward(self, x, t):
            f = (x.flatten(1) @ self.v) / self.lam
            return torch.stack([f, 0 * f, 0 * f], 1)

    net = Quadratic()
    batch = make_batch(levels=(3,), pairs=4)
    v = torch.randn(2, 2, 2, dtype=torch.float64)
    v = v / v.norm() * 8**0.5
    batch = batch._replace(eps=batch.x_0 + v)  # at t = 1, x_t − x_0 = v for every pair
    objective = WitnessMatching(net, LinearInterpolant(), 4, mean_embeddings="batch")
    net.v, net.lam = v.flatten(), objective.gradient_length()[3]
    terms = objective(batch)
    assert terms.total < 1e-10 and terms.named["cosine"] > 1 - 1e-6
    net.v = -net.v  # the sign of φ does not matter: Δ turns with it
    assert objective(batch).total < 1e-10


def test_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="running"):
        WitnessMatching(TinyNet(), LinearInterpolant(), 4, TinyNet(), mean_embeddings="stored")
    with pytest.raises(ValueError, match="segment"):
        WitnessMatching(TinyNet(), LinearInterpolant(), 4, mean_embeddings="batch", segment="half")
    with pytest.raises(ValueError, match="target"):
        WitnessMatching(TinyNet(), LinearInterpolant(), 4, mean_embeddings="batch", target="velocity")
    with pytest.raises(ValueError, match="averaged network"):
        WitnessMatching(TinyNet(), LinearInterpolant(), 4)


OBJECTIVES = {
    "dmmd": lambda: DMMD(TinyNet(), LinearInterpolant(), 4),
    "gaussian": lambda: DMMD(TinyNet(), LinearInterpolant(), 4, discrepancy=DISCREPANCIES["gaussian"]),
    "kale": lambda: DMMD(TinyNet(), LinearInterpolant(), 4, discrepancy=DISCREPANCIES["kale"]),
    "batch": lambda: WitnessMatching(TinyNet(), LinearInterpolant(), 4, mean_embeddings="batch"),
    "running": lambda: WitnessMatching(TinyNet(), LinearInterpolant(), 4, TinyNet(1)),
}


def loss_and_gradients(name, batch):
    objective = OBJECTIVES[name]()
    total = objective(batch).total
    total.backward()
    parameters = dict(objective.net.named_parameters())
    return total.detach(), {n: p.grad for n, p in parameters.items() if p.grad is not None}


def one_rank(rank, world_size, file, out):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world_size)
    whole = make_batch(pairs=6)
    share = slice(3 * rank, 3 * rank + 3)
    batch = whole._replace(x_0=whole.x_0[:, share], eps=whole.eps[:, share], u=whole.u[:, share])
    results = {}
    for name in OBJECTIVES:
        total, gradients = loss_and_gradients(name, batch)
        for value in (total, *gradients.values()):  # what DDP does
            dist.all_reduce(value)
            value /= world_size
        results[name] = (total, gradients)
    if rank == 0:
        torch.save(results, out)
    dist.destroy_process_group()


def test_two_ranks_are_one_rank_with_twice_the_pairs(tmp_path):
    mp.spawn(one_rank, args=(2, tmp_path / "rendezvous", tmp_path / "results.pt"), nprocs=2)
    for name, (total, gradients) in torch.load(tmp_path / "results.pt", weights_only=True).items():
        expected_total, expected = loss_and_gradients(name, make_batch(pairs=6))
        torch.testing.assert_close(total, expected_total, rtol=1e-5, atol=1e-8)
        assert gradients.keys() == expected.keys()
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[parameter], rtol=1e-4, atol=1e-7, msg=f"{name} {parameter}")


def as_saved_by_0_1(state):
    """A state dictionary with the old name of the network, and running embeddings whose rows were not kept by class."""
    names = {name: "feature_net." + name.removeprefix("net.") if name.startswith("net.") else name for name in state}
    tables = {f"source.{name}" for name in ("clean", "noisy", "num_updates")}
    return {names[name]: a.flatten(0, 1).contiguous() if name in tables else a for name, a in state.items()}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("num_classes", [0, 2])
@pytest.mark.parametrize("discrepancy", [DISCREPANCIES["mmd2"], DISCREPANCIES["gaussian"]], ids=["means", "features"])
def test_weights_saved_by_0_1_load(discrepancy, num_classes, wrapped):
    def build(seed):
        torch.manual_seed(seed)
        nets = [tiny_features(2, 2, 3, num_classes=num_classes).double() for _ in range(2)]
        options = dict(discrepancy=discrepancy, num_points=5, num_classes=num_classes)
        return WitnessMatching(nets[0], LinearInterpolant(), 4, nets[1], refresh_every=1, **options)

    def batch(seed):
        label = torch.tensor([2, 0]) if num_classes else None
        return make_batch(levels=(1, 3), seed=seed)._replace(label=label)

    before, after = build(0), build(1)
    for seed in range(3):
        before(batch(seed))
    state = as_saved_by_0_1(before.state_dict())
    assert "feature_net.conv_in.weight" in state and state["source.num_updates"].shape == (4 * (num_classes + 1),)
    if wrapped:  # as by DistributedDataParallel
        nn.ModuleDict({"module": after}).load_state_dict({f"module.{name}": a for name, a in state.items()})
    else:
        after.load_state_dict(state)
    assert before.source.num_updates.sum() == 6
    loaded = after.state_dict()
    for name, a in before.state_dict().items():
        assert torch.equal(a, loaded[name]), name


def test_tables_of_another_size_are_refused():
    with pytest.raises(RuntimeError, match="size mismatch for clean"):
        RunningEmbeddings(None, 4, 3).load_state_dict(RunningEmbeddings(None, 5, 3).state_dict())


@pytest.mark.parametrize("num_points", [0, 8])
def test_a_level_that_a_step_draws_twice_keeps_both_batches(num_points):
    """Batches of four features: one all 0, the other all 1."""

    class Asks:
        discrepancy = MMD()

        def both_features(self, batch, x_t, net):
            phi = torch.arange(2.0)[:, None, None].expand(2, 4, 3)
            return phi, phi + 10

    source = RunningEmbeddings(None, 5, 3, num_points=num_points)
    batch = SimpleNamespace(level=torch.tensor([2, 2]), label=None)
    source(Asks(), batch, torch.zeros(2, 4, 1, 1, 1))
    assert source.num_updates[0].tolist() == [0, 0, 2, 0, 0]
    clean, noisy = (table[0, 2] for table in (source.clean, source.noisy))
    if num_points:
        assert sorted(clean[:, 0].tolist()) == 4 * [0.0] + 4 * [1.0]
    else:
        assert clean.tolist() == 3 * [0.5]
    torch.testing.assert_close(noisy, clean + 10)


def test_checkpoints_of_0_1_resume(arguments, trained, trained_once):
    """The steps to come are the same."""
    checkpoint = trained / "checkpoint-3"
    path, manifest = checkpoint / "model.safetensors", checkpoint / "complete.json"
    state = as_saved_by_0_1(load_file(path))
    assert not [name for name in state if name.startswith("net.")] and state["source.clean"].shape == (4, 8)
    save_file(state, path, metadata={"format": "pt"})
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {path.name: path.stat().st_size}))
    resumed = train(parse_config(Config, [*arguments, "--resume_from_checkpoint", str(checkpoint)]))
    assert metrics(resumed) == metrics(trained_once)
    for (name, a), b in zip(weights(trained_once).items(), weights(resumed).values()):
        assert torch.equal(a, b), name
