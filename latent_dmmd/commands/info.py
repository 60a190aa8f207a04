"""`latent-dmmd info`: a few lines on a folder, a file or a bundled name."""

from latent_dmmd.apps.info import describe_folder
from latent_dmmd.commands import command_parser


def main(args: list[str] | None = None) -> None:
    parser = command_parser("info")
    parser.add_argument("folder", help="A run, checkpoint, cache, pipeline, autoencoder, images; or a bundled name.")
    print(describe_folder(parser.parse_args(args).folder))
