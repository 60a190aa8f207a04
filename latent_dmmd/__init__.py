"""Deep MMD gradient flow in the latent space of a frozen autoencoder.

A kernel on learned features, a noise level, a flow.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latent_dmmd.editing import LatentDMMDInpaintPipeline, LatentDMMDUpscalePipeline
    from latent_dmmd.embeddings import MeanEmbeddings
    from latent_dmmd.features import EncoderFeatureNet, FeatureNet
    from latent_dmmd.pipeline import LatentDMMDPipeline

__version__ = "0.2.0.dev0"

__all__ = [
    "EncoderFeatureNet",
    "FeatureNet",
    "LatentDMMDInpaintPipeline",
    "LatentDMMDPipeline",
    "LatentDMMDUpscalePipeline",
    "MeanEmbeddings",
]

MODULES = {
    "EncoderFeatureNet": "features",
    "FeatureNet": "features",
    "LatentDMMDInpaintPipeline": "editing",
    "LatentDMMDPipeline": "pipeline",
    "LatentDMMDUpscalePipeline": "editing",
    "MeanEmbeddings": "embeddings",
}


def __getattr__(name: str) -> object:
    """Import a public class when it is asked for: the command line answers `--help` without PyTorch."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"latent_dmmd.{MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
