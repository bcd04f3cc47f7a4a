"""One table with the options of the public functions, and the checks of their types and ranges.

The signatures repeat names and defaults, for readers and tools; tests/test_options.py compares them with the table.
"""

from __future__ import annotations

import math
import operator
import sys
from typing import Any, NamedTuple, cast

import torch
from torch.nn._reduction import legacy_get_string

CROSS_ENTROPY, LINEAR, CONTRACT = "cross_entropy", "linear_cross_entropy", "npu_cross_entropy_loss"
LOG_PROBS, LINEAR_LOG_PROBS, SELECTED = "token_log_probs", "linear_token_log_probs", "selected_log_probs"


class Option(NamedTuple):
    """An option of one or more functions. None is a valid value only if it is the default.

    (linear_cross_entropy replaces ignore_index=None, which F.linear_cross_entropy takes, before it checks.)
    """

    name: str
    default: str | float | bool | None
    kind: type[str] | type[int] | type[float] | type[bool] | type[torch.dtype]
    functions: tuple[str, ...]
    # `message` is the operator's error for values outside [low, high]; Python raises it only where no operator runs.
    low: float = -math.inf
    high: float = math.inf
    message: str = ""


_EVERY, _BOTH = (CROSS_ENTROPY, LINEAR, CONTRACT), (CROSS_ENTROPY, LINEAR)
_TOKEN = (LOG_PROBS, LINEAR_LOG_PROBS)
OPTIONS = (
    Option("ignore_index", -100, int, _EVERY + _TOKEN),
    Option("reduction", "mean", str, _EVERY),
    Option(
        "label_smoothing",
        0.0,
        float,
        _EVERY,
        low=0.0,
        high=1.0,
        message="npu_xent: label_smoothing must lie in [0, 1], but is {}.",
    ),
    Option(
        "lse_square_scale",
        0.0,
        float,
        _BOTH,
        low=0.0,
        high=sys.float_info.max,
        message="npu_xent: lse_square_scale must be finite and not negative, but is {}.",
    ),
    Option("lse_square_scale_for_zloss", 0.0, float, (CONTRACT,)),
    Option(
        "logit_scale",
        1.0,
        float,
        (*_BOTH, *_TOKEN, SELECTED),
        low=-sys.float_info.max,
        high=sys.float_info.max,
        message="npu_xent: logit_scale must be finite, but is {}.",
    ),
    Option(
        "softcap",
        None,
        float,
        (*_BOTH, *_TOKEN, SELECTED),
        low=1e-6,
        high=1e6,
        message="npu_xent: softcap must lie in [1e-6, 1e6], but is {}; leave it at None for no softcap.",
    ),
    Option(
        "temperature",
        1.0,
        float,
        (*_TOKEN, SELECTED),
        low=1e-6,
        high=1e6,
        message="npu_xent: temperature must lie in [1e-6, 1e6], but is {}; leave it at 1 for none.",
    ),
    Option("loss_dtype", None, torch.dtype, _EVERY),
    Option("chunk_rows", None, int, (LINEAR, LINEAR_LOG_PROBS)),
    Option("return_lse", False, bool, _BOTH),
    Option("return_z_loss", False, bool, _BOTH),
    Option("return_zloss", False, bool, (CONTRACT,)),
    Option("need_log_prob", True, bool, (CONTRACT,)),
    Option("return_entropy", False, bool, _TOKEN),
    Option("return_top1", False, bool, _TOKEN),
    Option("consume_logits", False, bool, (CROSS_ENTROPY, LOG_PROBS)),
)
LOSS_DTYPE = "npu_xent: loss_dtype must be float32, float64 or the dtype of the input, {}, but is {}."


def options_of(function: str) -> tuple[Option, ...]:
    """Return the options of a function, in the table's order."""
    return tuple(option for option in OPTIONS if function in option.functions)


# The options of each function whose type check_types checks; check_flags checks flags.
_CHECKED = {
    function: tuple((option.name, option.kind) for option in options_of(function) if option.kind is not bool)
    for function in (*_EVERY, *_TOKEN, SELECTED)
}
_OPTIONAL = frozenset(option.name for option in OPTIONS if option.default is None)
_RANGES = tuple(option for option in OPTIONS if option.message)


def check_types(function: str, options: dict[str, Any], named: str = "") -> None:
    """Raise TypeError for an option of the wrong type, with a clearer message than the C++ operators'.

    Numbers of other types, such as numpy's, become int or float in `options`. `function` has the options; messages call
    it `named`, if that is given.
    """
    named = named or function
    for name, kind in _CHECKED[function]:
        value = options[name]
        if value is None and name in _OPTIONAL:
            continue
        if type(value) is kind:
            if kind is int and not torch.compiler.is_compiling():
                _check_64_bits(named, name, cast(int, value))
            continue
        if kind is str:
            if not isinstance(value, str):  # the only string is the reduction
                raise TypeError(
                    f'npu_xent.{named}: reduction must be "mean", "sum" or "none", but is a {type(value).__name__}'
                )
        elif kind is torch.dtype:
            raise TypeError(f"npu_xent.{named}: {name} must be a torch.dtype, but is a {type(value).__name__}")
        else:
            options[name] = as_number(named, name, value, kind)


