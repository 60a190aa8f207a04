"""Deep MMD gradient flow in the latent space of a frozen autoencoder.

A kernel on learned features, a noise level, a flow.
"""

from latent_dmmd.editing import LatentDMMDInpaintPipeline, LatentDMMDUpscalePipeline
from latent_dmmd.embeddings import MeanEmbeddings
from latent_dmmd.features import EncoderFeatureNet, FeatureNet
from latent_dmmd.pipeline import LatentDMMDPipeline

__version__ = "0.1.0"

__all__ = [
    "EncoderFeatureNet",
    "FeatureNet",
    "LatentDMMDInpaintPipeline",
    "LatentDMMDPipeline",
    "LatentDMMDUpscalePipeline",
    "MeanEmbeddings",
]
