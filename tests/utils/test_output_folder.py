"""A folder of numbered images holds those of one call, and files of others stay."""

import json

import pytest
from test_files import names, refused

from latent_dmmd.utils.files import PROBE, aside_of
from latent_dmmd.utils.output_folder import ASIDE, MANIFEST, OutputFolder


def writes(*files):
    """A function that writes these files, each with its own name in it."""

    def write(folder):
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)

    return write


@pytest.mark.parametrize("before", ["missing", "empty", "emptied"])
def test_an_output_folder_is_missing_or_empty(before, tmp_path):
    folder = tmp_path / "a" / "out"
    if before != "missing":
        (folder / "images").mkdir(parents=True)
    if before == "emptied":
        (folder / MANIFEST).write_text('{"files": ["grid.png"]}')
    OutputFolder(folder).fill(writes("grid.png", "images/00000.png"))
    assert names(folder) == [MANIFEST, "grid.png", "images/00000.png"]
    assert json.loads((folder / MANIFEST).read_text()) == {"files": ["grid.png", "images/00000.png"]}


def test_a_second_call_is_refused_or_replaces_the_first(tmp_path):
    folder = tmp_path / "out"
    OutputFolder(folder).fill(writes("grid.png", *(f"images/{i:05d}.png" for i in range(6))))
    assert "out already holds grid.png; name another --output_dir, or pass --overwrite" in refused(OutputFolder, folder)
    OutputFolder(folder, overwrite=True).fill(writes("grid.png", *(f"images/{i:05d}.png" for i in range(4))))
    assert names(folder) == [MANIFEST, "grid.png", *(f"images/{i:05d}.png" for i in range(4))]
    OutputFolder(folder, overwrite=True).fill(writes("00000.png"))
    assert names(folder) == [MANIFEST, "00000.png"] and not (folder / "images").exists()


@pytest.mark.parametrize("foreign", ["notes.txt", "images/00001.png", "linked"])
def test_files_of_others_are_never_removed(foreign, tmp_path):
    folder = tmp_path / "out"
    OutputFolder(folder).fill(writes("images/00000.png"))
    if foreign == "linked":
        (folder / foreign).symlink_to(tmp_path)
    else:
        (folder / foreign).write_text("mine")
    before = names(folder)
    assert "already holds" in refused(OutputFolder, folder)
    assert f"out holds {foreign}, which no earlier call wrote" in refused(OutputFolder, folder, overwrite=True)
    assert names(folder) == before


def test_numbered_images_without_a_list_are_of_others(tmp_path):
    (tmp_path / "00000.png").write_text("a photograph")
    assert "holds 00000.png, which no earlier call wrote" in refused(OutputFolder, tmp_path, overwrite=True)
    (tmp_path / MANIFEST).write_text("[]")
    assert "holds 00000.png, which no earlier call wrote" in refused(OutputFolder, tmp_path, overwrite=True)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_call_that_fails_leaves_the_folder_as_it_was(error, tmp_path):
    folder = tmp_path / "out"
    OutputFolder(folder).fill(writes("images/00000.png"))

    def fail(aside):
        writes("images/00000.png", "images/00001.png")(aside)
        raise error

    with pytest.raises(type(error)):
        OutputFolder(folder, overwrite=True).fill(fail)
    assert names(folder) == [MANIFEST, "images/00000.png"]


def test_what_a_killed_call_left_makes_way(tmp_path):
    writes(f"{ASIDE}/images/00000.png", f"{ASIDE}/images/00001.png")(tmp_path)
    OutputFolder(tmp_path).fill(writes("images/00000.png"))
    assert names(tmp_path) == [MANIFEST, "images/00000.png"]


def test_two_calls_at_once_do_not_mix(tmp_path):
    first, second = OutputFolder(tmp_path), OutputFolder(tmp_path)
    first.fill(writes("images/00000.png"))
    assert "was written by another call meanwhile" in refused(second.fill, writes("images/00000.png", "grid.png"))
    assert names(tmp_path) == [MANIFEST, "images/00000.png"]


def test_a_process_that_looks_at_the_same_time_is_no_output(tmp_path):
    aside_of(tmp_path / PROBE).touch()
    OutputFolder(tmp_path)