def check_flags(function: str, **flags: Any) -> None:
    """Raise TypeError for a flag that is no bool: the string "False" is true, and would overwrite the logits.

    0 and 1, symbols, and bools of numpy and tensors that hold one are bools too.
    """
    for name, value in flags.items():
        if type(value) is bool or _is_flag(value):
            continue
        seen = str(value) if isinstance(value, int) else f"a {type(value).__name__}"
        way_out = "; leave it out for the default" if value is None else ""
        raise TypeError(f"npu_xent.{function}: {name} must be a bool, but is {seen}{way_out}")


def _is_flag(value: Any) -> bool:
    if isinstance(value, int):
        return value in (0, 1)
    of_bools = str(getattr(value, "dtype", "")).removeprefix("torch.") == "bool"
    return isinstance(value, torch.SymBool) or (of_bools and math.prod(value.shape) == 1)


_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


def as_number(function: str, name: str, value: Any, kind: type[Any]) -> Any:
    """Convert a value to an int or a float, or raise; TypeError also for a tensor that may be trained."""
    is_tensor = isinstance(value, torch.Tensor)
    if is_tensor and (name == "logit_scale" or value.requires_grad):  # torch takes constants
        raise TypeError(
            f"npu_xent.{function}: {name} must be a number, but is a {type(value).__name__}, which would get no "
            f"gradient; pass {name}.item()" + (", or multiply the logits by it" if name == "logit_scale" else "")
        )
    if is_tensor and value.numel() != 1:
        raise TypeError(f"npu_xent.{function}: {name} must be a number, but is a Tensor of shape {list(value.shape)}")
    if torch.compiler.is_compiling() or isinstance(value, _SYMBOLS):  # not traced, and without need of these messages
        return value
    try:
        if isinstance(value, (str, bytes)) or (kind is float and not hasattr(value, "__float__")):
            raise TypeError
        converted: Any = operator.index(value) if kind is int else float(value)
    except OverflowError:
        raise ValueError(
            f"npu_xent.{function}: {name} must be within the range of float64, but this {type(value).__name__} is not"
        ) from None
    except (TypeError, ValueError, RuntimeError):  # torch's for tensors of the meta device, sparse ones and others
        seen = type(value).__name__ + (f" of {value.dtype} on {value.device}" if is_tensor else "")
        way_out = "; leave it out for the default" if value is None else ""
        several = hasattr(value, "__len__") and not isinstance(value, (str, bytes))
        if several and name == "temperature" and function in (*_TOKEN, SELECTED):
            way_out = "; for one of each row pass a float32 tensor"
        if kind is int:
            raise TypeError(f"npu_xent.{function}: {name} must be an integer, but is a {seen}{way_out}") from None
        raise TypeError(f"npu_xent.{function}: {name} must be a number, but is a {seen}{way_out}") from None
    if kind is int:
        _check_64_bits(function, name, converted)
    return converted


def _check_64_bits(function: str, name: str, value: int) -> None:
    if not -(2**63) <= value < 2**63:  # not printed: Python refuses to print very long integers
        raise ValueError(
            f"npu_xent.{function}: {name} must fit in a signed 64-bit integer, but has {value.bit_length()} bits"
        )


def check_loss_dtype(loss_dtype: torch.dtype | None, input: torch.Tensor) -> None:
    """Raise TypeError for a dtype that the loss cannot have, as the operators do."""
    if loss_dtype not in (None, input.dtype, torch.float32, torch.float64):
        raise TypeError(LOSS_DTYPE.format(input.dtype, loss_dtype))
    if loss_dtype == torch.float64 and input.device.type == "npu":
        raise TypeError(
            f"npu_xent: loss_dtype must not be float64 on {input.device}, which has no float64 arithmetic; use float32."
        )


def check_ranges(options: dict[str, Any]) -> None:
    """Raise ValueError for an option out of its range, as the operators do."""
    if options.get("reduction", "mean") not in ("mean", "sum", "none"):
        raise ValueError(f'npu_xent: reduction must be "mean", "sum" or "none", but is "{options["reduction"]}".')
    for option in _RANGES:
        value = options.get(option.name)
        if value is not None and not option.low <= value <= option.high:
            raise ValueError(option.message.format(value))


def legacy_reduction(size_average: bool | None, reduce: bool | None) -> str:
    """Return the reduction that torch's deprecated arguments mean, with torch's warning."""
    _warn_of_legacy(size_average, reduce)
    if not (reduce is None or reduce):
        return "none"
    return "mean" if size_average is None or size_average else "sum"


def _warn_of_legacy(size_average: bool | None, reduce: bool | None) -> None:
    legacy_get_string(size_average, reduce)


_warn_of_legacy._dynamo_marked_constant = True  # type: ignore[attr-defined]  # called, not traced: see _loading
