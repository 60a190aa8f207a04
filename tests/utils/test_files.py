"""What is to be written is checked before the work."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from latent_dmmd.utils.files import check_folder, check_writable, expand_home, nearest_existing, probe


def refused(function, *args, **options):
    """The message of the OSError, which is one line."""
    with pytest.raises(OSError) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())


def test_a_file_that_can_be_written_leaves_no_trace_of_the_check(tmp_path):
    (tmp_path / "old.json").write_text("old")
    for name in ("new.json", "old.json", "a/b/c.json"):
        check_writable(tmp_path / name)
    assert names(tmp_path) == ["old.json"] and (tmp_path / "old.json").read_text() == "old"
    assert not (tmp_path / "a").exists()


def test_a_file_that_cannot_be_written_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("")
    assert "it is a folder; name a file in it" in refused(check_writable, tmp_path)
    assert "file is no folder" in refused(check_writable, tmp_path / "file" / "scores.json")
    assert "no plain file" in refused(check_writable, os.devnull)
    assert "name too long" in refused(check_writable, tmp_path / ("x" * 250))
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert "dangling is no folder" in refused(check_writable, tmp_path / "dangling" / "scores.json")


def test_a_read_only_file_system_is_refused_also_to_a_superuser(tmp_path):
    if not os.path.isdir("/proc/self"):
        pytest.skip("has no /proc")
    assert "cannot write into /proc" in refused(check_writable, "/proc/scores.json")
    assert "cannot write into /proc/a/b" in refused(check_folder, "/proc/a/b")


def test_the_nearest_that_is_there_may_be_a_file_or_a_link_that_leads_nowhere(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for path, nearest in {
        "a/b": ".",
        ".": ".",
        "file/a": "file",
        "dangling": "dangling",
        "dangling/a": "dangling",
    }.items():
        assert nearest_existing(tmp_path / path) == tmp_path / nearest
    monkeypatch.chdir(tmp_path)
    assert nearest_existing("file") == Path("file") and nearest_existing("a/b") == tmp_path


def test_a_probe_leaves_nothing(tmp_path):
    probe(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        probe(tmp_path / "nowhere")


def test_a_tilde_is_expanded_in_the_named_attributes_only(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    config = SimpleNamespace(output_dir="~/x", data="a~b", name="~", absent=None)
    expand_home(config, "output_dir", "data", "absent")
    assert vars(config) == {"output_dir": "/somewhere/x", "data": "a~b", "name": "~", "absent": None}
