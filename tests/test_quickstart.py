"""The notebook runs, and its outputs are those of a run."""

import json
import re

import pytest
from processes import ROOT, Child

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
FEWER = {
    r'(num_steps"): 100': r"\1: 2",
    r"num_inference_steps=\d+": "num_inference_steps=2",
    r"(trained|pipe)\(32": r"\1(8",
    r"examples\((200|64)": "examples(8",
}


def cells():
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def run_notebook(source, folder):
    result = Child(source, folder=folder).wait(900)
    assert result.returncode == 0, result.stderr
    assert "two real sets" in result.stdout


@pytest.fixture
def source():
    pytest.importorskip("elpv_dataset")
    return "\n".join("".join(cell["source"]) for cell in cells())


@pytest.mark.long
def test_the_notebook_runs_with_fewer_steps(source, tmp_path):
    for pattern, replacement in FEWER.items():
        source, count = re.subn(pattern, replacement, source)
        assert count
    run_notebook(source, tmp_path)


@pytest.mark.long
def test_the_notebook_runs_in_full(source, tmp_path):
    run_notebook(source, tmp_path)


def test_the_outputs_of_the_notebook_are_whole_and_small():
    assert NOTEBOOK.stat().st_size < 1_500_000
    counts = [cell["execution_count"] for cell in cells()]
    assert counts == list(range(1, len(counts) + 1))
    assert not any(output["output_type"] == "error" for cell in cells() for output in cell["outputs"])
    assert "two real sets" in "".join(cells()[-1]["outputs"][-1]["text"])
