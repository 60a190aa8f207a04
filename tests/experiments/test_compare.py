import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from latent_dmmd.baselines import GaussianFit
from latent_dmmd.experiments import stages
from latent_dmmd.experiments.compare import CompareConfig, Comparison
from latent_dmmd.experiments.report import write_report
from latent_dmmd.experiments.stages import generate_sets, measure_costs, real_features, run_comparison
from latent_dmmd.experiments.summary import mean_of, ratios, summarise
from latent_dmmd.metrics.scores import memorised_share
from latent_dmmd.utils.errors import ConfigError


@pytest.fixture
def settings(tiny_vae, tiny_images, tmp_path, monkeypatch, toy):
    monkeypatch.setattr(stages, "in_a_process", lambda function, *args: function(*args))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny_vae.save_pretrained(tmp_path / "vae")
    heldout = tmp_path / "heldout"
    heldout.mkdir()
    for path in sorted(tiny_images.iterdir())[::2]:
        Image.open(path).transpose(Image.Transpose.ROTATE_90).save(heldout / path.name)
    common = {
        "data": {"name_or_path": str(tiny_images), "resolution": 32},
        "autoencoder": {"name_or_path": str(tmp_path / "vae")},
        "feature_net": {
            "num_features": 8,
            "patch_size": 2,
            "block_out_channels": [8],
            "layers_per_block": 1,
            "attention_levels": [True],
        },
        "objective": {"num_noise_levels": 4, "segment": "level"},
        "training": {"levels_per_step": 2, "pairs_per_level": 4, "log_every": 1},
        "sampling": {"num_images": 2, "num_noise_levels": 2, "steps_per_level": 1},
    }
    pixel = {"autoencoder": {"name_or_path": None}, "feature_net": {"patch_size": 8, "squared_norm": True}}
    return dict(
        output_dir=str(tmp_path / "comparison"),
        common=common,
        entries={
            "latent-dmmd": {},
            "latent-flow-matching": {"objective": {"name": "flow-matching"}},
            "latent-mmd-gan": {"objective": {"name": "mmd-gan"}},
            "pixel-dmmd": pixel,
        },
        few=["pixel-dmmd"],
        few_nfe=[10, 100],
        nfe=[10, 100],
        one_seed_from=100,
        seeds=[0, 1],
        extractor=toy,
        num_images=6,
        num_steps=2,
        reference=str(heldout),
    )


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def test_a_tiny_report_end_to_end(settings):
    comparison = Comparison(CompareConfig(**settings))
    page = write_report(comparison, run_comparison(comparison), "python scripts/compare.py '<script>'")
    result = json.loads((page.parent / "results.json").read_text())

    rows = {(row["label"], row["nfe"]): row for row in result["rows"]}
    dmmd = {(f"latent-dmmd {sampler}", nfe) for sampler in ("exact", "approximate") for nfe in (10, 100)}
    pixel = {("pixel-dmmd exact", nfe) for nfe in (10, 100)}
    baseline = {("latent-flow-matching", nfe) for nfe in (10, 30, 100)}
    assert set(rows) == dmmd | pixel | baseline | {("latent-mmd-gan", 1), ("gaussian", 0)}
    assert len(rows["latent-flow-matching", 10]["frechet_distance"]) == 2  # seeds
    assert len(rows["latent-flow-matching", 100]["frechet_distance"]) == 1
    assert rows["latent-dmmd exact", 10]["frechet_distance"][0] != rows["latent-dmmd exact", 10]["frechet_distance"][1]
    assert result["entries"]["latent-dmmd"]["num_steps"] == 2
    seconds = result["entries"]["latent-dmmd"]["seconds_per_step"]
    assert result["entries"]["latent-dmmd"]["training_minutes"] == pytest.approx(2 * seconds / 60)
    assert len(result["ratios"]) == 11
    assert set(result["speed"]) == {row["label"] for row in result["rows"]} - {"gaussian"} | {"decode"}
    seconds = {label: cost["seconds"] for label, cost in result["speed"].items()}
    for label, nfe in (("latent-flow-matching", 30), ("pixel-dmmd exact", 100), ("gaussian", 0)):
        decoding = 0 if label == "pixel-dmmd exact" else seconds["decode"]
        expected = nfe * seconds.get(label, 0) + decoding
        assert rows[label, nfe]["seconds_per_image"] == pytest.approx(expected)

    text = page.read_text()
    assert "&lt;script&gt;" in text and "<script" not in text  # escaped
    assert '="http' not in text and text.count("data:image/") == len(list(page.parent.glob("*.png"))) + 14
    for path in page.parent.glob("*.png"):
        assert Image.open(path).width > 400

    # the same command does nothing again; more steps go on and leave nothing stale
    before = stamps(comparison.folder)
    again = Comparison(CompareConfig(**settings))
    run_comparison(again)
    assert stamps(comparison.folder) == before
    (comparison.folder / "samples" / "latent-mmd-gan" / "2-steps" / "nfe-1-seed-0.safetensors").unlink()
    run_comparison(again)
    changed = {path.name for path, stamp in stamps(comparison.folder).items() if before[path] != stamp}
    assert changed == {"nfe-1-seed-0.safetensors"}
    larger = Comparison(CompareConfig(**{**settings, "num_images": 7}))
    files = generate_sets(larger, measure_costs(larger))
    assert len(load_file(files["gaussian"][0, 0])["features"]) == 7
    longer = Comparison(CompareConfig(**{**settings, "num_steps": 3}))
    result = run_comparison(longer)
    assert result["entries"]["pixel-dmmd"]["num_steps"] == 3
    assert (comparison.folder / "samples" / "latent-dmmd-exact" / "3-steps" / "nfe-10-seed-0.safetensors").exists()


