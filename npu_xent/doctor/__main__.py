"""python -m npu_xent.doctor [--device cpu|npu[:i]] [--json FILE] [--quick]."""

from __future__ import annotations

import argparse
import faulthandler
import os
import re
import sys
import time
from pathlib import Path

import torch

from . import environment
from .report import DEFAULT_FILE, Check, Failure, Report, Result, ending
from .run import run_all

SIMULATED = "SIMULATED: the toolkit's version names a simulator. Times and memory below are simulated, too."

NO_CANN = (
    "Install torch_npu of torch's release, and source the set_env.sh of CANN before Python starts; to check on a "
    "simulated NPU instead, install cann_sim and run python -m cann_sim -m npu_xent.doctor"
)


def main(arguments: list[str] | None = None) -> int:
    """Run all checks and print the report. Returns 0 if all pass and 1 if not; argparse exits with 2 on wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m npu_xent.doctor", description="Checks the installation, results and times of npu_xent."
    )
    parser.add_argument("--device", type=_device, help="cpu, npu or npu:1; default: an NPU if there is one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the full report to FILE, as JSON")
    parser.add_argument("--quick", action="store_true", help="leave out long rows and large shapes")
    options = parser.parse_args(arguments)
    if options.json is not None and (unfit := _unfit_for_a_file(options.json.absolute())):
        parser.error(f"argument --json: {unfit}")
    start = time.monotonic()

    asked = options.device
    obstacle = None if asked == "cpu" else environment.import_torch_npu()
    way_out = f". {NO_CANN}" if obstacle and not environment.has_cann() else ""
    chosen = f"{asked}, as asked for"
    if asked is None:
        asked = "cpu" if obstacle else "npu"
        chosen = f"{asked}, because {obstacle or 'there is one'}"
    on_npu = asked != "cpu"
    if on_npu and not obstacle:
        asked = asked if ":" in asked else "npu:0"
        count = environment.npu().device_count()
        if int(asked[4:]) >= count:
            parser.error(f"argument --device: {asked}, but torch_npu sees {count} NPU" + "s" * (count > 1))
        obstacle = environment.use_npu(asked)

    found = environment.gather()
    simulated = on_npu and not obstacle and environment.is_simulated(found)
    report = Report(asked, found, simulated, options.quick, chosen)
    _say([f"npu_xent doctor on {chosen}", *([SIMULATED] if simulated else []), "", "environment"])
    _say(environment.lines(found))
    if on_npu and obstacle:
        report.checks.append(
            Check("environment", "there is an NPU to use", {}, Result(failures=[Failure(obstacle + way_out)]))
        )
        report.stopped = "no NPU"
    else:
        run_all(report, torch.device(asked), _say)

    report.seconds = time.monotonic() - start
    file = options.json or (Path(DEFAULT_FILE).absolute() if report.failed else None)
    if file is not None:
        try:
            report.write(file)
        except OSError as error:
            _say([f"{file} could not be written: {error}"])
            file = None
    _say(["", *ending(report, file)])
    return 1 if report.failed else 0


def _device(text: str) -> str:
    """Check a device's name. It stays a string, because torch knows `npu` only after importing torch_npu."""
    if not re.fullmatch(r"cpu|npu(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of cpu, npu, npu:0, npu:1, ...")
    return text


def _unfit_for_a_file(path: Path) -> str | None:
    """Return why the report cannot be written to `path`, as far as that can be checked beforehand; else None."""
    if not path.parent.is_dir():
        return f"{path.parent} is not a folder"
    if path.is_dir():
        return f"{path} is a folder; name a file"
    return None if os.access(path if path.exists() else path.parent, os.W_OK) else f"{path} cannot be written"


def _say(lines: list[str]) -> None:
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    faulthandler.enable()  # if a driver crashes the process, print the Python stack
    sys.exit(main())
