"""What a user would pick instead, on the same backbone, batches and training loop.

**Flow matching** (Lipman et al., 2023) regresses a velocity on the displacement of the linear interpolant,

    x_t = (1 − t) x_0 + t ε,      L = E ‖v(x_t, t) − (ε − x_0)‖²,      sampling: Z ← Z − v(Z, t) (t − t')

Witness matching is this with v restricted to gradients of witnesses; here v is the network's output itself.

**DDPM** (Ho et al., 2020) predicts the noise of a variance-preserving process at 1,000 times, L = E ‖ε̂(x_t, t) − ε‖²,
or the velocity √ᾱ_t ε − √(1 − ᾱ_t) x_0 (Salimans and Ho, 2022); it is sampled by DDIM (Song et al., 2021).

**MMD-GAN** (Li et al., 2017; Bińkowski et al., 2018) trains a generator G against the same features φ as critic,

    min_G max_φ MMD²_u[G(ε), x_0] − λ_∇ E (‖∇f(x̃_u)‖ − c)²

both in one step. G(ε) = ε − v(ε, 1) is one Euler step of the same network, so it is saved and sampled as flow matching
with one step.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import Tensor, nn

from latent_dmmd.features import BilinearFeatures
from latent_dmmd.forward import LinearInterpolant
from latent_dmmd.nn.unet import PatchUNet, UNetConfig
from latent_dmmd.objective import DMMD, Batch, Generators, Objective, Particles, Terms, WeightingScheme


class VelocityNet(PatchUNet, ModelMixin, ConfigMixin):
    """Velocity v(x_t, t) from the U-Net of `FeatureNet`, whose maps are its output.

    Args:
        sample_size, in_channels, patch_size, block_out_channels, layers_per_block, attention_levels, num_groups,
            conv_in_kernel: As of `UNetConfig`.

    Raises:
        ValueError: If the sizes do not fit each other.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int,
        in_channels: int,
        patch_size: int,
        block_out_channels: tuple[int, ...],
        layers_per_block: int,
        attention_levels: tuple[bool, ...],
        num_groups: int = 8,
        conv_in_kernel: int = 3,
    ) -> None:
        unet = UNetConfig.of(self.config)
        super().__init__(unet, out_channels=unet.patch_dim)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """v(x, t), shaped like x (B, C, H, W), for noise levels t of shape (B) or (), in float32 or better."""
        _, h, _ = self.maps(x, t)
        p = self.config.patch_size
        v = rearrange(h, "b (c p q) h w -> b c (h p) (w q)", p=p, q=p)
        return v.to(torch.promote_types(v.dtype, torch.float32))


class GeneratorAndCritic(nn.Module):
    """The two networks of MMD-GAN, trained by one optimiser and averaged together.

    Args:
        generator: G(ε) = ε − v(ε, 1).
        critic: φ, used at noise level 0.
    """

    def __init__(self, generator: VelocityNet, critic: BilinearFeatures) -> None:
        super().__init__()
        self.generator = generator
        self.critic = critic


class TimedPairs(NamedTuple):
    """Pairs at times: what a step of flow matching or DDPM draws.

    Attributes:
        x_0: Clean particles, with shape (N, C, H, W).
        eps: Standard normal noise, shaped like x_0.
        u: Uniform numbers in [0, 1), with shape (N), which times are made of.
    """

    x_0: Tensor
    eps: Tensor
    u: Tensor


def timed_pairs(batch: Batch) -> TimedPairs:
    """The pairs of a witness objective's batch, each at the time u."""
    return TimedPairs(batch.x_0.flatten(0, 1), batch.eps.flatten(0, 1), batch.u.flatten())


