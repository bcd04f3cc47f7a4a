"""The documentation says what the code says.

Every message in docs/errors.md is one of the code and has a remedy; messages are read out of the sources, with an
ellipsis for the parts that they fill in. Launches and environment variables are listed, and programs in the pages run.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from processes import aborted_at_exit

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parent.parent
ERRORS = ROOT / "docs" / "errors.md"
ATLAS = ROOT / "docs" / "atlas.md"
ACCEPTANCE = ROOT / "docs" / "acceptance.md"
PADDED_LABELS = ROOT / "docs" / "padded_labels.md"
PYTHON = [ROOT / "setup.py", *sorted((ROOT / "npu_xent").rglob("*.py"))]
CXX = sorted(path for kind in ("*.h", "*.cpp") for path in (ROOT / "csrc").rglob(kind))
CMAKE = [
    ROOT / "CMakeLists.txt",
    *sorted((ROOT / "cmake").glob("*.cmake")),
    ROOT / "csrc" / "ascendc" / "CMakeLists.txt",
]

GAP = "\u2026"  # what a message fills in
FEWEST_WORDS = 3  # of a message; less is a part of one, or a name


# C++ ------------------------------------------------------------------------------------------------------------------

LITERAL = re.compile(r'"((?:[^"\\]|\\.)*)"')
CHECK = re.compile(r"\b(?:TORCH_CHECK(?:_VALUE|_TYPE|_INDEX|_NOT_IMPLEMENTED)?|CHECK_SYM_VALUE)\(")
THROW = re.compile(r"\bthrow std::\w+\(")
REFUSE = re.compile(r"\bset_refusing_history\(")
REFUSE_SECOND = re.compile(r"\brefuse_second_derivative\(")
# Messages with a name: `constexpr char kName[] = ...;` and `const auto message = ...;`.
NAMED = re.compile(r"\bchar (k\w+)\[\]\s*=\s*([^;]+);|\bauto (message)\s*=\s*([^;]+);")


def arguments(text: str, begin: int) -> list[str]:
    """The arguments of the call whose parenthesis opens just before `begin`."""
    found, start, depth, at = [], begin, 0, begin
    while True:
        if literal := LITERAL.match(text, at):
            at = literal.end()
            continue
        if text[at] in "([{":
            depth += 1
        elif text[at] in ")]}":
            depth -= 1
        if depth < 0 or (text[at] == "," and depth == 0):
            found.append(text[start:at].strip())
            start = at + 1
        if depth < 0:
            return found
        at += 1


def messages_of(expression: str, names: dict[str, str]) -> list[str]:
    """What an expression says: one text, or one for each branch of a condition."""
    expression = re.sub(r'\["\w+"\]', "", names.get(expression, expression))  # a key says nothing
    bare = LITERAL.sub(lambda literal: "#" * len(literal[0]), expression)
    if "#" not in bare:
        return [GAP]
    if " ? " in bare:
        colon = bare.index(" : ")
        branches = expression[bare.index(" ? ") + 3 : colon], expression[colon + 3 :]
        return [text for branch in branches for text in messages_of(branch, names)]
    said, end = "", 0
    for literal in LITERAL.finditer(expression):
        said += GAP if expression[end : literal.start()].strip() else ""  # else literals side by side, which are one
        said += literal[1].replace('\\"', '"')
        end = literal.end()
    return [said]


def from_cxx(path: Path) -> Iterator[str]:
    text = re.sub(r"^\s*#define.*$|//.*$", "", path.read_text(), flags=re.MULTILINE)
    names = {match[1] or match[3]: match[2] or match[4] for match in NAMED.finditer(text)}
    for pattern, words in (
        (CHECK, slice(1, None)),
        (THROW, slice(None)),
        (REFUSE, slice(1, 2)),
        (REFUSE_SECOND, slice(3, 4)),
    ):
        for call in pattern.finditer(text):
            said = [""]
            for argument in arguments(text, call.end())[words]:
                said = [before + more for before in said for more in messages_of(argument, names)]
            yield from said


# Python ---------------------------------------------------------------------------------------------------------------

# Functions that raise or warn, and which of their arguments is the message.
SPEAKING = {"_missing": 0, "_require": 2, "warn": 0, "error": 0, "SystemExit": 0}


def literals(node: ast.AST, names: dict[str, ast.expr]) -> Iterator[str]:
    """The texts in an expression."""
    match node:
        case ast.Constant(value=str(text)):
            yield text.replace("{}", GAP)
        case ast.JoinedStr(values=parts):
            said = (part.value if isinstance(part, ast.Constant) else GAP for part in parts)
            yield "".join(str(part) for part in said).replace("{}", GAP)
        case ast.Name(id=name) if name in names:
            yield from literals(names[name], {})
        case _:
            for child in ast.iter_child_nodes(node):
                yield from literals(child, names)


def spoken_by(node: ast.AST) -> ast.expr | None:
    """The message in `raise Error(message)`, `return Error(message)` or a call of a function that speaks."""
    call = node.exc if isinstance(node, ast.Raise) else node.value if isinstance(node, ast.Return) else node
    if not isinstance(call, ast.Call):
        return None
    name = getattr(call.func, "id", getattr(call.func, "attr", ""))
    position = SPEAKING.get(name, 0 if name.endswith("Error") or isinstance(node, ast.Raise) else None)
    return call.args[position] if position is not None and len(call.args) > position else None


def from_python(path: Path) -> Iterator[str]:
    for function in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)):
        names = {
            target.id: node.value
            for node in ast.walk(function)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(function):
            if (message := spoken_by(node)) is not None:
                yield from literals(message, names)


def from_cmake(path: Path) -> Iterator[str]:
    for message in re.findall(r"message\(FATAL_ERROR\s+([^)]*)\)", path.read_text()):
        yield re.sub(r"\$\{\w+\}", GAP, "".join(LITERAL.findall(message)))


# The comparison -------------------------------------------------------------------------------------------------------


def spoken() -> list[str]:
    """The messages of the sources, each once."""
    readers = ((PYTHON, from_python), (CXX, from_cxx), (CMAKE, from_cmake))
    said = (" ".join(text.split()) for paths, read in readers for path in paths for text in read(path))
    said = (re.sub(f"{GAP}+", GAP, text) for text in said)
    return list(dict.fromkeys(text for text in said if len(re.findall(r"[A-Za-z_]{2,}", text)) >= FEWEST_WORDS))


def documented() -> dict[str, str]:
    """The messages of docs/errors.md, each a list item in code style, and the remedy in the lines below it."""
    item = re.compile(r"^- `([^`]+)`(?:\\)?\n((?:  .*\n)*)", flags=re.MULTILINE)
    return {message: " ".join(remedy.split()) for message, remedy in item.findall(ERRORS.read_text())}


def test_the_sources_are_read() -> None:
    """Every documented message would count as stale if this found too few."""
    for path, words in {
        "csrc/options.h": "npu_xent: label_smoothing must lie in [0, 1], but is",
        "csrc/autograd/cross_entropy.cpp": "second one needs consume_logits=False.",
        "npu_xent/_constraints.py": "the dtype of target must be int64",
        "npu_xent/_loading.py": "torch_npu sees no NPU.",
        "setup.py": "SOC_VERSION is not set and npu-smi does not tell",
        "csrc/ascendc/CMakeLists.txt": "install the toolkit with its kernel development files",
    }.items():
        read = {".py": from_python, ".txt": from_cmake}.get(Path(path).suffix, from_cxx)
        assert any(words in text for text in read(ROOT / path)), path


def test_every_documented_error_is_in_the_code() -> None:
    said = spoken()
    stale = [text for text in documented() if text not in said]
    assert not stale, "in docs/errors.md, but no longer in the code:\n" + "\n".join(stale)


def test_every_error_about_overwriting_is_documented() -> None:
    """With its own remedy too. An ellipsis of the page stands for any words, such as the function's name."""
    known = [re.compile(re.escape(message).replace(GAP, ".+")) for message in documented()]
    about = [text for text in spoken() if re.search(r"consume_logits|overwrit|write over", text)]
    assert len(about) >= 12
    missing = [text for text in about if not any(message.fullmatch(text) for message in known)]
    assert not missing, "not in docs/errors.md:\n" + "\n".join(missing)


