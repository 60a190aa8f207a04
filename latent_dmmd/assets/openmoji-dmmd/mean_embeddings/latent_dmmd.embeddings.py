from latent_dmmd.embeddings import MeanEmbeddings  # noqa: F401
