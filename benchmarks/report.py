"""What a benchmark found: its cases measured one after another, a file that is written after each, goals and tables.

The file is whole at every moment and says which cases are missing, and why: a benchmark may be killed whenever the
machine is wanted back, and loses the case that it was in. `--resume` goes on from it.
"""

import argparse
import gc
import json
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import cli
from benchmarks import harness
from benchmarks.harness import Rates, Times
from files import replace_json
from machine import choose_precision, set_precision

Rows = Sequence[Mapping[str, object]]
Tables = Mapping[str, Rows]  # by their titles

KERNELS = "kernels of one call"
NOT_BEGUN, UNFINISHED = "not begun", "begun, not finished"
UNLIKE = ("budget", "device", "output", "parts", "resume")  # settings that a measurement does not depend on
PART_OF_SHARE = 4  # what the rounds of one measurement may take of a case's share: models are made and compiled too

# ---------------------------------------------------------------------------------------------------------------- goals


@dataclass(frozen=True)
class Goal:
    """A number that the project wants to reach, and what was measured of it."""

    row: str  # of the table of goals in benchmarks/RESULTS.md
    what: str
    goal: str  # "<= 1.15", ">= 0.65", or "reported"
    value: float | None = None
    absent: str = "needs a GPU"  # why there is no value

    @classmethod
    def from_record(cls, record: dict) -> "Goal":
        """Of a benchmark's JSON."""
        return cls(**{name: record[name] for name in ("row", "what", "goal", "value", "absent")})

    def record(self) -> dict:
        return asdict(self) | {"verdict": self.verdict}

    @property
    def verdict(self) -> str:
        if self.value is None:
            return self.absent
        comparison, _, bound = self.goal.partition(" ")
        if comparison == "<=":
            return "met" if self.value <= float(bound) else "not met"
        if comparison == ">=":
            return "met" if self.value >= float(bound) else "not met"
        return self.goal


def no_goals(tables: Tables, cuda: bool) -> list[Goal]:
    return []


def column(rows: Rows, name: str, **wanted) -> list[float]:
    """The values of the rows that are so, without those that have none."""
    chosen = (row for row in rows if all(row.get(key) == value for key, value in wanted.items()))
    return [row[name] for row in chosen if row.get(name) is not None]


# ---------------------------------------------------------------------------------------------------------------- bench