def test_every_documented_error_has_a_remedy() -> None:
    """A message that carries its own remedy is not listed."""
    bare = [
        message for message, remedy in documented().items() if re.match(r"(As it says|As above|The same)?\W*$", remedy)
    ]
    assert not bare, "in docs/errors.md without a remedy of their own:\n" + "\n".join(bare)


# Names and programs ---------------------------------------------------------------------------------------------------


def programs(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_every_launch_is_listed() -> None:
    launches = re.findall(r'kName = "(\w+)"', (ROOT / "csrc/npu/launch.h").read_text())
    assert len(launches) == 5
    listed = re.findall(r"^\| `(npu_xent_\w+)` \|", ATLAS.read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(launches)


def test_every_environment_variable_is_documented() -> None:
    reading = re.compile(r'(?:getenv\(|environ\.(?:get|setdefault)\(|environ\[)"(\w+)"')
    read = {name for path in (*PYTHON, *CXX) for name in reading.findall(path.read_text())}
    assert {"NPU_XENT_DEBUG", "NPU_XENT_HUGE_PAGES", "NPU_XENT_KEEP_MEMORY", "SOC_VERSION"} <= read
    pages = ATLAS.read_text() + (ROOT / "docs" / "environment.md").read_text()
    assert not {name for name in read if f"`{name}" not in pages}


SITE = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "cann_sim" / "README.md"})
WIDEST = 105  # characters of code that fit between the site's two lists of contents, in a window of 1400 pixels


