"""Losses over sharded classes and of DTensors, on one to four ranks of gloo.

Every case of distributed_ranks.py and of dtensor_ranks.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import distributed_ranks
import dtensor_ranks
import pytest
import torch.distributed as dist
from processes import run_ranks
from rank_traffic import MOST, documented, formulas

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"),
]

Found = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module", params=[1, 2, 3, 4], ids="{} ranks".format)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What each rank found, by program and case. All cases of a program and a number of ranks share one launch."""
    programs = (distributed_ranks, dtensor_ranks)
    return {
        program.__name__: run_ranks(program.__file__, request.param, tmp_path_factory.mktemp(program.__name__))
        for program in programs
    }


def check(case: str, found: list[dict[str, Any]]) -> None:
    """Right, and the same bits on all ranks and in a second run."""
    for rank, of_rank in enumerate(found):
        assert of_rank[case]["error"] == "", f"rank {rank}: {of_rank[case]['error'][-3000:]}"
    assert len({of_rank[case]["bits"] for of_rank in found}) == 1, "ranks differ"


@pytest.mark.parametrize("case", distributed_ranks.CASES)
def test_sharded(case: str, found: Found) -> None:
    check(case, found["distributed_ranks"])


@pytest.mark.parametrize("case", dtensor_ranks.CASES)
def test_dtensor(case: str, found: Found) -> None:
    check(case, found["dtensor_ranks"])


def test_the_traffic_of_eight_ranks(tmp_path: Path) -> None:
    """As the page says; the test above compares that of fewer ranks."""
    for rank, of_rank in enumerate(run_ranks(distributed_ranks.__file__, MOST, tmp_path, "traffic")):
        assert of_rank["traffic"]["error"] == "", f"rank {rank}: {of_rank['traffic']['error'][-3000:]}"


def test_the_page_has_the_traffic_of_more_ranks() -> None:
    """By the formulas that the ranks are compared with."""
    page = documented()
    assert list(page) == [1, 2, 3, 4, 8, 16, 64, 256, 1024]
    assert page == {ranks: formulas(ranks) for ranks in page}
