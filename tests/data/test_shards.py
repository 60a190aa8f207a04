"""A shard is whole or named; the cache itself is tested with what it holds, in test_particles and test_pixels."""

import os
from pathlib import Path

import pytest
import torch
from conftest import refusal
from safetensors.torch import save_file

from latent_dmmd.data.shards import begin_cache, check_manifest, none_readable, stored_shard


def read(path):
    with stored_shard(path, "it encoded") as (tensors, metadata):
        return tensors["a"].tolist(), metadata["skipped"]


def test_a_shard_holds_tensors_and_metadata(tmp_path):
    save_file({"a": torch.arange(3)}, tmp_path / "shard", metadata={"skipped": '["b.png"]'})
    assert read(tmp_path / "shard") == ([0, 1, 2], ["b.png"])


@pytest.mark.parametrize("metadata", [None, {"skipped": "["}, {"sums": "[]"}])
def test_a_shard_that_lacks_something_is_named(tmp_path, metadata):
    save_file({"a": torch.arange(3)}, tmp_path / "shard", metadata=metadata)
    assert refusal(read, tmp_path / "shard") == f"{tmp_path / 'shard'} is damaged; delete it to have it encoded again"


def test_the_first_of_the_skipped_images_is_named_if_there_is_one():
    assert str(none_readable(["a.png", "b.png"])) == "none of the 2 images could be read; the first is a.png"
    assert str(none_readable([])) == "none of the 0 images could be read"


def test_a_folder_that_can_hold_no_cache_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    assert refusal(check_manifest, tmp_path / "file", {}).endswith("file is a file; pass another --data.cache_dir")
    other = tmp_path / os.fsdecode(b"caf\xe9")  # safetensors would write shards that it cannot read
    assert refusal(check_manifest, other, {}).endswith(r"caf\xe9 is not UTF-8; pass another --data.cache_dir")
    for folder in (tmp_path / "file" / "cache", "/proc/cache"):
        with pytest.raises(OSError, match=r"cannot write into [^\n]+; pass another --data.cache_dir$"):
            begin_cache(Path(folder), {})


@pytest.mark.parametrize("found", ["{", "[]", "null", '{"vae": 2}'])
def test_a_manifest_of_something_else_names_what_is_other(tmp_path, found):
    (tmp_path / "manifest.json").write_text(found)
    told = f"the latent cache in {tmp_path} was made with another vae; delete it or pass another --data.cache_dir"
    assert refusal(check_manifest, tmp_path, {"vae": 1}) == told
