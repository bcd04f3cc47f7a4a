"""Random programs: the simulator refuses one exactly when a model finds two conflicting accesses that nothing orders.

The model draws the graph of what comes before what, and looks for a path between each two accesses of the same bytes.
It shares nothing with the simulator's clocks and range maps but the rules of the documentation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_file import aligned, kernel_file

import cann_sim

S, V, MTE2, MTE3 = range(4)
PIPES = ("S", "V", "MTE2", "MTE3")
EVENTS = [(a, b) for a in range(4) for b in range(4) if a != b]  # in the kernel's numbering
BLOCKS = 32  # of UB, and of GM
LENGTH = 120  # steps that a program may have
COPY_IN, COPY_OUT, ADDS, DUPLICATE, GET, SET, GM_GET, GM_SET, SET_FLAG, WAIT_FLAG, BARRIER = range(11)
ALL_PIPES = 0  # BARRIER's operand; else the pipe's number


@dataclass(frozen=True)
class Step:
    """One operation: blocks that it writes and reads, or an event and its id, or a barrier's pipe."""

    code: int
    to: int = 0
    source: int = 0
    count: int = 1

    @property
    def word(self) -> int:
        """The step as the kernel reads it."""
        return self.code | self.to << 8 | self.source << 16 | self.count << 24

    @property
    def pipe(self) -> int:
        """The pipe that an instruction runs on."""
        return {COPY_IN: MTE2, COPY_OUT: MTE3, ADDS: V, DUPLICATE: V}.get(self.code, S)

    def accesses(self) -> tuple[set[tuple[str, int]], set[tuple[str, int]]]:
        """What it reads and what it writes."""
        read = {"ub": (COPY_OUT, ADDS, GET), "gm": (COPY_IN, GM_GET)}
        written = {"ub": (COPY_IN, ADDS, DUPLICATE, SET), "gm": (COPY_OUT, GM_SET)}
        return (
            {(m, self.source + i) for m, codes in read.items() if self.code in codes for i in range(self.count)},
            {(m, self.to + i) for m, codes in written.items() if self.code in codes for i in range(self.count)},
        )


def all_before(steps: list[Step]) -> list[set[int]]:
    """For each step, all steps that are complete before it starts."""
    before: list[set[int]] = []
    for i in range(len(steps)):
        direct = [j for j in range(i) if comes_before(steps, j, i)]
        before.append(set(direct).union(*(before[j] for j in direct)))
    return before


def sets_twice(steps: list[Step]) -> bool:
    """Whether a flag may be set again before the wait has taken it that comes earlier in the program."""
    before = all_before(steps)
    waits: dict[tuple[int, int], int] = {}
    issued: set[int] = set()  # what is complete when the scalar unit comes to the step
    for i, step in enumerate(steps):
        flag = (step.to, step.source)
        if step.code == SET_FLAG and flag in waits and waits[flag] not in before[i] | issued:
            return True
        if step.code == WAIT_FLAG:
            waits[flag] = i
        if step.code < BARRIER and where(step) == S:
            issued |= before[i] | {i}
    return False


def first_race(steps: list[Step]) -> tuple[int, int] | None:
    """The first step that conflicts with an earlier one and need not come after it; the earlier one, and it."""
    for i, (step, earlier) in enumerate(zip(steps, all_before(steps), strict=True)):
        if step.code >= SET_FLAG:
            continue
        reads, writes = step.accesses()
        for j in range(i):
            if steps[j].code >= SET_FLAG or j in earlier:
                continue
            other_reads, other_writes = steps[j].accesses()
            if writes & (other_reads | other_writes) or reads & other_writes:
                return j, i
    return None


def comes_before(steps: list[Step], j: int, i: int) -> bool:
    """Whether the documentation orders step i directly after the earlier step j."""
    first, then = steps[j], steps[i]
    if BARRIER in (first.code, then.code):
        barriers = [step.to for step in (first, then) if step.code == BARRIER]
        if ALL_PIPES in barriers:
            return True
    if first.code == SET_FLAG and then.code == WAIT_FLAG:
        if (first.to, first.source) == (then.to, then.source):
            between = steps[j + 1 : i]
            return not any(
                step.code == WAIT_FLAG and (step.to, step.source) == (then.to, then.source) for step in between
            )
        # A flag's set holds nobody up, whatever pipe it is given to.
        return False
    if first.code == SET_FLAG:
        return False
    # A pipe takes its waits and barriers in order, and they hold up all that comes after them; a flag is set and a
    # barrier is passed when all before it on the pipe is complete. Instructions of one pipe overlap, but for S.
    holds = first.code in (WAIT_FLAG, BARRIER)
    gathers = then.code in (SET_FLAG, BARRIER)
    pipe = where(first)
    return pipe == where(then) and (holds or gathers or pipe == S)


