from latent_dmmd.pipeline import LatentSchedulerPipeline  # noqa: F401
