import json
import shutil

import pytest
import torch
from conftest import frozen, save_tiny_images
from PIL import Image
from safetensors.torch import load_file

from latent_dmmd.baselines import GaussianFit
from latent_dmmd.data.autoencoder import BUNDLED_AUTOENCODERS
from latent_dmmd.experiments import exports, scoring, stages, workers
from latent_dmmd.experiments.compare import CompareConfig, Comparison
from latent_dmmd.experiments.exports import scored_as
from latent_dmmd.experiments.report import write_report
from latent_dmmd.experiments.scoring import Scorer, batch_sizes, context_of, score_generated, seen_by
from latent_dmmd.experiments.stages import measure_costs, run_comparison
from latent_dmmd.experiments.summary import score_of, summarise
from latent_dmmd.latent_pipeline import bundled_pipelines
from latent_dmmd.methods.flow_matching import FlowMatchingConfig
from latent_dmmd.methods.witness_matching import WitnessMatchingConfig
from latent_dmmd.metrics.extractors import EXTRACTORS, FeatureSpace
from latent_dmmd.metrics.scores import density_and_coverage, frechet_distance, memorised_share
from latent_dmmd.pipeline import load_pipeline
from latent_dmmd.training import loop
from latent_dmmd.training.config import parse_config
from latent_dmmd.utils.benchmark import Cost
from latent_dmmd.utils.errors import ConfigError

PIXELS = {"autoencoder": {"name_or_path": None}, "feature_net": {"patch_size": 8, "squared_norm": True}}
ENTRIES = {
    "one-step": {"objective": {"name": "one-step", "teacher": "latent-dmmd", "teacher_steps": 2, "num_pairs": 8}},
    "latent-dmmd": {},
    "latent-flow-matching": {"objective": {"name": "flow-matching"}},
    "pixel-dmmd": PIXELS,
    "pixel-flow-matching": {**PIXELS, "objective": {"name": "flow-matching"}},
}


