"""A one-step generator: pairs of the flow, the regression, and the pipeline."""

import pytest
import torch
from conftest import metrics, tiny_pipeline

from latent_dmmd import distillation
from latent_dmmd.baselines import VelocityNet
from latent_dmmd.config import Config, parse_config
from latent_dmmd.distillation import OneStep, PairCache, begin_with_features, make_pairs
from latent_dmmd.forward import LinearInterpolant
from latent_dmmd.objective import Batch
from latent_dmmd.pipeline import load_pipeline
from latent_dmmd.training import draw_batch, train
from latent_dmmd.utils.errors import ConfigError


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(distillation, "SHARD_SIZE", 4)


@pytest.fixture
def teacher(tiny_vae):
    return tiny_pipeline(tiny_vae)


HOW = dict(num_inference_steps=2, sampler="approximate")


def test_pairs_are_noise_and_where_the_flow_brings_it(teacher, tmp_path):
    pairs = make_pairs(teacher, tmp_path, 6, 0, **HOW)
    assert len(pairs) == 8 and len(list(tmp_path.glob("*.safetensors"))) == 2
    again = teacher(8, latents=pairs.noise, output_type="latent", **HOW).images
    torch.testing.assert_close(pairs.moved, again, atol=1e-5, rtol=1e-5)
    assert abs(pairs.noise.std() - 1) < 0.05
    moved, noise = pairs.draw_with_noise(50, torch.Generator().manual_seed(0))
    for x, eps in zip(moved, noise):
        (k,) = [k for k in range(8) if torch.equal(pairs.noise[k], eps)]
        assert torch.equal(x, pairs.moved[k])


def test_making_pairs_goes_on_where_it_was(teacher, tmp_path):
    whole = make_pairs(teacher, tmp_path / "whole", 12, 0, **HOW)
    make_pairs(teacher, tmp_path / "part", 12, 0, **HOW)
    (tmp_path / "part" / "00001.safetensors").unlink()
    before = (tmp_path / "part" / "00000.safetensors").stat().st_mtime_ns
    resumed = make_pairs(teacher, tmp_path / "part", 12, 0, **HOW)
    assert torch.equal(whole.noise, resumed.noise) and torch.equal(whole.moved, resumed.moved)
    assert (tmp_path / "part" / "00000.safetensors").stat().st_mtime_ns == before


def test_the_loss_against_loops():
    torch.manual_seed(0)
    net = VelocityNet(4, 2, block_out_channels=(8,), attention_levels=(False,), layers_per_block=1, num_groups=2)
    x, eps = torch.randn(2, 3, 2, 4, 4), torch.randn(2, 3, 2, 4, 4)
    terms = OneStep(net, LinearInterpolant(), 4)(Batch(x, torch.arange(2), eps, torch.rand(2, 3)))
    one, expected = torch.ones(()), 0.0
    for level in range(2):
        for i in range(3):
            generated = eps[level, i] - net(eps[level, i][None], one)[0]
            expected += (generated - x[level, i]).square().mean() / 6
    torch.testing.assert_close(terms.total, expected)
    assert terms.named.keys() == {"distillation"}


@pytest.fixture
def small_generator():
    torch.manual_seed(1)
    return VelocityNet(16, 4, block_out_channels=(8,), attention_levels=(True,), layers_per_block=1, num_groups=2)


