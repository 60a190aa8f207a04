"""What README and docs say is true: commands parse, names exist, links resolve, snippets run anywhere."""

import importlib
import re
import runpy
import shlex
import sys
from functools import partial
from pathlib import Path

import jsonargparse
import pytest
from processes import ROOT

import latent_dmmd.__main__
from latent_dmmd.commands import COMMANDS
from latent_dmmd.training.config import Config, key_names, parse_config

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TESTS = {
    name
    for path in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
}


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)


def command_of(words):
    """The module of a command and its arguments, for a script, `latent-dmmd` or `-m latent_dmmd`; None for others."""
    for i, word in enumerate(words):
        if word.startswith("scripts/"):
            return Path(word).stem, words[i + 1 :]
        if word == "latent-dmmd" or (word == "latent_dmmd" and words[i - 1] == "-m"):
            return words[i + 1], words[i + 2 :]
    return None


def commands():
    """Page, command and arguments of everything of ours that a page runs, and the examples of `latent-dmmd --help`."""
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                for command in re.split(r"&&|\|", line.split(" #")[0]):
                    found = command_of(shlex.split(command, comments=True))
                    if found is not None:
                        yield page.name, *found
    for command in COMMANDS.values():
        yield "help", *command_of(["latent-dmmd", *shlex.split(command.example)])


class Parsed(BaseException):
    """Raised in place of a command's work."""


@pytest.mark.parametrize(
    "name, arguments", [pytest.param(*c[1:], id=f"{c[0]}: {' '.join([c[1], *c[2]])[:70]}") for c in commands()]
)
def test_commands_parse(name, arguments, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    if name.startswith("--"):
        monkeypatch.setattr(sys, "argv", ["latent-dmmd", name, *arguments])
        latent_dmmd.__main__.main()
        assert capsys.readouterr().out
        return
    if name in ("train_latent", "train") and "--print_config" not in arguments:
        parse_config(Config, arguments)
        return
    original = jsonargparse.ArgumentParser.parse_args

    def parse_args(self, *args, **kwargs):
        original(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(jsonargparse.ArgumentParser, "parse_args", parse_args)
    if (script := ROOT / "scripts" / f"{name}.py").exists():
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        start = partial(runpy.run_path, str(script), run_name="__main__")
    else:
        monkeypatch.setattr(sys, "argv", ["latent-dmmd", name, *arguments])
        start = latent_dmmd.__main__.main
    with pytest.raises((Parsed, SystemExit)) as end:
        start()
    assert end.type is Parsed or end.value.code == 0


def resolves(name):
    """Whether a dotted name is a module of the package or something in it."""
    parts = name.removeprefix("latent_dmmd.").split(".")
    for n in range(len(parts), -1, -1):
        try:
            found = importlib.import_module(".".join(["latent_dmmd", *parts[:n]]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            annotations = getattr(found, "__annotations__", {})
            if not hasattr(found, part) and part not in annotations:
                return False
            found = getattr(found, part, None)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_names_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    rooms = {p.stem for p in (ROOT / "latent_dmmd").iterdir()} | {"latent_dmmd"}
    keys = {key.removeprefix("--") for key in key_names(Config)}
    unknown = []
    for name in re.findall(r"`((?:\w+\.)+\w+)(?:\(.*?\))?`", text):
        first, *_, last = name.split(".")
        public = first in latent_dmmd.__all__  # a class that is named without its module
        if name in keys or not (first in rooms or public) or last in ("py", "md", "yaml", "json", "jsonl", "png"):
            continue
        if not resolves(name):
            unknown.append(name)
    unknown += [name for name in re.findall(r"\btest_\w+", text) if name not in TESTS and not named_file(name)]
    assert not unknown


def named_file(name):
    return any((ROOT / "tests").rglob(f"{name}.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_relative_links_resolve(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, link


def test_snippets_run_anywhere(tmp_path, monkeypatch):
    """The README's Python from an empty directory."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    snippets = blocks(ROOT / "README.md", "python")
    assert snippets
    for snippet in snippets:
        exec(compile(snippet.replace("OUTPUT", str(tmp_path)), "README.md", "exec"), {})


def test_the_readme_invites():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    for command in (
        'pip install -e ".[demo]" && accelerate launch scripts/train_latent.py',
        'pip install -e ".[demo,test]" && pytest',
    ):
        assert f"```sh\n{command}\n```" in text
