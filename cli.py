"""One command line for all scripts: flags, switches and errors behave alike everywhere.

Standard library only, so that importing it costs nothing.
"""

import argparse
import atexit
import contextlib
import io
import math
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache


class UsageError(ValueError):
    """Something the user gave is wrong; the message names it, what was expected and what to do.

    `run` prints it as one line and exits with code 2. Any other exception is a defect of ours and keeps its traceback.
    `everywhere`: all processes of the run raise it, so that one of them says it for all.
    """

    everywhere = False


class RunStopped(RuntimeError):
    """A run cannot go on for a reason outside the code; the message says which and what to do.

    `run` prints it as one line and exits with code 1. `everywhere`: as of `UsageError`.
    """

    everywhere = False


@cache
def warn_once(line: str) -> None:
    """Print a warning to stderr, unless this very one has been."""
    with contextlib.suppress(OSError):  # it may go to the very disk that is full
        print(f"WARNING: {line}", file=sys.stderr, flush=True)


def first_line(error: Exception) -> str:
    """Of a message, in which libraries may go on for pages."""
    return str(error).partition("\n")[0]


def boolean(text: str) -> bool:
    """`--rf`, `--rf True` and `--rf False` mean what they say (argparse's `type=bool` reads "False" as true)."""
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")


def boolean_or_auto(text: str) -> bool | str:
    """The same where a script may choose."""
    try:
        return "auto" if text.lower() == "auto" else boolean(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected auto, True or False, got {text!r}") from None


def positive_int(text: str) -> int:
    """An integer of at least 1 (and below 2^63)."""
    if not text.isdecimal() or not 1 <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def natural_int(text: str) -> int:
    """An integer of at least 0 (and below 2^63, which seeds have to be)."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


def number_in(low: float, high: float):
    """An argparse type: a number from `low` up to `high`, both allowed."""

    def number(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= float(text) <= high and math.isfinite(float(text)):
                return float(text)
        limits = f"from {low:g} to {high:g}" if math.isfinite(high) else f"of at least {low:g}"
        raise argparse.ArgumentTypeError(f"expected a number {limits}, got {text!r}")

    return number


def only(value: str, why: str):
    """An argparse type for a published flag of which one value alone makes sense here."""

    def check(text: str) -> str:
        if text != value:
            raise argparse.ArgumentTypeError(f"only {value} is possible here ({why}), got {text!r}")
        return text

    return check


def unknown_name(kind: str, name: str, known) -> UsageError:
    """The error for a name that is in no table: lists the nearest ones, or all."""
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
    return UsageError(f"unknown {kind} {name!r}; {hint}")


@dataclass(frozen=True)
class Need:
    """Flags that do nothing unless `met(args)`."""

    flags: tuple[str, ...]  # as the namespace calls them
    met: Callable[[argparse.Namespace], bool]
    what: str  # it takes, such as "--rf"


def check_needs(args: argparse.Namespace, needs: Iterable[Need]) -> None:
    """Raises UsageError for a flag that was given and would do nothing."""
    for need in needs:
        useless = [name for name in need.flags if name in args.given]
        if useless and not need.met(args):
            raise UsageError(f"{args.given[useless[0]]} does nothing without {need.what}: drop it, or add that")


def idle(args: argparse.Namespace, needs: Iterable[Need]) -> set[str]:
    """The flags that would do nothing, given or not."""
    return {name for need in needs if not need.met(args) for name in need.flags}


def values(args: argparse.Namespace) -> dict:
    """What flags say, by name: the namespace without `given`."""
    return {name: value for name, value in vars(args).items() if name != "given"}


def said(args: argparse.Namespace, name: str, value) -> str:
    """What the command line says of `name`: `--depth 12`, or by another name `--mup (parametrization mup)`."""
    flag = args.given[name]
    return f"{flag} {value}" if flag.lstrip("-").replace("-", "_") == name else f"{flag} ({name} {value})"


class Parser(argparse.ArgumentParser):
    """ArgumentParser in which `-` and `_` are the same inside a flag, and abbreviations are refused.

    A value that begins with `~` is below the home folder, whether a shell would have seen that or not (`--flag=~/x`).
    The namespace gets `given`: of what stood on the command line, each name there and the flag as help spells it.
    """

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", _HelpFormatter)
        kwargs.setdefault("usage", "%(prog)s [flags]")
        super().__init__(allow_abbrev=False, **kwargs)

    def add_switch(self, group, flag: str, default: bool | str | None, help: str, *aliases: str) -> None:
        """A flag that takes an optional True or False; with a default of "auto" also that."""
        kind, metavar = (boolean_or_auto, "auto|BOOL") if default == "auto" else (boolean, "BOOL")
        options = {"type": kind, "nargs": "?", "const": True, "default": default, "metavar": metavar, "help": help}
        group.add_argument(flag, *aliases, **options)

    def parse_known_args(self, args=None, namespace=None):
        args = [self._spelling(str(arg)) for arg in (sys.argv[1:] if args is None else args)]
        namespace, rest = super().parse_known_args(args, namespace)
        flags = [flag for flag in (arg.partition("=")[0] for arg in args) if flag in self._option_string_actions]
        given: dict[str, str] = {}
        for flag in flags:
            action = self._option_string_actions[flag]
            before = given.setdefault(action.dest, flag)
            if action.nargs != 0 and self._option_string_actions[before] is not action:
                self.error(f"{before} and {flag} say the same thing in two ways: give one of them")
            given[action.dest] = flag
        namespace.given = getattr(namespace, "given", {}) | given  # a command's own are there already
        return namespace, rest

    def _spelling(self, arg: str) -> str:
        """The registered spelling of a flag, whichever of `-` and `_` the user typed; a value's home folder by name."""
        flag, equals, value = arg.partition("=")
        if not flag.startswith("--"):
            return os.path.expanduser(arg)
        if flag not in self._option_string_actions:
            same = (known for known in self._option_string_actions if known.replace("_", "-") == flag.replace("_", "-"))
            flag = next(same, flag)
        return flag + equals + os.path.expanduser(value)


def power_of_two(text: str) -> float:
    """An argparse type: 2 to a power such as -10, as the published flags of DiT-muP name numbers."""
    return 2.0 ** number_in(-100, 100)(text)


class _HelpFormatter(argparse.HelpFormatter):
    """Wide lines; the default stands behind every flag that has one worth showing."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=118)

    def _get_help_string(self, action):
        text = action.help or ""
        if action.option_strings and action.default not in (None, False, argparse.SUPPRESS):
            text += " (default: %(default)s)"
        return text


def run(main, parser: argparse.ArgumentParser) -> None:
    """Parse the command line and call `main(args)`; how that ends becomes an exit code and at most one line.

    2 is a UsageError, 1 a RunStopped, 130 Ctrl-C, and 141, without a word, that what reads the output has gone
    (`| head`). A defect of ours keeps its traceback.

    A process of a process group ends here and at once: a thread of the group that still let go of something while
    Python takes itself down would abort it (`terminate called without an active exception`).
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        code = _exit_code(main, parser)
    except SystemExit as end:
        code = end.code
    except BaseException:
        if "RANK" not in os.environ:
            raise
        traceback.print_exc()
        code = 1
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        send_nowhere(sys.stdout)
        code = code or 141
    if "RANK" in os.environ:  # set by launchers, or `distributed.start`
        end_at_once(code or 0)
    if code:
        raise SystemExit(code)


def _exit_code(main, parser: argparse.ArgumentParser) -> int:
    try:
        main(parser.parse_args())
    except (UsageError, RunStopped, OSError) as error:
        if _is_of_a_closed_pipe(error):
            send_nowhere(sys.stdout)
            return 141
        if isinstance(error, OSError):
            raise
        code, what = (2, "error") if isinstance(error, UsageError) else (1, "stopped")
        if not (error.everywhere and _rank()):
            process = f" [process {_rank()}]" if code == 1 and _rank() else ""
            print(f"{parser.prog}: {what}: {error}{process}", file=sys.stderr)
        return code
    except KeyboardInterrupt:
        if not _rank():  # a terminal tells all processes
            print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    return 0


def _is_of_a_closed_pipe(error: BaseException | None) -> bool:
    """Whether it began with a write that nobody reads any more, whatever it was turned into on its way."""
    while error is not None and not isinstance(error, BrokenPipeError):
        error = error.__context__
    return error is not None


def send_nowhere(stream) -> None:
    """What reads this output has gone: what is written to it from now on, or is still to be flushed, is dropped."""
    with open(os.devnull, "wb") as nowhere, contextlib.suppress(io.UnsupportedOperation):
        os.dup2(nowhere.fileno(), stream.fileno())


def end_at_once(code: int) -> None:
    """End as Python ends processes that it forked: threads joined, exit functions run, the interpreter kept."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def _rank() -> int:
    return int(os.environ.get("RANK") or 0)
