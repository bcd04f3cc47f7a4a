"""What the simulator does not model is refused by the compiler, by name."""

from __future__ import annotations

import re

import pytest

import cann_sim

HEAD = '#include "kernel_operator.h"\nusing namespace AscendC;\n'
KERNEL = 'extern "C" __global__ __aicore__ void k{number}(GM_ADDR x) {{\n  {statement}\n}}\n'

# What the message has to name, and a statement that uses it.
STATEMENTS = {
    "SyncAll": "SyncAll();",
    "SetAtomicAdd": "SetAtomicAdd<float>();",
    "SetAtomicNone": "SetAtomicNone();",
    "CrossCoreSetFlag": "CrossCoreSetFlag<0, PIPE_MTE3>(0);",
    "CrossCoreWaitFlag": "CrossCoreWaitFlag(0);",
    "Mmad": "LocalTensor<half> a; LocalTensor<float> c; Mmad(c, a, a, 0);",
    "LoadData": "LocalTensor<half> a; LoadData(a, a, 0);",
    "Fixpipe": "LocalTensor<float> a; GlobalTensor<float> b; Fixpipe(b, a, 0);",
    "Sort32": "LocalTensor<float> a; LocalTensor<uint32_t> b; Sort32(a, a, b, 1);",
    "SetFlag": "SetFlag<HardEvent::M_FIX>(0);",
    "PipeBarrier": "PipeBarrier<PIPE_M>();",
    "queue position": "TQue<TPosition::A1, 1> queue;",
}


@pytest.fixture(scope="module")
def compiler_output() -> str:
    """One compilation of all the statements."""
    kernels = [KERNEL.format(number=i, statement=statement) for i, statement in enumerate(STATEMENTS.values())]
    with pytest.raises(cann_sim.CompileError) as caught:
        cann_sim.compile(HEAD + "".join(kernels), name="unsupported")
    return str(caught.value)


@pytest.mark.parametrize("number, name", list(enumerate(STATEMENTS)), ids=STATEMENTS)
def test_named_by_the_compiler(compiler_output: str, number: int, name: str) -> None:
    """The message names what is missing, and where: each statement is refused on its own line."""
    line = HEAD.count("\n") + number * KERNEL.count("\n") + 2
    words = rf"cann_sim does not model (this )?{name}\b"
    # The compiler gives the place of the refusal first, or the chain of templates that leads from the statement to it.
    refusals = re.split(r"(?m)^(?=In file included|\S+: In )", compiler_output)
    assert any(re.search(words, part) and f"unsupported.cpp:{line}:" in part for part in refusals), compiler_output


def test_a_compile_error_shows_the_compilers_words() -> None:
    with pytest.raises(cann_sim.CompileError, match="no_such_function"):
        cann_sim.compile(HEAD + KERNEL.format(number=0, statement="no_such_function(x);"), name="mistake")


def test_an_unknown_kernel_is_named() -> None:
    library = cann_sim.compile(HEAD + KERNEL.format(number=0, statement="(void)x;"), name="only_k0")
    with pytest.raises(Exception, match="k1"):
        library.launch("k1", 1, None)
    library.launch("k0", 1, None)
