"""Every method trains and samples by its name, one from outside the package among them."""

import json
import math
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from conftest import metrics
from diffusers import FlowMatchEulerDiscreteScheduler

from latent_dmmd.data.particles import LatentCache
from latent_dmmd.editing import LatentDMMDInpaintPipeline
from latent_dmmd.methods import METHODS, Method, MethodConfig, register
from latent_dmmd.methods.base import latent_options
from latent_dmmd.methods.flow_matching import velocity_net
from latent_dmmd.objective import Generators, Objective, Terms
from latent_dmmd.pipeline import LatentSchedulerPipeline, load_pipeline
from latent_dmmd.training.config import Config, parse_config
from latent_dmmd.training.loop import train
from latent_dmmd.utils.errors import ConfigError


@pytest.mark.parametrize("scheme", ["none", "logit_normal"])
def test_flow_matching_trains_at_the_times_of_its_key(plain_arguments, scheme):
    extra = ["--objective.name", "flow-matching", "--objective.weighting_scheme", scheme]
    net = torch.nn.Identity()
    objective = parse_config(Config, [*plain_arguments, *extra]).method.objective(net, net)
    draw = torch.rand if scheme == "none" else torch.randn
    drawn = draw(5, generator=torch.Generator().manual_seed(0))
    expected = drawn if scheme == "none" else drawn.sigmoid()
    assert torch.equal(objective.draw_times(5, torch.Generator().manual_seed(0)), expected)


@pytest.mark.parametrize("scheme", ["none", "logit_normal"])
@pytest.mark.parametrize("name", ["witness-matching", "dmmd"])
def test_witnesses_train_at_the_levels_of_their_key(plain_arguments, name, scheme):
    extra = ["--objective.name", name, "--objective.weighting_scheme", scheme, "--objective.num_noise_levels", "10"]
    config = parse_config(Config, [*plain_arguments, *extra])
    net = config.method.network(config.feature_net, (4, 8, 8))
    objective = config.method.objective(net, net)
    particles = LatentCache(((torch.zeros(1, 1, 4, 8, 8), None),), torch.zeros(4), torch.ones(4))
    generators = Generators(*(torch.Generator().manual_seed(seed) for seed in (0, 1)))
    level = objective.draw(particles, 4000, 1, generators).level
    below = torch.linspace(0, 1, 11)
    if scheme == "logit_normal":
        below = torch.special.ndtr(below.logit())
    shares = torch.bincount(level, minlength=10) / len(level)
    assert torch.allclose(shares, below.diff(), atol=1e-3)  # stratified: independent draws are six times farther


@pytest.mark.parametrize(
    "method, term",
    [
        ("flow-matching", "cosine"),
        ("ddpm", "noise_prediction"),
        ("ddpm --objective.prediction_type v_prediction", "velocity_prediction"),
        ("mmd-gan", "mmd2"),
    ],
)
@pytest.mark.parametrize("space", ["latent", "pixel"])
def test_baselines_train_and_sample_by_one_key(plain_arguments, method, term, space):
    extra = ["--objective.name", *method.split()]
    if space == "pixel":
        extra += ["--autoencoder.name_or_path", "null", "--feature_net.patch_size", "8"]
    folder = train(parse_config(Config, [*plain_arguments, *extra]))
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert term in line and all(math.isfinite(value) for value in line.values())
    pipe = load_pipeline(folder / "pipeline")
    assert (pipe.vae is None) == (space == "pixel") and pipe.resolution == 32
    how = dict(batch_size=3, generator=torch.Generator().manual_seed(0), output_type="latent")
    z = pipe(num_inference_steps=1, **how).images
    assert z.isfinite().all() and z.shape[0] == 3
    if method == "mmd-gan":
        with pytest.raises(ValueError, match="a generator in one step"):
            pipe(num_inference_steps=4, **how)
        return
    how["generator"].manual_seed(0)
    more = pipe(num_inference_steps=4, **how).images
    assert more.isfinite().all() and not torch.equal(z, more)


@pytest.mark.parametrize("target", ["displacement", "restoring"])
def test_an_encoder_trains_and_samples_by_one_key(arguments, target, tmp_path):
    """And what is saved says how it is to be sampled."""
    extra = ["--feature_net.architecture", "encoder", "--objective.target", target]
    folder = train(parse_config(Config, [*arguments, *extra]))
    index = json.loads((folder / "pipeline" / "model_index.json").read_text())
    assert index["feature_net"] == ["latent_dmmd.features", "EncoderFeatureNet"]
    pipe = load_pipeline(folder / "pipeline")
    assert pipe.mean_embeddings.config.target == target
    assert [name for name, _ in pipe.feature_net.named_children() if name.startswith("up")] == []
    again = LatentDMMDInpaintPipeline.from_pipe(pipe)
    assert again.feature_net is pipe.feature_net
    for sampler in ("exact", "approximate", "hybrid"):
        call = dict(batch_size=3, num_inference_steps=8, sampler=sampler, output_type="latent")
        z = pipe(**call, generator=torch.Generator().manual_seed(0)).images
        assert z.shape[0] == 3 and z.isfinite().all()


