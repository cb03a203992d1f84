"""What command lines share: whatever is wrong is told in one line.

Exit status 2 stands for wrong input.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

from fdg_jax.names import check_name


def complain(reason: object, status: int) -> int:
    """Says it in a line; returns the exit status."""
    print(f"fdg_jax: {reason}", file=sys.stderr)
    return status


class Parser(argparse.ArgumentParser):
    """Complains in a line and exits with status 2; for a flag that does not exist it names the nearest that do."""

    def error(self, message: str) -> NoReturn:
        raise SystemExit(complain(f"{message}; --help explains", 2))

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):  # type: ignore[override]
        given, rest = self.parse_known_args(args, namespace)
        self.check_flags(rest)
        if rest:
            self.error(f"unexpected argument {rest[0]!r}")
        return given

    def check_flags(self, words: Iterable[str], others: Iterable[str] = ()) -> None:
        """Refuses flags among these words that are neither this command's nor `others`, names such as "config"."""
        own, others = {flag[2:] for flag in self._option_string_actions if flag.startswith("--")}, set(others)
        for word in words:
            name = word.split("=")[0].lstrip("-")
            is_flag = word.startswith("-") and name[:1].isalpha()  # -0.5 is a value
            if is_flag and name not in own and name.split(".")[0] not in others:
                try:
                    check_name("flag", name, own | others)
                except ValueError as error:
                    raise SystemExit(complain(error, 2)) from None
