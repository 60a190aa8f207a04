"""The U-Net on patches that φ and the baselines share, from operations that can be differentiated twice.

φ is trained through the gradient of a witness, so it is differentiated twice. Every operation here has a second
derivative: attention is written as matmul, softmax, matmul (the fused kernels have none), normalisation is over groups
(batch statistics would couple the samples of a gradient penalty), activations are smooth.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch
from einops import rearrange, reduce
from torch import Tensor, nn


@dataclass(frozen=True)
class UNetConfig:
    """The U-Net's sizes.

    Args:
        sample_size: Side of the particles.
        in_channels: Channels C of the particles.
        patch_size: Side of the non-overlapping patches that become the U-Net's pixels.
        block_out_channels: Width at each scale; the resolution halves from one to the next.
        layers_per_block: Residual blocks per scale, on the way down and again on the way up, if there is one.
        attention_levels: Whether each scale has attention.
        num_groups: Groups of the normalisation.
        conv_in_kernel: Side of the first convolution in patches; 1 is a plain patch embedding.
        num_classes: Classes of particles that the maps may be asked for; class C stands for any.

    Raises:
        ValueError: If the sizes do not fit each other.
    """

    sample_size: int
    in_channels: int
    patch_size: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    attention_levels: tuple[bool, ...]
    num_groups: int = 8
    conv_in_kernel: int = 3
    num_classes: int = 0

    def __post_init__(self) -> None:
        num_scales = len(self.block_out_channels)
        if len(self.attention_levels) != num_scales:
            raise ValueError(
                f"attention_levels needs {num_scales} entries, one per scale; got {len(self.attention_levels)}"
            )
        odd = [c for c in self.block_out_channels if c % min(self.num_groups, c)]
        if odd:
            raise ValueError(f"block_out_channels must be multiples of {self.num_groups}, or less; got {odd[0]}")
        smallest = self.patch_size * 2 ** (num_scales - 1)
        if self.sample_size % smallest:
            raise ValueError(
                f"sample_size={self.sample_size} must be a multiple of patch_size × 2^(scales − 1) = {smallest}"
            )

    @classmethod
    def of(cls, config: Mapping) -> "UNetConfig":
        """The sizes among the arguments of a network, as diffusers registers them."""
        given = {f.name: config[f.name] for f in fields(cls) if f.name in config}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})

    @property
    def patch_dim(self) -> int:
        """Numbers in a patch, C p²."""
        return self.in_channels * self.patch_size**2

    @property
    def embedding_dim(self) -> int:
        """Dimension of the noise level's embedding."""
        return 2 * self.block_out_channels[0]


def unrounded(before: Tensor, after: Tensor) -> Tensor:
    """A buffer of a module that was cast: where it went, but not with fewer bits than float32."""
    return before.to(after.device) if after.dtype in (torch.float16, torch.bfloat16) else after


class TimeEmbedding(nn.Module):
    """Noise level t in [0, 1], with shape (B), to an embedding with shape (B, dim)."""

    def __init__(self, dim: int, num_frequencies: int = 32) -> None:
        super().__init__()
        frequencies = torch.exp(torch.linspace(0, math.log(1000), num_frequencies, dtype=torch.float32))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * num_frequencies, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TimeEmbedding":
        exact = self.frequencies
        super()._apply(fn, recurse)
        self.frequencies = unrounded(exact, self.frequencies)
        return self

    def forward(self, t: Tensor) -> Tensor:
        angles = t.to(self.frequencies)[:, None] * self.frequencies
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=1).to(self.mlp[0].weight.dtype))


