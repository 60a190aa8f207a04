"""Features of real images that are saved score as the images do, and what is not of them is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refusal
from torch_fidelity.metric_fid import fid_features_to_statistics

from latent_dmmd import __version__
from latent_dmmd.metrics import reference as references
from latent_dmmd.metrics.evaluation import evaluate
from latent_dmmd.metrics.extractors import EXTRACTORS, FeatureSpace, extract_features, load_extractor
from latent_dmmd.metrics.reference import load_real_set, load_reference
from latent_dmmd.metrics.sets import READING, ScoredImages, save_samples


def random_images(n, seed, size=16):
    return torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def scores_of(evaluation):
    """What must not depend on whether images or their saved features were given."""
    other = ("seconds", "reference_fingerprint")
    return {name: value for name, value in evaluation.as_dict().items() if name not in other}


@pytest.fixture
def saved(toy, tmp_path):
    """A file of features of 30 images, and what they scored when it was made."""
    real = ScoredImages(random_images(30, 1), "real", READING, "PNG", ("bad.png",))
    path = tmp_path / "a" / "real.npz"
    how = dict(extractor=toy, reconstructions=random_images(30, 1) // 2 * 2)
    return path, evaluate(random_images(20, 0) // 2, real, save_reference=str(path), **how)


@pytest.mark.parametrize("pool", [None, random_images(90, 2)])
def test_saved_features_score_exactly_as_the_images(pool, saved, toy):
    path, _ = saved
    generated = ScoredImages(random_images(25, 3), "generated", READING, "PNG")
    how = dict(extractor=toy, floor_images=pool, seed=4)
    real = ScoredImages(random_images(30, 1), "real", READING, "PNG", ("bad.png",))
    expected = evaluate(generated, real, reconstructions=random_images(30, 1) // 2 * 2, **how)
    found = evaluate(generated, load_reference(path), **how)
    assert scores_of(found) == scores_of(expected) and found.reconstruction_distance > 0
    assert expected.reference_fingerprint is None and len(found.reference_fingerprint) == 64


def test_saving_changes_no_score(saved, toy):
    again = evaluate(
        random_images(20, 0) // 2,
        ScoredImages(random_images(30, 1), "real", READING, "PNG", ("bad.png",)),
        extractor=toy,
        reconstructions=random_images(30, 1) // 2 * 2,
    )
    assert scores_of(again) == scores_of(saved[1])


def test_the_file_says_what_the_features_are_of(saved, toy):
    path, _ = saved
    assert [p.name for p in path.parent.iterdir()] == ["real.npz"]
    with np.load(path, allow_pickle=False) as file:
        metadata, arrays = json.loads(str(file["metadata"])), {name: file[name] for name in file.files}
    expected = {"extractor": toy, "num_images": 30, "image_size": [16, 16], "name": "real", "preprocessing": READING}
    expected |= {"file_format": "PNG", "skipped": ["bad.png"], "library_version": __version__}
    assert metadata.items() >= expected.items()
    assert arrays["features"].shape == (30, 8) and arrays["features"].dtype == np.float32
    np.testing.assert_allclose(arrays["mu"], arrays["features"].mean(0), rtol=1e-5)
    np.testing.assert_allclose(arrays["sigma"], np.cov(arrays["features"], rowvar=False))


def test_the_fingerprint_is_of_pixels_in_their_order():
    images = random_images(4, 0)
    found = references.fingerprint(images)
    assert found == references.fingerprint(images.clone())
    assert found != references.fingerprint(images.flip(0)) and found != references.fingerprint(images[:3])
    changed = images.clone()
    changed[3, 0, 0, 0] ^= 1
    assert found != references.fingerprint(changed)


def changed(path, **arrays):
    """The file with some arrays replaced, or left out where they are None."""
    with np.load(path, allow_pickle=False) as file:
        kept = {name: file[name] for name in file.files} | arrays
    np.savez(path, **{name: value for name, value in kept.items() if value is not None})


def changed_metadata(path, **values):
    with np.load(path, allow_pickle=False) as file:
        metadata = json.loads(str(file["metadata"])) | values
    changed(path, metadata=np.array(json.dumps(metadata)))


def test_features_that_do_not_fit_are_refused_in_one_line(saved, toy, monkeypatch):
    path, generated = saved[0], random_images(20, 0)

    def message(generated=generated, **options):
        with pytest.raises(ValueError) as caught:
            evaluate(generated, load_reference(path), **{"extractor": toy, **options})
        assert "\n" not in str(caught.value)
        return str(caught.value)

    monkeypatch.setitem(EXTRACTORS, "other", FeatureSpace("toy", "features", "logits", "fd_other"))
    assert "holds features of toy; pass --extractor toy" in message(extractor="other")
    assert "of images of 16 × 16 pixels, not 8 × 8; pass --resolution" in message(random_images(20, 0, size=8))
    assert "holds features; pass the images to reconstruct" in message(reconstructions=generated)
    assert "holds features; pass the images to reconstruct or save" in message(save_reference="again.npz")
    assert "kid_subset_size=25 exceeds 20" in message(kid_subset_size=25)


def test_a_file_that_is_not_whole_is_refused_in_one_line(saved):
    path, _ = saved
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"text"):
        path.write_bytes(content)
        assert "cannot read" in refusal(load_reference, path)
    for arrays, message in (
        ({"features": None}, "no file of reference features of this version"),
        ({"metadata": np.array("text")}, "no file of reference features of this version"),
        ({"metadata": np.array("[1]")}, "no file of reference features of this version"),
        ({"metadata": np.array([{}])}, "cannot read"),
        ({"features": np.zeros((29, 8), np.float32)}, "is damaged: 30 images, features float32 (29, 8)"),
        ({"features": np.zeros((30, 8))}, "is damaged: 30 images, features float64"),
        ({"features": np.full((30, 8), np.nan, np.float32)}, "are not finite"),
    ):
        path.write_bytes(whole)
        changed(path, **arrays)
        assert message in refusal(load_reference, path)
    for values, message in (
        ({"unheard_of": 1}, "no file of reference features of this version"),
        ({"image_size": 16}, "no file of reference features of this version"),
        ({"preprocessing": "squeezed"}, "were read otherwise (squeezed)"),
    ):
        path.write_bytes(whole)
        changed_metadata(path, **values)
        assert message in refusal(load_reference, path)


# mu and sigma of other programs


@pytest.fixture
def inception(toy, monkeypatch):
    """The toy network in the place of Inception-v3."""
    monkeypatch.setitem(EXTRACTORS, "inception-v3", FeatureSpace("toy", "features", "logits", "fid_inception_v3"))
    monkeypatch.setattr(references, "INCEPTION_FEATURES", 8)
    return "inception-v3"


@pytest.fixture
def foreign(inception, toy, tmp_path):
    """A file of mean and covariance of 30 images, as pytorch-fid writes it, and the images."""
    real = random_images(30, 1)
    features, _ = extract_features(ScoredImages(real), load_extractor(toy))
    np.savez(tmp_path / "fid.npz", **fid_features_to_statistics(features))
    return str(tmp_path / "fid.npz"), real


def test_mu_and_sigma_give_the_fid_alone(foreign, inception):
    path, real = foreign
    generated = random_images(20, 0) // 2
    found = evaluate(generated, load_real_set(path, inception), extractor=inception)
    expected = evaluate(generated, real, extractor=inception)
    assert found.frechet_distance == pytest.approx(expected.frechet_distance, rel=1e-5)
    assert found.inception_style_score_mean == expected.inception_style_score_mean
    for name in ("n_reference", "floor_distance", "n_floor", "kid_mean", "kid_subset_size", "precision", "recall"):
        assert getattr(found, name) is None
    assert "KID" not in str(found) and "n = 20 / unknown" in str(found) and "biased upwards" in str(found)
    written = json.loads(found.to_json())
    assert written["reference"] == path and written["warnings"] == found.remarks()
    (line,) = found.remarks()
    assert line.startswith(f"{path} does not say which images and network")


def test_our_file_serves_as_mu_and_sigma(foreign, inception, tmp_path):
    _, real = foreign
    generated, path = random_images(20, 0) // 2, tmp_path / "ours.npz"
    expected = evaluate(generated, real, extractor=inception, save_reference=str(path))
    changed(path, features=None, metadata=None)
    found = evaluate(generated, load_real_set(str(path), inception), extractor=inception)
    assert found.frechet_distance == pytest.approx(expected.frechet_distance, rel=1e-5)


def test_mu_and_sigma_are_refused_where_they_do_not_fit(foreign, inception, toy):
    path, _ = foreign
    generated = random_images(20, 0)
    with pytest.raises(ValueError, match="for the FID alone; pass --extractor inception-v3, or the images"):
        evaluate(generated, load_real_set(path, toy), extractor=toy)
    with pytest.raises(ValueError, match="leave out --kid_subset_size"):
        evaluate(generated, load_real_set(path, inception), extractor=inception, kid_subset_size=5)
    whole = Path(path).read_bytes()
    for mu, message in (
        (np.zeros(7), "have shapes (7,) and (8, 8); those of the FID have (8,) and (8, 8)"),
        (np.full(8, np.inf), "is not finite"),
        (np.array([{}]), "cannot read"),
        (None, "no mu and sigma, and no arr_0; it has sigma"),
    ):
        Path(path).write_bytes(whole)
        changed(path, mu=mu)
        assert message in refusal(load_reference, path)


def test_a_file_of_guided_diffusion_is_statistics_for_the_fid_and_samples_otherwise(foreign, inception, toy):
    path, real = foreign
    changed(path, arr_0=real.permute(0, 2, 3, 1).numpy())
    assert load_real_set(path, inception).features is None
    samples = load_real_set(path, toy, resolution=16)
    assert torch.equal(torch.stack([samples[i] for i in range(30)]), real)


def test_samples_are_a_reference(toy, tmp_path):
    save_samples(random_images(30, 1), tmp_path / "real.npz")
    found = evaluate(random_images(20, 0), load_real_set(str(tmp_path / "real.npz"), toy, resolution=16), extractor=toy)
    assert (
        found.frechet_distance == evaluate(random_images(20, 0), random_images(30, 1), extractor=toy).frechet_distance
    )
