"""One clear line for a name that does not exist: what was given, the nearest that do, and all where they are few."""

import difflib
from collections.abc import Iterable


def check_name(kind: str, name: object, valid: Iterable[str]) -> None:
    """Refuses a name that is not among the valid ones.

    Raises:
        ValueError: `unknown policy 'stsh'; did you mean 'stash'? (current, recompute, stash)`
    """
    valid = sorted(valid)
    if name not in valid:
        near = difflib.get_close_matches(str(name), valid, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "it must be one of"
        every = "" if near and len(valid) > 12 else f" ({', '.join(valid)})"
        raise ValueError(f"unknown {kind} {name!r}; {hint}{every}")
