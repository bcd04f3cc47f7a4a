"""Feeds bytes to what parses text and files that others write: libFuzzer for Python (atheris), seeded by real samples.

    python tests/fuzz_parsers.py [--seconds 60] [--seed 1] [NAME ...]
    python tests/fuzz_parsers.py NAME --bytes 0a0b...        # one input again

A parser must return, or raise the error that it documents, in time that grows with the size of the input. Without
atheris, the same samples are mutated at random, without looking at the code that is reached.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
LAUNCHERS = ROOT / "cann_sim/cann_sim/toolkit/tools/tikcpp/ascendc_kernel_cmake"
sys.path += [str(ROOT / "examples"), str(ROOT / "cann_sim"), str(LAUNCHERS)]
LONGEST = 1 << 16
SLOWEST = 2.0  # seconds for one input

_FOLDER = tempfile.TemporaryDirectory(prefix="fuzz_parsers")  # in memory, if /tmp is; removed at exit
FOLDER = Path(_FOLDER.name)


class Parser(NamedTuple):
    """A function of bytes that raises for what should not happen, and samples of what it reads."""

    run: Callable[[bytes], object]
    samples: tuple[bytes, ...]


def must(condition: object, seen: object) -> None:
    """Not assert, which a Python with -O leaves out."""
    if not condition:
        raise AssertionError(repr(seen))


def text_of(data: bytes) -> str:
    return data.decode(errors="replace")


def file_of(data: bytes, name: str = "file") -> Path:
    path = FOLDER / name
    path.write_bytes(data)
    return path


# npu_xent's build and loading -----------------------------------------------------------------------------------------


def toolkit_version(data: bytes) -> None:
    from npu_xent import _toolkit

    for name in ("version.cfg", "compiler/version.info"):
        (FOLDER / "toolkit" / name).parent.mkdir(parents=True, exist_ok=True)
        (FOLDER / "toolkit" / name).write_bytes(data)
        found = _toolkit.version(FOLDER / "toolkit")
        (FOLDER / "toolkit" / name).unlink()
        must(found is None or (found and not set(found) & set(" \n],")), found)


def soc_names(data: bytes) -> None:
    from npu_xent import _soc

    text = text_of(data)
    for parse in (_soc.canonical, _soc.parse_list):
        try:
            found = parse(text)
        except ValueError as error:
            must("SoC" in str(error), error)
        else:
            names = (found,) if isinstance(found, str) else found
            must(len(names) > 0 and set(names) <= set(_soc.SUPPORTED), names)
    assert _soc.choose(text, _soc.SUPPORTED) in (None, *_soc.SUPPORTED)


def npu_smi(data: bytes) -> None:
    from npu_xent import _soc

    # What `info -m` and `info -t board` say.
    table, _, board = text_of(data).partition("\f")
    with mock.patch.object(_soc, "npu_smi", lambda *arguments: table if arguments == ("info", "-m") else board):
        assert _soc.detect() in (None, *_soc.SUPPORTED)
    assert _soc.from_board(table) in (None, *_soc.SUPPORTED)


def driver(data: bytes) -> None:
    from npu_xent.doctor import environment

    file, _, smi = data.partition(b"\f")
    with mock.patch.object(environment, "DRIVER", file_of(file)):
        found = environment._driver(text_of(smi))
        assert found is None or found.strip() == found
    with mock.patch.object(environment, "Path", return_value=file_of(data)):
        assert isinstance(environment._processor(), str)


# The doctor's report --------------------------------------------------------------------------------------------------


def values(data: bytes) -> Iterator[Any]:
    """Numbers and strings out of bytes, without end."""
    place = 0
    while True:
        kind = data[place % len(data)] if data else 0
        piece = data[place + 1 : place + 9]
        place += 9
        if kind % 4 == 0:
            yield struct.unpack("d", piece.ljust(8, b"\0"))[0]
        elif kind % 4 == 1:
            yield int.from_bytes(piece, "little", signed=True)
        elif kind % 4 == 2:
            yield piece.decode("utf-8", "surrogateescape")  # as names of files and variables come
        else:
            yield (None, True, [1.5, piece.hex()], {"a": (float("nan"), b"x")})[kind // 4 % 4]


def doctor_report(data: bytes) -> None:
    from npu_xent.doctor import environment
    from npu_xent.doctor.report import Check, Failure, Report, Result, ending

    some = values(data)
    words = [str(next(some)) for _ in range(8)]
    failure = Failure(words[0], words[1], [1, 2], next(some), next(some), next(some))
    result = Result({words[2]: next(some)}, [failure] if len(data) % 2 else [], words[3] or None, [words[4]])
    found = {"logs": words[5], "cann": words[6], "built": {"cann": words[7]}, "any": [next(some)]}
    checks = [Check("numbers", words[6], {words[7]: next(some)}, result, traceback=words[0])]
    report = Report("npu:0" if len(data) % 3 else "cpu", found, environment.is_simulated(found), True, words[1], checks)
    path = FOLDER / "report.json"
    report.write(path)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    read = json.loads(path.read_bytes(), parse_constant=refuse)
    assert read["passed"] == (not report.failed)
    assert read["checks"][0]["name"] == words[6]
    "\n".join(ending(report, path))


# cann_sim -------------------------------------------------------------------------------------------------------------


def sim_report(data: bytes) -> None:
    """A report as the runtime writes it, with any numbers and names, through all that formats it."""
    from cann_sim import _library
    from cann_sim.report import Report, compare, core_table
    from cann_sim.timeline import PIPES, window

    some = values(data)

    def number() -> Any:
        value = next(some)
        return value if isinstance(value, (int, float)) else 0

    def pipes() -> dict[str, Any]:
        return {pipe: number() for pipe in PIPES}

    core = {
        "index": 0,
        "read_bytes": 5,
        "written_bytes": 7,
        "instructions": pipes(),
        "busy_ns": pipes(),
        "time_ns": 1.0,
    }
    result = {
        "cores": [core | {"index": i, "busy_ns": pipes()} for i in range(len(data) % 3)],
        "time_ns": number(),
        "sync_sites": [[str(next(some)), str(next(some)), 3, 4], [str(next(some)), "k.cpp", 1, 2]],
        "trace": [["V", str(next(some)), number(), number(), "k.cpp", 5], ["S", "Add", 0.0, 1.0, "k.cpp", 6]],
    }
    library = object.__new__(_library.KernelLibrary)
    library.path = Path("library.so")
    report = library._report("kernel", 1, result, mock.Mock(trace_core=0))
    must(isinstance(report, Report), report)
    for text in (repr(report), report.table(elements=3, per_core=True), core_table(report)):
        must(text, report)
    compare([report, report], [str(next(some)), "b"])
    window(report.trace, number(), number())
    for labels, elements in ((["a", "b"], None), (None, [0]), (None, [1, 2])):
        with suppress(ValueError):
            compare([report], labels, elements=elements)


def refusals(data: bytes) -> None:
    from cann_sim._refusals import lead

    text = text_of(data)
    assert lead(text).endswith(text)


def launchers(data: bytes) -> None:
    import make_launchers

    try:
        kernels = make_launchers.find_kernels(text_of(data))
    except make_launchers.LauncherError:
        return
    assert make_launchers.wrapper(Path("k.cpp"), kernels)
    assert all(make_launchers.header(kernel) for kernel in kernels)


# The example's files --------------------------------------------------------------------------------------------------


def checkpoint(data: bytes) -> None:
    from lm.checkpoint import DamagedFile, load

    try:
        assert {"step"} <= set(load(file_of(data), ("step",)))
    except DamagedFile as error:
        must(len(str(error)) < 200, error)


def metrics(data: bytes) -> None:
    from lm.report import first_metrics, read_metrics
    from lm.settings import SettingError

    path = file_of(data)
    for read in (read_metrics, lambda path: first_metrics(path, 2)):
        try:
            read(path)
        except SettingError as error:
            must(str(path) in str(error), error)


def corpus_text(data: bytes) -> None:
    from lm.data import read_text

    for most in (len(data) // 2, len(data), len(data) + 1):
        text, size = read_text(file_of(data), most)
        must(isinstance(text, str) and size <= most, size)


def saved(content: dict[str, Any]) -> bytes:
    import torch

    torch.save(content, FOLDER / "saved")
    return (FOLDER / "saved").read_bytes()


BOARD = b"""\tNPU ID                         : 0
\tChip Type                      : Ascend
\tChip Name                      : 910B3
\tBoard ID                       : 0x2
"""
TABLE = b"""\tNPU ID                         Chip ID                        Chip Logic ID                  Chip Name
\t0                              0                              0                              Ascend 910B3
\t0                              1                              -                              Mcu
"""
SMI = b"""+------------------------------------------------------------------------------------------------+
| npu-smi 24.1.rc3                 Version: 24.1.rc3                                              |
| 0     910B3               | OK            | 93.6        36                0    / 0             |
"""
REFUSED = b"""In file included from k.cpp:3:
kernel_operator.h: In instantiation of 'void AscendC::f() [with T = int]':
k.cpp:12:9:   required from here
kernel_operator.h:55:17: error: static assertion failed: cann_sim does not model Sort
k.cpp:14: note: in expansion of macro 'X'
"""
KERNEL = b"""# 1 "k.cpp"
struct alignas(8) Args {
  int n;
};
extern "C" __global__ __aicore__ void add(__attribute__((cce_global)) uint8_t* x, Args args, int32_t n) {
}
"""


def parsers() -> dict[str, Parser]:
    return {
        "toolkit_version": Parser(
            toolkit_version,
            (
                b"toolkit_running_version=[7.6.0.1.220:8.0.0]\nruntime_version=[7.6]\n",
                b"Version=8.5.0\n",
                b"\xff\xfe\n",
            ),
        ),
        "soc_names": Parser(soc_names, (b"ascend910b1;ascend910_9391", b"910B3", b" Ascend910B4-1 ,910b2c", b"310P3")),
        "npu_smi": Parser(npu_smi, (TABLE + b"\f" + BOARD, BOARD, b"\tChip Name : Ascend910\n\tNPU Name : 9362\n")),
        "driver": Parser(
            driver, (b"Version=24.1.rc3\nascendhal_version=7.35\n\f" + SMI, b"\f" + SMI, b"model name\t: x\n")
        ),
        "doctor_report": Parser(doctor_report, (bytes(range(80)), b"\0" * 40, b"\2a\xff\xfe" * 20)),
        "sim_report": Parser(sim_report, (bytes(range(100)), struct.pack("=BdBdBd", 0, 1e300, 0, float("nan"), 1, 5))),
        "refusals": Parser(refusals, (REFUSED, b"k.cpp:1:2: error: cann_sim does not model X\n")),
        "launchers": Parser(launchers, (KERNEL, b"template <typename T>\n__global__ __aicore__ void f(GM_ADDR x) {\n")),
        "checkpoint": Parser(checkpoint, (saved({"step": 3}), saved({"x": [1.5, "a"]}), b"PK\3\4")),
        "metrics": Parser(
            metrics, (b"step,loss,tokens_per_s,peak_mb\n0,3.2,1000,50.5\n1,3.1,1000,50.5\n", b"step\n0,a,b,c\n")
        ),
        "corpus_text": Parser(corpus_text, ("déjà vu\n".encode(), b"\xff", b"a\0b", "€".encode()[:2])),
    }


# Running --------------------------------------------------------------------------------------------------------------


class TooSlow(Exception):
    """An input takes too long."""


@contextmanager
def time_limit() -> Iterator[None]:
    """Raise TooSlow after SLOWEST seconds of CPU time; regular expressions see signals, too."""

    def stop(*_: object) -> None:
        raise TooSlow(f"more than {SLOWEST} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SLOWEST)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def mutated(source: random.Random, samples: tuple[bytes, ...]) -> bytes:
    """A sample with some of its parts changed, repeated, removed or mixed with another's."""
    data = bytearray(source.choice(samples))
    for _ in range(source.randrange(1, 6)):
        at = source.randrange(len(data) + 1)
        size = source.choice((1, 1, 2, 4, 16))
        kind = source.randrange(7)
        if kind == 0:
            data[at : at + size] = source.randbytes(size)
        elif kind == 1:
            del data[at : at + size]
        elif kind == 2:
            data[at:at] = source.choice(
                (b"\n", b" ", b"\0", b"\xff", b"=", b":", b"\xe2\x82\xac", b"9")
            ) * source.choice((1, 2, 100, 20_000))
        elif kind == 3:
            other = source.choice(samples)
            begin = source.randrange(len(other) + 1)
            data[at:at] = other[begin : begin + source.randrange(1, 40)]
        elif kind == 4:
            data[at:at] = data[max(0, at - size) : at] * source.choice((1, 3, 1000))
        elif kind == 5:
            return bytes(data[:at])
        elif data and at < len(data):
            data[at] ^= 1 << source.randrange(8)
    return bytes(data[:LONGEST])


