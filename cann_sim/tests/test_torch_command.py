"""`python -m cann_sim` runs a program as Python would, and says at the end what the simulator found."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch_case import npu

from cann_sim import _runtime, _torch_runtime

RACE = """
import torch
x, side = torch.ones(64, device="npu"), torch.npu.Stream()
try:
    with torch.npu.stream(side):
        x * 2
except RuntimeError as error:
    print("raised", "broke a rule" in str(error))
"""
# What a synchronisation tells it tells once; the error stays.
TAKE_NOTE = "import contextlib\n" + 2 * "with contextlib.suppress(RuntimeError): torch.npu.synchronize()\n"


# Whoever runs these tests in the background may have the signal ignored.
INTERRUPTIBLE = "import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "

# What torch_npu writes past Python's warnings: at the first tensor, whatever the chip of these, and when the reader of
# a queue wakes to find nothing.
OF_TORCH_NPU = ("32 padding size", "Dequeue: taskqueue is empty")


def said(result):
    """What else is on stderr."""
    return "\n".join(line for line in result.stderr.splitlines() if not any(words in line for words in OF_TORCH_NPU))


def test_script_sees_what_python_shows_it(tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "beside.py").write_text("value = 5")
    (tmp_path / "lib" / "script.py").write_text(
        "import sys, json, beside\n"
        "print(json.dumps([__name__, __file__, sys.argv, sys.path[0], beside.value, "
        "sys.modules['__main__'].beside.value, 'torch' in sys.modules]))\n"
    )
    result = npu("lib/script.py", "--leaks", "-m", "x", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout) == [
        "__main__",
        "lib/script.py",
        ["lib/script.py", "--leaks", "-m", "x"],
        str(tmp_path / "lib"),
        5,
        5,
        False,
    ]


def test_module_and_code(tmp_path):
    (tmp_path / "program").mkdir()
    (tmp_path / "program" / "__main__.py").write_text("import sys; print(__name__, sys.argv[1:], __spec__.name)")
    assert npu("-m", "program", "-c", cwd=tmp_path).stdout == "__main__ ['-c'] program.__main__\n"
    result = npu("-c", "import sys; print(__name__, sys.argv, repr(sys.path[0]))", "a", cwd=tmp_path)
    assert result.stdout == "__main__ ['-c', 'a'] ''\n"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python has safe paths since 3.11")
@pytest.mark.parametrize("program", [("-c", "import sys; print(sys.path[0])"), ("-m", "this_one"), ("this_one.py",)])
def test_a_safe_path_stays(tmp_path, program):
    (tmp_path / "this_one.py").write_text("import sys; print(sys.path[0])")
    (tmp_path / "first").mkdir()
    path = os.pathsep.join(map(str, (tmp_path / "first", tmp_path, Path(_runtime.__file__).parent.parent)))
    result = npu(*program, cwd=tmp_path, PYTHONPATH=path, PYTHONSAFEPATH="1")
    assert result.stdout == f"{tmp_path / 'first'}\n", result.stderr


@pytest.mark.parametrize(
    "code, expected, says",
    [
        ("pass", 0, ""),
        ("import sys; sys.exit(7)", 7, ""),
        ("raise SystemExit('words')", 1, "words\n"),
        ("raise SystemExit", 0, ""),
        (f"{INTERRUPTIBLE}os.kill(os.getpid(), signal.SIGINT)", -2, "KeyboardInterrupt"),
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
    result = npu("-c", RACE + TAKE_NOTE)
    assert result.stdout == "raised True\n"
    assert result.returncode == 3
    assert "cann_sim: the simulator found 1 error(s):\ncann_sim:   stream-race: aten::mul" in result.stderr


def test_cleared_errors_and_freed_memory_are_none():
    code = RACE + TAKE_NOTE + "from cann_sim import acl\nacl.clear_errors()\ny = torch.ones(9).npu()\n"
    result = npu("--leaks", "-c", code)
    assert result.returncode == 0, result.stderr
    assert said(result).splitlines()[-1] == "cann_sim: no device memory is leaked"


def test_leaks():
    code = "import torch\nx = torch.ones(5, 7, device='npu')\ny = torch.ones(9).npu()\ntorch.nn.kept = x.half()\n"
    result = npu("--leaks", "-c", code)
    assert result.returncode == 3
    assert "70 bytes of device memory are leaked, in 1 tensors:" in result.stderr
    assert "npu:0: 70 bytes, (5, 7) of torch.float16" in result.stderr


def test_the_locals_of_a_failed_program_are_no_leaks():
    code = "import torch\ndef f():\n    x = torch.ones(7, device='npu')\n    1 / 0\nf()\n"
    result = npu("--leaks", "-c", code)
    assert result.returncode == 1
    assert "ZeroDivisionError" in result.stderr
    assert said(result).splitlines()[-1] == "cann_sim: no device memory is leaked"


def test_out_of_memory_is_an_error_like_others():
    """Of a new result, of a resized one, of a copy; after it the program goes on."""
    code = """
import torch
x = torch.ones(4 << 20, device="npu")
out = torch.empty(0, device="npu")
for work in (lambda: torch.cat([x, x, x]), lambda: torch.cat([x, x, x], out=out), lambda: x.expand(4, -1).contiguous()):
    try:
        work()
    except torch.OutOfMemoryError:
        print("raised")
