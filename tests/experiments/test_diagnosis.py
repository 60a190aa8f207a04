import json
import math
import runpy
import sys

import pytest
import torch
from conftest import TINY_NET, random_embeddings, tiny_features
from processes import ROOT

from latent_dmmd import FeatureNet, LatentDMMDPipeline, MeanEmbeddings
from latent_dmmd.experiments.diagnosis import Diagnosis, crossing, save_diagnosis
from latent_dmmd.latent_pipeline import FlowOptions

SCRIPT = ROOT / "scripts" / "diagnose.py"


class HalfSquare(FeatureNet):
    """φ = (‖x‖² / 2, x): for data at 0 the witness gradient at x_t is a multiple of x_t − x_0, exactly right."""

    def forward(self, x, t):
        x = x.flatten(1)
        return torch.cat([x.square().sum(1, keepdim=True) / 2, x], dim=1)


@pytest.fixture
def perfect():
    """A pipeline whose flow is the forward process of the linear interpolant, backwards, for data at 0."""
    stored = MeanEmbeddings(5, 33)
    stored.levels.copy_(torch.arange(1, 6) / 5)
    stored.noisy[0, :, 0] = 16 * stored.levels**2
    stored.gradient_scale[0] = 1 / stored.noisy[0, :, 0]
    pipe = LatentDMMDPipeline(HalfSquare(4, 2, 33, **TINY_NET), stored)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_crossing():
    levels = torch.tensor([0.0, 0.5, 1.0])
    assert crossing(3.0, levels, torch.tensor([1.0, 2.0, 4.0])) == pytest.approx(0.75)
    assert crossing(-9.0, levels, torch.tensor([1.0, 2.0, 4.0])) == 0 and crossing(9.0, levels, levels) == 1
    assert 0 <= crossing(1.5, levels, torch.tensor([1.0, 0.5, 2.0])) <= 1


def test_a_perfect_flow_is_the_forward_process(perfect):
    stops = Diagnosis(perfect, torch.zeros(512, 2, 4, 4)).run("approximate", 5, 1)
    assert [s.t for s in stops] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    for s in stops:
        assert s.noise_level == pytest.approx(s.t, abs=0.04)
        assert s.std == pytest.approx(s.forward_std, abs=0.02) and s.std == pytest.approx(s.t, abs=0.02)
        assert s.gradient_norm == pytest.approx(s.t, abs=0.02)
        assert abs(s.mmd2_to_forward) < 0.6 and s.mmd2_to_data == pytest.approx(s.forward_mmd2_to_data, abs=6)
    assert stops[0].mmd2_to_data == pytest.approx(16**2, rel=0.1)


def test_a_flow_that_lags_is_found_out(perfect):
    """Steps half as long leave particles at a higher noise level than their witness is for, and too far out."""
    perfect.mean_embeddings.gradient_scale.mul_(0.5)
    stops = Diagnosis(perfect, torch.zeros(256, 2, 4, 4)).run("approximate", 5, 1)
    expected = 1.0
    for s, following in zip(stops, [0.8, 0.6, 0.4, 0.2, 0.0, None]):
        assert s.noise_level == pytest.approx(expected, abs=0.06) and s.std == pytest.approx(expected, abs=0.04)
        if following is not None:
            expected *= 1 - 0.5 * (1 - following / s.t)
    assert stops[-1].mmd2_to_forward == pytest.approx((16 * expected**2) ** 2, rel=0.2)


def test_every_sampler_and_the_report(tmp_path):
    torch.manual_seed(0)
    stored = random_embeddings(3, num_points=4, discrepancy={"kernel": "gaussian"})
    pipe = LatentDMMDPipeline(tiny_features(), stored)
    pipe.set_progress_bar_config(disable=True)
    diagnosis = Diagnosis(pipe, torch.randn(13, 2, 4, 4))
    flows = {name: diagnosis.run(name, 3, 2) for name in ("exact", "approximate", "hybrid")}
    pipe.flow_options = FlowOptions(chunk_size=2, step_size=0.01)
    flows["the paper's"] = diagnosis.run("exact", 2, 1)
    save_diagnosis(flows, {"seed": 0}, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert len(report["flows"]["exact"]) == 4 and len(report["flows"]["the paper's"]) == 3
    assert all(math.isfinite(v) for stops in report["flows"].values() for s in stops for v in s.values())
    assert (tmp_path / "out" / "diagnosis.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="at least 4"):
        Diagnosis(pipe, torch.zeros(3, 2, 4, 4))


def test_script(tmp_path, tiny_vae, tiny_images, monkeypatch, capsys):
    torch.manual_seed(0)
    LatentDMMDPipeline(tiny_features(16, 4), random_embeddings(2), tiny_vae).save_pretrained(tmp_path / "pipeline")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["diagnose.py", *arguments])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    options = ["--data", str(tiny_images), "--output_dir", str(tmp_path / "out"), "--num_noise_levels", "2"]
    run("--pipeline", str(tmp_path / "pipeline"), *options)
    assert json.loads((tmp_path / "out" / "diagnosis.json").read_text())["settings"]["num_particles"] == 6
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run("--pipeline", str(tmp_path / "nowhere"), *options)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "no pipeline" in lines[0]
