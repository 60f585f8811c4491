"""The error a user can act on."""

from __future__ import annotations


class UserError(Exception):
    """Bad input to a command: its message is one line that says what was expected and what came."""

    exit_code = 2
