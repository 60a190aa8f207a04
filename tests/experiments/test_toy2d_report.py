import json
import runpy
import sys

import pytest
from processes import ROOT

from latent_dmmd.experiments.toy2d import TARGETS
from latent_dmmd.experiments.toy2d_report import toy_report

SCRIPT = ROOT / "scripts" / "toy2d.py"


def test_refuses_steps_that_do_not_fit():
    with pytest.raises(ValueError, match="multiple of 25"):
        toy_report(num_steps=30)


def test_script(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["toy2d.py", "--output_dir", str(tmp_path / "out"), *arguments])
        runpy.run_path(str(SCRIPT), run_name="__main__")

    with pytest.raises(SystemExit):
        run("--num_steps", "30")
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "multiple of 25" in lines[0] and not (tmp_path / "out").exists()
    run("--num_steps", "25", "--num_particles", "16", "--training_steps", "3", "--num_seeds", "1")
    report = json.loads((tmp_path / "out" / "toy2d.json").read_text())
    assert set(report["targets"]) == set(TARGETS) and len(report["bandwidth"]["gap"]) == 12
    assert (tmp_path / "out" / "toy2d.png").stat().st_size > 10_000
