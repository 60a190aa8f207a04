"""What a user would pick instead, on the same backbone, batches and training loop.

Flow matching (Lipman et al., 2023) regresses a velocity on the displacement of the linear interpolant,

    x_t = (1 − t) x_0 + t ε,      L = E ‖v(x_t, t) − (ε − x_0)‖²,      sampling: Z ← Z − v(Z, t) (t − t')

Witness matching is this with v restricted to gradients of witnesses; here v is the network's output itself.
"""

from collections.abc import Callable

import torch
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor

from latent_dmmd.features import PatchUNet
from latent_dmmd.objective import Batch, Objective, Terms


class VelocityNet(PatchUNet):
    """Velocity v(x_t, t) from the U-Net of `FeatureNet`, whose maps are its output.

    Args:
        sample_size: Side of the particles.
        in_channels: Channels C of the particles.
        patch_size: Side of the non-overlapping patches that become the U-Net's pixels.
        block_out_channels: Width at each level; the resolution halves from one to the next.
        layers_per_block: Residual blocks a level, on the way down and again on the way up.
        attention_levels: Whether a level has attention, for each level.
        num_groups: Groups of the normalisation.

    Raises:
        ValueError: If the sizes do not fit each other.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 16,
        in_channels: int = 8,
        patch_size: int = 1,
        block_out_channels: tuple[int, ...] = (64, 128),
        layers_per_block: int = 2,
        attention_levels: tuple[bool, ...] = (False, True),
        num_groups: int = 8,
    ) -> None:
        out_channels = in_channels * patch_size**2
        super().__init__(
            sample_size,
            in_channels,
            out_channels,
            patch_size,
            block_out_channels,
            layers_per_block,
            attention_levels,
            num_groups,
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """v(x, t), shaped like x (B, C, H, W), for noise levels t of shape (B) or (), in float32 or better."""
        _, h, _ = self.maps(x, t)
        p = self.config.patch_size
        v = rearrange(h, "b (c p q) h w -> b c (h p) (w q)", p=p, q=p)
        return v.to(torch.promote_types(v.dtype, torch.float32))


class FlowMatching(Objective):
    """Flow matching, in the place of a DMMD objective: `feature_net` is a `VelocityNet`.

    Each pair of the batch is taken at t = u ~ U[0, 1], whatever its level. Terms: `flow_matching`, the unexplained
    fraction of ε − x_0, and the diagnostic `cosine`.
    """

    def forward(self, batch: Batch) -> Terms:
        x_0, eps, t = batch.x_0.flatten(0, 1), batch.eps.flatten(0, 1), batch.u.flatten()
        x_t = torch.lerp(x_0, eps, rearrange(t, "b -> b 1 1 1"))
        v, displacement = self.feature_net(x_t, t), eps - x_0
        matching = (v - displacement).square().mean() / 2
        with torch.no_grad():
            cosine = torch.cosine_similarity(v.flatten(1), displacement.flatten(1)).mean()
        return Terms(matching, {"flow_matching": matching.detach(), "cosine": cosine})


@torch.no_grad()
def euler(
    velocity_net: VelocityNet, z: Tensor, num_steps: int, callback: Callable[[Tensor], object] = lambda z: None
) -> Tensor:
    """Move particles (N, C, H, W) from t = 1 to t = 0 in equal steps of the probability flow, one NFE each.

    `callback` sees the particles after every step.
    """
    for n in range(num_steps, 0, -1):
        z = z - velocity_net(z, torch.tensor(n / num_steps).to(z)) / num_steps
        callback(z)
    return z
