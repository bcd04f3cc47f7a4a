"""python -m npu_xent.doctor [--device cpu|npu[:i]] [--json FILE] [--quick]."""

from __future__ import annotations

import argparse
import faulthandler
import re
import sys
import time
from pathlib import Path

import torch

from . import environment
from .report import DEFAULT_FILE, Check, Failure, Report, Result, ending
from .run import run_all

SIMULATED = "SIMULATED: the toolkit's version says that no NPU is behind it. Times and memory below are simulated, too."


def main(arguments: list[str] | None = None) -> int:
    """Runs everything and prints the report. 0: all is right; 1: something is not; 2 is argparse's, for wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m npu_xent.doctor", description="Is everything right? Installation, results, times, in a minute."
    )
    parser.add_argument("--device", type=_device, help="cpu, npu or npu:1; default: an NPU if there is one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE, for programs and reports")
    parser.add_argument("--quick", action="store_true", help="leave out long rows and large shapes")
    options = parser.parse_args(arguments)
    faulthandler.enable()  # a driver that takes the process along leaves a Python stack
    start = time.monotonic()

    device = options.device
    obstacle = environment.import_torch_npu() if device is None or device.type == "npu" else None
    if device is None:
        device = torch.device("cpu" if obstacle else "npu")
        chosen = f"{device.type}, " + (f"because {obstacle}" if obstacle else "because there is one")
    else:
        chosen = f"{device}, as asked for"
    if device.type == "npu" and not obstacle:
        index, count = device.index or 0, torch.npu.device_count()
        if index >= count:
            parser.error(f"argument --device: {device}, but torch_npu sees {count} NPU" + "s" * (count > 1))
        device = torch.device("npu", index)
        torch.npu.set_device(device)
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"argument --json: {options.json.absolute().parent} is not a folder")

    found = environment.gather()
    simulated = device.type == "npu" and environment.is_simulated(found)
    report = Report(str(device), found, simulated, options.quick, chosen)
    _say([f"npu_xent doctor on {chosen}", *([SIMULATED] if simulated else []), "", "environment"])
    _say(environment.lines(found))
    if obstacle and device.type == "npu":
        report.checks.append(Check("environment", "torch_npu sees an NPU", {}, Result(failures=[Failure(obstacle)])))
        report.stopped = "no NPU"
    else:
        run_all(report, device, _say)

    report.seconds = time.monotonic() - start
    file = options.json or (Path(DEFAULT_FILE).absolute() if report.failed else None)
    if file is not None:
        try:
            report.write(file)
        except OSError as error:
            _say([f"{file} could not be written: {error}"])
    _say(["", *ending(report, file)])
    return 1 if report.failed else 0


def _device(text: str) -> torch.device:
    if not re.fullmatch(r"cpu|npu(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of cpu, npu, npu:0, npu:1, ...")
    # Under this name torch knows the device once torch_npu is imported, which is left to main.
    kind, _, index = text.partition(":")
    if kind == "npu":
        environment.import_torch_npu()
    return torch.device(kind, int(index)) if index else torch.device(kind)


def _say(lines: list[str]) -> None:
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    sys.exit(main())
