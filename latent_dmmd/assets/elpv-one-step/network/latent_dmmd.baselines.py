from latent_dmmd.baselines import VelocityNet  # noqa: F401