def tiny_settings(folder):
    """A comparison on tiny images that takes seconds."""
    frozen("AutoencoderKL").save_pretrained(folder / "vae")
    images, heldout = save_tiny_images(folder / "images"), folder / "heldout"
    heldout.mkdir()
    for path in sorted(images.iterdir())[::2]:
        Image.open(path).transpose(Image.Transpose.ROTATE_90).save(heldout / path.name)
    common = {
        "data": {"name_or_path": str(images), "resolution": 32, "cache_dir": str(folder / "cache")},
        "autoencoder": {"name_or_path": str(folder / "vae")},
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
    return dict(
        output_dir=str(folder / "comparison"),
        common=common,
        entries=ENTRIES,
        training_seeds={"latent-dmmd": [0, 1], "latent-flow-matching": [3, 4]},
        few=["pixel-dmmd"],
        few_nfe=[10],
        nfe=[2, 10],
        one_seed_from=10,
        seeds=[0, 1],
        extractor="toy",
        second_extractor="toy-2",
        num_images=6,
        batch_size=4,
        num_steps=2,
        milestones=[0.5],
        milestone_nfe=2,
        reference=str(heldout),
    )


def measured_once(tasks, device, repeats):
    """Costs of tasks that run once."""
    for task in tasks.values():
        task()
    return {name: Cost(0.001 * (i + 1), None) for i, name in enumerate(tasks)}


@pytest.fixture(scope="module")
def tools():
    """Toy extractors, and processes that are none, for all tests of this file."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("toy", "toy-2"):
            patch.setitem(EXTRACTORS, name, FeatureSpace("toy", "features", "logits", f"fd_{name}"))
        patch.setattr(stages, "in_a_process", lambda function, *args: function(*args))
        patch.setattr(workers, "measure", measured_once)
        patch.setattr(loop, "plot_losses", lambda *args: None)
        yield patch


@pytest.fixture(scope="module")
def finished_once(tools, tmp_path_factory):
    """A finished comparison: its settings, its result and its page."""
    folder = tmp_path_factory.mktemp("finished")
    settings = tiny_settings(folder)
    comparison = Comparison(CompareConfig(**settings))
    result = run_comparison(comparison)
    return settings, result, write_report(comparison, result, "latent-dmmd compare '<script>'")


@pytest.fixture
def settings(tools, tmp_path):
    return tiny_settings(tmp_path)


@pytest.fixture
def elsewhere(finished_once, tmp_path):
    """Settings of the finished comparison on a machine that has its export folder alone."""
    settings, _, page = finished_once
    shutil.copytree(page.parents[1] / "finished", tmp_path / "exports")
    return {**settings, "output_dir": str(tmp_path / "there"), "export_dir": str(tmp_path / "exports")}


@pytest.fixture
def no_work(monkeypatch):
    """Training, sampling, scoring and measuring fail."""

    def fail(*args, **options):
        raise AssertionError("nothing is to be done again")

    for name in ("in_a_process", "load_pipeline", "train_and_measure"):
        monkeypatch.setattr(stages, name, fail)
    monkeypatch.setattr(Scorer, "make_set", fail)
    monkeypatch.setattr(Scorer, "score_set", fail)


def plain(result):
    """A result as JSON has it."""
    return json.loads(json.dumps(result))


def test_rows_are_means_over_sampling_seeds_for_each_training_seed(finished_once):
    settings, result, page = finished_once
    assert json.loads((page.parent / "results.json").read_text())["rows"] == plain(result["rows"])
    rows = {(row["label"], row["nfe"]): row for row in result["rows"]}
    dmmd = {(f"latent-dmmd {sampler}", nfe) for sampler in ("exact", "approximate") for nfe in (2, 10)}
    flow = {("latent-flow-matching", nfe) for nfe in (2, 6, 10, 30)} | {("pixel-flow-matching", nfe) for nfe in (2, 10)}
    assert set(rows) == dmmd | flow | {("pixel-dmmd exact", 10), ("one-step", 1), ("gaussian", 0)}

    values = rows["latent-dmmd exact", 2]["frechet_distance"]
    assert len(values) == 2 and values[0] != values[1]
    for seed, value in enumerate(values):
        scores = json.loads((page.parents[1] / f"finished/latent-dmmd-seed-{seed}/scores.json").read_text())
        of_seed = [s["scores"] for s in scores["sets"] if (s["label"], s["nfe"]) == ("latent-dmmd exact", 2)]
        assert len(of_seed) == 2 and of_seed[0] != of_seed[1]
        assert value == pytest.approx(sum(s["frechet_distance"] for s in of_seed) / 2)
    assert len(rows["pixel-flow-matching", 2]["frechet_distance"]) == 1
    assert score_of(result, "pixel-flow-matching", 2).error is None
    assert score_of(result, "latent-dmmd exact", 2).error > 0
    row = rows["latent-dmmd exact", 2]
    assert row["second"]["recall"] == row["recall"]  # of the same network


def test_seconds_and_training_minutes(finished_once):
    _, result, _ = finished_once
    entry = result["entries"]["latent-dmmd"]
    assert entry["num_steps"] == 2 and entry["training_minutes"] == pytest.approx(2 * entry["seconds_per_step"] / 60)
    assert set(result["speed"]) == {row["label"] for row in result["rows"]} - {"gaussian"} | {"decode"}
    seconds = {label: cost["seconds"] for label, cost in result["speed"].items()}
    rows = {(row["label"], row["nfe"]): row for row in result["rows"]}
    for label, nfe in (("latent-flow-matching", 30), ("pixel-dmmd exact", 10), ("gaussian", 0), ("one-step", 1)):
        decoding = 0 if label == "pixel-dmmd exact" else seconds["decode"]
        assert rows[label, nfe]["seconds_per_image"] == pytest.approx(nfe * seconds.get(label, 0) + decoding)


def test_milestones_make_curves(finished_once):
    _, result, _ = finished_once
    points = [point for point in result["curves"] if point["label"] == "latent-dmmd exact"]
    minutes = result["entries"]["latent-dmmd"]["training_minutes"]
    assert [point["minutes"] for point in points] == pytest.approx([minutes / 2, minutes])
    assert [len(point["frechet_distance"]) for point in points] == [1, 2]  # the first run alone stops at milestones
    assert {point["nfe"] for point in points} == {2}
    assert points[0]["frechet_distance"] != points[1]["frechet_distance"]


def test_the_same_command_does_nothing_again(finished_once, no_work, tmp_path):
    settings, result, _ = finished_once
    assert plain(run_comparison(Comparison(CompareConfig(**settings)))) == plain(result)


def test_another_machine_goes_on_from_the_exports(elsewhere, finished_once, no_work):
    result = run_comparison(Comparison(CompareConfig(**elsewhere)))
    assert plain(result) == plain(finished_once[1])


def test_the_page_is_rebuilt_without_training(elsewhere, finished_once, no_work):
    _, result, page = finished_once
    for budget in ({}, {"num_steps": None}):  # a budget is not needed
        comparison = Comparison(CompareConfig(**{**elsewhere, "rebuild": True, **budget}))
        rebuilt = run_comparison(comparison)
        assert plain(rebuilt["rows"]) == plain(result["rows"])
    comparison = Comparison(CompareConfig(**{**elsewhere, "rebuild": True}))
    again = write_report(comparison, run_comparison(comparison), "latent-dmmd compare '<script>'")
    assert again.read_text() == page.read_text()


def cut_scores(folder):
    text = (folder / "scores.json").read_text()
    (folder / "scores.json").write_text(text[: len(text) // 2])


def cut_weights(folder):
    path = next(folder.rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-8])


DAMAGES = {
    "no scores": lambda folder: (folder / "scores.json").unlink(),
    "half of the scores": cut_scores,
    "scores that are no scores": lambda folder: (folder / "scores.json").write_text("[]"),
    "no weights": lambda folder: next(folder.rglob("*.safetensors")).unlink(),
    "half of the weights": cut_weights,
    "no image": lambda folder: next(folder.glob("*.webp")).unlink(),
    "no configuration": lambda folder: (folder / "config.yaml").unlink(),
    "no folder": shutil.rmtree,
    "written aside only": lambda folder: folder.rename(folder.with_name(f".{folder.name}.7.partial")),
    "no autoencoder": lambda folder: shutil.rmtree(folder.parent / "autoencoders"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_what_is_half_written_is_passed_over(damage, elsewhere, no_work, capsys):
    damage(Comparison(CompareConfig(**elsewhere)).export_dir / "latent-flow-matching-seed-3")
    result = run_comparison(Comparison(CompareConfig(**{**elsewhere, "rebuild": True})))
    assert "latent-flow-matching-seed-3: not finished, left out" in capsys.readouterr().out
    row = next((row for row in result["rows"] if row["label"] == "latent-flow-matching"), None)
    assert row is None or len(row["frechet_distance"]) == 1


def test_a_scored_run_needs_its_pipeline_only_for_other_sets(elsewhere, finished_once, no_work):
    for folder in Comparison(CompareConfig(**elsewhere)).export_dir.glob("*/pipeline"):
        shutil.rmtree(folder)
    assert plain(run_comparison(Comparison(CompareConfig(**elsewhere)))) == plain(finished_once[1])
    with pytest.raises(ConfigError, match="latent-dmmd-seed-0 holds scores but no pipeline, .*; remove it to train"):
        run_comparison(Comparison(CompareConfig(**{**elsewhere, "num_images": 8})))


def test_a_teacher_that_is_not_finished_is_one_line(elsewhere):
    for name in ("latent-dmmd-seed-0", "one-step"):
        shutil.rmtree(Comparison(CompareConfig(**elsewhere)).export_dir / name)
    with pytest.raises(ConfigError, match="^latent-dmmd-seed-0 is needed and not finished; finish it first$"):
        run_comparison(Comparison(CompareConfig(**{**elsewhere, "only": ["one-step"]})))


def test_an_entry_whose_teacher_is_bundled_is_measured_by_flow_matching():
    """Its own steps would need the pairs of the teacher's flow first."""
    comparison = Comparison(parse_config(CompareConfig, ["--config", "compare_openmoji256", "--minutes", "20"]))
    assert comparison.entries["latent-one-step"].objective.teacher in bundled_pipelines()
    assert isinstance(stages.cost_config(comparison, "latent-one-step").objective, FlowMatchingConfig)
    assert isinstance(stages.cost_config(comparison, "latent-dmmd").objective, WitnessMatchingConfig)


def test_speed_is_measured_without_a_trained_pipeline(elsewhere, finished_once):
    comparison = Comparison(CompareConfig(**elsewhere))
    for path in (*comparison.export_dir.glob("*/pipeline"), comparison.export_dir / "speed.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert stages.measure_speed(comparison).keys() == finished_once[1]["speed"].keys()


def test_processes_share_the_runs(elsewhere, finished_once, monkeypatch):
    """Each finishes its own, and none makes a page; the costs are measured once."""
    export, trained = Comparison(CompareConfig(**elsewhere)).export_dir, []
    monkeypatch.setattr(stages, "in_a_process", lambda function, *args: trained.append(function) or function(*args))
    names = ["latent-dmmd-seed-1", "latent-flow-matching-seed-4"]
    for name in names:
        shutil.rmtree(export / name)
    for name in names:
        assert run_comparison(Comparison(CompareConfig(**{**elsewhere, "only": [name]}))) is None
        assert (export / name / "scores.json").exists()
    assert trained == [stages.train_and_measure] * 2
    assert plain(run_comparison(Comparison(CompareConfig(**elsewhere)))["rows"]) == plain(finished_once[1]["rows"])


def test_only_what_is_missing_or_configured_otherwise_is_trained(elsewhere, tools, monkeypatch, capsys):
    trained = []

    def train(function, *args):
        trained.append(args[0].output_dir.rpartition("/")[2])
        return function(*args)

    monkeypatch.setattr(stages, "in_a_process", train)
    shutil.rmtree(Comparison(CompareConfig(**elsewhere)).export_dir / "latent-dmmd-seed-1")
    changed = {**PIXELS, "objective": {"name": "flow-matching"}, "training": {"learning_rate": 5e-4}}
    elsewhere["entries"] = {**ENTRIES, "pixel-flow-matching": changed}
    run_comparison(Comparison(CompareConfig(**elsewhere)))
    assert trained == ["latent-dmmd-seed-1", *["pixel-flow-matching"] * 2]  # first runs stop at the milestone
    assert "holds another training: training.learning_rate is 0.0005 (was 0.002)" in capsys.readouterr().out


def test_other_sets_of_a_finished_run_need_no_training(elsewhere, monkeypatch):
    elsewhere |= {"num_images": 8, "include": ["latent-dmmd", "latent-flow-matching"]}
    monkeypatch.setattr(stages, "train_and_measure", None)
    result = run_comparison(Comparison(CompareConfig(**elsewhere)))
    assert result["settings"]["num_images"] == 8 and len(result["rows"][0]["frechet_distance"]) == 2
    assert result["curves"] == []  # milestones were scored with fewer images


def test_exports_are_in_float16_and_score_as_they_are(finished_once):
    settings, _, page = finished_once
    export = page.parents[1] / "finished" / "latent-dmmd-seed-0"
    weights = load_file(export / "pipeline" / "feature_net" / "diffusion_pytorch_model.safetensors")
    stored = load_file(export / "pipeline" / "mean_embeddings" / "diffusion_pytorch_model.safetensors")
    assert {a.dtype for a in weights.values()} == {torch.float16}
    assert torch.float16 not in {a.dtype for a in stored.values()}
    assert not (export / "pipeline" / "vae").exists()  # once for all
    assert len(list((page.parents[1] / "finished" / "autoencoders").iterdir())) == 1
    comparison = Comparison(CompareConfig(**settings))
    pipe = load_pipeline(stages.pipeline_of(comparison, comparison.runs[0]))
    pipe.set_progress_bar_config(disable=True)
    expected = load_file(comparison.sets(comparison.runs[0], "2-steps")[0].files[2, 0])["images"]
    generator = torch.Generator().manual_seed(0)
    sampling = dict(num_inference_steps=2, sampler="exact")
    images = torch.cat([stages.generate(lambda: pipe, sampling, 3, generator) for _ in range(2)])
    assert torch.equal(images, expected)


def test_a_network_that_is_missing_is_missed_before_training(settings, monkeypatch):
    def missing(name):
        raise ImportError("toy-2 comes with an extra")

    monkeypatch.setattr(scoring, "load_extractor", missing)
    monkeypatch.setattr(stages, "train_and_measure", None)
    with pytest.raises(ImportError, match="comes with an extra"):
        run_comparison(Comparison(CompareConfig(**settings)))


def test_a_bundled_autoencoder_is_not_copied(settings):
    comparison, bundled = Comparison(CompareConfig(**settings)), BUNDLED_AUTOENCODERS["elpv-vae-f16c16"]
    name = exports.keep_autoencoder(comparison, bundled)
    assert exports.autoencoder_of(comparison, name) == bundled
    assert not comparison.export_dir.exists()


def test_a_killed_comparison_goes_on_where_it_was(settings, monkeypatch):
    settings |= {"include": ["latent-dmmd", "latent-flow-matching"], "training_seeds": {}, "nfe": [2], "seeds": [0]}
    settings |= {"only": ["latent-flow-matching"], "num_steps": 4}
    comparison, reached = Comparison(CompareConfig(**settings)), []

    def killed(function, *args):
        if function is stages.train_and_measure:
            if len(reached) == 1:
                raise KeyboardInterrupt
            reached.append(args[0].training.num_steps)
        return function(*args)

    monkeypatch.setattr(stages, "in_a_process", killed)
    with pytest.raises(KeyboardInterrupt):
        run_comparison(comparison)
    assert reached == [2] and not (comparison.export_dir / "latent-flow-matching").exists()

    monkeypatch.setattr(stages, "in_a_process", lambda f, c: reached.append(c.training.num_steps) or f(c))
    run_comparison(comparison)
    assert reached == [2, 4]  # the milestone is not trained again, and the costs are not measured again
    scores = json.loads((comparison.export_dir / "latent-flow-matching" / "scores.json").read_text())
    assert [point["num_steps"] for point in scores["curve"]] == [2] and scores["num_steps"] == 4


def test_a_trained_run_is_scored_elsewhere(elsewhere, finished_once, tools, monkeypatch, tmp_path, capsys):
    """What is trained is left before it is scored, and is no result before."""
    shutil.rmtree(Comparison(CompareConfig(**elsewhere)).export_dir / "latent-dmmd-seed-1")
    with monkeypatch.context() as patch:
        patch.setattr(stages, "drawing", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(stages, "show_sets", None)
        settings = {**elsewhere, "milestones": [], "only": ["latent-dmmd-seed-1"]}
        with pytest.raises(KeyboardInterrupt):
            run_comparison(Comparison(CompareConfig(**settings)))
    summarise(Comparison(CompareConfig(**elsewhere, rebuild=True)))
    assert "latent-dmmd-seed-1: not scored yet, left out" in capsys.readouterr().out

    monkeypatch.setattr(stages, "train_and_measure", None)
    result = run_comparison(Comparison(CompareConfig(**{**elsewhere, "output_dir": str(tmp_path / "third")})))
    assert plain(result["rows"]) == plain(finished_once[1]["rows"])


def test_more_steps_go_on(settings):
    settings |= {"include": ["latent-dmmd", "latent-flow-matching"], "training_seeds": {}, "nfe": [2], "seeds": [0]}
    settings |= {"milestones": [], "second_extractor": None}
    first = run_comparison(Comparison(CompareConfig(**settings)))
    longer = run_comparison(Comparison(CompareConfig(**{**settings, "num_steps": 3})))
    assert longer["entries"]["latent-dmmd"]["num_steps"] == 3
    label = "latent-dmmd exact"
    assert score_of(longer, label, 2) != score_of(first, label, 2)


def few_runs(settings):
    settings |= {"include": ["latent-dmmd", "latent-flow-matching"], "training_seeds": {}, "nfe": [2], "seeds": [0]}
    return settings | {"milestones": [], "second_extractor": None}


def test_a_run_folder_of_other_keys_is_not_passed_off_as_a_new_training(settings):
    settings = few_runs(settings)
    run_comparison(Comparison(CompareConfig(**settings)))
    changed = {"latent-dmmd": {"training": {"learning_rate": 0.1}}}
    with pytest.raises(ConfigError, match="latent-dmmd holds a training with other keys; remove it"):
        run_comparison(Comparison(CompareConfig(**settings | {"entries": {**ENTRIES, **changed}})))


def test_fewer_steps_do_not_get_the_weights_of_more(settings):
    settings = few_runs(settings)
    run_comparison(Comparison(CompareConfig(**{**settings, "num_steps": 3})))
    with pytest.raises(ConfigError, match="trained longer, for 3 steps instead of 2"):
        run_comparison(Comparison(CompareConfig(**settings)))


def test_real_images_of_another_size_are_scored_anew(settings, capsys):
    settings = few_runs(settings)
    first = Comparison(CompareConfig(**settings))
    _ = Scorer(first).real
    assert "features of real images" in capsys.readouterr().out
    _ = Scorer(first).real
    assert capsys.readouterr().out == ""
    common = {**settings["common"], "data": {**settings["common"]["data"], "resolution": 64}}
    other = Comparison(CompareConfig(**{**settings, "common": common}))
    _ = Scorer(other).real
    assert "features of real images" in capsys.readouterr().out
    assert seen_by(first) != seen_by(other) and scored_as(first) != scored_as(other)


def test_sets_of_another_training_are_not_scored(settings):
    settings |= {"include": ["latent-dmmd", "latent-flow-matching"], "training_seeds": {}, "nfe": [2], "seeds": [0]}
    settings |= {"second_extractor": None}
    comparison, changed = Comparison(CompareConfig(**settings)), "latent-flow-matching"
    first = run_comparison(comparison)
    shutil.rmtree(comparison.folder / "runs" / changed)
    keys = {"objective": {"name": "flow-matching"}, "training": {"learning_rate": 0.1}}
    second = run_comparison(Comparison(CompareConfig(**settings | {"entries": {**ENTRIES, changed: keys}})))
    assert score_of(second, changed, 2) != score_of(first, changed, 2)
    halfway = [next(p["frechet_distance"] for p in r["curves"] if p["label"] == changed) for r in (first, second)]
    assert halfway[0] != halfway[1]
    assert score_of(second, "latent-dmmd exact", 2) == score_of(first, "latent-dmmd exact", 2)


def test_trained_entries_are_loaded(finished_once, settings, tmp_path):
    first = Comparison(CompareConfig(**finished_once[0]))
    folder = tmp_path / "released"
    shutil.copytree(stages.pipeline_of(first, first.config.runs[1]), folder)
    settings |= {"trained": {"latent-dmmd": str(folder), "pixel-dmmd": "not included"}, "training_seeds": {}}
    settings |= {"include": ["latent-dmmd", "latent-flow-matching"], "milestones": [], "num_images": 6}
    second = Comparison(CompareConfig(**settings))
    result = run_comparison(second)
    assert sorted(path.name for path in (second.folder / "runs").iterdir()) == ["latent-flow-matching"]
    assert list(result["entries"]) == ["latent-flow-matching"]
    expected = next(row for row in finished_once[1]["rows"] if row["label"] == "latent-dmmd exact")
    assert score_of(result, "latent-dmmd exact", 2).mean == pytest.approx(expected["frechet_distance"][0])
    assert f"but for those loaded: latent-dmmd ({folder})" in write_report(second, result, "").read_text()

    # another pipeline in its place is sampled again, and nothing else
    shutil.copytree(folder, tmp_path / "other")
    settings["trained"] = {"latent-dmmd": str(tmp_path / "other")}
    before = {path: path.stat().st_mtime_ns for path in second.folder.rglob("samples/**/*.safetensors")}
    run_comparison(Comparison(CompareConfig(**settings)))
    changed = {path.parent.parent.name for path, stamp in before.items() if path.stat().st_mtime_ns != stamp}
    assert changed == {"latent-dmmd-exact", "latent-dmmd-approximate"}


def test_measured_seconds_are_taken_from_a_file(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "in_a_process", None)
    seconds = {name: {"seconds": 0.5 * (i + 1), "num_parameters": 1} for i, name in enumerate(ENTRIES)}
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(seconds))
    comparison = Comparison(CompareConfig(**{**settings, "num_steps": None, "minutes": 1.5, "costs": str(path)}))
    costs = measure_costs(comparison)
    assert [comparison.num_steps(costs)[name] for name in ENTRIES] == [180, 90, 60, 45, 36]
    assert json.loads((comparison.export_dir / "costs.json").read_text()) == seconds

    path.write_text(json.dumps({name: seconds[name] for name in list(ENTRIES)[1:]}))
    with pytest.raises(ConfigError, match="no seconds of one-step; measure it"):
        measure_costs(comparison)
    for text in ("", "[1]", json.dumps(dict.fromkeys(ENTRIES, 3))):
        path.write_text(text)
        with pytest.raises(ConfigError, match="cannot read measured seconds in .*; give a file"):
            measure_costs(comparison)


@pytest.mark.parametrize("data", ["elpv", "openmoji"])
def test_data_with_a_name_bring_splits_and_autoencoder(data):
    config = CompareConfig(entries=ENTRIES, num_steps=1, data=data, splits=["fit", "validation"])
    comparison = Comparison(config)
    latent, pixel = comparison.entries["latent-dmmd"], comparison.entries["pixel-dmmd"]
    assert latent.data.name_or_path == pixel.data.name_or_path == comparison.training_data == f"{data}:fit"
    assert latent.autoencoder.name_or_path == f"{data}-vae" and pixel.autoencoder.name_or_path is None
    assert config.reference == f"{data}:validation"


def test_a_way_of_sampling_may_have_few_sets(settings):
    settings |= {"few": ["latent-dmmd exact", "pixel-dmmd"], "nfe": [2, 5, 10]}
    comparison = Comparison(CompareConfig(**settings))
    run = comparison.runs[0]
    assert run.entry == "latent-dmmd"
    numbers = {sets.label: {nfe for nfe, _ in sets.files} for sets in comparison.sets(run, "trained")}
    assert numbers == {"latent-dmmd exact": {10}, "latent-dmmd approximate": {2, 5, 10}}
    assert [sets.label for sets in comparison.sets(run, "1-steps", milestone=True)] == ["latent-dmmd approximate"]


def test_batches_are_bounded_and_even():
    for count, largest in ((1024, 128), (6, 4), (129, 128), (4, 128)):
        sizes = batch_sizes(count, largest)
        assert sum(sizes) == count and max(sizes) <= largest and max(sizes) - min(sizes) <= 1
    assert batch_sizes(1024, 128) == [128] * 8


def test_sets_are_drawn_in_bounded_batches(settings, tmp_path):
    comparison, drawn = Comparison(CompareConfig(**{**settings, "num_images": 1024, "batch_size": 100})), []

    def draw(n, generator):
        drawn.append(n)
        return torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)

    Scorer(comparison).make_set(tmp_path / "set.safetensors", "x", 0, draw, "x")
    tensors = load_file(tmp_path / "set.safetensors")
    assert max(drawn) <= 100 and sum(drawn) == len(tensors["features_0"]) == len(tensors["features_1"]) == 1024
    assert len(tensors["images"]) == 32


@pytest.fixture
def real():
    """Features of 40 training and 10 held-out images, and of reconstructions, which are a little off."""
    draw = torch.Generator().manual_seed(0)
    training, reference = (torch.randn(n, 4, generator=draw) for n in (40, 10))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    a, b = (training[order[i : i + 12]] + 0.1 for i in (0, 12))
    names = ("training", "reference", "reconstructed_a", "reconstructed_b", "reconstructed_reference")
    return dict(zip(names, (training, reference, a, b, reference + 0.1)))


def test_what_a_set_is_scored_against(real):
    features = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    scores = score_generated(features, real)
    a, b = real["reconstructed_a"] - 0.1, real["reconstructed_b"] - 0.1
    assert scores["frechet_distance"] == pytest.approx(frechet_distance(features, real["reference"]))
    assert scores["reconstructed_distance"] == pytest.approx(frechet_distance(features, real["reference"] + 0.1))
    both = [frechet_distance(features, half) for half in (a, b)]
    assert scores["training_distance"] == pytest.approx(sum(both) / 2, rel=1e-4)
    assert scores["coverage"] == density_and_coverage(features, real["reference"])["coverage"]
    assert scores["memorised_share"] == memorised_share(features, real["training"], real["reference"])


def test_perfect_latents_are_scored_at_the_same_number_and_in_both_directions(real):
    context = context_of(real, 12)
    a, b = real["reconstructed_a"] - 0.1, real["reconstructed_b"] - 0.1
    found = context["reconstructed_training"]
    both = [frechet_distance(half + 0.1, real["reference"]) for half in (a, b)]
    assert found["frechet_distance"] == pytest.approx(sum(both) / 2)
    both = [frechet_distance(a + 0.1, b), frechet_distance(b + 0.1, a)]  # never against their originals
    assert found["training_distance"] == pytest.approx(sum(both) / 2, rel=1e-4)
    assert found["reconstructed_distance"] == pytest.approx(context["real_training"]["frechet_distance"], rel=1e-4)
    assert context["real_training"]["training_distance"] == pytest.approx(frechet_distance(a, b), rel=1e-4)
    assert context["num_each"] == 12 and context_of(real, 100)["num_each"] == 20


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_steps": None}, "either minutes or num_steps"),
        ({"minutes": 3.0}, "either minutes or num_steps"),
        ({"minutes": 3.0, "rebuild": True}, "either minutes or num_steps"),
        ({"entries": {}}, "at least one"),
        ({"entries": {"../x": {}}}, "letters, digits"),
        ({"few": ["other"]}, "other not among entries"),
        ({"few": ["latent-dmmd slow"]}, "few: latent-dmmd slow not among .*latent-dmmd exact, latent-dmmd approximate"),
        ({"baseline": "other"}, "other not among entries"),
        ({"dmmd": "pixel-dmmd"}, "on pixels"),
        ({"entries": {"latent-dmmd": {"training": {"num_step": 3}}, "latent-flow-matching": {}}}, "did you mean"),
        ({"num_images": 3}, "at least 4"),
        ({"batch_size": 1}, "at least 4"),
        ({"milestones": [1.5]}, r"milestones must be in \(0, 1\)"),
        ({"splits": ["train"]}, "splits must be two"),
        ({"second_extractor": "toy"}, "name another"),
        ({"table": {"latent-dmmd exact": list(range(9))}}, "at most 8 rows; got 9"),
        ({"include": ["latent-dmmd", "other"]}, "other not among entries"),
        ({"table": {"other exact": [10]}}, "other not among entries"),
        ({"table": {"latent-dmmd slow": [10]}}, "table: latent-dmmd slow not among .*latent-dmmd exact"),
        ({"few_nfe": []}, "few_nfe must be positive"),
        ({"few_nfe": [0]}, "few_nfe must be positive"),
        ({"entries": {**ENTRIES, "decode": {}}}, "decode is measured of every entry"),
        (
            {"include": ["latent-dmmd", "latent-flow-matching"], "only": ["pixel-dmmd"]},
            "only: pixel-dmmd not among include: latent-dmmd, latent-flow-matching",
        ),
        ({"include": ["latent-dmmd", "pixel-dmmd"]}, "latent-flow-matching not among entries"),
        ({"training_seeds": {"other": [0]}}, "other not among entries"),
        ({"training_seeds": {"latent-dmmd": []}}, "must be different numbers"),
        ({"training_seeds": {"latent-dmmd": [1, 1]}}, "must be different numbers"),
        ({"training_seeds": {"latent-dmmd": [-1]}}, "must not be negative"),
        ({"entries": {**ENTRIES, "latent-dmmd-seed-1": {}}}, "latent-dmmd-seed-1 is both"),
        ({"only": [], "rebuild": True}, "give one of them"),
        ({"only": ["latent-dmmd"]}, "only: latent-dmmd not among entries: .*latent-dmmd-seed-0"),
        ({"trained": {"latent-dmmd": "elpv-dmmd"}}, "latent-dmmd not among entries: .*latent-dmmd-seed-0"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(settings, change, message):
    changed = {**settings, **change}
    if len(change.get("entries", ENTRIES)) < 3:
        changed |= {"few": [], "training_seeds": {}}
    with pytest.raises(ConfigError, match=message) as error:
        Comparison(CompareConfig(**changed))
    assert "\n" not in str(error.value)
    assert not shutil.os.path.exists(settings["output_dir"])


def test_a_folder_without_a_pipeline_is_one_line(settings, tmp_path):
    with pytest.raises(ValueError, match="no pipeline in .*nowhere; give the folder"):
        Comparison(CompareConfig(**{**settings, "trained": {"latent-dmmd-seed-0": str(tmp_path / "nowhere")}}))
    assert not shutil.os.path.exists(settings["output_dir"])


def test_nothing_to_rebuild_is_one_line(settings):
    with pytest.raises(ConfigError, match="holds no finished run of this comparison; run it without --rebuild"):
        summarise(Comparison(CompareConfig(**{**settings, "rebuild": True})))


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
