from latent_dmmd.features import FeatureNet  # noqa: F401
