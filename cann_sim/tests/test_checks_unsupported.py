"""What the simulator does not model is refused by the compiler, by name."""

from __future__ import annotations

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
    """One compilation of all the statements: each must be refused on its own line."""
    kernels = [KERNEL.format(number=i, statement=statement) for i, statement in enumerate(STATEMENTS.values())]
    with pytest.raises(cann_sim.CompileError) as caught:
        cann_sim.compile(HEAD + "".join(kernels), name="unsupported")
    return str(caught.value)


@pytest.mark.parametrize("name", STATEMENTS)
def test_named_by_the_compiler(compiler_output: str, name: str) -> None:
    refusals = [line for line in compiler_output.splitlines() if "cann_sim does not model" in line]
    assert any(name in line for line in refusals), "\n".join(refusals)


def test_a_compile_error_shows_the_compilers_words() -> None:
    with pytest.raises(cann_sim.CompileError, match="no_such_function"):
        cann_sim.compile(HEAD + KERNEL.format(number=0, statement="no_such_function(x);"), name="mistake")


def test_an_unknown_kernel_is_named() -> None:
    library = cann_sim.compile(HEAD + KERNEL.format(number=0, statement="(void)x;"), name="only_k0")
    with pytest.raises(Exception, match="k1"):
        library.launch("k1", 1, None)
    library.launch("k0", 1, None)
