"""`latent-dmmd evaluate-classes`: classes.json and classes.webp.

A linear classifier on features of real images judges generated ones, and real held-out ones.
"""

import json
from pathlib import Path

import torch
from jsonargparse.typing import PositiveInt

from latent_dmmd.apps.film import decoded
from latent_dmmd.commands import command_parser
from latent_dmmd.data.sources import load_images
from latent_dmmd.metrics.classes import LinearClassifier, class_agreement
from latent_dmmd.metrics.extractors import CheckedImages, extract_features, load_extractor
from latent_dmmd.pipeline import load_pipeline
from latent_dmmd.utils.files import check_files, write_json
from latent_dmmd.utils.images import labelled_grid, save_image


def main(args: list[str] | None = None) -> None:
    parser = command_parser("evaluate-classes")
    parser.add_argument("--pipeline", type=str, required=True, help="Folder of a pipeline with classes.")
    parser.add_argument("--training", type=str, default="elpv:train", help="Real images that the classifier learns.")
    parser.add_argument("--heldout", type=str, default="elpv:heldout", help="Other real images, the yardstick.")
    parser.add_argument("--guidance_scales", type=list[float], default=[1.0, 2.0, 3.0], help="Scales to compare.")
    parser.add_argument("--num_images", type=PositiveInt, default=32, help="Images of each class and scale.")
    parser.add_argument("--num_inference_steps", type=PositiveInt, default=25, help="Evaluations of φ.")
    parser.add_argument("--output_dir", type=str, required=True, help="Where the files go.")
    args = parser.parse_args(args)
    check_files(args.output_dir, "classes.json", "classes.webp")

    pipe, net = load_pipeline(args.pipeline), load_extractor()
    training, heldout = (load_images(name, pipe.resolution) for name in (args.training, args.heldout))
    (names, labels), ours = training.labels(), pipe.config.get("class_names")
    if ours != names:
        raise ValueError(f"{args.pipeline} has classes {ours}, the images {names}")
    held_names, held_labels = heldout.labels()
    if held_names != names:
        raise ValueError(f"{args.heldout} has classes {held_names}, {args.training} {names}")
    classify = LinearClassifier(extract_features(training, net)[0], labels)
    results = {"real": class_agreement(names, held_labels, classify(extract_features(heldout, net)[0]))}
    asked, rows = torch.arange(len(names), device="cpu").repeat_interleave(args.num_images), {}
    sampling = dict(class_labels=asked.tolist(), num_inference_steps=args.num_inference_steps, output_type="latent")
    for scale in args.guidance_scales:
        z = pipe(len(asked), guidance_scale=scale, generator=torch.Generator().manual_seed(0), **sampling).images
        images_uint8 = decoded(pipe, z)
        found = classify(extract_features(CheckedImages(images_uint8, "generated"), net)[0])
        results[f"guidance {scale:g}"] = class_agreement(names, asked, found)
        rows |= {f"{name}, guidance {scale:g}": images_uint8[asked == i][:8] for i, name in enumerate(names)}
    write_json(Path(args.output_dir, "classes.json"), results)
    save_image(labelled_grid(rows, side=128), Path(args.output_dir, "classes.webp"), quality=85)
    print(json.dumps(results, indent=2))
