"""Finds the unmodelled names in a compiler's output, and the kernel's lines that use them."""

from __future__ import annotations

import re

from ._runtime import TOOLKIT

PLACE = re.compile(r"^([^\s:][^:]*:\d+)\b")
REFUSAL = "cann_sim does not model "
DIAGNOSTIC = re.compile(r"^[^\s:][^:]*:\d+:(\d+:)? (fatal )?(error|warning): ")
# The chain of templates before a refusal (g++), and the notes after it (macros; clang's chain), innermost first.
REQUIRED = re.compile(r"^([^\s:][^:]*:\d+):.*required (from|by) ")
NOTE = re.compile(r"^([^\s:][^:]*:\d+):.*note: in (expansion of|instantiation of) ")
INCLUDED = re.compile(r"^(?:In file included)? +from ([^\s:][^:]*:\d+)[,:]")


def lead(output: str) -> str:
    """A line `file:line: cann_sim does not model ...` for each refusal in the output, then the output."""
    lines = output.splitlines()
    refusals: dict[str, None] = {}
    begin = 0
    for number, line in enumerate(lines):
        if DIAGNOSTIC.match(line) is None:
            continue
        if (words := _refusal(line)) and (match := PLACE.match(line)):
            end = next((i for i in range(number + 1, len(lines)) if DIAGNOSTIC.match(lines[i])), len(lines))
            before, after = lines[begin:number], lines[number + 1 : end]
            places = [*_places(REQUIRED, before), match[1], *_places(NOTE, after), *_places(INCLUDED, before)]
            own = [place for place in places if not place.startswith(str(TOOLKIT))]
            refusals[f"{(own or places)[0]}: {words}"] = None
        begin = number + 1
    return "\n".join([*refusals, output])


def _places(pattern: re.Pattern[str], lines: list[str]) -> list[str]:
    return [match[1] for line in lines if (match := pattern.match(line))]


def _refusal(line: str) -> str | None:
    """The words of a refusal in an error, without the punctuation that ends the line."""
    begin = line.find("error: ")
    begin = line.find(REFUSAL, begin) if begin >= 0 else -1
    if begin < 0:
        return None
    end = len(line)
    while not (line[end - 1].isalnum() or line[end - 1] == "_"):
        end -= 1
    return line[begin:end]
