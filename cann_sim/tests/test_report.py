"""Reports: counted bytes and instructions, simulated time against published measurements, tables and timelines."""

from __future__ import annotations

import functools
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cann_sim
from cann_sim.report import PIPES, CoreReport, Event, Report, SyncSite, compare
from cann_sim.timeline import MAX_EVENTS, window

TILE = 15360  # two buffers of 30 KiB for each of three tensors: what UB has room for
SOURCE = Path(__file__).parent / "kernels" / "streaming_add.cpp"


@functools.cache
def library(buffers: int = 2, tile: int = TILE) -> cann_sim.KernelLibrary:
    return cann_sim.compile(SOURCE, defines=(f"BUFFERS={buffers}", f"TILE={tile}"))


def add(tiles: int, cores: int, *, buffers: int = 2, tile: int = TILE, **config: object) -> Report:
    x = np.ones(tiles * tile, np.float16)
    z = np.zeros_like(x)
    report = library(buffers, tile).launch(
        "streaming_add", cores, x, x, cann_sim.Uninit(z), tiles, config=cann_sim.Config(**config)
    )
    assert (z == 2).all()
    return report


def test_bytes_and_instructions_are_counted() -> None:
    report = add(10, 4)
    assert (report.kernel, report.blocks, len(report.cores)) == ("streaming_add", 4, 4)
    assert report.read_bytes == 2 * 10 * TILE * 2
    assert report.written_bytes == 10 * TILE * 2
    assert [core.index for core in report.cores] == [0, 1, 2, 3]
    for core, tiles in zip(report.cores, (2, 3, 2, 3), strict=True):
        assert (core.read_bytes, core.written_bytes) == (2 * tiles * TILE * 2, tiles * TILE * 2)
        assert (core.instructions["MTE2"], core.instructions["MTE3"]) == (2 * tiles, tiles)
        assert core.instructions["V"] >= tiles
        assert 0 < core.time_ns <= report.time_ns
        assert all(0 <= core.busy_ns[pipe] <= core.time_ns * (1 + 1e-9) for pipe in PIPES)
    assert report.time_ns == pytest.approx(max(core.time_ns for core in report.cores))


def test_a_report_prints_as_one_line() -> None:
    assert re.fullmatch(r"<Report of streaming_add: 4 blocks, \d+\.\d us, MTE2 busy \d+\.\d%>", str(add(10, 4)))
    assert ": 1 block, " in repr(add(1, 1))


def test_a_core_without_work_is_not_counted_as_idle() -> None:
    busy, idle = add(8, 8), add(8, 16)
    assert (idle.working_cores, idle.blocks) == (8, 16)
    assert idle.busiest()[0] == busy.busiest()[0] == "MTE2"


def test_the_same_launch_takes_the_same_time() -> None:
    assert add(12, 5, threads=1).time_ns == add(12, 5, threads=3).time_ns == add(12, 5, check=False).time_ns


def test_time_follows_the_bandwidth() -> None:
    """A streaming kernel takes half the time at twice the bandwidth; latencies do not scale."""
    half, nominal, twice = (add(48 * 24, 48, check=False, bandwidth_scale=scale) for scale in (0.5, 1, 2))
    assert half.time_ns / nominal.time_ns == pytest.approx(2, rel=0.03)
    assert nominal.time_ns / twice.time_ns == pytest.approx(2, rel=0.06)
    assert all(report.busy_share()["MTE2"] > 0.85 for report in (half, nominal, twice))


def test_time_follows_the_vector_unit_when_that_is_the_limit() -> None:
    slow, slower = (add(40, 1, check=False, vector_scale=scale) for scale in (1 / 32, 1 / 64))
    assert slow.busiest()[0] == slower.busiest()[0] == "V"
    assert slower.time_ns / slow.time_ns == pytest.approx(2, rel=0.05)


