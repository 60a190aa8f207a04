"""What is to be written is checked before the work."""

import os

import pytest

from latent_dmmd.utils.files import check_folder, check_writable


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
