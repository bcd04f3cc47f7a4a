"""Tests of an installed npu_xent without its sources. Run by .ci/smoke_test."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

COMPILERS = ("cc", "gcc", "c++", "g++", "clang", "clang++")
ROWS, CLASSES = 37, 1003

# Simulates another release of torch by changing the version of the installed one.
WITH_ANOTHER_TORCH = "import torch; torch.__version__ = '2.12.0+cpu'; import npu_xent"


def expect(true: bool, text: str) -> None:
    """Exit with the text unless it is true."""
    if not true:
        raise SystemExit(f"smoke test: {text}")


def check_installation(version: str, site: Path | None) -> None:
    """Check that the imported versions, files and requirements are the wheel's."""
    import npu_xent

    expect("torch_npu" not in sys.modules or site is not None, "import npu_xent has imported torch_npu")
    folder = Path(npu_xent.__file__).parent
    wanted = site or Path(sys.prefix)
    expect(folder.is_relative_to(wanted), f"npu_xent was imported from {folder}, not from {wanted}")
    installed = importlib.metadata.distribution("npu_xent")
    versions = {"metadata": installed.version, "__version__": npu_xent.__version__}
    expect(set(versions.values()) == {version}, f"the wheel is {version}, but its versions are {versions}")

    torch_version = torch.__version__.partition("+")[0]
    needed = [need for need in installed.requires or [] if "extra ==" not in need]
    expect(needed == [f"torch=={torch_version}"], f"the wheel requires {needed}, not torch=={torch_version}")

    files = {str(file) for file in installed.files or []}
    npu_files = sorted(file for file in files if "npu_xent/_npu" in file or "npu_xent/kernels/" in file)
    for_npus = ".cann" in version
    expect(len(npu_files) == (2 if for_npus else 0), f"files for NPUs in the wheel {version}: {npu_files}")
    info = f"npu_xent-{version}.dist-info"
    documents = {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE", f"{info}/sboms/npu_xent.cdx.json"}
    expect(documents <= files, f"the wheel lacks {documents - files}")
    bill = json.loads(installed.read_text("sboms/npu_xent.cdx.json"))
    held = {entry["name"]: entry.get("version") for entry in bill["components"]}
    expect(bill["metadata"]["component"]["version"] == version, f"the bill of materials is of {bill['metadata']}")
    expect(held["torch"].partition("+")[0] == torch_version, f"the bill of materials has torch {held['torch']}")
    expect(("CANN toolkit" in held) == for_npus, f"the bill of materials of {version} has {sorted(held)}")

    foreign = [f for f in files if not f.startswith(("npu_xent/", "npu_xent-")) and site is None]
    expect(not foreign, f"files outside of npu_xent: {foreign}")


def check_another_torch() -> None:
    """Importing it with another torch raises a clear error instead of crashing."""
    run = subprocess.run([sys.executable, "-I", "-c", WITH_ANOTHER_TORCH], capture_output=True, text=True)
    said = "but torch 2.12.0+cpu is installed. Rebuild it"
    expect(run.returncode == 1 and said in run.stderr, f"with another torch: {run.returncode}, {run.stderr}")


def check_losses(device: str) -> None:
    """Loss and gradient match torch.nn.functional.cross_entropy in float32 on the CPU."""
    import npu_xent

    torch.manual_seed(0)
    values = torch.randn(ROWS, CLASSES)
    target = torch.randint(CLASSES, (ROWS,))
    target[3] = -100
    weight = torch.rand(CLASSES) + 0.5
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        for options in ({}, {"weight": weight, "label_smoothing": 0.1}, {"reduction": "sum"}):
            expected = values.to(dtype, copy=True).float().requires_grad_()
            loss = F.cross_entropy(expected, target, **options)
            loss.backward()
            logits = values.to(device, dtype, copy=True).requires_grad_()
            moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
            ours = npu_xent.cross_entropy(logits, target.to(device), **moved)
            ours.backward()
            torch.testing.assert_close(ours.cpu().float(), loss.detach(), rtol=tolerance, atol=0.0)
            # A gradient is at most the weight of its row, and is rounded once.
            scale = expected.grad.abs().max().item()
            torch.testing.assert_close(logits.grad.cpu().float(), expected.grad, rtol=tolerance, atol=scale * 1e-5)

    target = target.clamp(min=0)
    expected = values.clone().requires_grad_()
    loss = F.cross_entropy(expected, target)
    loss.backward()
    logits = values.to(device, copy=True).requires_grad_()
    ours, log_prob, _, _ = npu_xent.npu_cross_entropy_loss(logits, target.to(device))
    ours.sum().backward()
    torch.testing.assert_close(ours.detach().cpu(), loss.detach().reshape(1))
    torch.testing.assert_close(log_prob.detach().cpu(), values.log_softmax(1))
    torch.testing.assert_close(logits.grad.cpu(), expected.grad)


def check_compiled() -> None:
    """torch.compile traces it into one graph. Uses aot_eager, since the default backend needs a compiler."""
    import npu_xent

    logits, target = torch.randn(ROWS, CLASSES, requires_grad=True), torch.randint(CLASSES, (ROWS,))
    compiled = torch.compile(npu_xent.cross_entropy, backend="aot_eager", fullgraph=True)
    loss = compiled(logits, target)
    loss.backward()
    torch.testing.assert_close(loss.detach(), F.cross_entropy(logits.detach(), target))


def main() -> None:
    """Run all checks for the device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--version", required=True, help="the one in the wheel's file name")
    parser.add_argument("--device", default="cpu", choices=("cpu", "npu"))
    parser.add_argument("--site", type=Path, help="the folder of npu_xent, if it is not in this environment")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        found = [name for name in COMPILERS if shutil.which(name)]
        expect(not found, f"there is a compiler: {found}")
        check_installation(arguments.version, arguments.site)
        check_another_torch()
        check_compiled()
    else:
        import torch_npu  # noqa: F401  (registers the device)

        check_installation(arguments.version, arguments.site)
        import npu_xent

        npu_xent.load_npu()  # raises if the kernels cannot be loaded, instead of using the composite
    check_losses(arguments.device)
    print(f"npu_xent {arguments.version} works on {arguments.device} with torch {torch.__version__}")


if __name__ == "__main__":
    main()
