"""The page, the plots and the table, of made-up runs."""

import json
import math
import re

import pytest
import torch
from PIL import Image

from latent_dmmd.experiments import report
from latent_dmmd.experiments.compare import GAUSSIAN, CompareConfig, Comparison
from latent_dmmd.experiments.exports import save_grids, scored_as, write_finished
from latent_dmmd.experiments.grids import image_grid, shown_nfe
from latent_dmmd.experiments.report import RESULTS, write_report
from latent_dmmd.experiments.report_plots import drawn_rows, legible, nfe_of, seconds_of
from latent_dmmd.experiments.report_table import TITLES, markdown_table, table_rows, title_of
from latent_dmmd.experiments.summary import summarise
from latent_dmmd.training.config import save_config
from latent_dmmd.utils.files import write_json

PIXELS = {"autoencoder": {"name_or_path": None}}
FLOW = {"objective": {"name": "flow-matching"}}
ENTRIES = {
    "latent-dmmd": {},
    "latent-flow-matching": FLOW,
    "latent-ddpm": {"objective": {"name": "ddpm"}},
    "latent-mmd-gan": {"objective": {"name": "mmd-gan"}},
    "pixel-dmmd": PIXELS,
    "pixel-flow-matching": {**PIXELS, **FLOW},
}
GOODNESS = {"latent-dmmd": 30, "latent-flow-matching": 28, "latent-ddpm": 40, "latent-mmd-gan": 120, "pixel-dmmd": 200}


def made_up_scores(level):
    """Scores that are a function of one number."""
    ends = dict(precision=0.6, recall=0.3, density=0.7, coverage=0.5, training_coverage=0.4, memorised_share=0.01)
    scores = {name: value * 20 / level for name, value in ends.items()}
    return scores | dict(
        frechet_distance=level,
        reconstructed_distance=level - 4,
        training_distance=level - 3,
        kid_mean=level / 1000,
        kid_std=0.001,
    )