def mutate(name: str, parser: Parser, seed: int, seconds: float, most: int = 10**9) -> tuple[int, bytes | None, str]:
    """The number of inputs, and the one that failed, and how."""
    source, end, count = random.Random(f"{name} {seed}"), time.monotonic() + seconds, 0
    while time.monotonic() < end and count < most:
        data = mutated(source, parser.samples) if count else parser.samples[0]
        count += 1
        try:
            with time_limit():
                parser.run(data)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            return count, data, "".join(traceback.format_exception(error)[-4:])
    return count, None, ""


def with_atheris(name: str, seed: int, seconds: float) -> None:
    """Run libFuzzer in this process, which it ends."""
    import atheris

    modules = ("npu_xent._toolkit", "npu_xent._soc", "npu_xent.doctor.environment", "npu_xent.doctor.report")
    modules += ("cann_sim._library", "cann_sim._refusals", "make_launchers", "lm.checkpoint", "lm.data", "lm.report")
    with atheris.instrument_imports(include=["npu_xent", "cann_sim", "lm", "make_launchers"]):
        for module in modules:
            importlib.import_module(module)
    parser = parsers()[name]
    corpus = FOLDER / "corpus"
    corpus.mkdir()
    for number, sample in enumerate(parser.samples):
        (corpus / str(number)).write_bytes(sample)

    def one(data: bytes) -> None:
        with time_limit():
            parser.run(data)

    options = [f"-max_total_time={max(1, int(seconds))}", f"-seed={seed}", "-rss_limit_mb=2048", f"-max_len={LONGEST}"]
    options += ["-timeout=10", f"-artifact_prefix={FOLDER}/failed-", "-print_final_stats=1", str(corpus)]
    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()


