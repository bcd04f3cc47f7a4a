#!/usr/bin/env python3
"""Writes the launchers of a kernel source: one header per kernel, and a C++ file that includes the source and runs it.

    make_launchers.py --source k.cpp --output wrapper.cpp --headers DIR [--depfile FILE] -- g++ -I... -D...

The kernels are found in the preprocessed source by their `__global__ __aicore__ void name(parameters)`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

KERNEL = re.compile(
    r"(?P<template>template\s*<[^;{}]*>\s*)?(?:extern\s*\"C\"\s*)?(?:inline\s+)?"
    r"(?:__global__\s+__aicore__|__aicore__\s+__global__)\s+(?:inline\s+)?void\s+(?P<name>\w+)\s*"
    r"\((?P<parameters>[^()]*)\)\s*\{"
)
SCALARS = {"bool", "char", "float", "double", "size_t", "ssize_t", "short", "int", "long", "signed", "unsigned"}
SCALARS |= {f"{prefix}int{bits}_t" for prefix in ("", "u") for bits in (8, 16, 32, 64)}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel: its type as written, and how the launcher takes it."""

    type: str
    name: str
    kind: str  # pointer, scalar or struct

    @property
    def launcher_type(self) -> str:
        """The type in the launcher's signature."""
        return {"pointer": "void*", "scalar": self.type, "struct": f"{self.type}*"}[self.kind]

    @property
    def pass_on(self) -> str:
        """The launcher's argument as the kernel takes it."""
        if self.kind == "pointer":
            return f"reinterpret_cast<{self.type}>({self.name})"
        return f"*{self.name}" if self.kind == "struct" else self.name


@dataclass(frozen=True)
class Kernel:
    """A kernel's name and parameters."""

    name: str
    parameters: tuple[Parameter, ...]


class LauncherError(Exception):
    """The source has no launcher: it does not preprocess, or a kernel cannot be launched."""


def preprocess(source: Path, compiler: list[str], depfile: Path | None = None, target: str = "") -> str:
    """The source after `compiler -E`, with the words that mark a kernel left in it."""
    command = [*compiler, "-E", "-DCANN_SIM_SCAN", str(source)]
    if depfile is not None:
        command += ["-MMD", "-MF", str(depfile), "-MT", target]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise LauncherError(result.stderr)
    return result.stdout


def find_kernels(text: str) -> list[Kernel]:
    """The kernels defined in preprocessed text."""
    kernels = []
    for match in KERNEL.finditer(re.sub(r"^#.*$", "", text, flags=re.MULTILINE)):
        if match["template"]:
            raise LauncherError(f"kernel {match['name']}: cann_sim does not model kernels that are templates")
        kernels.append(Kernel(match["name"], _parameters(match["name"], match["parameters"], text)))
    return kernels


def _parameters(kernel: str, text: str, source: str) -> tuple[Parameter, ...]:
    parameters = []
    for part in text.split(","):
        words = " ".join(part.split())
        if words in ("", "void"):
            continue
        if words.endswith("*"):  # a parameter that the kernel does not use may be without a name
            words += f" unused{len(parameters)}"
        match = re.fullmatch(r"(.*?[\s*])(\w+)", words)
        if match is None or "&" in words or "=" in words or "<" in words:
            raise LauncherError(f"kernel {kernel}: cann_sim cannot pass the parameter '{words}'")
        written = match[1].strip()
        bare = re.sub(r"\b(const|volatile|struct|std::)\s*", "", written).removeprefix("::").strip()
        if "*" in written:
            kind = "pointer"
        elif all(word in SCALARS for word in bare.split()):
            kind = "scalar"
        elif re.search(rf"^\s*struct\s+(?:alignas\([^)]*\)\s*)?{re.escape(bare)}\s*\{{", source, flags=re.MULTILINE):
            kind = "struct"
        else:
            raise LauncherError(
                f"kernel {kernel}: the type of parameter '{words}' is neither a pointer, a builtin number, nor a "
                f"struct defined in this source by 'struct {bare} {{'"
            )
        parameters.append(Parameter(written if kind == "pointer" else bare, match[2], kind))
    return tuple(parameters)