@pytest.mark.parametrize("page", SITE, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_does_not_scroll_sideways(page: Path) -> None:
    fenced = re.compile(r"^```.*?^```$", flags=re.MULTILINE | re.DOTALL)
    code = [line for block in fenced.findall(page.read_text()) for line in block.splitlines()]
    code += re.findall(r"^    (.*)", fenced.sub("", page.read_text()), flags=re.MULTILINE)
    assert not [line for line in code if len(line) > WIDEST]


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        *(f"docs/{name}.md" for name in ("acceptance", "atlas", "install", "limits", "migration", "rl", "vendor")),
    ],
)
def test_programs_parse(page: str) -> None:
    assert programs(ROOT / page)
    for program in programs(ROOT / page):
        ast.parse(program)


def test_the_program_for_several_cards_runs(tmp_path: Path) -> None:
    """Two processes on the CPU, which find the same weights and learn."""
    program = next(text for text in programs(ATLAS) if text.startswith("# ddp.py"))
    (tmp_path / "ddp.py").write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "ddp.py", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 or aborted_at_exit(run.returncode, run.stderr), run.stderr
    losses = [float(loss) for loss in re.findall(r"^step \d+: (\S+)$", run.stdout, flags=re.MULTILINE)]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("logits, passes", [("logits", True), ("2 * logits", False)])
def test_the_soak_finds_what_is_wrong(logits: str, passes: bool, tmp_path: Path) -> None:
    """A few seconds of it on the CPU, with small shapes."""
    program = next(text for text in programs(ACCEPTANCE) if text.startswith("# soak.py"))
    call = "first = step(npu_xent.cross_entropy, {}, target"
    assert call.format("logits") in program
    (tmp_path / "soak.py").write_text(program.replace(call.format("logits"), call.format(logits)))
    command = [sys.executable, "soak.py", "4", "cpu", "0.002"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (run.returncode == 0) == passes, run.stderr
    assert ("soak passed" in run.stdout) == passes
    assert ("AssertionError: turn 0" in run.stderr) != passes
    assert ("s, turn 0: " in run.stdout) == passes


def test_the_programs_on_padded_labels_print_what_the_page_says() -> None:
    """One after the other, as a reader types them. What a program prints stands below it."""
    pairs = re.findall(
        r"^```python\n(.*?)^```\n\n```\n(.*?)^```$", PADDED_LABELS.read_text(), flags=re.MULTILINE | re.DOTALL
    )
    assert len(pairs) == len(programs(PADDED_LABELS)) == 5
    names: dict[str, object] = {}
    for program, output in pairs:
        with contextlib.redirect_stdout(io.StringIO()) as printed, torch.random.fork_rng():
            exec(program, names)
        assert printed.getvalue() == output
