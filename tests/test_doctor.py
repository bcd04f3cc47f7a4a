"""The doctor: a right installation passes, each kind of fault is told in the right line, and the file says it all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import npu_xent
from npu_xent._options import OPTIONS
from npu_xent.doctor import __main__ as program
from npu_xent.doctor import behaviour, calls, correctness, environment, repeatability, run, timing, vendor
from npu_xent.doctor.cases import CASES, ROW_MODES, Case, make_problem, shapes
from npu_xent.doctor.report import LONGEST_LIST, Check, Failure, Report, Result, Task, ending
from npu_xent.doctor.truth import Expected, compare, composed, slack_of, truth

ROOT = Path(__file__).resolve().parents[1]
NPU = types.SimpleNamespace(type="npu", index=0)  # torch knows no such device until torch_npu is imported
VARIABLES = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Correctness and behaviour alone, at the smallest shape."""
    monkeypatch.setattr(correctness, "shapes", lambda dtype, device: shapes(dtype, device)[:1])
    for module in (repeatability, vendor, timing):
        monkeypatch.setattr(module, "tasks", lambda *_: iter(()))


def doctor(tmp_path: Path, device: torch.device | str) -> tuple[int, dict[str, Any]]:
    """The exit code and the file of a run in this process."""
    file = tmp_path / "doctor.json"
    code = program.main(["--device", str(device), "--quick", "--json", str(file)])
    return code, json.loads(file.read_text())


def page_of_promises() -> str:
    return " ".join((ROOT / "docs" / "trust.md").read_text().split())


# A whole run ----------------------------------------------------------------------------------------------------------


@pytest.mark.cpu
def test_a_right_installation_passes(tmp_path: Path) -> None:
    """As a user runs it: nothing but the verdict decides, and the file has what was printed."""
    file = tmp_path / "doctor.json"
    command = [sys.executable, "-m", "npu_xent.doctor", "--device", "cpu", "--quick", "--json", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=VARIABLES, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(file.read_text())
    assert found["schema_version"] == 1
    assert found["passed"]
    assert found["verdict"] == f"verdict: all {len(found['checks'])} checks passed"
    assert result.stdout.splitlines()[-1].startswith(found["verdict"])
    assert result.stdout.startswith("npu_xent doctor on cpu, as asked for\n\nenvironment\n")
    assert "simulated" not in result.stdout.partition("correctness")[2]
    assert [line.split()[1] for line in result.stderr.splitlines() if line.startswith("npu_xent.doctor:")] == [
        "correctness",
        "behaviour",
        "repeatability",
        "time",
    ]
    sections = {check["section"] for check in found["checks"]}
    assert sections == {"correctness", "behaviour", "repeatability", "time and memory"}
    assert {check["name"] for check in found["checks"]} >= {case.name for case in CASES}
    page = page_of_promises()
    for check in found["checks"]:
        assert check["promise"] or check["section"] == "time and memory"
        assert " ".join(check["promise"].split()) in page
    assert found["environment"]["torch"] == torch.__version__
    assert found["environment"]["npu_xent"].startswith(npu_xent.__version__)
    timed = [check for check in found["checks"] if check["section"] == "time and memory"]
    for check in timed:
        gradient = 256 * 8080 * (4 if check["where"]["dtype"] == "fp32" else 2)
        memory = check["numbers"]["peak_memory_bytes"]
        assert gradient <= memory["npu_xent"] <= 1.05 * gradient < memory["F.cross_entropy"]
        assert all(seconds > 0 for seconds in check["numbers"]["seconds"].values())


@pytest.mark.npu
@pytest.mark.simulated
def test_a_right_installation_passes_on_an_npu(tmp_path: Path) -> None:
    """By default on the NPU that is there; every figure says that it is simulated, and no memory is left behind."""
    file = tmp_path / "doctor.json"
    command = [sys.executable, "-m", "cann_sim", "--leaks", "-m", "npu_xent.doctor", "--quick", "--json", str(file)]
    variables = VARIABLES | {"PYTHONPATH": os.pathsep.join([VARIABLES["PYTHONPATH"], str(ROOT / "cann_sim")])}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=variables, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    lines, found = result.stdout.splitlines(), json.loads(file.read_text())
    assert lines[:2] == ["npu_xent doctor on npu, because there is one", program.SIMULATED]
    assert lines[-1].startswith("verdict: all ")
    assert "on a simulated NPU" in lines[-1]
    header = lines[lines.index("time and memory") + 2]
    assert header.count("simulated") == 3
    assert found["simulated"]
    assert found["device"] == "npu:0"
    assert "simulated" in found["environment"]["cann"]
    names = {check["name"]: check["outcome"] for check in found["checks"]}
    assert (
        names["the NPU kernels are loaded"] == names["several streams"] == names["the same bits on npu:1"] == "passed"
    )
    theirs = [check for check in found["checks"] if check["section"] == vendor.SECTION]
    assert {check["outcome"] for check in theirs} == {"skipped"}
    assert "not simulated" in theirs[0]["skipped"]


def test_importing_the_package_does_not_import_the_doctor() -> None:
    code = "import sys, npu_xent; print([name for name in sys.modules if name.startswith('npu_xent.doctor')])"
    variables = VARIABLES | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, check=True).stdout
    assert out == "[]\n"


