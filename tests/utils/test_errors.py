"""Messages of errors that the user can mend."""

import pytest

from latent_dmmd.utils.errors import did_you_mean, one_line


@pytest.mark.parametrize(
    "name, cutoff, expected",
    [("trian", 0.6, "; did you mean train?"), ("t", 0.6, ""), ("t", 0.3, "; did you mean train?"), ("", 0.6, "")],
)
def test_the_nearest_name_is_suggested_if_it_is_near(name, cutoff, expected):
    assert did_you_mean(name, {"train": 1, "evaluate": 2}, cutoff) == expected


def test_a_message_is_one_line_and_never_empty():
    assert one_line(ValueError("a\n  b")) == "a b" and one_line(KeyError()) == "KeyError"
