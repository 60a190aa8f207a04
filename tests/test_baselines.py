import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from latent_dmmd import FeatureNet
from latent_dmmd.baselines import DDPM, MMDGAN, FlowMatching, GeneratorAndCritic, VelocityNet, euler
from latent_dmmd.discrepancy import mmd2
from latent_dmmd.forward import LinearInterpolant
from latent_dmmd.objective import Batch
from latent_dmmd.pipeline import LatentSchedulerPipeline

SIZES = dict(
    sample_size=4,
    in_channels=2,
    patch_size=2,
    block_out_channels=(4, 8),
    layers_per_block=1,
    attention_levels=(False, True),
    num_groups=2,
)


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
    x_0 = 0.5 + 0.6 * torch.randn(4, 500, 2, 4, 4, generator=generator)
    eps, u = torch.randn(x_0.shape, generator=generator), torch.rand(4, 500, generator=generator)
    batch = Batch(x_0, torch.arange(4), eps, u)
    losses = []
    for mean, std in ((0.5, 0.6), (0.4, 0.6), (0.6, 0.6), (0.5, 0.5), (0.5, 0.7)):
        objective = FlowMatching(GaussianVelocity(mean, std), LinearInterpolant(), 4)
        losses.append(objective(batch).total.item())
    assert min(losses) == losses[0]


def test_euler_arrives_at_the_data():
    z = torch.randn(2000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    end = euler(GaussianVelocity(0.5, 0.6), z, 200)
    torch.testing.assert_close(end, 0.5 + 0.6 * z, atol=0.02, rtol=0)


def test_shape_round_trip_and_same_backbone(tmp_path):
    torch.manual_seed(0)
    net, x, t = VelocityNet(**SIZES), torch.randn(3, 2, 4, 4), torch.rand(3)
    v = net(x, t)
    assert v.shape == x.shape
    torch.testing.assert_close(net(x[1:2], t[1:2]), v[1:2])
    net.save_pretrained(tmp_path)
    loaded = VelocityNet.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), net.parameters(), strict=True))
    torch.testing.assert_close(loaded(x, t), v)  # not bit for bit: kernels depend on where tensors lie in memory
    shapes = {name: p.shape for name, p in FeatureNet(num_features=8, **SIZES).named_parameters()}
    ours = {name: p.shape for name, p in net.named_parameters()}
    assert ours == {name: shape for name, shape in shapes.items() if name.split(".")[0] not in ("lift", "gate")}


def random_batch(levels=2, pairs=6):
    generator = torch.Generator().manual_seed(1)
    x_0, eps = (torch.randn(levels, pairs, 2, 4, 4, generator=generator) for _ in range(2))
    return Batch(x_0, torch.arange(levels), eps, torch.rand(levels, pairs, generator=generator))


def moved(net):
    """The network away from its initialisation, at which some outputs are zero."""
    torch.manual_seed(0)
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net


class GaussianNoise(nn.Module):
    """The exact noise E[ε | x_t] of a DDPM scheduler for x_0 ~ N(0, s² I); `gain` spoils it."""

    def __init__(self, std, gain=1.0):
        super().__init__()
        self.std, self.gain, self.alphas = std, gain, DDPMScheduler().alphas_cumprod

    def forward(self, x, t):
        alpha = self.alphas[(t * 1000).round().long()].reshape(-1, *[1] * (x.ndim - 1))
        return self.gain * (1 - alpha).sqrt() * x / (alpha * self.std**2 + 1 - alpha)


def test_the_exact_noise_minimises_ddpm():
    generator = torch.Generator().manual_seed(0)
    x_0 = 0.6 * torch.randn(1, 4000, 1, 2, 2, generator=generator)
    batch = Batch(x_0, torch.zeros(1).long(), torch.randn(x_0.shape, generator=generator), torch.rand(1, 4000))
    losses = [
        DDPM(GaussianNoise(std, gain), LinearInterpolant(), 4)(batch).total.item()
        for std, gain in ((0.6, 1.0), (0.5, 1.0), (0.7, 1.0), (0.6, 0.9), (0.6, 1.1))
    ]
    assert min(losses) == losses[0]


@pytest.mark.parametrize("num_steps", [1, 4, 7])
def test_the_scheduler_takes_the_steps_of_euler(num_steps):
    net, z = moved(VelocityNet(**SIZES)), torch.randn(5, 2, 4, 4)
    pipe = LatentSchedulerPipeline(net, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    ours = pipe(5, num_inference_steps=num_steps, latents=z, output_type="latent", chunk_size=2).images
    torch.testing.assert_close(ours, euler(net, z, num_steps))


def test_ddim_with_the_exact_noise_arrives_at_the_data():
    options = dict(clip_sample=False, timestep_spacing="trailing")
    scheduler = DDIMScheduler.from_config(DDPMScheduler().config, **options)
    pipe = LatentSchedulerPipeline(VelocityNet(**SIZES), scheduler)
    pipe.set_progress_bar_config(disable=True)
    exact = GaussianNoise(0.6)
    pipe.network.forward = lambda x, t: exact(x, t.expand(len(x)))
    z = torch.randn(500, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    end = pipe(500, num_inference_steps=100, latents=z, output_type="latent", chunk_size=None).images
    torch.testing.assert_close(end, 0.6 * z, atol=0.1, rtol=0)


def test_mmd_gan_lowers_for_the_generator_what_it_raises_for_the_critic():
    """The step's gradients are those of the two losses, each in its own network."""
    network = moved(GeneratorAndCritic(VelocityNet(**SIZES), FeatureNet(num_features=5, **SIZES)))
    batch = random_batch()
    MMDGAN(network, LinearInterpolant(), 4, gradient_weight=0.0)(batch).total.backward()
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
    network = moved(GeneratorAndCritic(VelocityNet(**SIZES), FeatureNet(num_features=5, **SIZES)))
    gradients = []
    for weight in (0.0, 5.0):
        network.zero_grad()
        MMDGAN(network, LinearInterpolant(), 4, gradient_weight=weight)(random_batch()).total.backward()
        gradients.append([p.grad.clone() for net in (network.generator, network.critic) for p in [net.conv_in.weight]])
    assert torch.equal(gradients[0][0], gradients[1][0]) and not torch.equal(gradients[0][1], gradients[1][1])
