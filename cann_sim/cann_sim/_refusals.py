"""Finds the unmodelled names in a compiler's output, and the kernel's lines that use them."""

from __future__ import annotations

import re

from ._runtime import TOOLKIT

REFUSAL = re.compile(r"^(?P<place>[^\s:][^:]*:\d+)\b.*?error: .*?(?P<words>cann_sim does not model .*?)\W*$")
DIAGNOSTIC = re.compile(r"^[^\s:][^:]*:\d+:(\d+:)? (fatal )?(error|warning): ")
# The chain of templates before a refusal (g++), and the notes after it (macros; clang's chain), innermost first.
REQUIRED = re.compile(r"^([^\s:][^:]*:\d+):.*required (from|by) ")
NOTE = re.compile(r"^([^\s:][^:]*:\d+):.*note: in (expansion of|instantiation of) ")
INCLUDED = re.compile(r"^(?:In file included| +)\s*from ([^\s:][^:]*:\d+)[,:]")


def lead(output: str) -> str:
    """A line `file:line: cann_sim does not model ...` for each refusal in the output, then the output."""
    lines = output.splitlines()
    refusals: dict[str, None] = {}
    begin = 0
    for number, line in enumerate(lines):
        if DIAGNOSTIC.match(line) is None:
            continue
        if match := REFUSAL.match(line):
            end = next((i for i in range(number + 1, len(lines)) if DIAGNOSTIC.match(lines[i])), len(lines))
            before, after = lines[begin:number], lines[number + 1 : end]
            places = [*_places(REQUIRED, before), match["place"], *_places(NOTE, after), *_places(INCLUDED, before)]
            own = [place for place in places if not place.startswith(str(TOOLKIT))]
            refusals[f"{(own or places)[0]}: {match['words']}"] = None
        begin = number + 1
    return "\n".join([*refusals, output])


def _places(pattern: re.Pattern[str], lines: list[str]) -> list[str]:
    return [match[1] for line in lines if (match := pattern.match(line))]
