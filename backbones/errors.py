"""What a user did wrong, said in one line; no torch here."""

import contextlib
import difflib
import re
import sys
from collections.abc import Iterable, Iterator


class InputError(ValueError):
    """A mistake in what the user gave. The message names the value and the remedy.

    Commands print it as one line and exit with 2; anything else keeps its traceback, being our own.
    """


def unknown(what: str, value: object, choices: Iterable[str]) -> InputError:
    """The error for a name that is none of `choices`, with the nearest of them."""
    names = sorted(choices)
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(names)}"
    return InputError(f"unknown {what} {value!r}: {hint}")


@contextlib.contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Turn the user's mistakes, and Ctrl-C, into one line on stderr and an exit status."""
    try:
        yield
    except InputError as error:
        # A data loader's worker wraps the message in its traceback; the message is the last line.
        message = str(error).strip().splitlines()[-1]
        line = "error: " + re.sub(r"^[\w.]+Error: ", "", message) + "\n"
        sys.stderr.write(line)  # in one piece: the processes of one run share it
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # `... | head` closed our stdout
        raise SystemExit(141) from None