def grid(seed, side=64):
    images = torch.randint(256, (8, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return image_grid(images.repeat_interleave(side // 4, 2).repeat_interleave(side // 4, 3))


def make_up(comparison, side=64):
    """Fill the export folder of a comparison with made-up runs; no test shows them to anybody."""
    scored = scored_as(comparison)
    for i, run in enumerate(comparison.config.runs):
        sets = [(s.label, *key) for s in comparison.sets(run, "") for key in s.files]
        level = GOODNESS.get(run.entry, 150) + 2 * (run.seed or 0)
        rows = [
            {"label": label, "nfe": nfe, "seed": seed, "scores": made_up_scores(level + 40 / nfe + seed)}
            | {"second": made_up_scores(level + 10 + 40 / nfe)}
            for label, nfe, seed in sets
        ]
        facts = dict(
            num_parameters=2_500_000, num_steps=900, seconds_per_step=0.3, training_minutes=4.5, resident_mb=900.0
        )
        curve = [{**row, "num_steps": 90, "minutes": 0.45} for row in rows if row["nfe"] in (1, 10)]
        curve = [{**row, "scores": made_up_scores(2 * row["scores"]["frechet_distance"])} for row in curve]
        files = {f"{label}-{nfe}.webp".replace(" ", "-"): (label, nfe) for label, nfe, _ in sets if nfe in (1, 10)}
        images = [{"kind": "grid", "label": label, "nfe": nfe, "file": f} for f, (label, nfe) in files.items()]
        if run.entry == "latent-dmmd":
            images.append({**images[0], "kind": "nearest"})
        scores = dict(name=run.name, entry=run.entry, training_seed=run.seed, trained=None, sets=rows, scored=scored)
        scores |= dict(budget={"minutes": 4.5, "num_steps": None}, num_steps=900, entry_facts=facts, curve=curve)
        scores |= dict(images=images if run.seed in (None, 0) else [], autoencoder=None)
        scores["machine"] = {"gpu": None, "threads": 2, "torch": "2.9", "system": "Linux"}

        def write(aside, run=run, files=files, i=i):
            save_config(comparison.config_of(run, 900), aside / "config.yaml")
            save_grids({file: grid(i, side) for file in files}, aside)

        write_finished(comparison.export_dir / run.name, scores, write)
    rows = [{"label": GAUSSIAN, "nfe": 0, "seed": 0, "scores": made_up_scores(98), "second": made_up_scores(110)}]
    write_finished(
        comparison.export_dir / GAUSSIAN, dict(name=GAUSSIAN, scored=scored, sets=rows, images=[]), lambda _: None
    )
    context = dict(num_each=64, floor_distance=12.0, reconstruction_distance=17.0)
    context |= dict(real_training=made_up_scores(14), reconstructed_training=made_up_scores(22))
    shown = [{"kind": "grid", "label": "held-out images", "nfe": 0, "file": "heldout.webp"}]
    real = dict(scored=scored, counts={"reference": 263, "training": 2361}, images=shown)
    real["context"] = dict.fromkeys(comparison.extractors, context)
    write_finished(
        comparison.export_dir / "real", real, lambda aside: save_grids({"heldout.webp": grid(99, side)}, aside)
    )
    labels = ["decode", *(label for name in comparison.config.entries for label in comparison.ways(name))]
    write_json(
        comparison.export_dir / "speed.json", {label: {"seconds": 0.002 * (i + 1)} for i, label in enumerate(labels)}
    )


@pytest.fixture
def settings(tmp_path):
    return dict(
        output_dir=str(tmp_path / "elpv"),
        entries=ENTRIES,
        training_seeds={"latent-dmmd": [0, 1, 2], "latent-flow-matching": [0, 1, 2]},
        nfe=[10, 100],
        milestone_nfe=10,
        one_seed_from=10,
        num_images=64,
        minutes=4.5,
        second_extractor="efficientnet-lite1",
        rebuild=True,
    )


@pytest.fixture
def comparison(settings):
    comparison = Comparison(CompareConfig(**settings))
    make_up(comparison)
    return comparison


@pytest.fixture
def no_plots(monkeypatch):
    """Plots take the most time of a page."""
    monkeypatch.setattr(report, "plot_results", lambda *args, **options: [])


def test_the_page_is_self_contained_and_escaped(comparison):
    result = summarise(comparison)
    result["settings"]["reference"] = "<b>images</b>"
    page = write_report(comparison, result, "python scripts/compare.py '<script>'")
    text = page.read_text()
    assert "&lt;script&gt;" in text and "<script" not in text and "&lt;b&gt;images" in text
    assert not re.search(r'(src|href)="(?!data:image/)', text) and "url(" not in text and "@import" not in text
    # grids of 8 ways, held-out and nearest images, and the plots
    grids = len(result["images"])
    plots = sorted(page.parent.glob("*.png"))
    assert grids == 10 and text.count("data:image/webp") == grids and text.count("data:image/png") == len(plots) == 7
    assert text.count('type="checkbox"') == grids + len(plots)  # each at full size on a click
    for path in plots:
        assert Image.open(path).width > 400
    assert "36.0 ± 1.2" in text  # 30, 32, 34, and 4 for 10 NFE


def test_rows_of_one_training_seed_show_no_error(comparison, no_plots):
    text = write_report(comparison, summarise(comparison), "").read_text()
    rows = re.findall(r"<tr><td>latent-ddpm</td>.*?</tr>", text)
    assert len(rows) > 4
    for row in rows:
        assert not any("±" in cell for cell in row.split("</td>")[:4])
    drawn = drawn_rows(summarise(comparison), "recall", nfe_of, "")
    assert all(map(math.isnan, drawn["latent-ddpm"][2])) and min(drawn["latent-dmmd exact"][2]) > 0  # bars


def test_a_page_of_two_data_sets(comparison, settings, tmp_path, capsys, no_plots):
    other = {**settings, "data": "openmoji", "training_seeds": {}, "output_dir": str(tmp_path / "openmoji")}
    second = Comparison(CompareConfig(**other))
    first = Comparison(CompareConfig(**settings, beside=[str(second.export_dir)]))
    alone = write_report(first, summarise(first), "").read_text()
    assert f"{second.export_dir}: no finished comparison, left out" in capsys.readouterr().out
    make_up(second)
    write_report(second, summarise(second), "")
    page = write_report(first, summarise(first), "")
    both = page.read_text()
    assert re.findall("<h2>(.*)</h2>", alone) == ["ELPV photographs, 4.5 minutes of training"]
    assert re.findall("<h2>(.*)</h2>", both) == [f"{name}, 4.5 minutes of training" for name in TITLES.values()]
    assert both.count("data:image/webp") == 2 * alone.count("data:image/webp")
    assert len(json.loads((page.parent / "results.json").read_text())["beside"]) == 1
    table = (page.parent / "table.md").read_text()
    assert table.count("| model | NFE |") == 2 and table.index("ELPV photographs") < table.index("OpenMoji drawings")


def test_comparisons_of_one_data_set_are_told_apart_by_their_budgets():
    settings = {"training": "elpv:train", "minutes": 20.0, "steps": None}
    assert title_of({"settings": settings}) == "ELPV photographs, 20 minutes of training"
    assert title_of({"settings": settings | {"minutes": None, "steps": 7}}) == "ELPV photographs, 7 steps of training"
    assert title_of({"settings": settings | {"minutes": None, "training": "mine"}}) == "mine"


def test_other_files_beside_the_page_stay(comparison, no_plots):
    comparison.report_dir.mkdir(parents=True)
    (comparison.report_dir / "mine.txt").write_text("mine")
    (comparison.report_dir / "elpv").mkdir()
    write_report(comparison, summarise(comparison), "")
    assert (comparison.report_dir / "mine.txt").exists() and (comparison.report_dir / "elpv").exists()
    assert (comparison.export_dir / RESULTS).exists()


def test_curves_end_at_the_sets_of_the_same_nfe(comparison):
    result = summarise(comparison)
    for label, nfe in (("latent-dmmd exact", 10), ("latent-mmd-gan", 1)):  # one step has no other
        points = [(p["nfe"], p["minutes"]) for p in result["curves"] if p["label"] == label]
        assert points == [(nfe, 0.45), (nfe, 4.5)]


def test_the_table_has_at_most_eight_rows(comparison):
    result = summarise(comparison)
    rows = table_rows(result)
    assert len(rows) == 8
    assert [row["nfe"] for row in rows[:6]] == [10, 100] * 3  # of the two that the comparison is about
    odd = {**result, "rows": [{**row, "nfe": row["nfe"] + 1} for row in result["rows"]]}
    assert table_rows(odd)[0]["label"] == "latent-dmmd exact" and table_rows(odd)[0]["nfe"] == 101
    lines = markdown_table([result]).splitlines()
    header, *cells = [line.strip("|").split("|") for line in lines if line.startswith("| ")]
    assert len(cells) == 8 and all(len(line) == len(header) for line in cells)
    assert cells[0][0].strip() == "latent-dmmd exact" and cells[0][2].strip() == "36.0 ± 1.2"
    assert cells[0][3].strip() == "14.0 ± 1.2"  # above 22
    assert "reconstructed training images score 22.0, the floor is 12.0" in lines[-1]


def test_the_rows_of_the_table_are_chosen_by_a_key(settings):
    comparison = Comparison(CompareConfig(**settings, table={"pixel-dmmd exact": [100], "latent-ddpm": [10, 7]}))
    make_up(comparison)
    rows = table_rows(summarise(comparison))
    assert [(row["label"], row["nfe"]) for row in rows] == [("pixel-dmmd exact", 100), ("latent-ddpm", 10)]


def test_a_page_without_speed_has_no_times(comparison):
    (comparison.export_dir / "speed.json").unlink()
    page = write_report(comparison, summarise(comparison), "")
    assert not (page.parent / "distance_time.png").exists() and (page.parent / "distance_nfe.png").exists()
    assert "| – |" in (page.parent / "table.md").read_text()


def test_an_entry_without_a_time_leaves_the_others_their_colours(comparison):
    """Colours follow the place of a label."""
    path = comparison.export_dir / "speed.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "latent-dmmd exact"}))
    times, by_nfe = (drawn_rows(summarise(comparison), "recall", x_of, "") for x_of in (seconds_of, nfe_of))
    assert list(times) == list(by_nfe)
    assert times["latent-dmmd exact"] == ([], [], []) and len(by_nfe["latent-dmmd exact"][0]) > 1
    assert times["gaussian"][0] is None and len(times["latent-ddpm"][0]) > 1


def test_labels_of_an_axis_do_not_touch():
    assert legible([10, 25, 30, 75, 100]) == [10, 25, 30, 75, 100]
    assert legible([1, 10, 25, 30, 75, 100]) == [1, 10, 25, 75, 100]
    assert legible([7]) == [7] and legible([]) == []


def test_images_are_shown_at_the_usual_numbers():
    assert shown_nfe([5, 10, 25, 100]) == [10, 100]
    assert shown_nfe([2, 3]) == [3] and shown_nfe([1]) == [1]


def test_a_grid_is_filled_up_with_white():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 2, 2)
    pixels = torch.tensor(list(image_grid(images).getdata()))[:, 0].view(4, 8)
    assert pixels[0, ::2].tolist() == [0, 1, 2, 3] and pixels[2, ::2].tolist() == [4, 5, 255, 255]
