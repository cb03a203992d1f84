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
        lower = {known.lower(): known for known in valid}
        near = [lower[match] for match in difflib.get_close_matches(str(name).lower(), lower, n=2, cutoff=0.4)]
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "it must be one of"
        if near and len(valid) > 16:  # all methods are shown, not all keys of a config
            raise ValueError(f"unknown {kind} {name!r}; {hint}")
        few = ", ".join(valid[:40]) + (f" and {len(valid) - 40} more" if len(valid) > 40 else "")
        raise ValueError(f"unknown {kind} {name!r}; {hint} ({few})")