def test_some_of_the_entries(settings):
    config = CompareConfig(**{**settings, "include": ["latent-flow-matching", "latent-dmmd"]})
    assert list(config.entries) == ["latent-dmmd", "latent-flow-matching"] and config.few == []


def test_trained_entries_are_loaded(settings, tmp_path):
    settings |= {"nfe": [10], "seeds": [0]}
    first = Comparison(CompareConfig(**{**settings, "include": ["latent-dmmd", "latent-flow-matching"]}))
    expected = run_comparison(first)
    shutil.copytree(first.pipeline_folder("latent-dmmd"), tmp_path / "released")
    changed = {
        "include": ["latent-dmmd", "latent-flow-matching", "latent-mmd-gan"],
        "trained": {"latent-dmmd": str(tmp_path / "released"), "pixel-dmmd": "not included"},
        "output_dir": str(tmp_path / "second"),
    }
    second = Comparison(CompareConfig(**{**settings, **changed}))
    result = run_comparison(second)
    assert sorted(path.name for path in (second.folder / "runs").iterdir()) == [
        "latent-flow-matching",
        "latent-mmd-gan",
    ]
    assert list(result["entries"]) == ["latent-flow-matching", "latent-mmd-gan"]
    for label in ("latent-dmmd exact", "latent-dmmd approximate"):
        assert mean_of(result, label, 10) == pytest.approx(mean_of(expected, label, 10))
    text = write_report(second, result, "").read_text()
    assert f"but for those loaded: latent-dmmd ({tmp_path / 'released'})" in text

    # another pipeline in its place is sampled anew
    shutil.copytree(tmp_path / "released", tmp_path / "other")
    before = stamps(second.folder / "samples")
    changed["trained"] = {"latent-dmmd": str(tmp_path / "other")}
    third = Comparison(CompareConfig(**{**settings, **changed}))
    generate_sets(third, measure_costs(third))
    again = {
        path.parent.parent.name for path, stamp in stamps(second.folder / "samples").items() if before[path] != stamp
    }
    assert again == {"latent-dmmd-exact", "latent-dmmd-approximate"}


