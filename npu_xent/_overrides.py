"""How torch's subsystems see the public functions: __torch_function__ (subclasses, modes, torch.fx) and torch.jit."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, cast

from torch import Tensor
from torch.overrides import handle_torch_function
from torch.utils._pytree import _register_namedtuple

_Callable = TypeVar("_Callable", bound=Callable[..., Any])


def overridden(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """What a subclass or a mode makes of function(**arguments); `arguments` are all of them, by name.

    It sees those without a default by position, and of the others those that differ from it by keyword. In compiled
    code, where Dynamo traces the default __torch_function__ without end, overrides see the operators instead.
    """
    positional, keywords = [], {}
    for name, parameter in inspect.signature(function).parameters.items():
        value, default = arguments[name], parameter.default
        if default is parameter.empty:
            positional.append(value)
        elif not (value is default or (type(value) is type(default) and value == default)):
            keywords[name] = value
    return handle_torch_function(function, (*positional, *keywords.values()), *positional, **keywords)


def output_type(output: _Callable) -> _Callable:
    """Prepare a NamedTuple for torch.export.save, and for Tensor.__torch_function__, which makes one of an iterable."""
    _register_namedtuple(cast(Any, output), serialized_type_name=f"npu_xent.{output.__name__}")
    new, changed = output.__new__, cast(Any, output)

    @functools.wraps(new)
    def __new__(cls: Any, *values: Any, **named: Any) -> Any:
        if len(values) == 1 and not named and not isinstance(values[0], Tensor):
            (values,) = values
        return new(cls, *values, **named)

    changed.__new__ = __new__
    return output


def not_scriptable(operator: str) -> Callable[[_Callable], _Callable]:
    """Make torch.jit.script of a function or a module, or of code that calls it, raise an error with the way out."""

    def mark(function: _Callable) -> _Callable:
        def refuse(*_: object) -> NoReturn:
            raise NotImplementedError(
                f"npu_xent.{function.__name__}: torch.jit.script cannot compile it; use torch.compile or torch.export, "
                f"or call torch.ops.npu_xent.{operator}, which returns a tuple, in the scripted code"
            )

        cast(Any, function).__prepare_scriptable__ = refuse  # torch.jit.script calls it
        return function

    return mark
