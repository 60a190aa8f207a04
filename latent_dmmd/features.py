"""Noise-conditional features φ(x_t, t): the only network of the method."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange, reduce
from torch import Tensor, nn

from latent_dmmd.embeddings import MeanEmbeddings  # noqa: F401  where pipelines saved by 0.1 look for it
from latent_dmmd.nn.unet import PatchUNet, UNetConfig


class FeatureNet(PatchUNet, ModelMixin, ConfigMixin):
    """Noise-conditional features φ(x_t, t) from a U-Net with a bilinear head.

    The U-Net maps x_t to F maps h(x_t, t). The head pairs each with a linear map of the input itself,

        φ_i(x_t, t) = (H W)^(−½) Σ_p ℓ_i(p) (h_i(p) + γ_i ℓ_i(p)),        ℓ = W x_t + b,

    with gates γ(x_t, t) from the pooled bottleneck. With W = 0 this is an ordinary pooled output. With W ≠ 0 it also
    contains ⟨x, u(x, t)⟩ and gated ‖x‖² terms, so that ∇φ can return the network's own output and the input: the
    field a witness must have near t = 1 is close to x itself.

    ∇φ lies in the span of the maps that read x: at most block_out_channels[0] + F directions of the C p² of a patch.
    Where that is too few, as with patches of pixels, `squared_norm` adds gated (‖x‖² − D) / (2 √D) to every feature, so
    that the flow can at least shrink the noise in all others.

    Args:
        sample_size, in_channels, patch_size, block_out_channels, layers_per_block, attention_levels, num_groups,
            conv_in_kernel, num_classes: As of `UNetConfig`.
        num_features: Dimension F of φ.
        squared_norm: Whether features see the squared norm of the whole input.

    Raises:
        ValueError: If the sizes do not fit each other.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int,
        in_channels: int,
        num_features: int,
        patch_size: int,
        block_out_channels: tuple[int, ...],
        layers_per_block: int,
        attention_levels: tuple[bool, ...],
        num_groups: int = 8,
        conv_in_kernel: int = 3,
        squared_norm: bool = False,
        num_classes: int = 0,
    ) -> None:
        unet = UNetConfig.of(self.config)
        super().__init__(unet, out_channels=num_features)
        self.lift = nn.Conv2d(unet.patch_dim, num_features, 1)
        self.gate = nn.Linear(block_out_channels[-1] + unet.embedding_dim, num_features)
        nn.init.ones_(self.lift.bias)
        if squared_norm:
            self.norm_gate = nn.Linear(self.gate.in_features, num_features)
            nn.init.zeros_(self.norm_gate.weight)
            nn.init.zeros_(self.norm_gate.bias)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | int | None = None) -> Tensor:
        """Features of particles at noise levels.

        Args:
            x: Particles, with shape (B, C, H, W).
            t: Noise levels in [0, 1], with shape (B) or ().
            label: Classes, with shape (B) or one for all; any class if None.

        Returns:
            φ(x, t), with shape (B, F), in float32 or better.

        Raises:
            ValueError: If x does not have the network's channels and size.
        """
        patches, h, summary = self.maps(x, t, label)
        lift, gate = self.lift(patches), self.gate(summary)
        # float32: sums over positions, whose small differences are the signal
        h, lift, gate = (a.to(torch.promote_types(a.dtype, torch.float32)) for a in (h, lift, gate))
        products = lift * (h + rearrange(gate, "b f -> b f 1 1") * lift)
        phi = reduce(products, "b f h w -> b f", "sum") * (h.shape[-2] * h.shape[-1]) ** -0.5
        if self.config.squared_norm:
            x = x.flatten(1).to(phi)
            excess = (x.square().sum(1, keepdim=True) - x.shape[1]) / (2 * x.shape[1] ** 0.5)
            phi = phi + self.norm_gate(summary).to(phi) * excess
        return phi
