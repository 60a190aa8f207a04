"""The stored mean embeddings: all that sampling needs besides φ."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from latent_dmmd.discrepancy import Discrepancy, Witness, get_discrepancy
from latent_dmmd.forward import get_forward_process
from latent_dmmd.nn.unet import unrounded

Target = Literal["displacement", "restoring"]
TARGETS = get_args(Target)


@dataclass(frozen=True)
class LevelEmbeddings:
    """The mean embeddings of one noise level and class.

    Attributes:
        t: The noise level, with shape ().
        discrepancy: Its kernel is fitted to the stored features.
        clean: Features of clean particles, or their mean, with shape (M, F) or (1, F).
        stored: The witness between the stored X_t and X_0.
        scale: s_t, for which s_t times the gradient of `stored` at x_t predicts x_t − x_0.
        lengthening: r_t, how much longer a short step is.
    """

    t: Tensor
    discrepancy: Discrepancy
    clean: Tensor
    stored: Witness
    scale: float
    lengthening: float = 1.0

    @classmethod
    def build(
        cls,
        t: Tensor,
        discrepancy: Discrepancy,
        clean: Tensor,
        noisy: Tensor,
        scale: float,
        lengthening: float = 1.0,
    ) -> "LevelEmbeddings":
        """From the features of X_0 and X_t, or their means, with shapes (M, F) and (M', F)."""
        discrepancy = replace(discrepancy, kernel=discrepancy.kernel.fitted(noisy, clean))
        return cls(t, discrepancy, clean, discrepancy.witness(noisy, clean), scale, lengthening)

    def step_scale(self, fraction: float) -> float:
        """s_t (1 + (r_t − 1) (1 − δ)⁴) for a step of the fraction δ in [0, 1] of the remaining way.

        A step of the whole way ends at the prediction of x_0, where the least-squares scale is best. Short steps let
        particles lag, and are longer. The power was chosen on validation images.
        """
        return self.scale * (1 + (self.lengthening - 1) * (1 - fraction) ** 4)

    def exact(self, phi: Tensor, rescale: bool = True) -> Witness:
        """The witness between particles of features φ (N, F) and X_0, at the stored one's norm if `rescale`."""
        witness = self.discrepancy.witness(phi, self.clean)
        return witness.scaled(self.stored.norm() / witness.norm()) if rescale else witness


class MeanEmbeddings(ModelMixin, ConfigMixin):
    """The mean embeddings of every class and noise level.

    With the linear kernel the mean embedding of X_t is one vector, E φ(x_t, t). Any other kernel, and KALE, needs the
    distribution: then it is stored as the features of M draws.

    Buffers, for the noise levels t_1 < … < t_T and the classes 0 … C − 1, whose last row C is for any class: `levels`,
    with shape (T); `clean` and `noisy`, the mean embeddings of X_0 and X_t, with shape (C + 1, T, F), or
    (C + 1, T, M, F); `gradient_scale`, the s_t for which s_t times the gradient of the stored witness at x_t predicts
    x_t − x_0, with shape (C + 1, T); and `lengthening`, the factor r_t of short steps, shaped like it.

    A witness is a small difference of means, so they stay in float32 where a pipeline is cast to less.

    Args:
        num_noise_levels: T.
        num_features: F.
        num_points: M; 0 stores means.
        forward_process: The process that the features were trained on.
        discrepancy: Arguments of `get_discrepancy`; the MMD of the linear kernel if None.
        num_classes: C; 0 if particles have no classes.
        target: What the witness's gradient is at a particle of level s below t: the "displacement" x_t − x_0 of its
            own level, or the way that is left, z − x_0, which is "restoring".

    Raises:
        ValueError: If only means are to be stored and the discrepancy needs more, or an argument is out of range.
    """

    _keys_to_ignore_on_load_unexpected = ["displacement"]  # of pipelines saved by 0.1

    @register_to_config
    def __init__(
        self,
        num_noise_levels: int = 25,
        num_features: int = 64,
        num_points: int = 0,
        forward_process: str = "linear",
        discrepancy: dict | None = None,
        num_classes: int = 0,
        target: Target = "displacement",
    ) -> None:
        super().__init__()
        if target not in TARGETS:
            raise ValueError(f"target must be 'displacement' or 'restoring'; got {target!r}")
        self.process = get_forward_process(forward_process)
        self.discrepancy = get_discrepancy(**(discrepancy or {}))
        if not num_points and not self.discrepancy.needs_means_only:
            raise ValueError("this discrepancy needs stored features, not only their means; pass num_points > 0")
        rows, points = num_classes + 1, (num_points,) if num_points else ()
        self.register_buffer("levels", torch.zeros(num_noise_levels))
        self.register_buffer("gradient_scale", torch.zeros(rows, num_noise_levels))
        self.register_buffer("lengthening", torch.ones(rows, num_noise_levels))
        for name in ("clean", "noisy"):
            self.register_buffer(name, torch.zeros(rows, num_noise_levels, *points, num_features))
        add_class_dimension(self)

    @classmethod
    def from_pretrained(cls, *args, **options) -> "MeanEmbeddings":
        """As of `ModelMixin`, in float32; what 0.1 saved without classes gets their dimension."""
        options = {name: value for name, value in options.items() if name not in ("dtype", "torch_dtype")}
        device_map = options.pop("device_map", None)
        device = device_map.get("") if isinstance(device_map, dict) else device_map
        # the other way to load, which device maps take, skips hooks on state dictionaries
        model = super().from_pretrained(*args, **{**options, "low_cpu_mem_usage": False})
        return model if device in (None, "auto") else model.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MeanEmbeddings":
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            setattr(self, name, unrounded(buffer, getattr(self, name)))
        return self

    def _fix_state_dict_keys_on_load(self, state_dict: dict[str, Tensor]) -> None:
        """As of `ModelMixin`; steps that were calibrated before there was a `lengthening` are not lengthened."""
        super()._fix_state_dict_keys_on_load(state_dict)
        state_dict.setdefault("lengthening", torch.ones_like(state_dict["gradient_scale"]))

    def row(self, label: int | None) -> int:
        """Where a class is stored; any class if None. Raises ValueError if there is no such class."""
        num_classes = self.config.num_classes
        if label is None:
            return num_classes
        if not 0 <= label < num_classes:
            has = f"classes 0 to {num_classes - 1}" if num_classes else "no classes"
            raise ValueError(f"class {label} does not exist; the pipeline has {has}")
        return label

    def points(self, k: int, label: int | None = None) -> tuple[Tensor, Tensor]:
        """Stored features of X_0 and X_t at level k, or their means, each with shape (M, F) or (1, F)."""
        row = self.row(label)
        clean, noisy = (a[row, k].reshape(-1, a.shape[-1]) for a in (self.clean, self.noisy))
        return clean, noisy

    def at_level(self, k: int, label: int | None = None) -> LevelEmbeddings:
        """What is stored of level k and a class, ready for evaluation; any class if None."""
        clean, noisy = self.points(k, label)
        scale, lengthening = (a[self.row(label), k].item() for a in (self.gradient_scale, self.lengthening))
        return LevelEmbeddings.build(self.levels[k], self.discrepancy, clean, noisy, scale, lengthening)


def add_class_dimension(module: nn.Module) -> None:
    """Let a module load tables of 0.1, whose rows were not kept by class."""
    module.register_load_state_dict_pre_hook(reshape_saved)


def reshape_saved(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    for name, buffer in module.named_buffers(recurse=False):
        saved = state.get(prefix + name)
        if saved is not None and saved.ndim == buffer.ndim - 1 and saved.numel() == buffer.numel():
            state[prefix + name] = saved.reshape(buffer.shape)