def header(kernel: Kernel) -> str:
    """aclrtlaunch_<kernel>.h: the launcher's declaration, as host code includes it."""
    structs = dict.fromkeys(p.type for p in kernel.parameters if p.kind == "struct")
    return "\n".join(
        [
            f"// Launcher of kernel {kernel.name}. Generated.",
            f"#ifndef ACLRTLAUNCH_{kernel.name.upper()}_H_",
            f"#define ACLRTLAUNCH_{kernel.name.upper()}_H_",
            "",
            "#include <stddef.h>",
            "#include <stdint.h>",
            "",
            '#include "acl/acl.h"',
            "",
            "#ifndef ACLRT_LAUNCH_KERNEL",
            "#define ACLRT_LAUNCH_KERNEL(kernel_func) aclrtlaunch_##kernel_func",
            "#endif",
            "",
            *(f"struct {name};" for name in structs),
            f'extern "C" {_signature(kernel)};',
            "",
            "#endif",
            "",
        ]
    )


def _signature(kernel: Kernel) -> str:
    parameters = ["uint32_t numBlocks", "aclrtStream stream"]
    parameters += [f"{p.launcher_type} {p.name}" for p in kernel.parameters]
    return f"uint32_t aclrtlaunch_{kernel.name}({', '.join(parameters)})"


def wrapper(source: Path, kernels: list[Kernel]) -> str:
    """The C++ file that is compiled in the source's place."""
    lines = [f'#include "{source}"', "", '#include "acl/acl.h"', '#include "cann_sim/launch.h"']
    for kernel in kernels:
        args, parameters = f"cann_sim_args_{kernel.name}", kernel.parameters
        pointers = [p.name for p in parameters if p.kind == "pointer"]
        lines += [
            "",
            "namespace {",
            f"struct {args} {{",
            *(f"  {p.type} {p.name};" for p in parameters),
            "};",
            f"void cann_sim_run_{kernel.name}([[maybe_unused]] void* memory) {{",
            f"  [[maybe_unused]] auto* args = static_cast<{args}*>(memory);",
            f"  {kernel.name}({', '.join(f'args->{p.name}' for p in parameters)});",
            "}",
            "}  // namespace",
            'extern "C" {',
            # extern, as a constant would stay inside this file without it
            f"extern const cann_sim_parameter cann_sim_parameters_{kernel.name}[];",
            f"const cann_sim_parameter cann_sim_parameters_{kernel.name}[] = {{",
            *(f"    cann_sim::parameter<{p.type}>()," for p in parameters),
            "    {0, 0}};",
            f"{_signature(kernel)} {{",
            f"  const {args} cann_sim_values{{{', '.join(p.pass_on for p in parameters)}}};",
            f"  void* const cann_sim_pointers[] = {{{', '.join([*pointers, 'nullptr'])}}};",
            f'  return cann_sim_launch("{kernel.name}", numBlocks, stream, cann_sim_run_{kernel.name},',
            f"                         &cann_sim_values, sizeof(cann_sim_values), cann_sim_pointers, {len(pointers)});",
            "}",
            "}",
        ]
    return "\n".join([*lines, ""])


def make(source: Path, output: Path, headers: Path, compiler: list[str], depfile: Path | None = None) -> list[Kernel]:
    """Writes wrapper and headers of a source; returns its kernels."""
    headers.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    kernels = find_kernels(preprocess(source, compiler, depfile, str(output)))
    for kernel in kernels:
        _write(headers / f"aclrtlaunch_{kernel.name}.h", header(kernel))
    output.write_text(wrapper(source, kernels))
    return kernels


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:  # what includes it need not be built again
        path.write_text(text)


def main() -> int:
    """The command line."""
    own, _, compiler = "\0".join(sys.argv[1:]).partition("\0--\0")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--headers", type=Path, required=True)
    parser.add_argument("--depfile", type=Path)
    options = parser.parse_args(own.split("\0"))
    try:
        make(options.source.resolve(), options.output, options.headers, compiler.split("\0"), options.depfile)
    except LauncherError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
