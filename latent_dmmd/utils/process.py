"""What a call takes from the process it runs in, and leaves as it was: device, precision, threads, Accelerate's state.

Accelerate keeps device, ranks and precision once per process and refuses a second `Accelerator` of another precision.
A notebook could then train once per kernel. `own_accelerator` therefore drops its state when its call ends.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, parse_flag_from_env

from latent_dmmd.utils.errors import ConfigError, check

PREPARATION = timedelta(days=1)  # the longest that other ranks wait for the one that encodes the data
AUTO_PRECISION = "LATENT_DMMD_AUTO_PRECISION"  # environment variable: what "auto" stands for
LAUNCHER_PRECISION = "ACCELERATE_MIXED_PRECISION"  # what `accelerate launch` was told; "no" if nothing


def default_device() -> torch.device:
    """The GPU of this process if there is one and `ACCELERATE_USE_CPU` is not set, or the CPU."""
    if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def check_precision(name: str, precision: str) -> None:
    """Raise ConfigError for a precision that second derivatives do not survive; `name` is the key it comes from."""
    check(
        precision not in ("fp16", "fp8"),
        f"{name}={precision} overflows in the second derivative of the gradient penalty; use bf16 or no",
    )


def precision_and_reason(mixed_precision: str) -> tuple[str, str]:
    """What a precision stands for in this process, "no" or "bf16", and why.

    "auto" is, in this order: what the environment variable `LATENT_DMMD_AUTO_PRECISION` says; what `accelerate launch`
    was asked for; bf16 where the hardware computes in it; "no" where bf16 is emulated and therefore slower. The
    launcher's "no" is no choice, since it is also what the launcher says when it was asked for nothing.

    Args:
        mixed_precision: "no", "bf16", or "auto".

    Raises:
        ConfigError: If that variable is neither "no" nor "bf16", or the launcher was asked for fp16 or fp8.
    """
    launcher = os.environ.get(LAUNCHER_PRECISION, "").lower()
    if mixed_precision != "auto":
        overruled = launcher not in ("", "no", mixed_precision)
        return mixed_precision, "by the configuration" + f", not the launcher's {launcher}" * overruled
    forced = os.environ.get(AUTO_PRECISION)
    if forced:
        check(forced in ("no", "bf16"), f"{AUTO_PRECISION} must be no or bf16; got {forced!r}")
        return forced, f"by {AUTO_PRECISION}"
    check_precision("the launcher's mixed_precision", launcher)
    if launcher == "bf16":
        return launcher, "by the launcher"
    if default_device().type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        supported = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if not supported:
        return "no", "the hardware does not compute in bf16"
    return "bf16", "the hardware computes in it" + "; training.mixed_precision no turns it off" * (launcher == "no")


def resolved_precision(mixed_precision: str) -> str:
    """What a precision stands for in this process, as of `precision_and_reason`."""
    return precision_and_reason(mixed_precision)[0]


@contextmanager
def kept_threads() -> Iterator[None]:
    """Context that restores PyTorch's number of threads."""
    num_threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@contextmanager
def kept_state() -> Iterator[None]:
    """Context that drops the state of Accelerate that was made in it; what the caller had made before stays."""
    had_partial, had_accelerator = bool(PartialState._shared_state), bool(AcceleratorState._shared_state)
    had_gradient = bool(GradientState._shared_state)
    try:
        yield
    finally:
        if not had_accelerator:
            AcceleratorState._reset_state()
        if not had_gradient:
            GradientState._reset_state()
        if not had_partial:
            PartialState._reset_state()


@contextmanager
def own_modes() -> Iterator[None]:
    """Context in which float32 is the default, gradients are taken and nothing is autocast, whatever the caller set.

    In a caller's `autocast` another one keeps its casts of weights: `torch.clear_autocast_cache()` when they change.
    """
    kind, dtype = default_device().type, torch.get_default_dtype()
    autocast = torch.is_autocast_enabled(kind)
    torch.set_default_dtype(torch.float32)
    torch.set_autocast_enabled(kind, False)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_autocast_enabled(kind, autocast)


@contextmanager
def own_accelerator(mixed_precision: str = "auto", **options: object) -> Iterator[Accelerator]:
    """Context with an Accelerator that leaves no trace in the process, and with all cores on a CPU.

    Neither the caller's default type nor a caller's `no_grad`, `inference_mode` or `autocast` counts in it.

    Args:
        mixed_precision: "auto", "no" or "bf16".
        options: Further arguments of `Accelerator`.

    Raises:
        ConfigError: If the caller's own Accelerator has another precision, or shards the network.
    """
    precision, in_use = resolved_precision(mixed_precision), AcceleratorState._shared_state.get("_mixed_precision")
    if in_use not in (None, precision):
        raise ConfigError(
            f"this process has an Accelerator of mixed precision {in_use}, and this call needs {precision}: pass "
            f"training.mixed_precision={in_use}, or call it where no Accelerator has been made"
        )
    with kept_state(), kept_threads(), own_modes():
        waiting = InitProcessGroupKwargs(timeout=PREPARATION)
        accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[waiting], **options)
        check_distributed(accelerator.distributed_type)
        check(
            accelerator.gradient_accumulation_steps == 1,
            "gradients are not accumulated: leave out the launcher's gradient_accumulation_steps and raise "
            "training.pairs_per_level",
        )
        if accelerator.device.type == "cpu" and accelerator.num_processes == 1:
            use_all_cores()
        yield accelerator


def use_all_cores() -> None:
    """Undo the one thread that `accelerate launch` gives a single process on a machine without accelerator."""
    if os.environ.get("OMP_NUM_THREADS") == "1" and LAUNCHER_PRECISION in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())


def check_distributed(kind: DistributedType) -> None:
    """Raise ConfigError for wrappers that shard the network."""
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise ConfigError(
            f"distributed_type {kind.value} is not supported: the witness gradient is differentiated twice, which "
            "sharded weights do not survive; use MULTI_GPU or MULTI_CPU, see configs/accelerate"
        )
