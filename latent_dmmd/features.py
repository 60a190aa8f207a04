"""Noise-conditional features φ(x_t, t): the only network of the method.

φ is trained through the gradient of a witness, so it is differentiated twice. Every operation here has a second
derivative: attention is written as matmul, softmax, matmul (the fused kernels have none), normalisation is over groups
(batch statistics would couple the samples of a gradient penalty), activations are smooth.
"""

import math
from dataclasses import dataclass, replace

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange, reduce
from torch import Tensor, nn

from latent_dmmd.discrepancy import Discrepancy, Witness, get_discrepancy
from latent_dmmd.forward import get_forward_process


class TimeEmbedding(nn.Module):
    """Noise level t in [0, 1], with shape (B), to an embedding with shape (B, dim)."""

    def __init__(self, dim: int, num_frequencies: int = 32) -> None:
        super().__init__()
        frequencies = torch.exp(torch.linspace(0, math.log(1000), num_frequencies))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * num_frequencies, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())

    def forward(self, t: Tensor) -> Tensor:
        angles = t.to(self.frequencies)[:, None] * self.frequencies
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=1))


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
        self.num_heads = max(1, channels // head_dim)
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


class PatchUNet(ModelMixin, ConfigMixin):
    """The U-Net on patches that φ and the baselines have in common: particles and noise levels to maps.

    Args:
        sample_size: Side of the particles.
        in_channels: Channels C of the particles.
        out_channels: Channels of the maps.
        patch_size: Side of the non-overlapping patches that become the U-Net's pixels.
        block_out_channels: Width at each level; the resolution halves from one to the next.
        layers_per_block: Residual blocks a level, on the way down and again on the way up.
        attention_levels: Whether a level has attention, for each level.
        num_groups: Groups of the normalisation.
        conv_in_kernel: Side of the first convolution in patches; 1 is a plain patch embedding.
        num_classes: Classes of particles C that the maps may be asked for; class C stands for any.

    Raises:
        ValueError: If the sizes do not fit each other.
    """

    _supports_gradient_checkpointing = False

    def __init__(
        self,
        sample_size: int,
        in_channels: int,
        out_channels: int,
        patch_size: int,
        block_out_channels: tuple[int, ...],
        layers_per_block: int,
        attention_levels: tuple[bool, ...],
        num_groups: int,
        conv_in_kernel: int = 3,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        num_levels = len(block_out_channels)
        if len(attention_levels) != num_levels:
            raise ValueError(f"attention_levels needs {num_levels} entries, one a level; got {len(attention_levels)}")
        if sample_size % (patch_size * 2 ** (num_levels - 1)):
            raise ValueError(
                f"sample_size={sample_size} must be a multiple of patch_size × 2^(levels − 1) = "
                f"{patch_size * 2 ** (num_levels - 1)}"
            )
        self.embedding_dim = 2 * block_out_channels[0]
        self.patch_dim = in_channels * patch_size**2
        self.time_embedding = TimeEmbedding(self.embedding_dim)
        if num_classes:
            self.class_embedding = nn.Embedding(num_classes + 1, self.embedding_dim)
            nn.init.zeros_(self.class_embedding.weight)
        self.conv_in = nn.Conv2d(self.patch_dim, block_out_channels[0], conv_in_kernel, padding="same")

        def level(channels: int, attention: bool, previous: int | None = None) -> nn.ModuleList:
            inputs = [previous or channels] + [channels] * (layers_per_block - 1)
            blocks = [ResBlock(c, channels, self.embedding_dim, num_groups) for c in inputs]
            return nn.ModuleList(blocks + ([Attention(channels, num_groups)] if attention else []))

        widths = list(block_out_channels)
        self.down = nn.ModuleList(level(c, a, p) for c, a, p in zip(widths, attention_levels, widths[:1] + widths))
        self.up = nn.ModuleList(level(c, a) for c, a in zip(widths[::-1], attention_levels[::-1]))
        self.downsample = nn.ModuleList(nn.Conv2d(c, c, 3, stride=2, padding=1) for c in widths[:-1])
        self.upsample = nn.ModuleList(nn.Conv2d(c, 4 * d, 1) for c, d in zip(widths[:0:-1], widths[-2::-1]))
        self.norm_out = nn.GroupNorm(min(num_groups, widths[0]), widths[0])
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)
        self.act = nn.SiLU()

    def maps(self, x: Tensor, t: Tensor, label: Tensor | int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What the U-Net makes of particles.

        Args:
            x: Particles, with shape (B, C, H, W).
            t: Noise levels in [0, 1], with shape (B) or ().
            label: Classes, with shape (B) or one for all; any class if None.

        Returns:
            The patches, with shape (B, C p², H / p, W / p); the output maps on them, with shape (B, out_channels,
            H / p, W / p); and the pooled bottleneck beside the noise level's embedding, with shape (B, dim).

        Raises:
            ValueError: If x does not have the network's channels and size.
        """
        expected = (self.config.in_channels, self.config.sample_size, self.config.sample_size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"particles must have shape (B, {', '.join(map(str, expected))}); got {tuple(x.shape)}")
        p = self.config.patch_size
        x = rearrange(x, "b c (h p) (w q) -> b (c p q) h w", p=p, q=p)
        embedding = self.time_embedding(t.expand(len(x)))
        num_classes = self.config.get("num_classes", 0)
        if num_classes:
            label = torch.as_tensor(num_classes if label is None else label, device=x.device)
            embedding = embedding + self.class_embedding(label.expand(len(x)))

        h = self.conv_in(x)
        skips = []
        for i, blocks in enumerate(self.down):
            h = self.apply_level(blocks, h, embedding)
            if i < len(self.downsample):
                skips.append(h)
                h = self.downsample[i](h)
        pooled = reduce(h, "b c h w -> b c", "mean")
        for i, blocks in enumerate(self.up):
            h = self.apply_level(blocks, h, embedding)
            if i < len(self.upsample):
                h = rearrange(self.upsample[i](h), "b (c p q) h w -> b c (h p) (w q)", p=2, q=2) + skips.pop()
        h = self.conv_out(self.act(self.norm_out(h)))
        return x, h, torch.cat([pooled, embedding], dim=1)

    @staticmethod
    def apply_level(blocks: nn.ModuleList, h: Tensor, embedding: Tensor) -> Tensor:
        for block in blocks:
            h = block(h, embedding) if isinstance(block, ResBlock) else block(h)
        return h


class FeatureNet(PatchUNet):
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
        sample_size: Side of the particles.
        in_channels: Channels C of the particles.
        num_features: Dimension F of φ.
        patch_size: Side of the non-overlapping patches that become the U-Net's pixels.
        block_out_channels: Width at each level; the resolution halves from one to the next.
        layers_per_block: Residual blocks a level, on the way down and again on the way up.
        attention_levels: Whether a level has attention, for each level.
        num_groups: Groups of the normalisation.
        conv_in_kernel: Side of the first convolution in patches; 1 is a plain patch embedding.
        squared_norm: Whether features see the squared norm of the whole input.
        num_classes: Classes of particles C that features may be asked for; class C stands for any.

    Raises:
        ValueError: If the sizes do not fit each other.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 16,
        in_channels: int = 8,
        num_features: int = 64,
        patch_size: int = 1,
        block_out_channels: tuple[int, ...] = (64, 128),
        layers_per_block: int = 2,
        attention_levels: tuple[bool, ...] = (False, True),
        num_groups: int = 8,
        conv_in_kernel: int = 3,
        squared_norm: bool = False,
        num_classes: int = 0,
    ) -> None:
        super().__init__(
            sample_size,
            in_channels,
            num_features,
            patch_size,
            block_out_channels,
            layers_per_block,
            attention_levels,
            num_groups,
            conv_in_kernel,
            num_classes,
        )
        self.lift = nn.Conv2d(self.patch_dim, num_features, 1)
        self.gate = nn.Linear(block_out_channels[-1] + self.embedding_dim, num_features)
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


class MeanEmbeddings(ModelMixin, ConfigMixin):
    """The stored mean embeddings of every noise level: all that sampling needs besides φ.

    With the linear kernel the mean embedding of X_t is one vector, E φ(x_t, t). Any other kernel, and KALE, needs the
    distribution: then it is stored as the features of M draws.

    Buffers, for the levels t_1 < … < t_T: `levels` (T); `displacement`, d(t_k), with shape (T); `clean` and `noisy`,
    the mean embeddings of X_0 and X_t at t = t_k, with shape (T, F), or (T, M, F); `gradient_scale`, the s_k for
    which s_k times the gradient of the stored witness at x_t predicts x_t − x_0, with shape (T). With C classes the
    last three have a first dimension of C + 1, whose last entry is for any class.

    Args:
        num_noise_levels: T.
        num_features: F.
        num_points: M; 0 stores means.
        forward_process: The process that the features were trained on.
        discrepancy: Arguments of `get_discrepancy`; the MMD of the linear kernel if None.
        num_classes: C; 0 if particles have no classes.

    Raises:
        ValueError: If only means are to be stored and the discrepancy needs more, or an argument is out of range.
    """

    @register_to_config
    def __init__(
        self,
        num_noise_levels: int = 25,
        num_features: int = 64,
        num_points: int = 0,
        forward_process: str = "linear",
        discrepancy: dict | None = None,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.process = get_forward_process(forward_process)
        self.discrepancy = get_discrepancy(**(discrepancy or {}))
        if not num_points and not self.discrepancy.needs_means_only:
            raise ValueError("this discrepancy needs stored features, not only their means; pass num_points > 0")
        for name in ("levels", "displacement"):
            self.register_buffer(name, torch.zeros(num_noise_levels))
        rows = (num_classes + 1,) if num_classes else ()
        points = (num_points,) if num_points else ()
        self.register_buffer("gradient_scale", torch.zeros(*rows, num_noise_levels))
        for name in ("clean", "noisy"):
            self.register_buffer(name, torch.zeros(*rows, num_noise_levels, *points, num_features))

    @property
    def delta(self) -> Tensor:
        """Δ at every level, the difference of the means of φ, with shape (T, F)."""
        difference = self.noisy - self.clean
        return difference.mean(1) if self.config.num_points else difference

    def of_class(self, label: int | None = None) -> "MeanEmbeddings":
        """Those of one class, or of any if None, on the same memory; these themselves if there are no classes.

        Raises ValueError if there is no such class.
        """
        num_classes = self.config.num_classes
        if label is not None and not 0 <= label < num_classes:
            has = f"classes 0 to {num_classes - 1}" if num_classes else "no classes"
            raise ValueError(f"class {label} does not exist; the pipeline has {has}")
        if not num_classes:
            return self
        options = ("num_noise_levels", "num_features", "num_points", "forward_process", "discrepancy")
        view = MeanEmbeddings(**{name: self.config[name] for name in options})
        view.levels, view.displacement = self.levels, self.displacement
        row = num_classes if label is None else label
        for name in ("clean", "noisy", "gradient_scale"):
            setattr(view, name, getattr(self, name)[row])
        return view

    def at_level(self, k: int) -> "LevelEmbeddings":
        """What is stored of level k, ready for evaluation."""
        clean, noisy = (a[k].reshape(-1, a.shape[-1]) for a in (self.clean, self.noisy))
        kernel = self.discrepancy.kernel.fitted(noisy, clean)
        discrepancy = replace(self.discrepancy, kernel=kernel)
        return LevelEmbeddings(self.levels[k], discrepancy, clean, discrepancy.witness(noisy, clean))


@dataclass(frozen=True)
class LevelEmbeddings:
    """The mean embeddings of one noise level.

    Attributes:
        t: The level, with shape ().
        discrepancy: Its kernel is settled on the stored features.
        clean: Features of clean particles, or their mean, with shape (M, F) or (1, F).
        stored: The witness between the stored X_t and X_0.
    """

    t: Tensor
    discrepancy: Discrepancy
    clean: Tensor
    stored: Witness

    def exact(self, phi: Tensor, rescale: bool = True) -> Witness:
        """The witness between particles of features φ (N, F) and X_0, at the stored one's norm if `rescale`."""
        witness = self.discrepancy.witness(phi, self.clean)
        return witness.scaled(self.stored.norm() / witness.norm()) if rescale else witness
