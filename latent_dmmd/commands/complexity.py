"""`latent-dmmd complexity`: complexity.json and complexity.png. Let nothing else run meanwhile."""

from pathlib import Path

import torch
from jsonargparse.typing import PositiveInt

from latent_dmmd.commands import command_parser
from latent_dmmd.experiments.complexity import complexity_report, plot_complexity
from latent_dmmd.utils.files import check_files, write_json
from latent_dmmd.utils.process import default_device


def main(args: list[str] | None = None) -> None:
    parser = command_parser("complexity")
    parser.add_argument("--output_dir", type=str, required=True, help="Where the figure and the JSON file go.")
    parser.add_argument(
        "--batches", type=list[PositiveInt], default=[256, 512, 1024, 2048, 4096], help="Pairs B; linear: 8 B."
    )
    parser.add_argument(
        "--particles", type=list[PositiveInt], default=[512, 1024, 2048, 4096, 8192], help="N_p; linear: 8 N_p."
    )
    parser.add_argument("--resolutions", type=list[PositiveInt], default=[64, 128, 256, 512], help="Sides in pixels.")
    parser.add_argument(
        "--pairs_per_level", type=PositiveInt, default=8, help="Pairs per level where objectives compare."
    )
    parser.add_argument("--repeats", type=PositiveInt, default=5, help="Rounds of each measurement.")
    args = parser.parse_args(args)
    if any(side % 64 for side in args.resolutions):
        raise ValueError(f"--resolutions must be multiples of 64; got {args.resolutions}")
    if min(len(set(args.batches)), len(set(args.particles))) < 2:
        raise ValueError("--batches and --particles need at least 2 different sizes each, to fit an exponent")
    check_files(args.output_dir, "complexity.json", "complexity.png")
    device = default_device()
    sizes = (sorted(sizes) for sizes in (args.batches, args.particles, args.resolutions))
    report = complexity_report(device, *sizes, pairs_per_level=args.pairs_per_level, repeats=args.repeats)
    report["machine"] = {"device": device.type, "threads": torch.get_num_threads(), "torch": torch.__version__}
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / "complexity.json", report)
    plot_complexity(report, output_dir / "complexity.png")
    for name, cost in report["objectives"].items():
        print(f"{name:<28}{cost['seconds']:8.3f} s per step, {cost['over_flow_matching']:.2f} of flow matching")
    for name, cost in report["representations"].items():
        print(f"{name:<28}{1000 * cost['seconds_per_pair']:8.1f} ms per pair and step")
    for part in ("training", "sampling"):
        for name, series in report[part].items():
            print(f"{part}, {name:<28} exponent {series['exponent']:.2f} at sizes up to {series['sizes'][-1]}")
