"""`latent-dmmd train`: a run folder."""

from latent_dmmd.training import train
from latent_dmmd.training.config import Config, parse_config


def main(args: list[str] | None = None) -> None:
    train(parse_config(Config, args))
