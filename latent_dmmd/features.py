"""Noise-conditional features φ(x_t, t): the only network of the method."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange, reduce
from torch import Tensor, nn

from latent_dmmd.embeddings import MeanEmbeddings  # noqa: F401  where pipelines saved by 0.1 look for it
from latent_dmmd.nn.unet import PatchUNet, UNetConfig


class BilinearFeatures(PatchUNet, ModelMixin, ConfigMixin):
    """Base class: features that pair maps with linear maps of the input, gated by a summary of the input."""

    def add_gates(self, num_features: int, squared_norm: bool) -> None:
        """The layers γ(x_t, t), and those of the squared norm where it is asked for."""
        self.gate = nn.Linear(self.unet.block_out_channels[-1] + self.unet.embedding_dim, num_features)
        if squared_norm:
            self.norm_gate = nn.Linear(self.gate.in_features, num_features)
            nn.init.zeros_(self.norm_gate.weight)
            nn.init.zeros_(self.norm_gate.bias)

    def paired(self, lift: Tensor, h: Tensor, gate: Tensor | None = None) -> Tensor:
        """(H W)^(−½) Σ_p ℓ(p) (h(p) + γ ℓ(p)), with shape (B, F), in float32 or better.

        Args:
            lift: ℓ, with shape (B, F, H, W).
            h: Maps, with shape (B, F, H, W).
            gate: γ, with shape (B, F); 0 if None.
        """
        # float32: sums over positions, whose small differences are the signal
        lift, h = (a.to(torch.promote_types(a.dtype, torch.float32)) for a in (lift, h))
        if gate is not None:
            h = h + rearrange(gate.to(h), "b f -> b f 1 1") * lift
        return reduce(lift * h, "b f h w -> b f", "sum") * (h.shape[-2] * h.shape[-1]) ** -0.5

    def gated_norm(self, x: Tensor, summary: Tensor) -> Tensor:
        """Gated (‖x‖² − D) / (2 √D) of particles (B, C, H, W), with shape (B, F), in float32 or better."""
        x = x.flatten(1).to(torch.promote_types(x.dtype, torch.float32))
        excess = (x.square().sum(1, keepdim=True) - x.shape[1]) / (2 * x.shape[1] ** 0.5)
        return self.norm_gate(summary).to(x) * excess


class FeatureNet(BilinearFeatures):
    """Noise-conditional features φ(x_t, t) from a U-Net with a bilinear head.

    The U-Net maps x_t to F maps h(x_t, t). The head pairs each with a linear map of the input itself,

        φ_i(x_t, t) = (H W)^(−½) Σ_p ℓ_i(p) (h_i(p) + γ_i ℓ_i(p)),        ℓ = W x_t + b,

    with gates γ(x_t, t) from the pooled bottleneck. With W = 0 this is an ordinary pooled output. With W ≠ 0 it also
    contains ⟨x, u(x, t)⟩ and gated ‖x‖² terms, so that ∇φ can return the network's own output and the input: the
    field a witness must have near t = 1 is close to x itself.

    ∇φ lies in the span of the maps that read x: with `conv_in_kernel` 1, at most block_out_channels[0] + F directions
    of the C p² of a patch. Where that is too few, as with patches of pixels, `squared_norm` adds gated
    (‖x‖² − D) / (2 √D) to every feature, so that the flow can at least shrink the noise in all others.

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
        self.add_gates(num_features, squared_norm)
        nn.init.ones_(self.lift.bias)

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
        phi = self.paired(self.lift(patches), h, self.gate(summary))
        return phi + self.gated_norm(x, summary) if self.config.squared_norm else phi


class EncoderFeatureNet(BilinearFeatures):
    """Noise-conditional features φ(x_t, t) from the way down of the U-Net alone, with a bilinear head at each scale.

    A witness is used by its gradient, and the backward pass of an encoder already is a decoder: transposed weights,
    gated by the activations of the way down, which is what skip connections are for. So φ needs no way up. At each
    scale i the blocks' output, by GroupNorm, SiLU and a 1×1 convolution, becomes F maps h_i, which are paired with a
    linear map ℓ_i of the input, average-pooled to that scale:

        φ(x_t, t) = Σ_i (H_i W_i)^(−½) Σ_p ℓ_i(p) (h_i(p) + γ_i ℓ_i(p)),        ℓ_i = W_i pool_i(x_t) + b_i

    with gates γ_0(x_t, t) at the finest scale from the pooled last one, and γ_i = 0 elsewhere.

    Args:
        sample_size, in_channels, num_features, patch_size, block_out_channels, layers_per_block, attention_levels,
            num_groups, conv_in_kernel, squared_norm, num_classes: As of `FeatureNet`.

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
        super().__init__(unet, out_channels=None)
        widths = unet.block_out_channels
        self.norms = nn.ModuleList(nn.GroupNorm(min(num_groups, c), c) for c in widths)
        self.heads = nn.ModuleList(nn.Conv2d(c, num_features, 1) for c in widths)
        self.lifts = nn.ModuleList(nn.Conv2d(unet.patch_dim, num_features, 1) for _ in widths)
        self.add_gates(num_features, squared_norm)
        for lift in self.lifts:
            nn.init.ones_(lift.bias)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | int | None = None) -> Tensor:
        """As of `FeatureNet`."""
        pooled, scales, embedding = self.encode(x, t, label)
        summary, phi = self.summary(scales[-1], embedding), 0.0
        for i, h in enumerate(scales):
            if i:
                pooled = reduce(pooled, "b c (h p) (w q) -> b c h w", "mean", p=2, q=2)
            maps = self.heads[i](self.act(self.norms[i](h)))
            phi = phi + self.paired(self.lifts[i](pooled), maps, None if i else self.gate(summary))
        return phi + self.gated_norm(x, summary) if self.config.squared_norm else phi


FEATURE_NETS: dict[str, type[BilinearFeatures]] = {"unet": FeatureNet, "encoder": EncoderFeatureNet}