def test_one_step_starts_from_an_encoder(arguments, plain_arguments, tmp_path):
    teacher = train(parse_config(Config, [*arguments, "--feature_net.architecture", "encoder"])) / "pipeline"
    extra = ["--objective.name", "one-step", "--objective.teacher", str(teacher), "--objective.num_pairs", "4"]
    config = parse_config(Config, [*plain_arguments, *extra, "--output_dir", str(tmp_path / "one-step")])
    shape = (4, 16, 16)
    generator, phi = config.method.network(config.feature_net, shape), load_pipeline(teacher).feature_net
    assert torch.equal(generator.conv_in.weight, phi.conv_in.weight)
    assert torch.equal(generator.down[0][0].conv1.weight, phi.down[0][0].conv1.weight)


@dataclass
class ToyConfig(MethodConfig):
    """Keys of a method that the package does not know.

    Args:
        share: What is left of a particle.
    """

    name: str = "toy"
    share: float = 1.0


class Points(NamedTuple):
    x: torch.Tensor


class Shrinking(Objective):
    """The network learns to move particles x to `share` · x in one step."""

    def __init__(self, net, share):
        super().__init__(net)
        self.share = share

    def draw(self, particles, num_levels, num_pairs, generators):
        return Points(particles.draw(num_levels * num_pairs, generators.own))

    def forward(self, batch):
        moved = batch.x - self.net(batch.x, batch.x.new_ones(()))
        error = (moved - self.share * batch.x).square().mean()
        return Terms(error, {"shrinking": error.detach()})


class Toy(Method):
    name, title, config_class, one_step = "toy", "Toy", ToyConfig, True

    def network(self, net, shape, num_classes=0):
        return velocity_net(net, shape)

    def objective(self, network, averaged_net):
        return Shrinking(network, self.options.share)

    def pipeline(self, objective, averaged_net, particles, vae, sampling, seed, class_names=()):
        options = latent_options(particles, vae) | self.sampling_options(sampling)
        return LatentSchedulerPipeline(averaged_net, FlowMatchEulerDiscreteScheduler(), **options)


@pytest.fixture
def toy_method(monkeypatch):
    """The toy method is known for the length of a test."""
    monkeypatch.setitem(METHODS, "toy", Toy)
    assert register(Toy) is Toy  # again, as when its module is reloaded


def test_a_method_from_outside_trains_and_samples(toy_method, plain_arguments):
    extra = ["--objective.name", "toy", "--objective.share", "0.5"]
    config = parse_config(Config, [*plain_arguments, *extra])
    assert isinstance(config.method, Toy) and config.objective.share == 0.5
    folder = train(config)
    assert all(math.isfinite(line["shrinking"]) for line in metrics(folder)) and len(metrics(folder)) == 6
    assert parse_config(Config, ["--config", str(folder / "config.yaml")]).objective == config.objective
    assert "# Toy" in (folder / "pipeline" / "README.md").read_text() and (folder / "samples.png").exists()
    pipe = load_pipeline(folder / "pipeline")
    assert pipe.config.num_inference_steps == 1  # of a method in one step
    images = pipe(3, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert images.shape == (3, 3, 32, 32) and images.isfinite().all()
    with pytest.raises(ConfigError, match="another configuration: objective.share 0.25"):
        train(parse_config(Config, [*plain_arguments, *extra[:2], "--objective.share", "0.25"]))


def test_keys_and_names_of_a_method_from_outside(toy_method, plain_arguments):
    for other in ("dmmd", "flow-matching"):
        with pytest.raises(ConfigError, match=f"^objective.share is a key of toy, and not of {other}; "):
            parse_config(Config, [*plain_arguments, "--objective.name", other, "--objective.share", "0.5"])
    with pytest.raises(ConfigError, match="^objective.momentum is a key of witness-matching, and not of toy; "):
        parse_config(Config, [*plain_arguments, "--objective.name", "toy", "--objective.momentum", "0.5"])
    with pytest.raises(ConfigError, match="must be one of .*flow-matching.*toy; got 'toi'; did you mean toy"):
        parse_config(Config, [*plain_arguments, "--objective.name", "toi"])
    with pytest.raises(ConfigError, match="data.class_conditional needs .*; got toy"):
        parse_config(Config, [*plain_arguments, "--objective.name", "toy", "--data.class_conditional", "true"])
    with pytest.raises(ValueError, match="'toy' is registered already"):
        register(type("Another", (Method,), {"name": "toy"}))
