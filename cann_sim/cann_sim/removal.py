"""Takes a kernel's synchronisation away, one site at a time, and tells which removals the checks notice.

A kernel is shown to need all of its synchronisation, and the checks to see all that it needs, when every removal is
caught. A removal that is not caught leaves a kernel that is still right on this launch: its site is redundant there,
and `partners` tells which other site does the same work.

A site is a line of source and a kind: the flags of a helper function count as one site, wherever it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._config import Config
from ._library import KernelError


@dataclass(frozen=True)
class Removal:
    """One synchronisation site and what became of the launch without its ordering."""

    index: int  # in the report's sync_sites
    kind: str
    file: str
    line: int
    count: int  # how often the intact launch executed it
    error: KernelError | None = None  # what the launch without it was refused with
    partners: tuple[int, ...] = ()  # sites that do its work: without both, the launch is refused

    @property
    def caught(self) -> bool:
        """Whether the launch was refused without this site."""
        return self.error is not None

    @property
    def message(self) -> str:
        """What the launch was refused with, or why nothing had to be."""
        if self.error is not None:
            return str(self.error)
        if self.partners:
            return f"redundant beside site {', '.join(map(str, self.partners))}"
        return "redundant: nothing in this launch depends on it"

    def __str__(self) -> str:
        site = f"{self.index}: {self.kind} at {Path(self.file).name}:{self.line}, {self.count} times"
        return f"{site}, {'caught' if self.caught else 'not caught'}: {self.message}"


def removed_syncs(run: Callable[[Config], Any]) -> list[Removal]:
    """Calls `run` as it is, which has to pass, then without each synchronisation in turn.

    `run` takes a `Config`, launches with it, and returns the report. It has to make its launch anew each time: fresh
    outputs, since a launch that is refused leaves them half written. Sites whose removal is not caught are then removed
    two at a time, which shows where one does the work of another.
    """
    sites = run(Config()).sync_sites
    removals = [Removal(*site, error=_error(run, site[0])) for site in sites]
    redundant = [removal.index for removal in removals if not removal.caught]
    pairs = {(a, b) for a in redundant for b in redundant if a < b and _error(run, (a, b)) is not None}
    return [
        removal if removal.caught else Removal(*_site(removal), partners=_partners(removal.index, pairs))
        for removal in removals
    ]


def summary(removals: Sequence[Removal]) -> str:
    """How many sites were removed, caught and redundant, and one line for each of them."""
    caught = sum(removal.caught for removal in removals)
    head = f"{len(removals)} removed, {caught} caught, {len(removals) - caught} redundant"
    return "\n".join([head, *map(str, removals)])


def _error(run: Callable[[Config], Any], site: int | tuple[int, ...]) -> KernelError | None:
    try:
        run(Config(remove_sync=site))
    except KernelError as error:
        return error
    return None


def _site(removal: Removal) -> tuple[int, str, str, int, int]:
    return removal.index, removal.kind, removal.file, removal.line, removal.count


def _partners(index: int, pairs: set[tuple[int, int]]) -> tuple[int, ...]:
    return tuple(sorted(b if a == index else a for a, b in pairs if index in (a, b)))
