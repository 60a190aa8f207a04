"""Imports run one way, and the README says what is true."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# a module or room may import those above it
ORDER = [
    "utils",
    "nn",
    "kernels",
    "forward",
    "discrepancy",
    "embeddings",
    "embedding_sources",
    "features",
    "objective",
    "schedule",
    "flow",
    "calibration",
    "baselines",
    "data",
    "latent_pipeline",
    "pipeline",
    "editing",
    "distillation",
    "methods",
    "metrics",
    "training",
    "experiments",
    "apps",
    "commands",
    "__main__",
]
MAX_LINES = 60


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def sources():
    return sorted(p for p in (ROOT / "latent_dmmd").rglob("*.py") if "assets" not in p.parts)


def test_imports_run_one_way():
    modules = {p: p.relative_to(ROOT / "latent_dmmd").parts[0].removesuffix(".py") for p in sources()}
    assert set(modules.values()) - {"__init__"} == set(ORDER)
    for path, room in modules.items():
        for imported in imports_of(path):
            if imported.startswith("latent_dmmd.") and room != "__init__":
                other = imported.split(".")[1]
                assert other == room or ORDER.index(other) < ORDER.index(room), f"{path} imports {imported}"


def lines_without_docstring(function):
    """Lines of a function's body."""
    body = function.body[ast.get_docstring(function) is not None :]
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def test_a_function_fits_one_screen():
    long = {
        f"{path.relative_to(ROOT / 'latent_dmmd').as_posix()}: {node.name}"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and lines_without_docstring(node) > MAX_LINES
    }
    assert long == set(), f"more than {MAX_LINES} lines: split them"


def test_a_module_has_fewer_than_400_lines():
    for path in sources():
        assert len(path.read_text().splitlines()) < 400, path


def test_own_code_does_not_import_torchvision():
    for path in [*sources(), *(ROOT / "scripts").glob("*.py")]:
        assert not any(name.split(".")[0] == "torchvision" for name in imports_of(path)), path


def test_scripts_are_thin():
    for path in (ROOT / "scripts").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 60, path


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_configs_parse(path):
    from latent_dmmd.experiments.compare import CompareConfig, Comparison
    from latent_dmmd.training.autoencoder.config import AutoencoderTrainingConfig
    from latent_dmmd.training.config import Config, parse_config

    if path.name.startswith("compare_"):
        Comparison(parse_config(CompareConfig, ["--config", str(path), "--num_steps", "1"]))
    elif path.name.startswith("autoencoder_"):
        parse_config(AutoencoderTrainingConfig, ["--config", str(path)])
    else:
        parse_config(Config, ["--config", str(path)])
