import json
import shutil

import pytest
import torch
from conftest import NoDistance

from latent_dmmd.data.autoencoder import BUNDLED_AUTOENCODER, encode_moments, load_autoencoder
from latent_dmmd.training import autoencoder
from latent_dmmd.training.autoencoder import (
    AutoencoderTrainingConfig,
    build_autoencoder,
    random_crops,
    train_autoencoder,
)
from latent_dmmd.utils.errors import ConfigError


@pytest.fixture
def images_uint8(monkeypatch):
    monkeypatch.setattr(autoencoder, "PerceptualDistance", NoDistance)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (4, 3, 48, 48), dtype=torch.uint8, generator=generator)


def config(folder, **options):
    settings = dict(num_steps=4, batch_size=2, crop_size=32, checkpointing_steps=2, mixed_precision="no")
    return AutoencoderTrainingConfig(output_dir=str(folder), **{**settings, **options})


def test_the_bundled_weights_are_of_the_architecture_that_the_script_trains():
    bundled, built = load_autoencoder(BUNDLED_AUTOENCODER), build_autoencoder()
    shapes = [{name: w.shape for name, w in vae.state_dict().items()} for vae in (bundled, built)]
    assert shapes[0] == shapes[1]
    assert encode_moments(bundled, torch.zeros(1, 3, 256, 256))[0].shape == (1, 8, 16, 16)


def test_crops_are_windows_of_the_images_flipped_or_not(images_uint8):
    crops = random_crops(images_uint8, 6, 32, torch.Generator().manual_seed(0))
    again = random_crops(images_uint8, 6, 32, torch.Generator().manual_seed(0))
    assert torch.equal(crops, again) and crops.shape == (6, 3, 32, 32)
    windows = images_uint8.unfold(2, 32, 1).unfold(3, 32, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 32, 32)
    for crop in ((crops + 1) * 127.5).round().to(torch.uint8):
        views = [crop, crop.flip(1), crop.flip(2), crop.flip(1, 2)]
        assert any((windows == view).flatten(1).all(1).any() for view in views)


@pytest.mark.parametrize("adversarial_weight", [0.0, 0.1])
def test_resume_is_exact(images_uint8, tmp_path, adversarial_weight):
    options = dict(adversarial_weight=adversarial_weight, adversarial_start=1)
    whole = train_autoencoder(images_uint8, config(tmp_path / "whole", **options))
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    for name in ("checkpoint-4", "autoencoder"):
        shutil.rmtree(tmp_path / "broken" / name)
    resumed = train_autoencoder(images_uint8, config(tmp_path / "broken", **options))
    weights = [load_autoencoder(str(folder)).state_dict() for folder in (whole, resumed)]
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights)))
    line = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 4 and ("discriminator" in line) == (adversarial_weight > 0)


def test_refuses_what_cannot_be(images_uint8, tmp_path):
    with pytest.raises(ConfigError, match="multiple of 16"):
        config(tmp_path, crop_size=40)
    train_autoencoder(images_uint8, config(tmp_path / "run"))
    with pytest.raises(ConfigError, match="learning_rate 0.5 .was 0.001."):
        train_autoencoder(images_uint8, config(tmp_path / "run", learning_rate=0.5))