def test_scale_from_the_environment() -> None:
    """The environment is read by the library, so that programs that know nothing of Config can be scaled."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_report; print(test_report.add(96, 48).time_ns)"
    times = [
        float(
            subprocess.run(
                [sys.executable, "-c", code, str(Path(__file__).parent)],
                env={**os.environ, "CANN_SIM_BANDWIDTH_SCALE": scale},
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for scale in ("1", "0.5")
    ]
    assert times[1] / times[0] == pytest.approx(2, rel=0.15)


@pytest.mark.parametrize(
    ("buffers", "tile", "cores", "tiles", "published_us"),
    [
        pytest.param(1, 4096, 1, 64, 6909.14, id="one-core-8-KiB"),
        pytest.param(1, 16384, 48, 48 * 20, 261.5, id="48-cores-single-buffer"),
        pytest.param(2, TILE, 48, 48 * 20, 257.56, id="48-cores-double-buffer"),
    ],
)
def test_simulated_time_is_near_the_published_one(
    buffers: int, tile: int, cores: int, tiles: int, published_us: float
) -> None:
    """Add of 8192 x 8192 half on Atlas A2: times as published (variants 1, 3, 4), for a part of the matrix."""
    report = add(tiles, cores, buffers=buffers, tile=tile, check=False)
    part = tiles * tile / 8192**2
    print(f"{report.time_ns / 1e3 / part:.1f} us simulated, {published_us} us published")
    assert report.time_ns / 1e3 == pytest.approx(published_us * part, rel=0.15)


def made_report(cores: int = 2) -> Report:
    one = {"S": 10, "V": 20, "MTE2": 4, "MTE3": 2}
    busy = {"S": 50.0, "V": 600.0, "MTE2": 900.0, "MTE3": 300.0}
    rows = [CoreReport(i, 4000, 2000, one, busy, 1000.0) for i in range(cores)]
    rows.append(CoreReport(cores, 0, 0, {"S": 2}, {"S": 10.0}, 10.0))
    return Report("made", cores + 1, rows, 1000.0, sync_sites=[SyncSite(0, "PipeBarrier", "k.cpp", 3, 7)])


def test_sums_and_shares() -> None:
    report = made_report()
    assert (report.read_bytes, report.written_bytes, report.working_cores) == (8000, 4000, 2)
    assert report.instructions == {"S": 22, "V": 40, "MTE2": 8, "MTE3": 4}
    assert report.busy_share() == pytest.approx({"S": 0.05, "V": 0.6, "MTE2": 0.9, "MTE3": 0.3})
    assert report.busiest() == ("MTE2", pytest.approx(0.9))
    assert report.rate_gbps == pytest.approx(12.0)


def test_table() -> None:
    head, _, *rows = [re.split(r"  +", line) for line in made_report().table(elements=2000).splitlines()]
    assert head == ["", "made"]
    lines = dict(rows)
    assert lines["cores with work / launched"] == "2 / 3"
    assert lines["simulated time, us"] == "1.0"
    assert lines["GM read, MB"] == "0.008"
    assert lines["read bytes / element"] == "4.000"
    assert lines["written bytes / element"] == "2.000"
    assert lines["V (vector) instructions"] == "40"
    assert lines["MTE2 (GM to UB) busy"] == "90.0%"
    assert lines["busiest pipe"] == "MTE2 90.0%"


def test_table_of_cores_and_of_several_launches() -> None:
    per_core = made_report().table(per_core=True).split("\n\n")[1].splitlines()
    assert [line.split()[0] for line in per_core[2:]] == ["0", "1", "2"]
    assert "90.0%" in per_core[2]
    both = compare([made_report(), made_report(1)], ["two cores", "one core"]).splitlines()
    assert re.split(r"  +", both[0]) == ["", "two cores", "one core"]
    assert len({len(line) for line in both}) == 1


def test_table_of_an_empty_launch() -> None:
    assert "0.0" in Report("nothing", 0, [], 0.0).table(per_core=True)


def events(count: int) -> list[Event]:
    return [Event("V", ("Exp", "Adds")[i % 2], 10.0 * i, 10.0 * i + 8, "k.cpp", i) for i in range(count)]


def test_window_of_a_trace() -> None:
    assert [event.line for event in window(events(10), 25, 45)[0]] == [2, 3, 4]
    assert window(events(10), None, None) == (events(10), False)
    shown, cut = window(events(MAX_EVENTS + 5), None, None)
    assert (len(shown), cut) == (MAX_EVENTS, True)


def test_timeline(tmp_path: Path) -> None:
    report = add(12, 2, trace_core=1)
    assert {event.pipe for event in report.trace} >= {"V", "MTE2", "MTE3"}
    assert {event.name for event in report.trace} >= {"Add", "DataCopy"}
    for pipe in ("V", "MTE2", "MTE3"):
        lane = sorted((event.start_ns, event.end_ns) for event in report.trace if event.pipe == pipe)
        assert all(before[1] <= after[0] + 1e-6 for before, after in itertools.pairwise(lane)), pipe
        assert sum(end - start for start, end in lane) == pytest.approx(report.cores[1].busy_ns[pipe], rel=1e-4)
    for options in ({}, {"start_ns": 1000, "end_ns": 5000}, {"core": 1}):
        picture = tmp_path / "timeline.png"
        report.timeline(picture, **options)
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size < 200_000
        picture.unlink()


def test_timeline_needs_a_trace(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trace_core=0"):
        add(2, 1).timeline(tmp_path / "t.png")
    with pytest.raises(ValueError, match="core 1 was"):
        add(2, 2, trace_core=1).timeline(tmp_path / "t.png", core=0)
    with pytest.raises(ValueError, match="nothing happened"):
        add(2, 1, trace_core=0).timeline(tmp_path / "t.png", start_ns=1e9)