def by_atheris(name: str, seed: int, seconds: float) -> tuple[int, bytes | None, str]:
    """The same results as of mutate, from another process."""
    command = [sys.executable, __file__, name, "--atheris", "--seconds", str(seconds), "--seed", str(seed)]
    try:
        process = subprocess.run(command, capture_output=True, errors="replace", timeout=seconds + 120)
    except subprocess.TimeoutExpired:
        return 0, b"", "it does not end"
    said = process.stdout + process.stderr
    count = next((int(line.split(":")[-1]) for line in said.splitlines() if "number_of_executed_units" in line), 0)
    if process.returncode == 0:
        return count, None, "" if count else "no input ran"
    files = [Path(line.split()[-1]) for line in said.splitlines() if "Test unit written to" in line]
    data = files[0].read_bytes() if files and files[0].is_file() else b""
    return count, data, said[-4000:]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bytes", type=bytes.fromhex, help="run this input alone")
    parser.add_argument("--file", type=Path, help="run the bytes of this file alone")
    parser.add_argument("--atheris", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.atheris:
        with_atheris(options.names[0], options.seed, options.seconds)
        return 0
    found = parsers()
    names = options.names or list(found)
    if options.file is not None:
        options.bytes = options.file.read_bytes()
    if options.bytes is not None:
        with time_limit():
            found[names[0]].run(options.bytes)
        print(f"{names[0]}: right")
        return 0
    guided = importlib.util.find_spec("atheris") is not None
    if not guided:
        print("atheris is not installed: samples are mutated without looking at the code that is reached")
    failed = 0
    for name in names:
        share = options.seconds / len(names)
        count, data, why = (
            by_atheris(name, options.seed, share) if guided else mutate(name, found[name], options.seed, share)
        )
        print(f"  {name:<20}{count:>10} inputs" + (", FAILED" if why else ""), flush=True)
        if why:
            failed += 1
            data = data or b""
            kept = f"--bytes {data.hex()}"
            if len(data) >= 500:
                file = Path(tempfile.gettempdir(), f"fuzz_parsers_failed_{name}")
                file.write_bytes(data)
                kept = f"--file {file}"
            again = f"python tests/fuzz_parsers.py {name} {kept}"
            print(f"{why}\n  {len(data)} bytes: {data[:300]!r}\n  again: {again}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