class Bench:
    """Where and how a benchmark measures, what it has found, and when it has to end.

    `goals` makes goals of the tables, and of whether that is a GPU; `network`: the benchmark runs networks, and has
    flags for that (`harness.add_network_arguments`); `more` goes to the file.
    """

    def __init__(self, args, goals: Callable[[Tables, bool], list[Goal]] = no_goals, network: bool = False, **more):
        self.args, self.goals = args, goals
        self.ends, self.seconds = time.monotonic() + args.budget, None
        self.device = harness.start(args)
        self.cuda = self.device.type == "cuda"
        self.failed: list[str] = []
        self.record = {
            "command": command(),
            "date": time.strftime("%Y-%m-%d"),
            "machine": harness.machine(self.device),
            "versions": harness.versions(),
            "settings": settings(args),
            "tables": {},  # title -> case -> rows
            "seconds": {},  # of the cases that are complete
            "missing": {},  # case -> why
            **more,
        }
        before = self._earlier()
        self.record = before | self.record | {name: before[name] for name in ("tables", "seconds") if before}
        if network:
            self.dtype = set_precision(choose_precision(args.precision, self.device))
            self.rates = Rates(**before["rates"]) if before else self._measured_rates()
            self.record["rates"] = vars(self.rates)

    def _measured_rates(self) -> Rates:
        return harness.measured_rates(self.device, self.dtype, self.args.quick)

    def _earlier(self) -> dict:
        """The complete cases of the file that is there, if it may be gone on with; else it is moved aside."""
        path = self.args.output
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            return {}
        before = json.loads(path.read_text())
        other = different(before, json.loads(json.dumps(self.record)))
        if not self.args.resume or other:
            aside = path.with_suffix(".previous.json")
            path.replace(aside)
            why = f"other {', '.join(other)}: " if self.args.resume else ""
            print(f"{why}measured anew; what {path} held is in {aside}", flush=True)
            return {}
        done = before["seconds"]
        tables = {
            title: {case: rows for case, rows in cases.items() if case in done}
            for title, cases in before["tables"].items()
        }
        return before | {"tables": tables}

    # ------------------------------------------------------------------------------------------------------- measuring

    def compiles(self, wanted: bool = True) -> bool:
        """Whether compiled ways are measured: what `--compile` says, or on a GPU what is `wanted`."""
        return self.cuda and wanted if self.args.compile is None else self.args.compile

    def measure(self, ways: Mapping[str, Callable[[], object]], rounds: int | None = None) -> Times:
        """`harness.measure`, with fewer rounds where they take long."""
        return harness.measure(ways, self.device, rounds or self.args.rounds, seconds=self.seconds)

    def kernels(self, ways: Mapping[str, Callable[[], object]], **labels) -> Iterator[tuple[str, list[dict]]]:
        """With `--profile`: what each way spends its time in."""
        if self.args.profile:
            for way, work in ways.items():
                yield KERNELS, [row | {"way": way, **labels} for row in harness.kernels(work, self.device)]

    def run(self, cases: Mapping[str, Callable[[], Iterable[tuple[str, Rows]]]]) -> None:
        """Measure the cases that are missing, in order: each gives rows for tables, by their titles. Then report.

        Raises:
            RunStopped: a way computed something else than the reference, or failed; the other cases were measured.
        """
        self.record["missing"] = {name: NOT_BEGUN for name in cases if name not in self.record["seconds"]}
        self.seconds = self.args.budget / max(1, len(cases)) / PART_OF_SHARE
        self.write()
        for name in list(self.record["missing"]):
            if time.monotonic() > self.ends:
                break
            self._run(name, cases[name])
        late = {name: f"{why} in {self.args.budget:g} s" for name, why in self._missing(NOT_BEGUN)}
        self.record["missing"] |= late
        self.write()
        self.show()
        if self.failed:
            raise cli.RunStopped(f"failed: {'; '.join(self.failed)}")

    def _missing(self, why: str) -> list[tuple[str, str]]:
        return [(name, reason) for name, reason in self.record["missing"].items() if reason == why]

    def _run(self, name: str, case: Callable[[], Iterable[tuple[str, Rows]]]) -> None:
        """One case; how it fails is noted, and is no reason for others to go."""
        self._begin()
        self.record["missing"][name] = UNFINISHED
        self.write()
        began = time.monotonic()
        try:
            for title, rows in case():
                self.record["tables"].setdefault(title, {}).setdefault(name, []).extend(rows)
                self.write()
        except Exception as error:
            reason = in_one_line(error)
            self.record["missing"][name] = reason
            if not is_out_of_memory(error):
                self.failed.append(f"{name} ({reason})")
                if not isinstance(error, harness.WrongResult):
                    traceback.print_exc(limit=-6)
            print(f"{name}: {reason}", flush=True)
        else:
            self.record["seconds"][name] = round(time.monotonic() - began, 1)
            del self.record["missing"][name]
            print(f"{name}: {self.record['seconds'][name]:.0f} s", flush=True)
        self.write()

    def _begin(self) -> None:
        """Every case begins alike, whichever were before it: the same random numbers, and the memory free."""
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()
        if hasattr(self.args, "precision"):
            set_precision(choose_precision(self.args.precision, self.device))
        torch.manual_seed(0)

    # --------------------------------------------------------------------------------------------------------- telling

    def tables(self) -> dict[str, list[dict]]:
        """title -> the rows of all cases."""
        return {title: [row for rows in cases.values() for row in rows] for title, cases in self._tables().items()}

    def _tables(self) -> dict[str, dict[str, list[dict]]]:
        return self.record["tables"]

    def write(self) -> None:
        found = [goal.record() for goal in self.goals(self.tables(), self.cuda)]
        replace_json(self.args.output, self.record | {"goals": found})

    def show(self) -> None:
        """Print tables and goals."""
        for title, rows in self.tables().items():
            if rows:
                print(f"\n{title}\n\n{table(rows)}")
        if found := self.goals(self.tables(), self.cuda):
            print(f"\ngoals\n\n{goals_table(found)}")
        print()
        for name, reason in self.record["missing"].items():
            print(f"missing: {name}: {reason}")
        if self.record.get("left_out"):
            print(f"left out: {'; '.join(self.record['left_out'])}")
        print(f"{machine_line(self.device)}; written to {self.args.output}", flush=True)


def different(before: dict, now: dict) -> list[str]:
    """What of another measurement makes it one of something else: versions, settings, the machine."""
    machines = before["machine"], now["machine"]
    names = [name for name in ("processor", "threads", "gpu") if len({each.get(name) for each in machines}) > 1]
    names += [name for name, version in now["versions"].items() if before["versions"].get(name) != version]
    return names + [
        f"--{name.replace('_', '-')}"
        for name, value in now["settings"].items()
        if name not in UNLIKE and before["settings"].get(name) != value
    ]


def is_out_of_memory(error: Exception) -> bool:
    """The compiler wraps it."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def in_one_line(error: Exception) -> str:
    first = next(filter(None, map(str.strip, str(error).splitlines())), "")
    name = "out of memory" if is_out_of_memory(error) else type(error).__name__
    return f"{name}: {first}"[:300]


# --------------------------------------------------------------------------------------------------------------- report


def table(rows: Rows) -> str:
    """Markdown, columns in the order of the first row; floats to three digits."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        lines.append("| " + " | ".join(_cell(row.get(name)) for name in names) + " |")
    return "\n".join(lines)


def _cell(value) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def goals_table(goals: Sequence[Goal]) -> str:
    columns = ("row", "measure", "goal", "measured", "verdict")
    return table([dict(zip(columns, (g.row, g.what, g.goal, g.value, g.verdict), strict=True)) for g in goals])


def machine_line(device: torch.device) -> str:
    facts = harness.machine(device)
    where = (
        facts.get("gpu")
        or f"{facts['processor']}, {facts['threads']} of {facts['cores']} cores, load {facts['load'][0]}"
    )
    return f"{where}; PyTorch {torch.__version__}"


def command() -> str:
    """As it was typed, `python -m benchmarks.moe_block ...`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = f"-m {spec.name.removesuffix('.__main__')}" if spec is not None else sys.argv[0]
    return shlex.join(["python", *name.split(), *sys.argv[1:]])


def settings(args: argparse.Namespace) -> dict:
    return {name: str(value) if isinstance(value, Path) else value for name, value in cli.values(args).items()}
