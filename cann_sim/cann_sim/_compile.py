"""Compiles kernel sources to a library, by the toolkit's own launcher generator and flags, without CMake."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType

from ._library import KernelLibrary
from ._refusals import lead
from ._runtime import LIBRARY, TOOLKIT, cache_folder, compiler_command, toolkit_path

BUILD_FILES = TOOLKIT / "tools" / "tikcpp" / "ascendc_kernel_cmake"


class CompileError(Exception):
    """A kernel source does not compile. The message has a line for each unmodelled name, then the compiler's output."""


def compile(
    source: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    name: str | None = None,
    defines: Iterable[str] | Mapping[str, object] = (),
    include_dirs: Iterable[str | os.PathLike[str]] = (),
) -> KernelLibrary:
    """Builds a kernel library from source text, or from one or more paths.

    `defines` are "NAME" or "NAME=VALUE", or a mapping. Source text is saved as `<name>.cpp`, so that messages can refer
    to its lines. The result is cached by content in `CANN_SIM_CACHE` (default ~/.cache/cann_sim). Raises CompileError
    with the compiler's output.
    """
    toolkit_path()
    if isinstance(defines, Mapping):
        defines = [f"{key}={value}" for key, value in defines.items()]
    compiler = [*compiler_command(), *(BUILD_FILES / "compile_flags.txt").read_text().split()]
    compiler += [f"-I{TOOLKIT / 'include'}"]
    compiler += [f"-I{Path(folder).resolve()}" for folder in include_dirs] + [f"-D{define}" for define in defines]
    cache = cache_folder()
    paths = _paths(source, name, cache)
    launchers = _launchers()
    try:
        texts = [launchers.preprocess(path, compiler) for path in paths]
        digest = _digest(
            *map(str, paths), *texts, *compiler, _version(compiler_command()), Path(launchers.__file__).read_text()
        )
        library = cache / digest / f"lib{name or paths[0].stem}.so"
        if not library.exists():
            _build(launchers, compiler, paths, texts, library)
    except launchers.LauncherError as error:
        raise CompileError(lead(str(error))) from None
    return KernelLibrary(library)


def _build(launchers: ModuleType, compiler: list[str], paths: list[Path], texts: list[str], library: Path) -> None:
    """Compiles in a temporary folder and moves the result into place atomically."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        wrappers = []
        for number, (path, text) in enumerate(zip(paths, texts, strict=True)):
            kernels = launchers.find_kernels(text)
            wrapper = Path(folder) / f"{number}_{path.stem}.cpp"
            wrapper.write_text(launchers.wrapper(path, kernels))
            wrappers.append(str(wrapper))
        built = Path(folder) / library.name
        command = [*compiler, "-shared", *wrappers, "-o", str(built), str(LIBRARY), f"-Wl,-rpath,{LIBRARY.parent}"]
        english = {**os.environ, "LC_ALL": "C.UTF-8"}
        result = subprocess.run(command, capture_output=True, text=True, env=english)
        if result.returncode != 0:
            raise CompileError(lead(result.stderr))
        built.replace(library)


def _paths(source: object, name: str | None, cache: Path) -> list[Path]:
    """The files to compile; writes source text to a file."""
    if isinstance(source, str) and ("\n" in source or "{" in source):
        folder = cache / f"source-{_digest(source, name or '')}"
        path = folder / f"{name or 'kernel'}.cpp"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
                file.write(source)
            os.replace(file.name, path)
        return [path]
    paths = [Path(path).resolve() for path in ([source] if isinstance(source, str | os.PathLike) else source)]  # type: ignore[union-attr]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"kernel source {path} does not exist")
    return paths


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _version(compiler: list[str]) -> str:
    return subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout


@functools.cache
def _launchers() -> ModuleType:
    """The toolkit's generator script, imported as a module."""
    spec = importlib.util.spec_from_file_location("cann_sim._make_launchers", BUILD_FILES / "make_launchers.py")
    assert spec is not None
    assert spec.loader is not None
    generator = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = generator  # dataclasses look their module up
    spec.loader.exec_module(generator)
    return generator
