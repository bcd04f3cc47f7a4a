"""Imports verl, which imports ray: where that is not installed, a module that has any name.

verl starts no actor here. ray alone is larger than all other packages that these tests need.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import pytest
from frameworks import import_without_torch_npu

NEEDED = ("verl", "tensordict", "omegaconf", "transformers")


class _Anything(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments, **_: arguments[0] if arguments else self.__getattr__(name)


def import_verl(name: str) -> types.ModuleType:
    for needed in NEEDED:
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed", allow_module_level=True)
    if "ray" not in sys.modules and importlib.util.find_spec("ray") is None:
        sys.modules["ray"] = _Anything("ray")
    return import_without_torch_npu(f"verl.{name}")
