from latent_dmmd.features import EncoderFeatureNet  # noqa: F401
