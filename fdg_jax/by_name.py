"""Methods and corrections as a user types them: names, with arguments behind some, read and never evaluated.

    fdg, adl(steps=2, average=True), pipelined_bp(corrections="spike_compensation, linear_prediction(horizon=2)")

An argument has a name. Its value is a number, True, False, None, a tuple of these, a text in quotes, or a bare word.
"""

import ast
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from fdg_jax.corrections import CORRECTIONS, Correction
from fdg_jax.methods import PRESETS, Method
from fdg_jax.names import check_name

Call = tuple[str, dict[str, Any]]


def read_calls(text: str) -> list[Call]:
    """The names in `text` with their arguments, in order: `[("fdg", {"beta": 0.5}), ("bp", {})]`.

    Raises:
        ValueError: it is something else than names, with arguments by name, between commas.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's, of doubtful literals
            listed = ast.parse(f"[{text}]", mode="eval").body
        if isinstance(listed, ast.List):
            return [_call(node) for node in listed.elts]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        pass
    raise ValueError(f"{text!r} must be names with arguments between commas, each once, like a, b(c=0.5, d=word)")


def _call(node: ast.expr) -> Call:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
        keys = [str(keyword.arg) for keyword in node.keywords]  # None stands for **, a name that nothing has
        if len(set(keys)) < len(keys):
            raise ValueError
        return node.func.id, dict(zip(keys, (_value(keyword.value) for keyword in node.keywords), strict=True))
    if isinstance(node, ast.Name):
        return node.id, {}
    raise ValueError


def _value(node: ast.expr) -> Any:
    return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)


def show_call(name: str, arguments: Mapping[str, Any]) -> str:
    """What `read_calls` reads as this."""
    words = [f"{key}={value if str(value).isidentifier() else repr(value)}" for key, value in arguments.items()]
    return f"{name}({', '.join(words)})" if words else name


def make_corrections(text: str) -> tuple[Correction, ...]:
    """The corrections that `text` names: "spike_compensation, weight_prediction(assume=held)".

    Raises:
        ValueError: there is no such correction, or not with such arguments.
    """
    made = []
    for name, arguments in read_calls(text):
        check_name("correction", name, CORRECTIONS)
        fields = inspect.signature(CORRECTIONS[name]).parameters
        for key in arguments:
            check_name(f"argument of {name}", key, fields)
        if missing := [key for key, f in fields.items() if f.default is f.empty and key not in arguments]:
            raise ValueError(f"{name} needs {', '.join(missing)}, as in {name}({missing[0]}=..)")
        try:
            made.append(CORRECTIONS[name](**arguments))
        except TypeError as error:
            raise ValueError(str(error)) from None
    return tuple(made)


def make_method(name: str, given: Mapping[str, Any], defaults: Mapping[str, Any], corrections: str = "") -> Method:
    """A preset of `methods` with the arguments that it takes, and corrections.

    Args:
        name: of the preset.
        given: of all arguments that some preset takes.
        defaults: the same, as they are where nobody has said anything.
        corrections: as `make_corrections` reads them.

    Raises:
        ValueError: there is no such preset, correction or value; or `given` departs from the defaults where the preset
            takes no such argument.
    """
    preset = _preset(name)
    takes = [key for key in inspect.signature(preset).parameters if key in given]
    for key, value in given.items():
        if key not in takes and value != defaults[key]:
            has = f"takes {', '.join(takes)}" if takes else "takes nothing of the kind"
            raise ValueError(f"{name} has no {key}, it {has}: leave {key} at {defaults[key]!r}; got {value!r}")
    return preset(**{key: given[key] for key in takes}).with_corrections(*make_corrections(corrections))


def own_default(name: str, key: str, otherwise: Any) -> Any:
    """What the preset `name` takes for an argument when nobody says anything; `otherwise` where it has none."""
    found = inspect.signature(PRESETS[name]).parameters.get(key) if name in PRESETS else None
    return otherwise if found is None else found.default


def _preset(name: str) -> Callable[..., Method]:
    check_name("method", name, PRESETS)
    return PRESETS[name]
