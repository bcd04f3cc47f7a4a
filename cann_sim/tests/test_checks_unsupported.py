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
    "GET_TILING_DATA": "GET_TILING_DATA(tiling, x);",
    "Sin": "LocalTensor<float> a; Sin(a, a, 8);",
    "Sum": "LocalTensor<float> a; Sum<float, 1>(a, a, 8);",
    "Matmul": "Matmul<float, float> matmul;",
    "Tanh": "LocalTensor<float> a; Tanh(a, a);",
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
    """The message begins with what is missing, and where: each statement is refused on its own line."""
    line = HEAD.count("\n") + number * KERNEL.count("\n") + 2
    words = rf"cann_sim does not model (this )?{name}\b"
    head = compiler_output.splitlines()[: len(STATEMENTS)]
    assert any(re.search(rf"/unsupported\.cpp:{line}: {words}", refusal) for refusal in head), compiler_output


def test_a_header_that_is_not_there_is_named() -> None:
    with pytest.raises(cann_sim.CompileError, match=r"^\S+/cube\.cpp:3: cann_sim does not model lib/matmul_intf\.h"):
        cann_sim.compile(HEAD + '#include "lib/matmul_intf.h"\n', name="cube")


def test_a_helper_is_named_by_its_own_line() -> None:
    helper = "template <typename T> __aicore__ inline void helper(T a) { Tanh(a, a); }\n"
    source = HEAD + helper + KERNEL.format(number=0, statement="helper(LocalTensor<float>());")
    with pytest.raises(cann_sim.CompileError, match=r"^\S+/helper\.cpp:3: cann_sim does not model Tanh\n"):
        cann_sim.compile(source, name="helper")


def test_a_compile_error_shows_the_compilers_words() -> None:
    with pytest.raises(cann_sim.CompileError, match="no_such_function"):
        cann_sim.compile(HEAD + KERNEL.format(number=0, statement="no_such_function(x);"), name="mistake")


def test_an_unknown_kernel_is_named() -> None:
    library = cann_sim.compile(HEAD + KERNEL.format(number=0, statement="(void)x;"), name="only_k0")
    with pytest.raises(Exception, match="k1"):
        library.launch("k1", 1, None)
    library.launch("k0", 1, None)
