"""What is in an sdist, and what it is called. Nothing is compiled."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import cann_sim

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(not (ROOT.parent / ".git").exists(), reason="asks git for the files")
def test_the_sdist_has_all_files_and_no_build_products(tmp_path: Path) -> None:
    left_out = shutil.ignore_patterns(".*", "build", "__pycache__", "*.so", "*.egg-info")
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=left_out)
    product = source / "cann_sim" / "toolkit" / "lib64" / "libcann_sim.so"
    product.parent.mkdir(exist_ok=True)
    product.write_text("")

    subprocess.run([sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", "out"], cwd=source, check=True)
    (archive,) = (source / "out").iterdir()
    assert archive.name == f"cann_sim-{cann_sim.__version__}.tar.gz"
    with tarfile.open(archive) as opened:
        files = {member.name.partition("/")[2] for member in opened.getmembers() if member.isfile()}

    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    tracked = {file for file in listed.split() if (ROOT / file).exists()} - {".gitignore"}
    assert "src/launch.cpp" in tracked
    assert tracked - files == set()
    assert not [file for file in files if file.endswith((".so", ".pyc"))]
