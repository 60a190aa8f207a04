"""A one-step generator: pairs of the flow, the regression, and the pipeline."""

import pytest
import torch
from conftest import metrics, tiny_pipeline, tiny_velocity

from latent_dmmd import distillation
from latent_dmmd.distillation import MovedPairs, OneStep, PairCache, begin_with_features, make_pairs
from latent_dmmd.pipeline import load_pipeline
from latent_dmmd.training.config import Config, parse_config
from latent_dmmd.training.loop import train
from latent_dmmd.training.trainer import step_generators
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


@pytest.mark.parametrize("change", ["num_inference_steps", "seed", "feature_net"])
def test_pairs_of_two_flows_are_not_mixed(teacher, tmp_path, change):
    make_pairs(teacher, tmp_path, 6, 0, **HOW)
    next(tmp_path.glob("*1.safetensors")).unlink()  # stopped before all were made
    if change == "feature_net":
        next(teacher.feature_net.parameters()).data += 1
    how = {**HOW, "num_inference_steps": 3} if change == "num_inference_steps" else HOW
    with pytest.raises(ConfigError, match=f"of another {change}: .*choose another --output_dir"):
        make_pairs(teacher, tmp_path, 6, int(change == "seed"), **how)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_a_run_killed_while_it_made_pairs_goes_on(one_step, tmp_path, monkeypatch):
    folder, kept, write = tmp_path / "killed", [], distillation.write_aside
    killed = [*one_step, "--output_dir", str(folder)]

    def write_one(path, *args):
        if kept:
            raise KeyboardInterrupt
        write(path, *args)
        kept.append((path, path.stat().st_mtime_ns))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(distillation, "write_aside", write_one)
        train(parse_config(Config, killed))
    with pytest.raises(ConfigError, match="another configuration: objective.teacher_steps"):  # whose pairs are others
        train(parse_config(Config, [*killed, "--objective.teacher_steps", "2"]))
    train(parse_config(Config, killed))
    assert len(list((folder / "pairs").glob("*.safetensors"))) == 3
    assert kept == [(path, path.stat().st_mtime_ns) for path, _ in kept]  # not made again
    assert metrics(folder) == metrics(train(parse_config(Config, one_step)))


def test_the_loss_against_loops():
    torch.manual_seed(0)
    net, x, eps = tiny_velocity(attention_levels=(False,)), torch.randn(6, 2, 4, 4), torch.randn(6, 2, 4, 4)
    terms = OneStep(net)(MovedPairs(x, eps))
    one, expected = torch.ones(()), 0.0
    for i in range(6):
        generated = eps[i] - net(eps[i][None], one)[0]
        expected += (generated - x[i]).square().mean() / 6
    torch.testing.assert_close(terms.total, expected)
    assert terms.named.keys() == {"distillation"}


def test_batches_hold_pairs():
    numbers = torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 2, 4, 4).contiguous()
    cache = PairCache(numbers, 10 * numbers, torch.zeros(2), torch.ones(2))
    objective = OneStep(tiny_velocity())
    batch, again, other_rank = (objective.draw(cache, 4, 16, step_generators(0, rank, 0)) for rank in (0, 0, 1))
    assert batch.moved.shape == (64, 2, 4, 4) and len(batch.eps.unique()) == 5
    assert torch.equal(batch.moved, 10 * batch.eps) and torch.equal(batch.moved, again.moved)
    assert not torch.equal(batch.moved, other_rank.moved)


def test_a_generator_begins_with_the_shared_weights(teacher):
    net = tiny_velocity(16, 4)
    last = net.conv_out.weight.clone()
    begin_with_features(net, teacher.feature_net)
    features = teacher.feature_net.state_dict()
    for name, weight in net.state_dict().items():
        assert name.startswith("conv_out") or torch.equal(weight, features[name]), name
    assert torch.equal(net.conv_out.weight, last)


@pytest.fixture
def one_step(plain_arguments, trained_once):
    # the teacher's network is the one that the configuration describes
    folder = trained_once
    extra = ["--objective.name", "one-step", "--objective.teacher", str(folder / "pipeline")]
    extra += ["--objective.teacher_steps", "4", "--objective.num_pairs", "12", "--training.num_steps", "30"]
    return [*plain_arguments, *extra, "--training.learning_rate", "3e-3"]


def test_from_a_teacher_to_images_in_one_step(one_step, trained_once):
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


def test_resuming_makes_the_same_generator(one_step, tmp_path):
    whole = train(parse_config(Config, one_step))
    again = [*one_step, "--output_dir", str(tmp_path / "again")]
    train(parse_config(Config, again))
    checkpoint = sorted((tmp_path / "again").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))[0]
    resumed = train(parse_config(Config, [*again, "--resume_from_checkpoint", str(checkpoint)]))
    assert metrics(whole) == metrics(resumed)
    a, b = (load_pipeline(folder / "pipeline").network.state_dict() for folder in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_refuses_what_cannot_be(plain_arguments, one_step, tmp_path):
    with pytest.raises(ConfigError, match="needs objective.teacher"):
        parse_config(Config, [*plain_arguments, "--objective.name", "one-step"])
    with pytest.raises(ConfigError, match="teacher: no pipeline"):
        train(parse_config(Config, [*one_step, "--objective.teacher", str(tmp_path)]))
    generator = train(parse_config(Config, one_step))
    again = [*one_step, "--output_dir", str(tmp_path / "more")]
    with pytest.raises(ConfigError, match="not a LatentDMMDPipeline"):
        train(parse_config(Config, [*again, "--objective.teacher", str(generator / "pipeline")]))
    with pytest.raises(ConfigError, match="another shape"):
        train(parse_config(Config, [*again, "--data.resolution", "64", "--data.cache_dir", str(tmp_path / "large")]))
    teacher = load_pipeline(one_step[one_step.index("--objective.teacher") + 1])
    teacher.vae.decoder.conv_out.bias.data += 0.1
    teacher.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="other has another autoencoder than autoencoder.name_or_path"):
        train(parse_config(Config, [*again, "--objective.teacher", str(tmp_path / "other")]))
    assert not (tmp_path / "more").exists()