def test_minutes_become_steps(settings):
    comparison = Comparison(CompareConfig(**{**settings, "num_steps": None, "minutes": 1.5}))
    costs = {name: {"seconds": 0.5 * (i + 1), "num_parameters": 1} for i, name in enumerate(settings["entries"])}
    assert list(comparison.num_steps(costs).values()) == [180, 90, 60, 45]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_steps": None}, "either minutes or num_steps"),
        ({"minutes": 3.0}, "either minutes or num_steps"),
        ({"entries": {}}, "at least one"),
        ({"entries": {"../x": {}}}, "letters, digits"),
        ({"few": ["other"]}, "other not among entries"),
        ({"baseline": "other"}, "other not among entries"),
        ({"dmmd": "pixel-dmmd"}, "on pixels"),
        ({"entries": {"latent-dmmd": {"training": {"num_step": 3}}, "latent-flow-matching": {}}}, "did you mean"),
        ({"num_images": 3}, "at least 4"),
        ({"include": ["latent-dmmd", "other"]}, "other not among entries"),
        ({"include": ["latent-dmmd", "pixel-dmmd"]}, "latent-flow-matching not among entries"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(settings, change, message):
    changed = {**settings, **change}
    if "entries" in change:
        changed["few"] = []
    with pytest.raises(ConfigError, match=message) as error:
        Comparison(CompareConfig(**changed))
    assert "\n" not in str(error.value)
    assert not shutil.os.path.exists(settings["output_dir"])


def test_a_folder_without_a_pipeline_is_one_line(settings, tmp_path):
    with pytest.raises(ValueError, match="no pipeline in .*nowhere; give the folder"):
        Comparison(CompareConfig(**{**settings, "trained": {"latent-dmmd": str(tmp_path / "nowhere")}}))
    with pytest.raises(ConfigError, match="other not among entries"):
        CompareConfig(**{**settings, "trained": {"other": str(tmp_path)}})
    assert not shutil.os.path.exists(settings["output_dir"])


def test_ratios_are_above_the_reconstruction():
    rows = [
        {"label": "a exact", "nfe": 100, "frechet_distance": [50.0, 70.0], "memorised_share": [0.0, 0.02]},
        {"label": "b", "nfe": 100, "frechet_distance": [40.0, 40.0], "memorised_share": [0.0, 0.0]},
        {"label": "p exact", "nfe": 100, "frechet_distance": [180.0], "memorised_share": [0.0]},
    ]
    speed = {"a exact": {"seconds": 3.3}, "a approximate": {"seconds": 2.9}, "b": {"seconds": 1.0}}
    settings = {"dmmd": "a", "baseline": "b", "pixel": "p"}
    result = {"settings": settings, "reconstruction_distance": 20.0, "rows": rows, "speed": speed}
    found = ratios(result)
    assert found == {
        "a exact ÷ b, distance above the reconstruction's, 100 NFE": 2.0,
        "p exact ÷ a exact, distance, 100 NFE": 3.0,
        "a exact, 100 NFE ÷ reconstruction, distance": 3.0,
        "a exact ÷ b, time of one NFE per image": 3.3,
        "a approximate ÷ b, time of one NFE per image": 2.9,
        "a exact, 100 NFE, share of memorised images": 0.01,
    }
    del speed["a approximate"]  # among the few, which are sampled by exact witnesses alone
    assert list(ratios(result)) == [text for text in found if "approximate" not in text]


def test_the_summary_trains_and_generates_nothing(settings, monkeypatch):
    """It is a function of what the stages left."""
    settings |= {"nfe": [10], "seeds": [0], "include": ["latent-dmmd", "latent-flow-matching"]}
    comparison = Comparison(CompareConfig(**settings))
    result = run_comparison(comparison)
    costs, real = measure_costs(comparison), real_features(comparison)
    files = comparison.set_files(comparison.num_steps(costs))
    for name in ("make_set", "in_a_process", "load_extractor", "load_pipeline"):
        monkeypatch.setattr(stages, name, None)
    again = summarise(comparison, costs, stages.score_sets(files, real), real, stages.measure_speed(comparison))
    assert again == result


def test_memorised_share():
    training, heldout = torch.zeros(1, 2), torch.tensor([[float(r), 0.0] for r in range(1, 102)])
    generated = torch.tensor([[0.5, 0.0], [1.9, 0.0], [2.1, 0.0], [50.0, 0.0]])
    assert memorised_share(generated, training, heldout) == 0.5  # the first percentile is at 2


def test_gaussian_fit():
    generator = torch.Generator().manual_seed(0)
    factor = torch.tensor([[1.0, 0.5], [0.0, 0.8]], dtype=torch.float64)
    particles = (3 + torch.randn(4000, 2, dtype=torch.float64, generator=generator) @ factor).float()
    draws = GaussianFit(particles.view(-1, 1, 1, 2)).draw(20000, generator).flatten(1)
    torch.testing.assert_close(draws.mean(0), particles.mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(draws.T.cov(), particles.T.cov(), atol=0.05, rtol=0)
