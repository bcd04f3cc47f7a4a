"""Removes a kernel's synchronisation, one site at a time, and reports which removals the checks catch.

If every removal is caught, the kernel needs all of its synchronisation, and the checks notice everything missing. A
removal that is not caught leaves this launch correct: the site is redundant there, and `partners` names the other sites
that do the same work.

A site is a source line and a kind: the flags of a helper function count as one site for all its callers.
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
    """One synchronisation site, and the outcome of the launch without its ordering."""

    index: int  # in the report's sync_sites
    kind: str
    file: str
    line: int
    count: int  # executions in the unmodified launch
    error: KernelError | None = None  # the error of the launch without it
    partners: tuple[int, ...] = ()  # sites that do the same work: removing both is caught

    @property
    def caught(self) -> bool:
        """Whether the launch without this site raised an error."""
        return self.error is not None

    @property
    def message(self) -> str:
        """The error without this site, or why there was none."""
        if self.error is not None:
            return str(self.error)
        if self.partners:
            return f"redundant with site {', '.join(map(str, self.partners))}"
        return "redundant: nothing in this launch depends on it"

    def __str__(self) -> str:
        site = f"{self.index}: {self.kind} at {Path(self.file).name}:{self.line}, {self.count} times"
        return f"{site}, {'caught' if self.caught else 'not caught'}: {self.message}"


def removed_syncs(run: Callable[[Config], Any]) -> list[Removal]:
    """Calls `run` unmodified, which must pass, then without each synchronisation site in turn.

    `run` takes a `Config`, launches with it, and returns the report. It must allocate new outputs each time, since a
    failed launch leaves them partly written. Sites whose removal is not caught are then removed in pairs, to find sites
    that do the same work.
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
    """The numbers of removed, caught and redundant sites, then one line per site."""
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
