"""`latent-dmmd evaluate-autoencoder`: how well an autoencoder gives back images, as a table and as JSON."""

from typing import Literal

from jsonargparse.typing import PositiveInt
from torch.utils.data import Subset

from latent_dmmd.commands import command_parser
from latent_dmmd.data.autoencoder import load_autoencoder
from latent_dmmd.data.pixels import validation_indices
from latent_dmmd.data.sources import OnBadImage
from latent_dmmd.metrics.autoencoders import evaluate_autoencoder
from latent_dmmd.metrics.extractors import Extractor
from latent_dmmd.metrics.sets import load_set
from latent_dmmd.utils.files import check_writable
from latent_dmmd.utils.process import default_device


def main(args: list[str] | None = None) -> None:
    parser = command_parser("evaluate-autoencoder")
    parser.add_argument("autoencoder", help="Folder, hub name or bundled name of an autoencoder, such as elpv-vae.")
    parser.add_argument("data", help="Images: a folder, parquet files, elpv:heldout or a name on the hub.")
    parser.add_argument("--output", type=str | None, help="JSON file of the figures.")
    parser.add_argument(
        "--part",
        type=Literal["all", "validation"],
        default="all",
        help="All images, or the tenth that train-autoencoder leaves out of the data unless --validation is given.",
    )
    parser.add_argument("--resolution", type=PositiveInt, default=256, help="Side of the images in pixels.")
    parser.add_argument("--image_column", type=str, default="image", help="Column of images in tables and hub data.")
    parser.add_argument("--on_bad_image", type=OnBadImage, default="error", help="What to do with unreadable images.")
    parser.add_argument(
        "--extractors",
        type=list[Extractor],
        default=["efficientnet-lite0"],
        help="Networks on whose features the Fréchet distance is measured.",
    )
    parser.add_argument("--inception_weights", type=str | None, help="File of the weights of inception-v3.")
    args = parser.parse_args(args)
    if args.output is not None:
        check_writable(args.output)
    vae = load_autoencoder(args.autoencoder, default_device())
    how = dict(resolution=args.resolution, on_bad_image=args.on_bad_image, image_column=args.image_column)
    images, name = load_set(args.data, **how), args.data
    if images.description:
        print(images.description)
    skipped = images.skipped
    if args.part == "validation":
        images, name = Subset(images, validation_indices(len(images))), f"{name}, the tenth that is not trained on"
    networks = dict(extractors=args.extractors, inception_weights=args.inception_weights)
    names = dict(autoencoder=args.autoencoder, data=name, skipped=skipped)
    scores = evaluate_autoencoder(vae, images, **networks, **names)
    if args.output is not None:
        scores.save(args.output)
    print(scores)
