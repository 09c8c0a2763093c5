"""The exception for problems that users can fix, and what it quotes of other exceptions."""

from collections.abc import Mapping
from typing import Any


class UserError(Exception):
    """A problem that the user can fix: the command line prints it as one line and exits with 1.

    The message names the file, the field and the remedy. figures: results up to the error, which `--json` still writes,
    so that a failed check can be read by programs.
    """

    def __init__(self, message: str, *, figures: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.figures = dict(figures or {})


def first_line(error: BaseException) -> str:
    """The first line of another library's error, or its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
