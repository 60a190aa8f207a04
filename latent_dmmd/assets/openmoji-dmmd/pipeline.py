from latent_dmmd.pipeline import LatentDMMDPipeline  # noqa: F401
