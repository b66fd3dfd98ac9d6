"""Numbers as people read them."""

from __future__ import annotations

import pytest

from moeprof.replay.wording import percent, percent_range, points


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (0.916, "92%"),
        (0.012, "1.2%"),
        (-0.012, "-1.2%"),
        (0.0, "0%"),
        (-0.0001, "0%"),
        (1.5, "150%"),
    ],
)
def test_shares(share, said):
    assert percent(share) == said


def test_nothing_has_no_sign():
    assert points(-0.0001) == "0.0 points"
    assert percent_range(-0.0002, 0.0002) == "0.0 to 0.0%"