def where(step: Step) -> int:
    """The pipe that a step is given to."""
    if step.code == SET_FLAG:
        return EVENTS[step.to][0]
    if step.code == WAIT_FLAG:
        return EVENTS[step.to][1]
    return step.to if step.code == BARRIER else step.pipe


@st.composite
def programs(draw: st.DrawFn, longest: int = 45) -> list[Step]:
    """Steps that keep all rules but, perhaps, the order of accesses: flags are paired, no overlap, few places."""
    block = st.integers(0, 7)
    count = st.integers(1, 3)
    steps: list[Step] = []
    pending: list[tuple[int, int]] = []
    for _ in range(draw(st.integers(2, longest))):
        kind = draw(
            st.sampled_from(["copy", "copy", "vector", "vector", "scalar", "set", "set", "wait", "wait", "barrier"])
        )
        if kind == "copy":
            steps.append(Step(draw(st.sampled_from([COPY_IN, COPY_OUT])), draw(block), draw(block), draw(count)))
        elif kind == "vector":
            n, to, source = draw(count), draw(block), draw(block)
            apart = source == to or abs(source - to) >= n
            steps.append(Step(ADDS, to, source, n) if apart else Step(DUPLICATE, to, 0, n))
        elif kind == "scalar":
            steps.append(Step(draw(st.sampled_from([GET, SET, GM_GET, GM_SET])), draw(block), draw(block)))
        elif kind == "set":
            flag = (draw(st.integers(0, 11)), draw(st.integers(0, 1)))
            if flag not in pending:
                pending.append(flag)
                steps.append(Step(SET_FLAG, *flag))
                if draw(st.booleans()):  # many a wait comes at once
                    steps.append(Step(WAIT_FLAG, *pending.pop()))
        elif kind == "wait" and pending:
            steps.append(Step(WAIT_FLAG, *pending.pop(draw(st.integers(0, len(pending) - 1)))))
        elif kind == "barrier":
            steps.append(Step(BARRIER, draw(st.sampled_from([V, V, MTE2, MTE3, ALL_PIPES]))))
    return steps


def closed(steps: list[Step]) -> list[Step]:
    """The program, then a wait for each flag that it leaves set."""
    pending: list[tuple[int, int]] = []
    for step in steps:
        if step.code == SET_FLAG:
            pending.append((step.to, step.source))
        elif step.code == WAIT_FLAG:
            pending.remove((step.to, step.source))
    return steps + [Step(WAIT_FLAG, *flag) for flag in pending]


def run(steps: list[Step]) -> None:
    steps = closed(steps)
    words = np.zeros(1 + LENGTH, np.uint32)
    words[: len(steps) + 1] = [len(steps), *(step.word for step in steps)]
    gm = np.zeros(BLOCKS * 8, np.float32)
    kernel_file("interpreter").library.launch("interpret", 1, gm, words.tobytes())


@settings(max_examples=400, deadline=None)
@given(programs())
def test_refused_exactly_when_something_is_unordered(steps: list[Step]) -> None:
    """Up to the first race the program passes, and with that step it is refused; so is a flag that may be set twice."""
    race = first_race(steps)
    if sets_twice(closed(steps[: race[1]] if race else steps)):
        with pytest.raises(cann_sim.KernelError) as caught:
            run(steps[: race[1]] if race else steps)
        assert caught.value.kind == "flag"
        assert "a second time" in caught.value.message
        return
    if race is None:
        run(steps)
        return
    run(steps[: race[1]])
    with pytest.raises(cann_sim.KernelError) as caught:
        run(steps[: race[1] + 1])
    assert caught.value.kind == "race"
    assert f"pipe {PIPES[steps[race[1]].pipe]}" in caught.value.message


def repaired(steps: list[Step]) -> tuple[list[Step], list[range]]:
    """The program with a flag or a barrier where the model asks for one, and where these are."""
    right: list[Step] = []
    repairs: list[range] = []
    for step in steps:
        right.append(step)
        while race := first_race(right):
            first, then = right[race[0]].pipe, step.pipe
            event = EVENTS.index((first, then)) if first != then else None
            own = 2 + len(repairs) % 6
            flag = [Step(SET_FLAG, event, own), Step(WAIT_FLAG, event, own)] if first != then else [Step(BARRIER, then)]
            repairs.append(range(len(right) - 1, len(right) - 1 + len(flag)))
            right[-1:-1] = flag
        if len(right) > LENGTH - 24:
            break
    return right, repairs


