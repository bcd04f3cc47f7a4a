"""`python -m cann_sim` runs a program as Python would, and says at the end what the simulator found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch_case import npu

from cann_sim import _torch_runtime

RACE = """
import torch
x, side = torch.ones(64, device="npu"), torch.npu.Stream()
try:
    with torch.npu.stream(side):
        x * 2
except RuntimeError as error:
    print("raised", "broke a rule" in str(error))
"""


def said(result):
    """What is on stderr, without the warnings of torch_npu's that go there past Python's."""
    return "\n".join(line for line in result.stderr.splitlines() if "Warning: " not in line)


def test_script_sees_what_python_shows_it(tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "beside.py").write_text("value = 5")
    (tmp_path / "lib" / "script.py").write_text(
        "import sys, json, beside\n"
        "print(json.dumps([__name__, __file__, sys.argv, sys.path[0], beside.value, "
        "sys.modules['__main__'].beside.value, 'torch' in sys.modules]))\n"
        "import torch\nprint(torch.ones(3).npu().sum().item(), torch.npu.device_count())\n"
    )
    result = npu("lib/script.py", "--leaks", "-m", "x", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert json.loads(first) == [
        "__main__",
        "lib/script.py",
        ["lib/script.py", "--leaks", "-m", "x"],
        str(tmp_path / "lib"),
        5,
        5,
        False,
    ]
    assert second == "3.0 2"
    assert said(result) == ""


def test_module_and_code(tmp_path):
    (tmp_path / "program").mkdir()
    (tmp_path / "program" / "__main__.py").write_text("import sys; print(__name__, sys.argv[1:], __spec__.name)")
    assert npu("-m", "program", "-c", cwd=tmp_path).stdout == "__main__ ['-c'] program.__main__\n"
    result = npu("-c", "import sys; print(__name__, sys.argv, repr(sys.path[0]))", "a", cwd=tmp_path)
    assert result.stdout == "__main__ ['-c', 'a'] ''\n"


@pytest.mark.parametrize(
    "code, expected, says",
    [
        ("pass", 0, ""),
        ("import sys; sys.exit(7)", 7, ""),
        ("raise SystemExit('words')", 1, "words\n"),
        ("raise SystemExit", 0, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGINT)", -2, "KeyboardInterrupt"),
    ],
)
def test_exit_code(code, expected, says):
    result = npu("-c", code)
    assert result.returncode == expected
    assert says in result.stderr


def test_traceback_is_the_programs(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("def f():\n    1 / 0\n\nf()\n")
    ours = npu(str(script))
    theirs = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert (ours.returncode, ours.stderr) == (theirs.returncode, theirs.stderr)
    script.write_text("def f(:\n")
    assert "__main__.py" not in npu(str(script)).stderr


def test_errors_of_the_simulator_fail_the_program():
    result = npu("-c", RACE)
    assert result.stdout == "raised True\n"
    assert result.returncode == 3
    assert "cann_sim: the simulator found 1 error(s):\ncann_sim:   stream-race: aten::mul" in result.stderr
    forgiven = npu(
        "-c",
        RACE
        + "import contextlib\nfrom cann_sim import acl\n"
        + 2 * ("with contextlib.suppress(RuntimeError): torch.npu.synchronize()\n")
        + "acl.clear_errors()\n",
    )
    assert forgiven.returncode == 0, forgiven.stderr
    assert npu("-c", RACE + "raise SystemExit(5)").returncode == 5


def test_leaks():
    code = "import torch\nx = torch.ones(5, 7, device='npu')\ny = torch.ones(9).npu()\n"
    result = npu("--leaks", "-c", code)
    assert (result.returncode, said(result)) == (0, "cann_sim: no device memory is leaked")
    result = npu("--leaks", "-c", code + "torch.nn.kept = x.half()\n")
    assert result.returncode == 3
    assert "70 bytes of device memory are leaked, in 1 tensors:" in result.stderr
    assert "npu:0: 70 bytes, (5, 7) of torch.float16" in result.stderr
    assert said(npu("-c", code + "torch.nn.kept = x\n")) == ""


def test_torch_npu_first_and_processes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch_npu, torch\n"
        "from torch.utils.data import DataLoader\n"
        "if __name__ == '__main__':\n"
        "    import subprocess, sys\n"
        "    print((torch.ones(3, device='npu') + 1).tolist())\n"
        "    loader = DataLoader(range(4), num_workers=1, multiprocessing_context='spawn')\n"
        "    print(sum(x.npu() for x in loader).item())\n"
        "    print(subprocess.run([sys.executable, '-c', 'import torch'], capture_output=True).returncode)\n"
    )
    result = npu(str(script), TORCH_DEVICE_BACKEND_AUTOLOAD="1")
    assert result.stdout == "[2.0, 2.0, 2.0]\n6\n0\n", result.stderr


def test_pytest_keeps_its_exit_code(tmp_path):
    (tmp_path / "test_x.py").write_text(
        "import torch\ndef test_a(): assert torch.ones(2).npu().sum().item() == 2\ndef test_b(): assert 0\n"
        "def test_c(): pass\n"
    )
    result = npu("-m", "pytest", "-x", "-q", cwd=tmp_path)
    assert result.returncode == 1
    assert "1 failed, 1 passed" in result.stdout


def test_usage():
    result = npu("--help")
    assert (result.returncode, result.stdout.count("usage:")) == (0, 1)
    for arguments, says in (((), "what is to be run"), (("-m",), "-m needs"), (("--lacks", "x"), "--lacks")):
        result = npu(*arguments)
        assert result.returncode == 2
        assert says in result.stderr
    assert "no file" in npu("missing.py").stderr


def test_missing_packages_are_named(monkeypatch, tmp_path):
    package = _torch_runtime._package
    versions = {"torch": "2.13.0+cpu", "torch_npu": "2.13.0"}
    monkeypatch.setattr(_torch_runtime.importlib.metadata, "version", versions.get)

    def without(*missing):
        monkeypatch.setattr(_torch_runtime, "_package", lambda name: None if name in missing else tmp_path)
        with pytest.raises(_torch_runtime.SetupError) as error:
            _torch_runtime.installed()
        return str(error.value)

    assert "torch is not installed" in without("torch")
    assert "pip install torch_npu==2.13.0 --no-deps" in without("torch_npu")
    assert "pip install pyyaml" in without("yaml")
    versions["torch_npu"] = "2.12.0.post1"
    assert "torch_npu 2.12.0.post1 is for torch 2.12.0, and torch is 2.13.0+cpu" in without()
    monkeypatch.setattr(_torch_runtime, "_package", package)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(_torch_runtime.SetupError, match="no-such-compiler is not there"):
        _torch_runtime._compiler()


def test_a_build_that_fails_says_why(monkeypatch, tmp_path):
    sources = tmp_path / "sources"
    sources.mkdir()
    start = "cmake_minimum_required(VERSION 3.18)\nproject(x CXX)\n"
    (sources / "CMakeLists.txt").write_text(start + "message(FATAL_ERROR the-reason)\n")
    monkeypatch.setenv("CANN_SIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_torch_runtime, "_sources", lambda part: sources)
    found = _torch_runtime.Installed(Path("a"), "1", Path("b"), "1")
    with pytest.raises(_torch_runtime.SetupError, match=r"(?s)building it failed:.*the-reason"):
        _torch_runtime._built("part", found, {}, "it")
    (sources / "CMakeLists.txt").write_text(start + "file(WRITE ${OUTPUT_DIR}/made here)\n")
    folder = _torch_runtime._built("part", found, {}, "it")
    assert (folder / "made").read_text() == "here"
    assert _torch_runtime._built("part", found, {}, "it") == folder
    assert _torch_runtime._built("part", found, {"OTHER": 1}, "it") != folder