def test_the_page_has_the_promises_of_checks_on_npus() -> None:
    page = page_of_promises()
    on_npus = [check.__doc__ or "" for check in behaviour.NPU_ONLY]
    for promise in (*on_npus, behaviour.ANY_DEVICE, vendor.PROMISE):
        assert " ".join(promise.split()) in page


def test_a_failed_check_says_what_was_promised() -> None:
    lines = Check("behaviour", "a name", {}, Result(failures=[Failure("seen")]), promise="It holds.").lines()
    assert lines == ["FAIL  behaviour: a name", "      promised: It holds.", "      seen"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--device", "cuda"], "'cuda' is none of cpu, npu"),
        (["--json", "/nowhere/file.json", "--device", "cpu"], "/nowhere is not a folder"),
        (["--json", "/", "--device", "cpu"], "/ is a folder; name a file"),
        (["--slow"], "unrecognized arguments: --slow"),
    ],
)
def test_wrong_usage(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        program.main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.cpu
def test_a_report_that_cannot_be_written_is_not_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether the run passed or failed: the disk is full, for example."""

    def fails(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Report, "write", fails)
    for failures in ([], [Failure("wrong")]):
        check = Check("correctness", "mean", {}, Result(failures=failures))
        monkeypatch.setattr(program, "run_all", lambda report, *_, check=check: report.checks.append(check))
        file = tmp_path / "doctor.json"
        assert program.main(["--device", "cpu", "--json", str(file)]) == len(failures)
        said = capsys.readouterr().out
        assert said.count(str(file)) == 1
        assert f"{file} could not be written: No space left on device" in said


@pytest.mark.npu
def test_an_npu_that_is_not_there_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        program.main(["--device", "npu:99"])
    assert stopped.value.code == 2
    assert "npu:99, but torch_npu sees" in capsys.readouterr().err


# Faults are told ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("few")
def test_an_option_that_is_wrong_is_the_one_that_fails(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A z-loss scale that has no effect: only the lines with a z-loss fail, with the place and the numbers."""
    right = npu_xent.cross_entropy

    def wrong(*arguments: Any, **options: Any) -> Any:
        return right(*arguments, **(options | ({"lse_square_scale": 0.0} if "lse_square_scale" in options else {})))

    monkeypatch.setattr(npu_xent, "cross_entropy", wrong)
    code, found = doctor(tmp_path, device)
    assert code == 1
    failed = [check for check in found["checks"] if check["outcome"] == "failed"]
    with_z_loss = {case.name for case in CASES if case.options.get("lse_square_scale")}
    assert {check["name"] for check in failed} == with_z_loss
    assert found["verdict"].startswith(f"verdict: {len(failed)} of {len(found['checks'])} checks failed")
    check = next(c for c in failed if c["name"] == "z-loss" and c["where"]["dtype"] == "bf16")
    outputs = {failure["output"]: failure for failure in check["failures"]}
    assert set(outputs) == {"loss", "z_loss", "gradient"}
    element = outputs["gradient"]
    assert len(element["element"]) == 2
    assert abs(element["seen"] - element["expected"]) > element["allowed_error"] > 0
    out = capsys.readouterr().out
    mode = ", row mode short" if device.type == "npu" else ""
    line = f"FAIL  correctness: z-loss (shape 96 x 130, dtype bf16{mode})\n      promised: {correctness.PROMISE}\n"
    assert f"{line}      loss: seen " in out
    assert "To report it, in the project's issue tracker, attach" in out
    assert str(tmp_path / "doctor.json") in out
    assert ("npu-smi info" in out) == (device.type == "npu")


@pytest.mark.usefixtures("few")
def test_a_check_that_raises_fails_and_the_others_go_on(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = npu_xent.cross_entropy

    def wrong(*arguments: Any, **options: Any) -> Any:
        if options.get("consume_logits"):
            raise RuntimeError("out of luck\nand more")
        return right(*arguments, **options)

    monkeypatch.setattr(npu_xent, "cross_entropy", wrong)
    code, found = doctor(tmp_path, device)
    assert code == 1
    failed = [check for check in found["checks"] if check["outcome"] == "failed"]
    assert {check["name"] for check in failed} == {
        "consume_logits",
        "all, consume_logits",
        "logits are left alone, or consumed",
    }
    assert found["stopped"] is None
    for check in failed:
        assert check["failures"][0]["words"] == "raised RuntimeError: out of luck"
        assert "in wrong" in check["traceback"]


def test_an_interrupt_leaves_a_report(tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that hangs."""
    right = npu_xent.cross_entropy

    def hangs(*arguments: Any, **options: Any) -> Any:
        if options.get("consume_logits"):
            raise KeyboardInterrupt
        return right(*arguments, **options)

    monkeypatch.setattr(npu_xent, "cross_entropy", hangs)
    code, found = doctor(tmp_path, device)
    assert code == 1
    assert found["stopped"] == "interrupted"
    last = found["checks"][-1]
    assert (last["name"], last["outcome"], last["failures"][0]["words"]) == ("consume_logits", "failed", "interrupted")
    assert "in hangs" in last["traceback"]
    assert len(found["checks"]) > 1


@pytest.mark.parametrize("case", [case for case in CASES if not case.contract], ids=lambda case: case.name)
def test_a_class_that_is_lost_is_seen_in_every_case(case: Case, device: torch.device) -> None:
    """The last class of a row, or one row's result in another: such faults are far outside what is allowed."""
    problem = make_problem(case, 96, 130, torch.bfloat16)
    seen = calls.observe(problem, device)
    without = problem.logits.clone()
    without[:, -1] = -100.0  # its exponential is 0
    other = {**vars(problem), "logits": without}
    assert not any(wrong for wrong in failures(seen, truth(problem), device).values())
    lost = failures(calls.observe(type(problem)(**other), device), truth(problem), device)
    assert lost["log_probs" if case.log_probs else "loss"]
    if case.grad:
        assert lost["gradient"]
        assert failures({"gradient": seen["gradient"].roll(1, dims=0)}, truth(problem), device)["gradient"]


def test_every_option_has_a_case() -> None:
    """The README says that the doctor checks the options of all losses."""
    given = {name for case in CASES for name in case.options} | {"ignore_index", "weight"}
    given |= {"temperature", "return_entropy", "return_top1", "need_log_prob"}  # always, or by the case's kind
    assert {option.name for option in OPTIONS} - given == set()


def failures(seen: dict[str, torch.Tensor], expected: Any, device: torch.device) -> dict[str, bool]:
    """Which outputs are judged to be wrong."""
    return {
        name: compare(name, tensor, expected[name], slack_of(device))[1] is not None for name, tensor in seen.items()
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_truth_is_what_torch_computes(case: Case) -> None:
    """In float64, where torch's own roundings are as small as those of the formulas."""
    problem = make_problem(case, 30, 201, torch.float64)
    expected, torchs = truth(problem), composed(problem)
    for name, tensor in torchs.items():
        torch.testing.assert_close(tensor, expected[name].value, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_row_mode_has_a_shape(dtype: torch.dtype) -> None:
    modes = [shape.row_mode for shape in shapes(dtype, NPU)]
    assert sorted(modes) == sorted(ROW_MODES.values())


@pytest.mark.usefixtures("few")
def test_results_that_change_are_told(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last bit of one element, in every other call."""
    observe, calls_so_far = repeatability.observe, []

    def wrong(*arguments: Any) -> dict[str, torch.Tensor]:
        found = observe(*arguments)
        calls_so_far.append(1)
        if len(calls_so_far) % 2 == 0:
            found["gradient"].view(torch.int32)[3, 2] ^= 1
        return found

    problem = make_problem(CASES[0], 96, 130, torch.float32)
    assert repeatability.check([problem], device) == []
    monkeypatch.setattr(repeatability, "observe", wrong)
    told = repeatability.check([problem], device)
    assert told
    assert all(failure.element == [3, 2] and "1 of 12480 elements differ" in failure.words for failure in told)


@pytest.mark.parametrize("name, check", behaviour.CHECKS, ids=lambda value: value if isinstance(value, str) else "")
def test_behaviour_is_judged(name: str, check: Callable, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each check fails when the operator does what it looks for: here a result that depends on the call before."""
    if check in behaviour.NPU_ONLY and device.type != "npu":
        pytest.skip("about NPUs")
    assert check(device) == []
    right, scale = npu_xent.cross_entropy, [1.0]

    def drifting(logits: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
        scale[0] *= 1.001
        clean = target.clamp(max=logits.shape[1] - 1)  # no IndexError either
        return right(logits * scale[0], clean, **options)

    monkeypatch.setattr(npu_xent, "cross_entropy", drifting)
    assert check(device), name


def vendors(**changed: Any) -> types.SimpleNamespace:
    """torch_npu with an operator that means what ours does, but for some arguments."""

    def operator(logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, **options: Any) -> Any:
        arguments = {"weight": weight, **options, "strict": False} | changed
        return npu_xent.npu_cross_entropy_loss(logits, target, **arguments)

    return types.SimpleNamespace(npu_cross_entropy_loss=operator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_vendors_operator_is_compared(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its roundings are its own; an option that means something else is a failure; not to be there is none."""
    problems = [make_problem(case, *vendor.SHAPE, dtype) for case in vendor.CASES]
    monkeypatch.setitem(sys.modules, "torch_npu", vendors())
    assert not any(vendor.check(problem, device).failures for problem in problems)
    for changed, cases in (
        ({"weight": None}, [1, 2, 3]),
        ({"label_smoothing": 0.0}, [3]),
        ({"ignore_index": -100}, [1, 2]),
    ):
        monkeypatch.setitem(sys.modules, "torch_npu", vendors(**changed))
        for index in cases:
            failed = vendor.check(problems[index], device).failures
            assert failed[0].words.startswith("torch_npu's loss")
    monkeypatch.setitem(sys.modules, "torch_npu", types.SimpleNamespace())
    result = vendor.check(problems[0], device)
    assert result.skipped.startswith("not available: ")
    assert not result.failures


# The environment and the device ---------------------------------------------------------------------------------------


def test_kernels_that_cannot_be_loaded_are_a_failure_and_nothing_else_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse() -> None:
        raise RuntimeError("npu_xent's NPU kernels are not in use: it was built without its NPU part.")

    monkeypatch.setattr(npu_xent, "load_npu", refuse)
    report = Report("npu:0", environment.gather(), False)
    run.run_all(report, NPU, lambda lines: None)
    assert [check.name for check in report.failed] == ["the NPU kernels are loaded"]
    assert "built without its NPU part" in report.checks[0].lines()[1]
    assert len(report.checks) == 1
    assert report.verdict == f"verdict: 1 of 1 checks failed; stopped: {run.NO_KERNELS}"


def test_a_terminal_shows_the_check_before_it_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = run.Progress()
    progress.show(3, Task("correctness", "mean", Result, {"shape": "4 x 8", "rows": None}))
    progress.clear()
    assert capsys.readouterr().err == "\r\033[K[3] correctness: mean 4 x 8\r\033[K"


def test_a_result_of_another_shape_is_a_failure() -> None:
    ratio, failure = compare("loss", torch.zeros(2), Expected(torch.zeros(3), torch.ones(3)), 1)
    assert (ratio, failure.words) == (float("inf"), "loss: shape [2], expected [3]")


@pytest.mark.parametrize("more", [0, 2])
def test_a_long_list_of_failures_is_cut(more: int) -> None:
    report = Report("cpu", {}, False)
    failed = [Check("correctness", str(i), {}, Result(failures=[Failure("")])) for i in range(LONGEST_LIST + more)]
    report.checks.extend(failed)
    lines = ending(report, Path("doctor.json"))
    assert sum(line.startswith("FAIL") for line in lines) == LONGEST_LIST
    assert ("      and 2 more, in doctor.json" in lines) == bool(more)


@pytest.mark.cpu
def test_no_npu_to_ask_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Asked for, it is a failure; by default the CPU is taken, with a word."""
    monkeypatch.setattr(environment, "import_torch_npu", lambda: "torch_npu sees no NPU")
    monkeypatch.setattr(program, "run_all", lambda *_: None)
    monkeypatch.setattr(environment._build, "CANN_VERSION", "0.1.0-simulated", raising=False)  # as tests are built
    for toolkit, way_out in ((None, f". {program.NO_CANN}"), (Path("/usr/local/Ascend/cann"), "")):
        monkeypatch.setattr(environment._toolkit, "home", lambda toolkit=toolkit: toolkit)
        code, found = doctor(tmp_path, "npu")
        assert code == 1
        assert found["checks"][0]["failures"][0]["words"] == "torch_npu sees no NPU" + way_out
        assert not found["simulated"]
        assert program.SIMULATED not in capsys.readouterr().out
    assert program.main([]) == 0
    assert capsys.readouterr().out.startswith("npu_xent doctor on cpu, because torch_npu sees no NPU\n")


def test_a_device_that_is_lost_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error from which the device does not come back, what is known is reported and nothing more is tried."""

    def dies() -> Result:
        raise RuntimeError("AICore exception")

    tasks = [Task("correctness", name, dies if name == "b" else Result) for name in "abc"]
    monkeypatch.setattr(run, "sections", lambda *_: iter([(tasks, lambda report: []), (tasks, lambda report: [])]))
    monkeypatch.setattr(run, "answers", lambda device: False)
    monkeypatch.setattr(npu_xent, "load_npu", lambda: None)
    report = Report("npu:0", environment.gather(), False)
    run.run_all(report, NPU, lambda lines: None)
    assert [check.name for check in report.checks] == ["the NPU kernels are loaded", "a", "b"]
    assert report.stopped == run.DEVICE_LOST


def test_an_operator_of_others_that_loses_the_device_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was to be skipped; but what follows is not known, so the run does not pass."""
    tasks = [Task("agreement", "mean", lambda: Result(skipped="not available: AICore exception"))]
    monkeypatch.setattr(run, "sections", lambda *_: iter([(tasks, lambda report: [])]))
    monkeypatch.setattr(npu_xent, "load_npu", lambda: None)
    for lost in (False, True):
        monkeypatch.setattr(run, "answers", lambda device, lost=lost: not lost)
        report = Report("npu:0", environment.gather(), False)
        run.run_all(report, NPU, lambda lines: None)
        assert [check.name for check in report.failed] == ["mean"] * lost
    words = report.failed[0].result.failures[0].words
    assert words == f"not available: AICore exception; {run.DEVICE_LOST}"


@pytest.mark.cpu
def test_an_npu_that_does_not_open_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process has it, or its driver is of another release: the report says so, instead of a traceback."""

    def refuse(*_: object) -> str:
        raise RuntimeError("aclrtSetDevice: error code is 507033\nand more")

    npu = types.SimpleNamespace(device_count=lambda: 1, set_device=refuse, get_device_name=refuse)
    monkeypatch.setattr(torch, "npu", npu, raising=False)
    monkeypatch.setitem(sys.modules, "torch_npu", types.SimpleNamespace(npu=npu, __version__="2.13.0"))
    monkeypatch.setattr(environment, "import_torch_npu", lambda: None)
    code, found = doctor(tmp_path, "npu")
    assert code == 1
    assert found["checks"][0]["failures"][0]["words"] == "npu:0 cannot be used: aclrtSetDevice: error code is 507033"
    assert found["environment"]["devices"] == 1
    assert found["environment"]["soc"] is None


def test_files_that_may_not_be_read_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver may be installed for one group of users alone, and a home folder missing."""

    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    for name in ("ASCEND_PROCESS_LOG_PATH", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "npu-smi").write_bytes(b"#!/bin/sh\nprintf 'Version: 24.1.0 \\377'\n")
    (tmp_path / "npu-smi").chmod(0o755)
    monkeypatch.setattr(Path, "read_text", refuse)
    found = environment.gather()
    assert found["cann"] is None
    assert found["driver"] == "24.1.0"
    assert found["logs"].endswith("/ascend/log")


FAILING_LAUNCH = """
import sys
import npu_xent
from cann_sim import acl
from npu_xent.doctor.__main__ import main

npu_xent.load_npu()
with acl.fail("launch:npu_xent_row_stats_grad", acl.KERNEL_ERROR, skip=5):
    sys.exit(main(["--quick"]))
"""


@pytest.mark.npu
@pytest.mark.simulated
def test_a_launch_that_fails_ends_the_run(tmp_path: Path) -> None:
    """torch_npu launches nothing after it, and says so once: all that followed would be measured on old memory."""
    command = [sys.executable, "-m", "cann_sim", "-c", FAILING_LAUNCH]
    variables = VARIABLES | {"PYTHONPATH": os.pathsep.join([VARIABLES["PYTHONPATH"], str(ROOT / "cann_sim")])}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=variables, timeout=600)
    assert result.returncode == 1, result.stdout + result.stderr
    found = json.loads((tmp_path / "npu_xent_doctor.json").read_text())
    (failed,) = [check for check in found["checks"] if check["outcome"] == "failed"]
    assert found["checks"][-1] == failed
    assert "npu_xent_row_stats_grad" in failed["traceback"]
    assert found["stopped"] == run.DEVICE_LOST
    assert f"; stopped: {run.DEVICE_LOST}" in result.stdout.splitlines()[-1]


@pytest.mark.npu
def test_a_device_that_answers(device: torch.device) -> None:
    assert run.answers(device)
    assert not run.answers(torch.device("npu", 99))


def test_the_file_is_json_for_every_reader(tmp_path: Path) -> None:
    """NaN and infinity are not JSON."""
    report = Report("cpu", environment.gather(), False)
    failure = Failure("loss: seen nan", "loss", [], float("nan"), 1.0, float("inf"))
    report.checks.append(run.run_task(Task("correctness", "mean", lambda: Result(failures=[failure]))))
    report.write(tmp_path / "file.json")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    found = json.loads((tmp_path / "file.json").read_text(), parse_constant=refuse)
    assert found["checks"][0]["failures"][0]["seen"] == "nan"


def test_versions_say_what_is_simulated() -> None:
    def said(running: str | None, built: str | None) -> bool:
        return environment.is_simulated({"cann": running, "built": {"cann": built}})

    assert said("0.1.0-simulated", "8.5.0")
    assert said(None, "0.1.0-simulated")
    assert not said("8.5.0", "8.5.0")
    assert not said(None, None)


def test_shapes_that_take_too_long_are_left_out() -> None:
    budget = timing.Budget()
    assert budget.predicted(10**9, 7) == 0
    budget.seconds_each = 1e-6
    result = timing.measure(1000, 1000000, torch.float32, torch.device("cpu"), 7, budget)
    assert result.skipped == "would take about 8000 s here"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("NPU out of memory"), RuntimeError("NPU out of memory. ...")])
def test_shapes_that_do_not_fit_are_left_out(error: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(timing, "candidates", refuse)
    result = timing.measure(4, 5, torch.float32, torch.device("cpu"), 3, timing.Budget())
    assert result.skipped == "does not fit in the free memory"


def test_peak_memory_is_what_is_in_use_at_a_time(device: torch.device) -> None:
    """Not what was there before, and not the sum of what came one after the other."""
    before = torch.empty(2**22, dtype=torch.uint8, device=device)

    def step() -> torch.Tensor:
        for _ in range(3):
            torch.empty(2**20, dtype=torch.uint8, device=device)
        return before

    assert 2**20 <= timing.peak_memory(step, device) <= 1.01 * 2**20


@pytest.mark.cpu
def test_a_slow_operator_is_a_note_and_an_absurd_one_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    for factor, failed in ((2.0, False), (1000.0, True)):
        seconds = {timing.OURS: [factor] * 3, timing.TORCH: [1.0] * 3}
        monkeypatch.setattr(timing, "in_turns", lambda *_, seconds=seconds: seconds)
        result = timing.measure(4, 5, torch.float32, torch.device("cpu"), 3, timing.Budget())
        assert result.notes == [f"slower than F.cross_entropy at 4 x 5 fp32: {factor:.2f} times its time"]
        assert bool(result.failures) == failed
