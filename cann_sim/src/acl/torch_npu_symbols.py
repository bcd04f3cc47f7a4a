#!/usr/bin/env python3
"""Reads the CANN libraries and functions that torch_npu requires from its binaries.

torch_npu_symbols.py libraries TORCH_NPU_DIR TORCH_LIB_DIR      names of the libraries, besides libascendcl.so
torch_npu_symbols.py stubs TORCH_NPU_DIR OUTPUT OBJECT...       writes stubs of functions that no object defines
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

CANN_FUNCTION = re.compile(r"(acl(rt|op|mdl|prof|nn|sys|tdt)?|rt|Hccl|Hcom|HCCL|Msprof|ge)[A-Z]\w*")


def binaries(torch_npu: Path) -> list[Path]:
    """The libraries that importing torch_npu loads."""
    return [torch_npu / "lib" / "libtorch_npu.so", torch_npu / "lib" / "libtensorpipe.so", *torch_npu.glob("_C.*.so")]


def run(*command: object) -> str:
    """The output of a command."""
    return subprocess.run([str(word) for word in command], check=True, text=True, stdout=subprocess.PIPE).stdout


def symbols(path: Path, *options: str) -> set[str]:
    """Names that nm lists, without their versions."""
    return {line.split()[-1].split("@")[0] for line in run("nm", *options, path).splitlines() if line.split()}


def libraries(torch_npu: Path, torch_lib: Path) -> list[str]:
    """CANN libraries that torch_npu is linked against, as CMake targets."""
    needed: set[str] = set()
    for path in binaries(torch_npu):
        needed |= set(re.findall(r"NEEDED.*\[(lib[^\]]+)\]", run("readelf", "-d", path)))
    own = {path.name for folder in (torch_lib, torch_npu / "lib") for path in folder.glob("*.so*")}
    cann = {name for name in needed - own if re.fullmatch(r"lib[A-Za-z_]+\.so", name)} - {"libascendcl.so"}
    return sorted(name.removeprefix("lib").removesuffix(".so") for name in cann)


def stubs(torch_npu: Path, objects: list[Path]) -> str:
    """C source with a stub of each CANN function that torch_npu requires and no object defines."""
    wanted: set[str] = set().union(*(symbols(path, "-D", "--undefined-only") for path in binaries(torch_npu)))
    defined: set[str] = set().union(*(symbols(path, "--defined-only") for path in objects))
    missing = sorted(name for name in wanted - defined if CANN_FUNCTION.fullmatch(name))
    lines = [
        "/* Functions of CANN that are not modelled. Generated. */",
        "long cann_sim_acl_not_modelled(const char *);",
    ]
    lines += [f'long {name}(void) {{ return cann_sim_acl_not_modelled("{name}"); }}' for name in missing]
    return "\n".join([*lines, ""])


def main() -> int:
    """The command line."""
    what, torch_npu, *rest = sys.argv[1:]
    if what == "libraries":
        print(";".join(libraries(Path(torch_npu), Path(rest[0]))), end="")
    else:
        Path(rest[0]).write_text(stubs(Path(torch_npu), [Path(path) for path in rest[1:]]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
