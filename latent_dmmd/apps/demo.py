"""A page to play with trained pipelines: generate and watch the flow, inpaint with a brush, diagnose.

Everything comes from this machine, fonts and scripts included. Needs the extra `app` (Gradio).
"""

import queue
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple, get_args

import gradio as gr
import torch
from PIL import Image

from latent_dmmd.apps.film import decoded
from latent_dmmd.data.sources import load_images
from latent_dmmd.editing import editor_of
from latent_dmmd.experiments.diagnosis import Diagnosis, save_diagnosis
from latent_dmmd.pipeline import LatentDMMDPipeline, LatentPipeline, load_pipeline, read_index
from latent_dmmd.schedule import Sampler, SamplingDefaults
from latent_dmmd.utils.images import labelled_grid, to_pil

THEME = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
BUSY = dict(concurrency_id="pipeline", concurrency_limit=1)  # of what runs a pipeline: one at a time
NUM_FRAMES, MAX_IMAGES, MAX_SEED, ANY = 12, 16, 2**31 - 1, "any"


@contextmanager
def shown_errors() -> Iterator[None]:
    """Context whose errors of the user's making are messages on the page."""
    try:
        yield
    except (ImportError, OSError, ValueError, FloatingPointError) as error:
        raise gr.Error(" ".join(str(error).split()), print_exception=False) from error


def seed_of(seed: float | None) -> torch.Generator:
    """A generator of a seed typed into the page. Raises ValueError if it is none."""
    if seed is None or seed != int(seed) or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"the seed must be a whole number from 0 to {MAX_SEED}")
    return torch.Generator().manual_seed(int(seed))


