"""Training of an autoencoder: `loop` runs steps of `trainer`, which minimises `loss`; `card` says what came of it."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latent_dmmd.training.autoencoder.config import AutoencoderTrainingConfig
    from latent_dmmd.training.autoencoder.loop import train_autoencoder

__all__ = ["AutoencoderTrainingConfig", "train_autoencoder"]

MODULES = {"AutoencoderTrainingConfig": "config", "train_autoencoder": "loop"}


def __getattr__(name: str) -> object:
    """Import what is asked for: the loop here imports the one of `training`, which imports the configuration here."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
