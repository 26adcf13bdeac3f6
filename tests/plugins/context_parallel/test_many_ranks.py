"""Every family, and every method on Wan, over as many processes as the environment says: ``TILEWISE_RANKS=4,8 pytest`` this file.

Minutes on two cores, so that it is not part of the suite; ``test_ranks.py`` has a few of its cases.
"""

from __future__ import annotations

from typing import Any

import forked_ranks
import many_ranks_cases
import pytest

RANKS = many_ranks_cases.RANKS
NAMES = [f"{name}, {ranks} ranks" for name in many_ranks_cases.cases() for ranks in RANKS] if RANKS else []
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not RANKS, reason="TILEWISE_RANKS says how many processes, such as 4,8"),
]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return forked_ranks.run_cases("many_ranks_cases", 1, timeout=1800)


@pytest.mark.timeout(1900)
@pytest.mark.parametrize("name", NAMES)
def test_many_ranks_equal_one_process(found, name):
    case, _, ranks = name.rpartition(", ")
    if case.removeprefix("Wan: ") in many_ranks_cases.ALL_HEADS:
        assert all(each["kinds"] == ["fallback"] for each in found[name]["said"])
        return
    assert found[name]["error"] is not None, found[name]["said"]
    assert found[name]["error"] <= 1e-5 * max(1, found[name]["largest"])
    said, one = found[name]["said"], found["one process"][case]
    assert [each["calls"] for each in said] == [one["calls"]] * int(ranks.split()[0])
    assert all(each["kinds"] == one["kinds"] for each in said)