@settings(max_examples=60, deadline=None)
@given(programs(25))
def test_each_repair_of_a_program_is_needed_when_the_model_says_so(steps: list[Step]) -> None:
    """With all flags and barriers that the model asks for it passes; without one of them as the model says."""
    right, repairs = repaired(steps)
    assume(not sets_twice(closed(right)))
    run(right)
    for repair in repairs:
        without = [step for i, step in enumerate(right) if i not in repair]
        if first_race(without) is None and not sets_twice(closed(without)):
            run(without)
        else:
            with pytest.raises(cann_sim.KernelError):
                run(without)


@st.composite
def many_cores(draw: st.DrawFn) -> list[tuple[int, Step]]:
    """Copies and scalar accesses of GM, each by one of four cores."""
    steps = []
    for _ in range(draw(st.integers(2, 7))):
        code = draw(st.sampled_from([COPY_IN, COPY_OUT, COPY_OUT, GM_GET, GM_SET]))
        count = draw(st.integers(1, 24)) if code in (COPY_IN, COPY_OUT) else 1
        place = draw(st.integers(0, 120))
        steps.append((draw(st.integers(0, 3)), Step(code, place, place, count)))
    return steps


def cores_conflict(steps: list[tuple[int, Step]]) -> bool:
    """Whether two cores touch the same bytes, one of them writing, or one writes by scalars to the other's line."""
    touched = []  # of each step: core, floats read, floats written, floats that the lines of scalar writes cover
    for core, step in steps:
        reads, writes = ({place for memory, place in part if memory == "gm"} for part in step.accesses())
        line = {step.to // 16 * 16 + i for i in range(16)} if step.code == GM_SET else set()
        touched.append((core, reads, writes, line))
    return any(
        core != other_core and (writes & (other_reads | other_writes) or line & other_writes or line & other_line)
        for core, _, writes, line in touched
        for other_core, other_reads, other_writes, other_line in touched
    )


@settings(max_examples=300, deadline=None)
@given(many_cores())
def test_cores_are_refused_exactly_when_they_meet(steps: list[tuple[int, Step]]) -> None:
    """The sweep over what the cores touched finds what a comparison of each two accesses finds."""
    words = np.zeros(1 + LENGTH, np.uint32)
    words[: len(steps) + 1] = [len(steps), *(step.word | core << 4 for core, step in steps)]
    gm = aligned(256)
    library = kernel_file("interpreter").library
    if not cores_conflict(steps):
        library.launch("interpret_on_cores", 4, gm, words.tobytes())
        return
    with pytest.raises(cann_sim.KernelError) as caught:
        library.launch("interpret_on_cores", 4, gm, words.tobytes())
    assert caught.value.kind == "cross-core"


def test_the_model_itself() -> None:
    """A few programs whose answer is plain."""
    flag = EVENTS.index((MTE2, V))
    copy, add = Step(COPY_IN, 0, 0, 2), Step(ADDS, 4, 1, 1)
    paired = [Step(SET_FLAG, flag, 0), Step(WAIT_FLAG, flag, 0)]
    assert first_race([copy, add]) == (0, 1)
    assert first_race([copy, *paired, add]) is None
    assert first_race([paired[0], copy, paired[1], add]) == (1, 3)
    assert first_race([copy, Step(BARRIER, MTE2), add]) == (0, 2)
    assert first_race([copy, Step(BARRIER, ALL_PIPES), add]) is None
    assert first_race([add, add]) == (0, 1)
    assert first_race([add, Step(BARRIER, V), add]) is None
    assert first_race([copy, copy]) == (0, 1)
    assert first_race([Step(SET, 0), Step(GET, 0, 0)]) is None
    back = [Step(code, EVENTS.index((V, MTE2)), 0) for code in (SET_FLAG, WAIT_FLAG)]
    to_scalar = [Step(code, EVENTS.index((V, S)), 0) for code in (SET_FLAG, WAIT_FLAG)]
    assert sets_twice(paired + paired)
    assert sets_twice([*paired, Step(BARRIER, V), *paired])
    assert not sets_twice(paired + back + paired)
    assert not sets_twice(to_scalar + to_scalar)
    assert not sets_twice(paired + to_scalar + paired)
