"""From a configuration to a run folder."""

from latent_dmmd.training.loop import train

__all__ = ["train"]