class ResBlock(nn.Module):
    """Two convolutions, the second modulated by the noise level: (B, C, H, W) and (B, dim) to (B, C', H, W)."""

    def __init__(self, in_channels: int, out_channels: int, embedding_dim: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(min(num_groups, in_channels), in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.modulation = nn.Linear(embedding_dim, 2 * out_channels)
        self.norm2 = nn.GroupNorm(min(num_groups, out_channels), out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.act = nn.SiLU()
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(self.act(self.norm1(x)))
        scale, shift = rearrange(self.modulation(embedding), "b (two c) -> two b c 1 1", two=2)
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(self.act(h))


class Attention(nn.Module):
    """Self-attention over positions, (B, C, H, W) to the same, from operations that have a second derivative."""

    def __init__(self, channels: int, num_groups: int, head_dim: int = 32) -> None:
        super().__init__()
        self.num_heads = next(n for n in range(max(1, channels // head_dim), 0, -1) if channels % n == 0)
        self.norm = nn.GroupNorm(min(num_groups, channels), channels)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.to_out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[-2]
        qkv = self.to_qkv(self.norm(x))
        q, k, v = rearrange(qkv, "b (three n d) h w -> three b n (h w) d", three=3, n=self.num_heads)
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return x + self.to_out(rearrange(weights @ v, "b n (h w) d -> b (n d) h w", h=height))


class PatchUNet(nn.Module):
    """Particles and noise levels to maps on patches.

    Args:
        unet: The sizes.
        out_channels: Channels of the maps; None leaves out the way up, and there is `encode` only.
    """

    def __init__(self, unet: UNetConfig, out_channels: int | None) -> None:
        super().__init__()
        self.unet = unet
        widths, groups = list(unet.block_out_channels), unet.num_groups
        self.time_embedding = TimeEmbedding(unet.embedding_dim)
        if unet.num_classes:
            self.class_embedding = nn.Embedding(unet.num_classes + 1, unet.embedding_dim)
            nn.init.zeros_(self.class_embedding.weight)
        self.conv_in = nn.Conv2d(unet.patch_dim, widths[0], unet.conv_in_kernel, padding="same")

        def scale(channels: int, attention: bool, previous: int | None = None) -> nn.ModuleList:
            inputs = [previous or channels] + [channels] * (unet.layers_per_block - 1)
            blocks = [ResBlock(c, channels, unet.embedding_dim, groups) for c in inputs]
            return nn.ModuleList(blocks + ([Attention(channels, groups)] if attention else []))

        attention = unet.attention_levels
        self.down = nn.ModuleList(scale(c, a, p) for c, a, p in zip(widths, attention, widths[:1] + widths))
        if out_channels is not None:  # before `downsample`: checkpoints count parameters in this order
            self.up = nn.ModuleList(scale(c, a) for c, a in zip(widths[::-1], attention[::-1]))
        self.downsample = nn.ModuleList(nn.Conv2d(c, c, 3, stride=2, padding=1) for c in widths[:-1])
        self.act = nn.SiLU()
        if out_channels is not None:
            self.upsample = nn.ModuleList(nn.Conv2d(c, 4 * d, 1) for c, d in zip(widths[:0:-1], widths[-2::-1]))
            self.norm_out = nn.GroupNorm(min(groups, widths[0]), widths[0])
            self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def maps(self, x: Tensor, t: Tensor, label: Tensor | int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What the U-Net makes of particles.

        Args:
            x: Particles, with shape (B, C, H, W); cast to the type of the weights.
            t: Noise levels in [0, 1], with shape (B) or ().
            label: Classes, with shape (B) or one for all; any class if None.

        Returns:
            The patches, with shape (B, C p², H / p, W / p); the output maps on them, with shape (B, out_channels,
            H / p, W / p); and the pooled bottleneck beside the noise level's embedding, with shape (B, dim).

        Raises:
            ValueError: If x does not have the network's channels and size.
        """
        x, scales, embedding = self.encode(x, t, label)
        summary = self.summary(scales[-1], embedding)
        h = scales.pop()
        for i, blocks in enumerate(self.up):
            h = self.apply_scale(blocks, h, embedding)
            if i < len(self.upsample):
                h = rearrange(self.upsample[i](h), "b (c p q) h w -> b c (h p) (w q)", p=2, q=2) + scales.pop()
        return x, self.conv_out(self.act(self.norm_out(h))), summary

    def encode(self, x: Tensor, t: Tensor, label: Tensor | int | None = None) -> tuple[Tensor, list[Tensor], Tensor]:
        """The way down; arguments and errors as of `maps`.

        Returns:
            The patches, with shape (B, C p², H / p, W / p); the maps after the blocks of each scale i, with shape
            (B, block_out_channels[i], H / (p 2^i), W / (p 2^i)); and the noise level's embedding, with shape (B, dim).
        """
        expected = (self.unet.in_channels, self.unet.sample_size, self.unet.sample_size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"particles must have shape (B, {', '.join(map(str, expected))}); got {tuple(x.shape)}")
        p = self.unet.patch_size
        x = rearrange(x.to(self.conv_in.weight.dtype), "b c (h p) (w q) -> b (c p q) h w", p=p, q=p)
        embedding = self.time_embedding(t.expand(len(x)))
        num_classes = self.unet.num_classes
        if num_classes:
            label = torch.as_tensor(num_classes if label is None else label, device=x.device)
            embedding = embedding + self.class_embedding(label.expand(len(x)))

        h = self.conv_in(x)
        scales = []
        for i, blocks in enumerate(self.down):
            h = self.apply_scale(blocks, self.downsample[i - 1](h) if i else h, embedding)
            scales.append(h)
        return x, scales, embedding

    @staticmethod
    def summary(bottleneck: Tensor, embedding: Tensor) -> Tensor:
        """The pooled maps of the last scale beside the noise level's embedding, with shape (B, dim)."""
        return torch.cat([reduce(bottleneck, "b c h w -> b c", "mean"), embedding], dim=1)

    @staticmethod
    def apply_scale(blocks: nn.ModuleList, h: Tensor, embedding: Tensor) -> Tensor:
        for block in blocks:
            h = block(h, embedding) if isinstance(block, ResBlock) else block(h)
        return h
