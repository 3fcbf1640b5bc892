"""What a dry run tells of the time."""

import pytest

from minirlhf.run.dry_run import duration


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0.4, "0 s"), (99.4, "99 s"), (100, "2 min"), (5960, "99 min"), (6000, "1 h 40 min"),
        (47 * 3600 + 300, "47 h 05 min"), (100 * 3600, "4 d 4 h"),
    ],
)
def test_duration_in_the_units_that_one_waits_in(seconds, told):
    assert duration(seconds) == told
