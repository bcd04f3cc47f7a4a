"""Runs every test suite, whatever fails in another one, and ends with a line for each: the whole of `make test`.

Arguments name the suites to run, if not all of them.
"""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "tests"

# The suites by name: the folder to run in, the command, and where it writes its report (JUnit's XML).
PYTEST = [sys.executable, "-m", "pytest"]
SUITES = {
    "cpu": (ROOT, [*PYTEST, "-n", "auto"], LOGS / "cpu.xml"),
    "npu": (ROOT, [sys.executable, "-m", "cann_sim", "-m", "pytest", "--device", "npu", "tests"], LOGS / "npu.xml"),
    "cann_sim": (ROOT / "cann_sim", [*PYTEST, "-n", "auto"], LOGS / "cann_sim.xml"),
    "cpp": (ROOT, ["make", "test-cpp"], ROOT / "build" / "tests_host" / "junit.xml"),
    "cpp_sanitized": (ROOT, ["make", "test-cpp-sanitized"], ROOT / "build" / "tests_sanitized" / "junit.xml"),
    "cpp_threads": (ROOT, ["make", "test-cpp-threads"], ROOT / "build" / "tests_threads" / "junit.xml"),
    "cann_sim_sanitized": (ROOT, ["make", "test-cann-sim-sanitized"], ROOT / "build" / "sanitized" / "cann_sim.xml"),
    "extension_sanitized": (ROOT, ["make", "test-extension-sanitized"], ROOT / "build" / "sanitized" / "extension.xml"),
}
# Run only if named: the rest of `make sanitize`.
SLOW = ("cann_sim_sanitized", "extension_sanitized")


class Suite:
    """A suite under way. Its output goes to the terminal, or into a log that `join` prints."""

    def __init__(self, name: str, *, logged: bool = False) -> None:
        folder, command, self.report = SUITES[name]
        self.name, self.logged, self.log = name, logged, LOGS / f"{name}.log"
        self.report.unlink(missing_ok=True)
        if not logged:
            print(f"== Tests: {name}", flush=True)
        if "pytest" in command:
            command = [*command, f"--junitxml={self.report}"]
        with self.log.open("w") as log:
            output = log if logged else None
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
            counts = next(xml.etree.ElementTree.parse(self.report).iter("testsuite")).attrib
            tests, skipped = int(counts["tests"]), int(counts["skipped"])
            failed = int(counts["failures"]) + int(counts.get("errors", 0))
            lines.append(f"{self.name}: {tests - failed - skipped} passed, {failed} failed, {skipped} skipped")
        if bool(code) != bool(failed) or not lines:
            lines.append(f"{self.name}: exit code {code}" + ("" if lines else ", and no report of the tests"))
        return lines


def main(*names: str) -> int:
    wanted = names or tuple(name for name in SUITES if name not in SLOW)
    if unknown := set(wanted) - set(SUITES):
        sys.exit(f"no such suite: {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}")
    LOGS.mkdir(parents=True, exist_ok=True)
    alone = ("cpp", "cpp_sanitized", "cpp_threads", *SLOW, "cpu")
    done = [Suite(name).join() for name in alone if name in wanted]
    # The suite on the simulated NPU is one process, and leaves a core to cann_sim's.
    beside = [Suite("cann_sim", logged=True)] if "cann_sim" in wanted else []
    done += [Suite("npu").join()] if "npu" in wanted else []
    done += [suite.join() for suite in beside]
    print("== Summary", *(line for suite in done for line in suite.summary()), sep="\n", flush=True)
    return int(any(suite.process.returncode for suite in done))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