print((x[:8] + 1).sum().item(), torch.cat([x[:2], x[:2]]).tolist())
"""
    result = npu("-c", code, CANN_SIM_MEMORY_MB="40")
    assert result.stdout == "raised\nraised\nraised\n16.0 [1.0, 1.0, 1.0, 1.0]\n", result.stderr
    assert result.returncode == 0


def test_a_stream_that_is_gone_is_named_and_a_held_one_let_go():
    code = """
import torch, ctypes
from cann_sim import acl
x, y = torch.ones(8, device="npu"), torch.ones(8, device="npu")
side = torch.npu.Stream()
gone = side.npu_stream
assert ctypes.CDLL("libascendcl.so").aclrtDestroyStream(ctypes.c_void_p(gone)) == 0
try:
    with torch.npu.stream(side):
        x.add_(1)
except RuntimeError as error:
    print("cannot run on the current stream" in str(error), "is no stream" in str(error))
acl.hold_streams(torch.npu.current_stream())
y.copy_(x)
"""
    result = npu("-c", code)
    assert (result.stdout, result.returncode) == ("True True\n", 0), result.stderr


def test_a_failing_program_keeps_its_exit_code(tmp_path):
    """Whatever the simulator found; of leaks it says nothing unasked."""
    (tmp_path / "race.py").write_text(RACE)
    (tmp_path / "test_x.py").write_text(
        "import torch\ndef test_a(): assert torch.ones(2).npu().sum().item() == 2\n"
        "def test_b():\n    torch.nn.kept = torch.ones(9, device='npu')\n    import race\n    assert 0\n"
        "def test_c(): pass\n"
    )
    result = npu("-m", "pytest", "-x", "-q", cwd=tmp_path)
    assert result.returncode == 1
    assert "1 failed, 1 passed" in result.stdout
    assert "cann_sim: the simulator found 1 error(s)" in result.stderr
    assert "leaked" not in result.stderr


def test_torch_npu_first_and_processes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import importlib.util\n"
        "assert importlib.util.find_spec('torch_npu') and importlib.util.find_spec('torch')\n"  # imports nothing
        "import torch_npu, torch\n"
        "from torch.utils.data import DataLoader\n"
        "if __name__ == '__main__':\n"
        "    import subprocess, sys\n"
        "    child = [sys.executable, '-c', \"import sys, torch; print('torch_npu' in sys.modules)\"]\n"
        "    child = subprocess.Popen(child, stdout=subprocess.PIPE, text=True)\n"
        "    print((torch.ones(3, device='npu') + 1).tolist(), torch.npu.device_count())\n"
        "    loader = DataLoader(range(4), num_workers=1, multiprocessing_context='spawn')\n"
        "    print(sum(x.npu() for x in loader).item())\n"
        "    print(child.communicate()[0].strip(), child.returncode)\n"
    )
    result = npu(str(script), TORCH_DEVICE_BACKEND_AUTOLOAD="1")
    assert (result.stdout, said(result)) == ("[2.0, 2.0, 2.0] 2\n6\nFalse 0\n", "")


def test_usage():
    result = npu("--help")
    assert (result.returncode, result.stdout.count("usage:")) == (0, 1)
    for arguments, says in (((), "no program is given"), (("-m",), "-m needs"), (("--lacks", "x"), "--lacks")):
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


def test_a_compiler_of_several_words(monkeypatch, tmp_path):
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(x CXX)\nadd_library(x SHARED x.cpp)\n"
        "set_target_properties(x PROPERTIES LIBRARY_OUTPUT_DIRECTORY ${OUTPUT_DIR})\n"
    )
    (sources / "x.cpp").write_text("#ifndef GIVEN\n#error not given\n#endif\n")
    monkeypatch.setenv("CANN_SIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "env g++ -DGIVEN")
    monkeypatch.setattr(_torch_runtime, "_sources", lambda part: sources)
    folder = _torch_runtime._built("part", _torch_runtime.Installed(Path("a"), "1", Path("b"), "1"), {}, "it")
    assert (folder / "libx.so").is_file()


def test_an_installed_package_is_no_source_tree(monkeypatch, tmp_path):
    """Whatever else has put a folder src beside it."""
    (tmp_path / "src").mkdir()
    monkeypatch.setattr(_runtime, "PROJECT", tmp_path)
    monkeypatch.setattr(_runtime, "SOURCES", tmp_path / "src")
    monkeypatch.setattr(_runtime, "LIBRARY", tmp_path / "lib64" / "libcann_sim.so")
    _runtime._build_in_source_tree.__wrapped__()
    assert not (tmp_path / "lib64").exists()


def test_a_build_that_fails_says_why(monkeypatch, tmp_path):
    sources = tmp_path / "sources"
    sources.mkdir()
    start = "cmake_minimum_required(VERSION 3.18)\nproject(x NONE)\n"
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


def test_what_an_interrupted_build_left_is_removed(monkeypatch, tmp_path):
    monkeypatch.setenv("CANN_SIM_CACHE", str(tmp_path))
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "CMakeLists.txt").write_text("cmake_minimum_required(VERSION 3.18)\nproject(x NONE)\n")
    monkeypatch.setattr(_torch_runtime, "_sources", lambda part: sources)
    left, under_way = (tmp_path / f"{name}.building-abc" for name in ("acl-1", "torch-2"))
    for folder in (left, under_way):
        (folder / "build").mkdir(parents=True)
    lock = _torch_runtime._lock_file(tmp_path, "torch-2")
    fcntl.flock(lock, fcntl.LOCK_EX)
    folder = _torch_runtime._built("part", _torch_runtime.Installed(Path("a"), "1", Path("b"), "1"), {}, "it")
    os.close(lock)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"sources", under_way.name, folder.name}
