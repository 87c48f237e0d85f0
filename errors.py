"""A user's mistake in one line; a programmer's mistake stays a traceback.  [imports nothing here]

Three rules hold in all files:

- InputError is raised on purpose, where the program knows that its input is at fault. Nothing else
  ends in one line: a bug in this code, or in a fork of it, ends in a traceback.
- A call of others' code that may raise anything (transformers, Jinja, safetensors, JSON, the file
  system) is wrapped by itself, with nothing of ours inside.
- Whoever raises need not know which option is at fault: `with about("--model"):` names it.
"""

import sys
from contextlib import contextmanager


class InputError(Exception):
    """What a user can correct: a reason, and the option that it is about."""

    def __init__(self, reason, option=None):
        super().__init__(" ".join(str(reason).split())[:500])
        self.option = option

    def __str__(self):
        reason = super().__str__()
        return f"{self.option}: {reason}" if self.option else reason


@contextmanager
def about(option):
    """Name the option of an InputError that leaves this block, unless it has one already."""
    try:
        yield
    except InputError as error:
        error.option = error.option or option
        raise


def stop(error):
    """End the program with one line on stderr and exit code 2."""
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)
