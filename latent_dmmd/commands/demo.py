"""`latent-dmmd demo`: a page at a local address to generate and watch the flow, inpaint with a brush, and diagnose."""

import os

from jsonargparse.typing import PositiveInt

from latent_dmmd.commands import command_parser
from latent_dmmd.latent_pipeline import bundled_pipelines

BUNDLED = {name: name for name in bundled_pipelines()}


def main(args: list[str] | None = None) -> None:
    parser = command_parser("demo")
    parser.add_argument("--pipelines", type=dict[str, str], default=BUNDLED, help="Names and folders of pipelines.")
    parser.add_argument(
        "--server_name", type=str, default="127.0.0.1", help="Address; 0.0.0.0 shows it to the network."
    )
    parser.add_argument("--server_port", type=PositiveInt, default=7860, help="Port.")
    args = parser.parse_args(args)
    if not args.pipelines:
        raise ValueError('--pipelines names none; give "{NAME: FOLDER}"')

    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    try:
        from latent_dmmd.apps.demo import THEME, build_demo
    except ImportError as error:
        raise ImportError(f'the page needs Gradio: pip install "latent-dmmd[app]" ({error})') from error
    page = build_demo(args.pipelines)
    page.launch(server_name=args.server_name, server_port=args.server_port, theme=THEME, footer_links=[])