class TimedObjective(Objective):
    """Base class of objectives whose every pair has a time of its own."""

    def draw(self, particles: Particles, num_levels: int, num_pairs: int, generators: Generators) -> TimedPairs:
        x_0, eps = particles.draw_with_noise(num_levels * num_pairs, generators.own)
        return TimedPairs(x_0, eps, self.draw_times(len(x_0), generators.own))

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Times in [0, 1], with shape (count), on the CPU; uniform."""
        return torch.rand(count, generator=generator, device="cpu")


class FlowMatching(TimedObjective):
    """Flow matching: `net` is a `VelocityNet`, and every pair is taken at a time t = u in [0, 1].

    Terms: `flow_matching`, the unexplained fraction of ε − x_0, and the diagnostic `cosine`.

    Args:
        net: The network.
        weighting_scheme: "none" draws times uniformly, "logit_normal" the sigmoid of N(0, 1) (Esser et al., 2024,
            section 3.1). Losses at drawn times count alike.
    """

    def __init__(self, net: nn.Module, weighting_scheme: WeightingScheme = "none") -> None:
        super().__init__(net)
        self.weighting_scheme = weighting_scheme

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        if self.weighting_scheme == "none":
            return super().draw_times(count, generator)
        return torch.randn(count, generator=generator, device="cpu").sigmoid()

    def forward(self, batch: TimedPairs) -> Terms:
        x_0, eps, t = batch
        x_t = torch.lerp(x_0, eps, rearrange(t, "b -> b 1 1 1"))
        v, displacement = self.net(x_t, t), eps - x_0
        matching = (v - displacement).square().mean() / 2
        with torch.no_grad():
            cosine = torch.cosine_similarity(v.flatten(1), displacement.flatten(1)).mean()
        return Terms(matching, {"flow_matching": matching.detach(), "cosine": cosine})


class DDPM(TimedObjective):
    """Noise prediction: `net` is a `VelocityNet` whose output is ε̂(x_t, t), at one of the scheduler's times, or the
    velocity √ᾱ_t ε − √(1 − ᾱ_t) x_0 (Salimans and Ho, 2022, section 4) where the scheduler says so.

    Terms: `noise_prediction` or `velocity_prediction`, the mean squared error.

    Args:
        net: The network.
        scheduler: The forward process, with `prediction_type` "epsilon" or "v_prediction"; the network sees its times
            divided by their number.
    """

    def __init__(self, net: nn.Module, scheduler: DDPMScheduler | None = None) -> None:
        super().__init__(net)
        self.scheduler = scheduler or DDPMScheduler()

    def forward(self, batch: TimedPairs) -> Terms:
        x_0, eps, u = batch
        num_times = self.scheduler.config.num_train_timesteps
        times = (u * num_times).long().clamp(max=num_times - 1)
        x_t = self.scheduler.add_noise(x_0, eps, times)
        name, target = "noise_prediction", eps
        if self.scheduler.config.prediction_type == "v_prediction":
            name, target = "velocity_prediction", self.scheduler.get_velocity(x_0, eps, times)
        error = (self.net(x_t, times / num_times) - target).square().mean()
        return Terms(error, {name: error.detach()})


class MMDGAN(DMMD):
    """A generator against features as critic; `net` is the critic.

    All pairs of a step are one batch at noise level 0, and their noise ε is what the generator is given. Terms: `mmd2`
    (or `kale`), which the critic raises and the generator lowers; `gradient_penalty`; and the diagnostic
    `gradient_norm`.

    Args:
        network: Both networks.
        options: As of `DMMD`; `feature_weight` is not used.
    """

    def __init__(self, network: GeneratorAndCritic, **options) -> None:
        super().__init__(network.critic, LinearInterpolant(), num_noise_levels=1, **options)
        self.generator = network.generator

    def draw(self, particles: Particles, num_levels: int, num_pairs: int, generators: Generators) -> Batch:
        x_0, eps = particles.draw_with_noise(num_levels * num_pairs, generators.own)
        u = torch.rand(len(x_0), generator=generators.own, device="cpu")
        return Batch(x_0[None], torch.zeros(1, dtype=torch.long, device="cpu"), eps[None], u[None])

    def forward(self, batch: Batch) -> Terms:
        generated = batch.eps - self.generator(batch.eps[0], batch.eps.new_ones(()))
        x_g = generated.detach().requires_grad_()
        phi_0, phi_g = self.both_features(batch, x_g)
        value = self.discrepancy.value(phi_g, phi_0).mean()
        (descent,) = torch.autograd.grad(value, x_g, retain_graph=True)
        penalty, norm = self.gradient_penalty(batch, x_g, phi_0, phi_g)
        named = {self.discrepancy.name: value, "gradient_penalty": penalty, "gradient_norm": norm.mean()}
        # the critic sees `x_g`, a constant; the generator gets the gradient of the value, and not that of the penalty
        total = penalty - value + (descent * generated).sum()
        return Terms(total, {name: term.detach() for name, term in named.items()})

    def features(self, batch: Batch, x: Tensor, net: nn.Module | None = None) -> Tensor:
        """φ at noise level 0: (1, B, C, H, W) to (1, B, F)."""
        return (net or self.net)(x.flatten(0, 1), x.new_zeros(())).unflatten(0, x.shape[:2])


class GaussianFit:
    """A Gaussian fitted to particles: what anything worth the name must beat.

    Args:
        particles: With shape (N, C, H, W), N ≥ 2.
    """

    def __init__(self, particles: Tensor) -> None:
        self.shape, rows = particles.shape[1:], particles.flatten(1).double()
        self.mean = rows.mean(0)
        # of the covariance over N − 1, by its N rows: D may be large
        self.factor = (rows - self.mean) / (len(rows) - 1) ** 0.5

    def draw(self, num_particles: int, generator: torch.Generator) -> Tensor:
        """Draws in float32, with shape (num_particles, C, H, W)."""
        shape = (num_particles, len(self.factor))
        z = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(self.factor)
        return (self.mean + z @ self.factor).float().unflatten(1, self.shape)


@torch.no_grad()
def euler(
    velocity_net: VelocityNet, z: Tensor, num_steps: int, callback: Callable[[Tensor], object] = lambda z: None
) -> Tensor:
    """Move particles (N, C, H, W) from t = 1 to t = 0 in equal steps of the probability flow, one NFE each.

    `callback` sees the particles after every step.
    """
    for n in range(num_steps, 0, -1):
        z = z - velocity_net(z, torch.tensor(n / num_steps, device=z.device).to(z)) / num_steps
        callback(z)
    return z