def test_own_samples_are_moved_by_the_witness_against_loops(teacher, small_generator):
    embeddings, weight = teacher.mean_embeddings, 0.3
    embeddings.noisy.normal_()
    embeddings.gradient_scale.uniform_(0.1, 1.0)
    x, eps, u = torch.randn(1, 3, 4, 16, 16), torch.randn(1, 3, 4, 16, 16), torch.rand(1, 3)
    objective = OneStep(small_generator, LinearInterpolant(), 4, teacher=teacher, witness_weight=weight)
    terms = objective(Batch(x, torch.zeros(1, dtype=torch.long), eps, u))
    parameters = list(small_generator.parameters())
    found = torch.autograd.grad(terms.total, parameters, retain_graph=True)

    k = int(u[0, 0] * len(embeddings.levels))
    t, net = embeddings.levels[k], teacher.feature_net
    generated = [eps[0, i] - small_generator(eps[0, i][None], torch.ones(()))[0] for i in range(3)]
    noised = [((1 - t) * generated[i] + t * eps[0, (i - 1) % 3]).detach() for i in range(3)]
    features = [net(z[None], t)[0].detach() for z in noised]
    expected = 0.0
    for i in range(3):
        others = sum(features[j] for j in range(3) if j != i) / 2
        z = noised[i].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(net(z[None], t)[0] @ (others - embeddings.noisy[k]), z)
        target = generated[i].detach() - embeddings.gradient_scale[k] * gradient
        own = (generated[i] - target).square().mean()
        expected += ((generated[i] - x[0, i]).square().mean() + weight * own) / 3
    torch.testing.assert_close(terms.total, expected)
    for a, b in zip(found, torch.autograd.grad(expected, parameters)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    assert terms.named.keys() == {"distillation", "witness"}


def test_the_witness_moves_samples_towards_the_data(teacher):
    embeddings, process = teacher.mean_embeddings, LinearInterpolant()
    torch.manual_seed(0)
    x, eps = torch.randn(16, 4, 16, 16), torch.randn(16, 4, 16, 16)
    k, t = 1, embeddings.levels[1]
    phi = teacher.feature_net(process.sample(x + 0.5, t.expand(16), eps), t).detach()
    embeddings.noisy[k] = phi.mean(0)
    embeddings.gradient_scale.fill_(0.1)
    objective = OneStep(None, process, 4, teacher=teacher)

    def distance(x):
        return (teacher.feature_net(process.sample(x, t.expand(16), eps), t).mean(0) - phi.mean(0)).norm().item()

    moved = objective.moved_by_witness(x, eps, (k + 0.5) / len(embeddings.levels))
    assert not moved.requires_grad and distance(moved) < distance(x)


def test_batches_hold_pairs():
    numbers = torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 2, 4, 4).contiguous()
    cache = PairCache(numbers, 10 * numbers, torch.zeros(2), torch.ones(2))
    config = parse_config(Config, []).training
    batch = draw_batch(cache, config, 4, 0, 0)
    assert torch.equal(batch.x_0, 10 * batch.eps) and batch.label is None and len(batch.eps.unique()) == 5


def test_a_generator_begins_with_the_shared_weights(teacher):
    net = VelocityNet(16, 4, block_out_channels=(8,), attention_levels=(True,), layers_per_block=1, num_groups=2)
    last = net.conv_out.weight.clone()
    begin_with_features(net, teacher.feature_net)
    features = teacher.feature_net.state_dict()
    for name, weight in net.state_dict().items():
        assert name.startswith("conv_out") or torch.equal(weight, features[name]), name
    assert torch.equal(net.conv_out.weight, last)


@pytest.fixture
def one_step(arguments, trained_once):
    # the teacher's network is the one that the configuration describes
    folder = trained_once
    extra = ["--objective.name", "one-step", "--objective.teacher", str(folder / "pipeline")]
    extra += ["--objective.teacher_steps", "4", "--objective.num_pairs", "12", "--training.num_steps", "30"]
    return [*arguments, *extra, "--training.learning_rate", "3e-3"]


def test_from_a_teacher_to_pictures_in_one_step(one_step, trained_once):
    folder = train(parse_config(Config, one_step))
    losses = [line["distillation"] for line in metrics(folder)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    pipe = load_pipeline(folder / "pipeline")
    z = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    how = dict(latents=z, num_inference_steps=1, output_type="latent")
    expected = z - pipe.network(z, torch.ones(()))
    torch.testing.assert_close(pipe(2, **how).images, expected.detach(), atol=1e-5, rtol=1e-5)
    teacher = load_pipeline(trained_once / "pipeline")
    assert pipe.config.latents_mean == pytest.approx(teacher.config.latents_mean)
    assert (folder / "samples.png").exists()


@pytest.mark.parametrize("weight", ["0", "0.1"])
def test_resuming_makes_the_same_generator(weight, one_step, tmp_path):
    one_step = [*one_step, "--objective.witness_weight", weight]
    whole = train(parse_config(Config, one_step))
    again = [*one_step, "--output_dir", str(tmp_path / "again")]
    train(parse_config(Config, again))
    checkpoint = sorted((tmp_path / "again").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))[0]
    resumed = train(parse_config(Config, [*again, "--resume_from_checkpoint", str(checkpoint)]))
    assert metrics(whole) == metrics(resumed)
    a, b = (load_pipeline(folder / "pipeline").network.state_dict() for folder in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert ("witness" in metrics(whole)[0]) == (weight != "0")


def test_refuses_what_cannot_be(arguments, one_step, tmp_path):
    with pytest.raises(ConfigError, match="needs objective.teacher"):
        parse_config(Config, [*arguments, "--objective.name", "one-step"])
    with pytest.raises(ConfigError, match="teacher: no pipeline"):
        train(parse_config(Config, [*one_step, "--objective.teacher", str(tmp_path)]))
    generator = train(parse_config(Config, one_step))
    again = [*one_step, "--output_dir", str(tmp_path / "more")]
    with pytest.raises(ConfigError, match="not a LatentDMMDPipeline"):
        train(parse_config(Config, [*again, "--objective.teacher", str(generator / "pipeline")]))
    with pytest.raises(ConfigError, match="another shape"):
        train(parse_config(Config, [*again, "--data.resolution", "64", "--data.cache_dir", str(tmp_path / "large")]))
    assert not (tmp_path / "more").exists()
