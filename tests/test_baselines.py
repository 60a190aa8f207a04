import pytest
import torch
from conftest import moved, tiny_features, tiny_velocity
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import nn

from latent_dmmd.baselines import (
    DDPM,
    MMDGAN,
    FlowMatching,
    GeneratorAndCritic,
    TimedPairs,
    VelocityNet,
    euler,
    timed_pairs,
)
from latent_dmmd.data.particles import LatentCache
from latent_dmmd.discrepancy import mmd2
from latent_dmmd.latent_pipeline import FlowOptions
from latent_dmmd.methods.ddpm import DDPMConfig, DDPMMethod
from latent_dmmd.objective import Batch, Generators
from latent_dmmd.pipeline import LatentSchedulerPipeline

SIZES = dict(patch_size=2, block_out_channels=(4, 8), attention_levels=(False, True))


class GaussianVelocity(nn.Module):
    """The exact velocity E[ε − x_0 | x_t] for x_0 ~ N(m, s² I)."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, x, t):
        t = t.reshape(-1, 1, 1, 1) if t.ndim else t
        variance = (1 - t) ** 2 * self.std**2 + t**2
        residual = (x - (1 - t) * self.mean) / variance
        return t * residual - (self.mean + (1 - t) * self.std**2 * residual)


def test_the_exact_velocity_minimises_the_loss():
    generator = torch.Generator().manual_seed(0)
    x_0 = 0.5 + 0.6 * torch.randn(2000, 2, 4, 4, generator=generator)
    eps, u = torch.randn(x_0.shape, generator=generator), torch.rand(2000, generator=generator)
    batch = TimedPairs(x_0, eps, u)
    losses = []
    for mean, std in ((0.5, 0.6), (0.4, 0.6), (0.6, 0.6), (0.5, 0.5), (0.5, 0.7)):
        losses.append(FlowMatching(GaussianVelocity(mean, std))(batch).total.item())
    assert min(losses) == losses[0]


def test_densities_of_training_times():
    """The quartiles of the uniform density and of the logit-normal one, which are sigmoid(∓0.6745)."""
    quartiles = torch.tensor([0.25, 0.5, 0.75])
    for scheme, expected in (("none", quartiles), ("logit_normal", torch.tensor([0.3375, 0.5, 0.6625]))):
        t = FlowMatching(tiny_velocity(**SIZES), scheme).draw_times(20_000, torch.Generator().manual_seed(0))
        assert 0 <= t.min() and t.max() <= 1 and t.device.type == "cpu"
        torch.testing.assert_close(t.quantile(quartiles), expected, atol=0.01, rtol=0)


def test_euler_arrives_at_the_data():
    z = torch.randn(2000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    end = euler(GaussianVelocity(0.5, 0.6), z, 200)
    torch.testing.assert_close(end, 0.5 + 0.6 * z, atol=0.02, rtol=0)


def test_shape_round_trip_and_same_backbone(tmp_path):
    torch.manual_seed(0)
    net, x, t = tiny_velocity(**SIZES), torch.randn(3, 2, 4, 4), torch.rand(3)
    v = net(x, t)
    assert v.shape == x.shape
    torch.testing.assert_close(net(x[1:2], t[1:2]), v[1:2])
    net.save_pretrained(tmp_path)
    loaded = VelocityNet.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), net.parameters(), strict=True))
    torch.testing.assert_close(loaded(x, t), v)  # not bit for bit: kernels depend on where tensors lie in memory
    shapes = {name: p.shape for name, p in tiny_features(num_features=8, **SIZES).named_parameters()}
    ours = {name: p.shape for name, p in net.named_parameters()}
    assert ours == {name: shape for name, shape in shapes.items() if name.split(".")[0] not in ("lift", "gate")}


def random_batch(pairs=12):
    """What a step of MMD-GAN draws: all pairs at one level."""
    generator = torch.Generator().manual_seed(1)
    x_0, eps = (torch.randn(1, pairs, 2, 4, 4, generator=generator) for _ in range(2))
    return Batch(x_0, torch.zeros(1, dtype=torch.long), eps, torch.rand(1, pairs, generator=generator))


PREDICTIONS = ["epsilon", "v_prediction"]


class GaussianPrediction(nn.Module):
    """The exact noise E[ε | x_t] of a DDPM scheduler for x_0 ~ N(0, s² I), or the exact velocity; `gain` spoils it."""

    def __init__(self, prediction_type, std, gain=1.0):
        super().__init__()
        self.prediction_type, self.std, self.gain = prediction_type, std, gain
        self.alphas = DDPMScheduler().alphas_cumprod

    def forward(self, x, t):
        alpha = self.alphas[(t * 1000).round().long()].reshape(-1, *[1] * (x.ndim - 1))
        noise = (1 - alpha).sqrt() * x / (alpha * self.std**2 + 1 - alpha)
        velocity = (noise - (1 - alpha).sqrt() * x) / alpha.sqrt()
        return self.gain * {"epsilon": noise, "v_prediction": velocity}[self.prediction_type]


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_the_exact_prediction_minimises_ddpm(prediction_type):
    generator = torch.Generator().manual_seed(0)
    x_0 = 0.6 * torch.randn(4000, 1, 2, 2, generator=generator)
    batch = TimedPairs(x_0, torch.randn(x_0.shape, generator=generator), torch.rand(4000))
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    losses = [
        DDPM(GaussianPrediction(prediction_type, std, gain), scheduler)(batch).total.item()
        for std, gain in ((0.6, 1.0), (0.5, 1.0), (0.7, 1.0), (0.6, 0.9), (0.6, 1.1))
    ]
    assert min(losses) == losses[0]


@pytest.mark.parametrize("num_steps", [1, 4, 7])
def test_the_scheduler_takes_the_steps_of_euler(num_steps):
    net, z = moved(tiny_velocity(**SIZES)), torch.randn(5, 2, 4, 4)
    pipe = LatentSchedulerPipeline(net, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    pipe.flow_options = FlowOptions(chunk_size=2)
    ours = pipe(5, num_inference_steps=num_steps, latents=z, output_type="latent").images
    torch.testing.assert_close(ours, euler(net, z, num_steps))
    assert torch.equal(ours, pipe.move(z, num_steps))


def test_the_scheduler_pipeline_has_its_own_number_of_steps():
    net, z = moved(tiny_velocity(**SIZES)), torch.randn(2, 2, 4, 4)
    pipe = LatentSchedulerPipeline(net, FlowMatchEulerDiscreteScheduler(), num_inference_steps=3)
    pipe.set_progress_bar_config(disable=True)
    torch.testing.assert_close(pipe(2, latents=z, output_type="latent").images, euler(net, z, 3))


def test_flow_matching_begins_anywhere_and_ddpm_at_noise():
    """A velocity that is constant along the way arrives from t = 0.6 in one step, and in several."""
    x_0, eps = torch.randn(2, 3, 2, 4, 4)
    pipe = LatentSchedulerPipeline(tiny_velocity(**SIZES), FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    pipe.network.forward = lambda x, t: (x - x_0) / t
    for num_steps in (1, 3):
        times = []
        z = pipe.move(0.4 * x_0 + 0.6 * eps, num_steps, 0.6, lambda pipe, i, t, tensors, seen=times: seen.append(t))
        torch.testing.assert_close(z, x_0, atol=1e-5, rtol=1e-5)
        trajectory = pipe.trajectory(num_steps, 0.6)
        assert times == pytest.approx(trajectory[:-1]) and trajectory[-1] == 0
    with pytest.raises(ValueError, match="start must be in"):
        pipe.move(x_0, 2, 1.5)
    with pytest.raises(ValueError, match="at least 1"):
        pipe.move(x_0, 0)
    ddpm = LatentSchedulerPipeline(tiny_velocity(**SIZES), DDIMScheduler())
    with pytest.raises(ValueError, match="start=0.6 needs flow matching"):
        ddpm.move(x_0, 2, 0.6)


def test_a_scheduler_that_shifts_its_levels_is_followed():
    """The network hears of the level that a particle is at, and a flow begins at the level it was given."""
    pipe = LatentSchedulerPipeline(tiny_velocity(**SIZES), FlowMatchEulerDiscreteScheduler(shift=3))
    pipe.set_progress_bar_config(disable=True)
    heard = []
    pipe.network.forward = lambda x, t: heard.append(t.item()) or torch.zeros_like(x)
    for start in (1.0, 0.5):
        heard.clear()
        levels = pipe.trajectory(5, start)
        pipe.move(torch.randn(2, 2, 4, 4), 5, start)
        assert levels[0] == pytest.approx(start) and levels[-1] == 0 and heard == pytest.approx(levels[:-1])
    assert levels[1] != pytest.approx(0.4)  # shifted


def test_a_generator_in_one_step_takes_one_and_does_not_edit():
    net = tiny_velocity(**SIZES)
    pipe = LatentSchedulerPipeline(net, FlowMatchEulerDiscreteScheduler(), num_inference_steps=1, one_step=True)
    assert pipe(2, output_type="latent").images.shape == (2, 2, 4, 4)
    with pytest.raises(ValueError, match="takes num_inference_steps=1; got 2"):
        pipe(2, num_inference_steps=2)
    with pytest.raises(ValueError, match="no flow to edit by"):
        pipe.trajectory(1)


@pytest.mark.parametrize("other", [DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler])
def test_other_schedulers_of_diffusers_take_the_place_of_ddim(other):
    scheduler = DDPMMethod(DDPMConfig()).scheduler()
    pipe = LatentSchedulerPipeline(tiny_velocity(**SIZES), other.from_config(scheduler.config))
    pipe.set_progress_bar_config(disable=True)
    exact = GaussianPrediction("epsilon", 0.6)
    pipe.network.forward = lambda x, t: exact(x, t.expand(len(x)))
    z = torch.randn(500, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    end = pipe(500, num_inference_steps=50, latents=z, output_type="latent").images
    torch.testing.assert_close(end, 0.6 * z, atol=0.15, rtol=0)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_ddim_with_the_exact_prediction_arrives_at_the_data(prediction_type):
    scheduler = DDPMMethod(DDPMConfig(prediction_type=prediction_type)).scheduler()
    pipe = LatentSchedulerPipeline(tiny_velocity(**SIZES), scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe.flow_options = FlowOptions(chunk_size=None)
    exact = GaussianPrediction(prediction_type, 0.6)
    pipe.network.forward = lambda x, t: exact(x, t.expand(len(x)))
    z = torch.randn(500, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    end = pipe(500, num_inference_steps=100, latents=z, output_type="latent").images
    torch.testing.assert_close(end, 0.6 * z, atol=0.1, rtol=0)


def test_mmd_gan_lowers_for_the_generator_what_it_raises_for_the_critic():
    """The step's gradients are those of the two losses, each in its own network."""
    network = moved(GeneratorAndCritic(tiny_velocity(**SIZES), tiny_features(num_features=5, **SIZES)))
    batch = random_batch()
    MMDGAN(network, gradient_weight=0.0)(batch).total.backward()
    step = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}

    x_0, eps, zero = batch.x_0.flatten(0, 1), batch.eps.flatten(0, 1), torch.zeros(())
    value = mmd2(network.critic(eps - network.generator(eps, torch.ones(())), zero), network.critic(x_0, zero))
    network.zero_grad()
    value.backward()
    assert any(name.startswith("generator.") for name in step) and any(name.startswith("critic.") for name in step)
    for name, p in network.named_parameters():
        if name in step:
            sign = 1 if name.startswith("generator.") else -1
            torch.testing.assert_close(step[name], sign * p.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_the_penalty_of_mmd_gan_does_not_reach_the_generator():
    network = moved(GeneratorAndCritic(tiny_velocity(**SIZES), tiny_features(num_features=5, **SIZES)))
    gradients = []
    for weight in (0.0, 5.0):
        network.zero_grad()
        MMDGAN(network, gradient_weight=weight)(random_batch()).total.backward()
        gradients.append([p.grad.clone() for net in (network.generator, network.critic) for p in [net.conv_in.weight]])
    assert torch.equal(gradients[0][0], gradients[1][0]) and not torch.equal(gradients[0][1], gradients[1][1])


def test_each_objective_draws_its_own_batch():
    """L · B pairs, each at a time of its own or all at noise level 0, from the rank's own generator alone."""
    latents = torch.arange(5.0).reshape(5, 1, 1, 1, 1).expand(5, 1, 2, 4, 4).contiguous()
    cache = LatentCache(((latents, None),), torch.zeros(2), torch.ones(2))
    network = GeneratorAndCritic(tiny_velocity(**SIZES), tiny_features(**SIZES))
    drawn = []
    for objective in (FlowMatching(network.generator), DDPM(network.generator), MMDGAN(network)):
        first, again, other = (
            objective.draw(cache, 3, 4, Generators(*(torch.Generator().manual_seed(seed) for seed in seeds)))
            for seeds in ((0, 1), (9, 1), (0, 2))
        )
        assert all(torch.equal(a, b) for a, b in zip(first, again) if a is not None)
        assert not torch.equal(first.eps, other.eps) and not torch.equal(first.u, other.u)
        drawn.append(first)
        assert objective(first).total.isfinite()
    timed, noise, gan = drawn
    assert type(timed) is type(noise) is TimedPairs and timed.x_0.shape == (12, 2, 4, 4) and timed.u.shape == (12,)
    assert gan.x_0.shape == (1, 12, 2, 4, 4) and gan.level.tolist() == [0] and gan.label is None
    for a, b, c in zip(timed, noise, timed_pairs(gan)):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert 0 <= timed.u.min() and timed.u.max() < 1 and timed.x_0[:, 0, 0, 0].unique().tolist() == [0, 1, 2, 3, 4]


def test_weights_saved_by_0_1_load():
    """The network of every objective had another name."""
    for build in (FlowMatching, DDPM, lambda net: MMDGAN(GeneratorAndCritic(net, tiny_features(**SIZES)))):
        before, after = build(tiny_velocity(**SIZES)), build(tiny_velocity(**SIZES))
        old = {f"feature_{name}" if name.startswith("net.") else name: a for name, a in before.state_dict().items()}
        assert "feature_net.conv_in.weight" in old
        after.load_state_dict(old)
        assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
