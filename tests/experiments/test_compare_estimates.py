"""Means, errors and ratios against their formulas."""

import math

import pytest

from latent_dmmd.experiments.estimates import Estimate, estimate, interpolated
from latent_dmmd.experiments.summary import equal_time_ratio, excess_ratio, ratios, score_of


def test_standard_error_is_of_the_training_seeds():
    found = estimate([1.0, 2.0, 6.0])
    assert found.mean == 3 and found.error == pytest.approx(math.sqrt(((4 + 1 + 9) / 2) / 3))
    assert estimate([5.0]) == Estimate(5.0, None)
    assert (found.text(1), estimate([5.0]).text(1), estimate([0.02]).text(1, factor=100)) == ("3.0 ± 1.5", "5.0", "2.0")


def test_errors_of_a_quotient_are_those_of_small_changes():
    a, b = Estimate(6.0, 0.3), Estimate(4.0, 0.1)
    step = 1e-6
    by_a, by_b = ((6 + step) / 4 - 1.5) / step, (6 / (4 + step) - 1.5) / step
    assert a.over(b).mean == 1.5 and a.over(b).error == pytest.approx(math.hypot(by_a * 0.3, by_b * 0.1), rel=1e-5)
    assert a.over(Estimate(4.0)).error == pytest.approx(0.3 / 4)
    assert Estimate(6.0).over(Estimate(4.0)) == Estimate(1.5, None)
    assert a.above(5) == Estimate(1.0, 0.3)
    assert Estimate(0.0, 0.3).over(b) == Estimate(0.0, pytest.approx(0.075))
    assert a.over(Estimate(0.0)) is None and a.over(Estimate(-1.0, 0.1)) is None  # not above the level


def test_estimates_between_two_points():
    points = [(10.0, [4.0, 6.0]), (1.0, [8.0, 9.0]), (100.0, [3.0, 3.0])]
    assert interpolated(points, math.sqrt(10)) == pytest.approx([6, 7.5])  # each training by itself
    assert interpolated(points, 10.0) == pytest.approx([4, 6])
    assert interpolated(points, 0.9) is None and interpolated(points, 101.0) is None


def row(label, nfe, distances, seconds, memorised=(0.0,)):
    return {
        "label": label,
        "nfe": nfe,
        "seconds_per_image": seconds,
        "frechet_distance": distances,
        "memorised_share": list(memorised),
        "second": {"frechet_distance": [d + 5 for d in distances]},
    }


@pytest.fixture
def result():
    names = {"dmmd": "a", "baseline": "b", "pixel": "p", "pixel_baseline": "q"}
    spaces = {"extractor": "one", "second_extractor": "two", "second_distance": "fd_two"}
    rows = [
        row("a exact", 100, [50.0, 70.0], 3.3, [0.0, 0.02]),
        row("b", 100, [40.0, 40.0], 1.0),
        row("b", 200, [30.0, 30.0], 10.0),
        row("p exact", 100, [180.0], 4.0),
        row("q", 100, [160.0], 1.2),
    ]
    return {
        "settings": names | spaces,
        "context": {name: {"reconstructed_training": {"frechet_distance": 20.0}} for name in ("one", "two")},
        "rows": rows,
        "speed": {"a exact": {"seconds": 3.3}, "a approximate": {"seconds": 2.9}, "b": {"seconds": 1.0}},
    }


def test_ratios_are_above_reconstructed_training_images(result):
    found = {text: (pytest.approx(value["mean"]), value["error"]) for text, value in ratios(result).items()}
    assert found == {
        "a exact ÷ b, distance above reconstructed training images, 100 NFE": (2.0, pytest.approx(0.5)),
        "a exact ÷ b, distance above reconstructed training images, 100 NFE, fd_two": (1.8, pytest.approx(0.4)),
        "p exact ÷ a exact, distance, 100 NFE": (3.0, pytest.approx(0.5)),
        "q ÷ b, distance, 100 NFE": (4.0, 0.0),
        "a exact ÷ b, time of one NFE per image": (3.3, None),
        "a approximate ÷ b, time of one NFE per image": (2.9, None),
        "a exact, 100 NFE, share of memorised images": (0.01, pytest.approx(0.01)),
    }
    del result["speed"]["a approximate"]  # among the few, which are sampled by exact witnesses alone
    assert list(ratios(result)) == [text for text in found if "approximate" not in text]
    assert score_of(result, "a exact", 10) is None


def test_ratios_of_rows_are_to_the_baseline_at_equal_nfe_and_at_equal_time(result):
    exact, baseline, _, pixel, _ = result["rows"]
    assert excess_ratio(result, baseline) is None and equal_time_ratio(result, baseline) is None
    assert excess_ratio(result, exact).mean == 2
    assert excess_ratio(result, {"label": "a exact", "nfe": 7}) is None
    between = 20 + (10 - 20) * math.log10(3.3)
    assert equal_time_ratio(result, exact).mean == pytest.approx(40 / between)
    assert equal_time_ratio(result, {**pixel, "seconds_per_image": 0.5}) is None  # faster than the baseline ever is
    assert equal_time_ratio(result, {**pixel, "seconds_per_image": None}) is None