def steps_of(run: Callable[[Callable], object]) -> Iterator[object]:
    """What `run(report)` reports while it runs in a thread, and at last what it returns, or raises.

    If nobody listens any more, as when a page is closed, `run` ends at its next report.
    """
    reports, closed = queue.Queue(), threading.Event()

    def report(value: object) -> None:
        if closed.is_set():
            raise InterruptedError("nobody listens")
        reports.put(("report", value))

    def work() -> None:
        try:
            reports.put(("result", run(report)))
        except Exception as error:
            reports.put(("error", error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    kind = "report"
    try:
        while kind == "report":
            kind, value = reports.get()
            if kind == "error":
                raise value
            yield value
    finally:
        closed.set()
        thread.join()  # the next call must not share the pipeline


class Controls(NamedTuple):
    """What stands above the tabs and holds for all of them."""

    name: gr.Dropdown
    seed: gr.Number
    num_levels: gr.Slider
    steps_per_level: gr.Slider


class Actions:
    """What the buttons do.

    Args:
        folders: Names and folders of saved pipelines; each is loaded when it is first used.

    Raises:
        ValueError: If there is no pipeline in a folder.
    """

    def __init__(self, folders: dict[str, str]) -> None:
        self.class_names = {name: read_index(folder).get("class_names") or [] for name, folder in folders.items()}
        self.loaded = cache(lambda name: load_pipeline(folders[name]))
        self.files = tempfile.TemporaryDirectory(prefix="latent_dmmd-")  # gone with the page

    def pipeline(self, name: str) -> LatentPipeline:
        """A pipeline by its name."""
        pipe = self.loaded(name)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def new_folder(self) -> Path:
        """An empty folder for files that a button shows or offers."""
        return Path(tempfile.mkdtemp(dir=self.files.name))

    def packed(self, images: list[Image.Image]) -> str:
        """The path of a zip file of images as PNG."""
        path = self.new_folder() / "images.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for i, image in enumerate(images):
                with archive.open(f"{i:05d}.png", "w") as file:
                    image.save(file, "PNG")
        return str(path)

    def classes(self, name: str) -> gr.Dropdown:
        """The choice among a pipeline's classes."""
        return gr.Dropdown([ANY, *self.class_names[name]], value=ANY)

    def generate(
        self,
        name,
        seed,
        count,
        sampler,
        label,
        guidance,
        num_levels,
        steps_per_level,
        progress=gr.Progress(),  # noqa: B008
    ):
        """Particles on their way, then the images and a file of them."""
        with shown_errors():
            pipe, generator, nfe = self.pipeline(name), seed_of(seed), int(num_levels * steps_per_level)
            every, count = max(1, nfe // NUM_FRAMES), int(count)
            if pipe.one_step:
                nfe = 1
            sampling = {"num_inference_steps": nfe}
            if isinstance(pipe, LatentDMMDPipeline):
                sampling = dict(sampler=sampler, num_noise_levels=int(num_levels), steps_per_level=int(steps_per_level))
            if label != ANY:
                sampling |= dict(class_labels=label, guidance_scale=guidance)

            def run(report: Callable) -> torch.Tensor:
                def after_step(pipe: LatentPipeline, i: int, t: float, tensors: dict) -> None:
                    shown = (i + 1) % every == 0 and i + 1 < nfe  # the end is decoded below
                    report((i + 1, t, decoded(pipe, tensors["latents"]) if shown else None))

                z = pipe(count, generator=generator, output_type="latent", callback_on_step_end=after_step, **sampling)
                return decoded(pipe, z.images)

            for value in steps_of(run):
                if isinstance(value, torch.Tensor):
                    images = [to_pil(image) for image in value]
                    yield labelled_grid({"the end": value}, columns=min(4, count)), images, self.packed(images)
                    return
                step, t, images_uint8 = value
                progress((step, nfe), desc="flow")
                if images_uint8 is not None:
                    caption = f"step {step} of {nfe}, t = {t:.2f}"
                    yield labelled_grid({caption: images_uint8}, columns=min(4, count)), None, None

    def inpaint(self, name, seed, drawing, num_variations, num_steps, strength, progress=gr.Progress()):  # noqa: B008
        """Images in which what was painted over is replaced, and a file of them."""
        with shown_errors():
            image, mask = image_and_mask(drawing)
            pipe, generator = self.pipeline(name), seed_of(seed)
            editor = editor_of(pipe, "inpaint")
            editor.set_progress_bar_config(disable=True)

            def run(report: Callable) -> list[Image.Image]:
                return editor(
                    image,
                    mask,
                    strength=strength,
                    num_inference_steps=int(num_steps),
                    num_variations=int(num_variations),
                    generator=generator,
                    callback_on_step_end=lambda pipe, i, t, tensors: report(i + 1),
                ).images

            for value in steps_of(run):
                if isinstance(value, list):
                    return value, self.packed(value)
                progress((value, int(num_steps)), desc="flow")

    def diagnose(self, name, seed, data, num_particles, num_levels, steps_per_level):
        """The plot of both flows against the forward process."""
        with shown_errors():
            pipe, seed = self.pipeline(name), seed_of(seed).initial_seed()
            source = load_images(data, resolution=pipe.resolution)
            diagnosis = Diagnosis(pipe, pipe.encode(source.examples(2 * int(num_particles), seed)), seed)
            counts = (int(num_levels), int(steps_per_level))
            flows = {sampler: diagnosis.run(sampler, *counts) for sampler in ("exact", "approximate")}
            folder = self.new_folder()
            save_diagnosis(flows, {"data": data, "seed": seed}, folder)
            return str(folder / "diagnosis.png")


def image_and_mask(drawing: dict | None) -> tuple[Image.Image, Image.Image]:
    """What an image editor holds: an image, and 255 where it was painted over. Raises ValueError if one is missing."""
    if not drawing or drawing["background"] is None:
        raise ValueError("load an image first")
    layers = [layer.getchannel("A") for layer in drawing["layers"] if layer is not None]
    mask = layers[0].point(lambda alpha: 255 if alpha > 0 else 0) if layers else None
    if mask is None or mask.getbbox() is None:
        raise ValueError("first paint over what is to be replaced")
    return drawing["background"].convert("RGB"), mask


def take_image(gallery: list | None) -> Image.Image:
    """The first image of a gallery."""
    with shown_errors():
        if not gallery:
            raise ValueError("generate images first")
        return gallery[0][0]


def build_demo(folders: dict[str, str]) -> gr.Blocks:
    """The page.

    Args:
        folders: Names and folders of saved pipelines; each is loaded when it is first used.

    Returns:
        The page, to be launched with `THEME`.

    Raises:
        ValueError: If there is no pipeline in a folder.
    """
    actions = Actions(folders)
    with gr.Blocks(title="latent_dmmd", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown("# latent_dmmd\nNoise flows down the gradient of a learned discrepancy until it is an image.")
        with gr.Row():
            controls = Controls(
                name=gr.Dropdown(list(folders), value=next(iter(folders)), label="Pipeline"),
                seed=gr.Number(0, precision=0, label="Seed"),
                num_levels=gr.Slider(1, 25, 25, step=1, label="Noise levels"),
                steps_per_level=gr.Slider(1, 8, 1, step=1, label="Steps per level"),
            )
        with gr.Tab("Generate"):
            gallery = generate_tab(page, actions, controls)
        with gr.Tab("Inpaint"):
            inpaint_tab(actions, controls, gallery)
        with gr.Tab("Diagnose"):
            diagnose_tab(actions, controls)
    return page


def generate_tab(page: gr.Blocks, actions: Actions, controls: Controls) -> gr.Gallery:
    """Fill the tab that generates. Returns where its images are shown."""
    name, seed, num_levels, steps_per_level = controls
    with gr.Row():
        num_images = gr.Slider(1, MAX_IMAGES, 4, step=1, label="Images")
        sampler = gr.Dropdown(list(get_args(Sampler)), value=SamplingDefaults().sampler, label="Sampler (DMMD)")
        label = gr.Dropdown([ANY], value=ANY, label="Class")
        guidance = gr.Slider(1.0, 5.0, 1.0, step=0.5, label="Guidance (approximate sampler)")
    start = gr.Button("Generate", variant="primary", elem_id="generate")
    flow = gr.Image(label="Flow", interactive=False, buttons=["download"], elem_id="flow")
    gallery = gr.Gallery(label="Images", columns=4, interactive=False, elem_id="images")
    files = gr.DownloadButton("Download the images", elem_id="download")
    name.change(actions.classes, name, label)
    page.load(actions.classes, name, label)
    inputs = [name, seed, num_images, sampler, label, guidance, num_levels, steps_per_level]
    start.click(actions.generate, inputs, [flow, gallery, files], **BUSY)
    return gallery


def inpaint_tab(actions: Actions, controls: Controls, gallery: gr.Gallery) -> None:
    """Fill the tab that inpaints, where a generated image can be taken from a gallery."""
    brush = gr.Brush(colors=["#ff0000"], color_mode="fixed", default_size=40)
    canvas = dict(layers=False, brush=brush, canvas_size=(512, 512), transforms=(), sources=("upload",))
    drawing = gr.ImageEditor(type="pil", label="Paint over what is to be replaced", elem_id="drawing", **canvas)
    take = gr.Button("Take a generated image", elem_id="take")
    with gr.Row():
        num_variations = gr.Slider(1, MAX_IMAGES, 2, step=1, label="Images")
        num_steps = gr.Slider(1, 25, 10, step=1, label="Steps")
        strength = gr.Slider(0.1, 1.0, 1.0, step=0.05, label="Strength")
    change = gr.Button("Inpaint", variant="primary", elem_id="inpaint")
    edited = gr.Gallery(label="Images", columns=4, interactive=False, elem_id="edited")
    files = gr.DownloadButton("Download the images")
    inputs = [controls.name, controls.seed, drawing, num_variations, num_steps, strength]
    change.click(actions.inpaint, inputs, [edited, files], **BUSY)
    take.click(take_image, gallery, drawing)


def diagnose_tab(actions: Actions, controls: Controls) -> None:
    """Fill the tab that diagnoses."""
    name, seed, num_levels, steps_per_level = controls
    data = gr.Textbox("elpv:train", label="Images it was trained on: a folder, elpv:train")
    num_particles = gr.Slider(4, 64, 16, step=1, label="Particles")
    look = gr.Button("Diagnose", variant="primary", elem_id="diagnose")
    plot = gr.Image(label="Particles against the forward process", interactive=False, elem_id="plot")
    look.click(actions.diagnose, [name, seed, data, num_particles, num_levels, steps_per_level], plot, **BUSY)
