"""Runs every test suite, whatever fails in another one, and ends with a line for each: the whole of `make test`."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "tests"

# The suites by name: the folder to run in, and the arguments of Python.
SUITES = {
    "cpu": (ROOT, ["-m", "pytest", "-n", "auto"]),
    "npu": (ROOT, ["-m", "cann_sim", "-m", "pytest", "--device", "npu", "tests"]),
    "cann_sim": (ROOT / "cann_sim", ["-m", "pytest", "-n", "auto"]),
}


class Suite:
    """A suite under way. Its output goes to the terminal, or into a log that `join` prints."""

    def __init__(self, name: str, *, logged: bool = False) -> None:
        folder, arguments = SUITES[name]
        self.name, self.logged = name, logged
        self.report, self.log = LOGS / f"{name}.xml", LOGS / f"{name}.log"
        self.report.unlink(missing_ok=True)
        if not logged:
            print(f"== Tests: {name}", flush=True)
        with self.log.open("w") as log:
            output = log if logged else None
            command = [sys.executable, *arguments, f"--junitxml={self.report}"]
            self.process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output)

    def join(self) -> Suite:
        self.process.wait()
        if self.logged:
            print(f"== Tests: {self.name}", self.log.read_text(errors="replace"), sep="\n", flush=True)
        return self

    def summary(self) -> list[str]:
        """How many tests passed, and an exit code that they do not explain."""
        lines, failed, code = [], 0, self.process.returncode
        if self.report.exists():
            counts = xml.etree.ElementTree.parse(self.report).find("testsuite").attrib
            tests, skipped = int(counts["tests"]), int(counts["skipped"])
            failed = int(counts["failures"]) + int(counts["errors"])
            lines.append(f"{self.name}: {tests - failed - skipped} passed, {failed} failed, {skipped} skipped")
        if code != (1 if failed else 0) or not lines:
            lines.append(f"{self.name}: exit code {code}" + ("" if lines else ", and no report of the tests"))
        return lines


def main() -> int:
    LOGS.mkdir(parents=True, exist_ok=True)
    done = [Suite("cpu").join()]
    beside = Suite("cann_sim", logged=True)  # the suite on the simulated NPU is one process, and leaves a core to it
    done += [Suite("npu").join(), beside.join()]
    print("== Summary", *(line for suite in done for line in suite.summary()), sep="\n", flush=True)
    return int(any(suite.process.returncode for suite in done))


if __name__ == "__main__":
    sys.exit(main())
