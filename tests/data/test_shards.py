"""A shard is whole or named; the cache itself is tested with what it holds, in test_particles and test_pixels."""

import pytest
import torch
from conftest import refusal
from safetensors.torch import save_file

from latent_dmmd.data.shards import none_readable, stored_shard


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
