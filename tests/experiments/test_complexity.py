import json
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from processes import ROOT
from torch.utils.flop_counter import FlopCounterMode

from latent_dmmd.experiments import complexity
from latent_dmmd.experiments.complexity import REPRESENTATIONS, objective_costs, representation_costs
from latent_dmmd.experiments.workers import in_a_process
from latent_dmmd.features import FeatureNet
from latent_dmmd.utils.benchmark import Cost, PeakMemory, fitted_exponent, measure, peak_memory_mb

SCRIPT = ROOT / "scripts" / "complexity.py"
TINY = dict(
    in_channels=2, sample_size=4, patch_size=2, block_out_channels=(4,), layers_per_block=1, attention_levels=(False,)
)


def test_exponents():
    sizes = [1, 10, 100, 1000]
    assert fitted_exponent(sizes, [3.0 * n**2 for n in sizes]) == pytest.approx(2)
    assert fitted_exponent(sizes, [5.0] * 4) == pytest.approx(0)
    assert fitted_exponent(sizes, [99.0, *(0.1 * n for n in sizes[1:])]) == pytest.approx(1)  # the largest count


def test_median_of_turns():
    order, pauses = [], iter([0.0, 0.0, 0.05, 0.0, 0.0, 0.0, 0.05, 0.0])

    def task(name):
        order.append(name)
        torch.zeros(1).sum()
        import time

        time.sleep(next(pauses))

    costs = measure({"a": lambda: task("a"), "b": lambda: task("b")}, torch.device("cpu"), repeats=3)
    assert order == ["a", "b"] * 4
    assert costs["a"].seconds > 0.04 > 0.02 > costs["b"].seconds


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory on a CPU is a Linux figure")
def test_peak_memory_is_that_of_what_runs():
    with PeakMemory(torch.device("cpu")) as large:
        torch.ones(64 * 2**18).sum()  # 64 MB
    with PeakMemory(torch.device("cpu")) as small:
        torch.ones(8 * 2**18).sum()
    assert 60 < large.mb < 80 and 6 < small.mb < 20


def test_forwards_make_the_difference():
    """On a tiny network: every objective is timed, flow matching is the reference."""
    costs = objective_costs(torch.device("cpu"), TINY, pairs_per_level=4, levels_per_step=2, repeats=1)
    witnesses = {"witness matching, running", "witness matching, encoder", "dmmd, gaussian", "dmmd, kale"}
    assert {"flow matching"} | witnesses <= costs.keys()
    assert all(isinstance(cost, Cost) and cost.seconds > 0 for cost in costs.values())


def counted(tasks, device, repeats):
    """`measure` in floating point operations, which do not depend on what else the machine does."""
    costs = {}
    for name, task in tasks.items():
        with FlopCounterMode(display=False) as counter:
            task()
        costs[name] = Cost(counter.get_total_flops(), None)
    return costs


def test_a_step_on_pixels_costs_a_pair_what_it_costs(monkeypatch):
    """Small U-Nets: counted by the pair, so that a large step and a small one compare."""
    monkeypatch.setattr(complexity, "measure", counted)
    large = TINY | {"sample_size": 32, "patch_size": 1}
    networks = {"latents": (TINY, 2, 4), "pixels": (large, 1, 2), "pixels, more": (large, 1, 8)}
    costs = representation_costs(torch.device("cpu"), networks)
    assert [cost["pairs"] for cost in costs.values()] == [8, 2, 8]
    per_pair = {name: cost["seconds_per_pair"] for name, cost in costs.items()}
    assert per_pair["pixels"] > 30 * per_pair["latents"]
    assert per_pair["pixels, more"] == pytest.approx(per_pair["pixels"], rel=0.05)


def test_representations_have_the_same_grid_for_attention():
    for network, _, _ in REPRESENTATIONS.values():
        with torch.device("meta"):
            net = FeatureNet(num_features=64, **network)
        halvings = len(network["block_out_channels"]) - 1
        assert network["sample_size"] // network["patch_size"] // 2**halvings == 4
        assert net.config.attention_levels[-1] and not any(net.config.attention_levels[:-1])


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["complexity.py", *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_script(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        complexity, "representation_costs", partial(representation_costs, representations={"a": (TINY, 1, 2)})
    )
    run(
        monkeypatch, "--output_dir", str(tmp_path), "--batches", "[8,16]", "--particles", "[4,8]",
        "--resolutions", "[64]", "--pairs_per_level", "2", "--repeats", "1",
    )  # fmt: skip
    report = json.loads((tmp_path / "complexity.json").read_text())
    assert report["training"]["gaussian"]["sizes"] == [8, 16] and "64" in report["resolution"]
    assert report["objectives"]["flow matching"]["over_flow_matching"] == 1
    assert (tmp_path / "complexity.png").stat().st_size > 10_000
    assert "exponent" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message", [(("--resolutions", "[100]"), "64"), (("--batches", "[8]"), "2 different sizes")]
)
def test_bad_input_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--output_dir", str(tmp_path / "out"), *arguments)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0] and not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="has no /proc")
def test_the_peak_of_a_process_is_not_that_of_its_parent():
    ballast = torch.ones(3 * 2**27)  # 1.5 GB
    child = in_a_process(peak_memory_mb, torch.device("cpu"))
    assert child < peak_memory_mb(torch.device("cpu")) - 500
    del ballast
