"""Processes, run folders and logs.

One process without a launcher, or many under torchrun, `python -m torch.distributed.launch`, `accelerate launch` or
`srun`: `start()` reads what the launcher left in the environment. Global rank decides what a process computes, local
rank only which GPU it uses.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import re
import socket
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from cli import RunStopped, UsageError, send_nowhere, warn_once
from files import digest_of, dispensable, replacing

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


@dataclass(frozen=True)
class Processes:
    """This process among all that work on the same run."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Rank 0 alone prints, logs and writes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over all processes, as a new tensor; carries no gradient."""
        tensor = tensor.detach().clone()
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_main(self, value):
        """Rank 0's `value` (anything that pickles; private to the run's own processes)."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value) -> list:
        """Every process's `value`, in the order of ranks, on every process."""
        values = [value]
        if self.world_size > 1:
            values = [None] * self.world_size
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until every process has come here."""
        if self.world_size > 1:
            dist.barrier()

    def set_timeout(self, seconds: float) -> None:
        """From now on, give up after so many seconds in which nothing is heard from another process."""
        if self.world_size > 1:
            # PyTorch 2.11 has it under another name; groups of a part of the processes count too.
            change = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
            for group in dist.distributed_c10d._world.pg_map:
                change(timedelta(seconds=seconds), group)

    def on_main(self, function: Callable):
        """What `function()` gives on rank 0, on every process; what it raises of `EXPECTED`, every process raises."""
        value = error = None
        if self.is_main:
            value, error = _outcome(function)
        value, error = self.from_main((value, error))
        return _value_or_raise(value, error)

    def together(self, function: Callable):
        """`function()` on every process, which must not wait for another one; what one raises of `EXPECTED`, all do."""
        value, error = _outcome(function)
        return _value_or_raise(value, next((e for e in self.gather(error) if e is not None), None))

    def agree(self, facts: dict) -> None:
        """See that `facts`, which JSON can hold, are the same on every process.

        Raises:
            UsageError: on all of them; it names the first difference and whose it is.
        """
        digests = self.gather(digest_of(facts))
        if len(set(digests)) == 1:
            return
        other = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
        # From those two alone: there may be thousands.
        mine = (socket.gethostname(), facts) if self.rank in (0, other) else None
        known = self.gather(mine)
        (host, ours), (other_host, theirs) = known[0], known[other]
        name = next(name for name in ours | theirs if ours.get(name) != theirs.get(name))
        theirs, ours = (str(facts.get(name))[:200] for facts in (theirs, ours))  # lists of names can be long
        what = f"process {other} on {other_host} has {name} {theirs}, process 0 on {host} has {ours}"
        _value_or_raise(None, UsageError(f"{what}; all must be started with the same flags, data and packages"))

    def share_folder(self, folder: Path) -> None:
        """See that what rank 0 writes into a folder stands there for every process.

        Raises:
            UsageError: on all of them; it names the machines that have a folder of their own there.
        """
        probe = folder / self.from_main(f".probe-{uuid.uuid4().hex}")
        self.on_main(probe.touch)
        blind = {host for host in self.gather(None if _appears(probe) else socket.gethostname()) if host}
        here = self.from_main(socket.gethostname())
        self.on_main(lambda: probe.unlink(missing_ok=True))
        if blind:
            what = f"{', '.join(sorted(blind))} cannot see what {here} writes there"
            advice = "give a --results-dir on a disk that all share"
            error = UsageError(f"{folder} is not the same folder on all machines: {what}; {advice}")
            _value_or_raise(None, error)


SEEN_WITHIN = 90  # seconds for which a network disk may show the list of names of before


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + SEEN_WITHIN
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # makes network disks look again
    return True


EXPECTED = (UsageError, RunStopped, OSError)  # errors that are no defects of ours


def _outcome(function: Callable) -> tuple[object, Exception | None]:
    try:
        return function(), None
    except EXPECTED as error:
        return None, error


def _value_or_raise(value, error: Exception | None):
    if error is None:
        return value
    error.everywhere = True
    raise error


def _from_environment() -> tuple[int, int, int]:
    """(rank, local rank, world size) as torchrun and its kin, or else SLURM, state them."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env.get("LOCAL_RANK", 0)), int(env["WORLD_SIZE"])
    if int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:  # under srun
        nodes = env.get("SLURM_STEP_NODELIST") or env["SLURM_NODELIST"]
        env.setdefault("MASTER_ADDR", _first_node(nodes))
        env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))
        env["RANK"] = env["SLURM_PROCID"]
        return int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"]), int(env["SLURM_NTASKS"])
    return 0, 0, 1


def _first_node(nodes: str) -> str:
    """The first host of SLURM's compressed list: `gpu[03-05,9],cpu1` -> `gpu03`."""
    match = re.match(r"([^,\[]+)(?:\[([^\]]+)\])?([^,\[]*)", nodes)
    prefix, inside, suffix = match[1], match[2], match[3]
    return prefix + (re.split(r"[-,]", inside)[0] if inside else "") + suffix


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def keep_freed_memory(device: torch.device) -> None:
    """Let the C library (glibc) of a process that computes on the CPU keep what tensors leave, for the next ones.

    By default it gives memory back to the system, which clears each page again when it is next touched: up to a tenth
    of a sampling step. Tensors above 32 MB still come and go: kept, they would leave holes that none fits into again.
    """
    library = ctypes.CDLL(None)
    if device.type == "cpu" and hasattr(library, "mallopt"):
        library.mallopt(M_MMAP_THRESHOLD, 2**25)  # the most it takes
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def start(device: str = "auto", timeout: float = 600) -> Processes:
    """Join the other processes, if any, and choose this one's device.

    Args:
        timeout: seconds after which a process that hears nothing from another one gives up, at the start and in any
            exchange after it, until `Processes.set_timeout` says otherwise.
    """
    where = choose_device(device)
    keep_freed_memory(where)
    rank, local_rank, world_size = _from_environment()
    options = {"backend": "gloo"}
    if where.type == "cuda":
        seen = torch.cuda.device_count()
        if seen == 1 and "LOCAL_RANK" not in os.environ:  # srun with a GPU for each task shows each only its own
            local_rank = 0
        if local_rank >= seen:
            raise UsageError(
                f"process {local_rank} of this node has no GPU of its own: {seen} here; start as many processes as GPUs"
            )
        where = torch.device("cuda", local_rank)
        torch.cuda.set_device(where)
        options = {"backend": "nccl", "device_id": where}
    if world_size > 1:
        dist.init_process_group(rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout), **options)
    return Processes(rank, local_rank, world_size, where)


@contextlib.contextmanager
def noticing_lost_processes():
    """Turns what the backends raise when another process is dead or hangs into RunStopped.

    NCCL's own watchdog ends a process whose exchange timed out; this is for what is raised.
    """
    try:
        yield
    except RuntimeError as error:
        if not re.search(r"[Tt]imed out|[Tt]imeout|closed by peer|reset by peer|Broken pipe", str(error)):
            raise
        reason = str(error).splitlines()[0]
        raise RunStopped(
            f"lost another process: it has died or hangs ({reason}); start the same command with --resume auto"
        ) from None


def progress_bar(processes: Processes, **options):
    """A tqdm bar on rank 0, with `options` of tqdm; once a minute where the output is a file."""
    from tqdm import tqdm

    interval = 0.5 if sys.stderr.isatty() else 60
    return tqdm(dynamic_ncols=True, mininterval=interval, disable=not processes.is_main, **options)


def stop() -> None:
    """Leave the process group, if there is one; waits for no other process. `cli.run` ends what is left of it."""
    if dist.is_initialized():
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------- run folders


def new_run_folder(results_dir: Path, name: str) -> Path:
    """Make `results_dir/NNN-name` with the next free number; two runs started at once get two folders."""
    try:
        results_dir.mkdir(parents=True, exist_ok=True)
        number = 1 + max((number for number, _ in _runs(results_dir)), default=-1)
        while True:
            folder = results_dir / f"{number:03d}-{name}"
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
            number += 1
    except OSError as error:
        raise UsageError(f"--results-dir {results_dir} cannot be written: {error.strerror or error}") from None


def claim(folder: Path, refusal: str):
    """Hold a folder for this process until it ends or closes what this returns.

    Args:
        refusal: what is said where another process has it.

    Raises:
        UsageError: another process has it, or nothing can be written there.
    """
    try:
        file = open(folder / ".lock", "w")  # noqa: SIM115 (kept open: that is the claim)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror}") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            raise UsageError(refusal) from None
        warn_once(f"no locks on the disk of {folder} ({error.strerror}): see to it that no other process writes there")
    return file


def release(claim) -> None:
    """Give a folder back, and leave no trace in it."""
    with contextlib.suppress(OSError):
        os.unlink(claim.name)
    claim.close()


def find_runs(results_dir: Path, name: str) -> list[Path]:
    """The folders that `new_run_folder` made under this name, newest first."""
    runs = [run for run in _runs(results_dir) if run[1].name.partition("-")[2] == name]
    return [folder for _, folder in sorted(runs, reverse=True)]


def _runs(results_dir: Path) -> list[tuple[int, Path]]:
    if not results_dir.is_dir():
        return []
    return [(int(m[1]), p) for p in results_dir.iterdir() if (m := re.match(r"(\d+)-", p.name)) and p.is_dir()]


# ----------------------------------------------------------------------------------------------------------------- logs


class Logger:
    """Rank 0's log: lines to the screen and `log.txt`, metrics to `metrics.jsonl`, TensorBoard and, if asked, W&B.

    On other ranks, and without a folder, it does nothing. The progress bar passes under the lines unharmed.
    """

    def __init__(self, folder: Path | None, wandb: dict | None = None, resume_step: int = 0):
        self.folder = folder
        if folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._text = open(folder / "log.txt", "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 (lives as long as the run)
        self._metrics = self._open_metrics(folder / "metrics.jsonl", resume_step)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1 if resume_step else None)
        self._wandb = None
        if wandb is not None:
            import wandb as package

            self._wandb = package.init(dir=str(folder), resume="allow", id=_own_id(folder), **wandb)

    @staticmethod
    def _open_metrics(path: Path, resume_step: int):
        """Append, after dropping the lines of steps that the resumed run will do again, and a line cut by a kill."""
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = []
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):
                if json.loads(line)["step"] <= resume_step:
                    kept.append(line)
        if kept != lines:
            with replacing(path) as file:
                file.write("".join(line + "\n" for line in kept).encode())
        return open(path, "a", encoding="utf-8")

    def info(self, line: str) -> None:
        if self.folder is None:
            return
        from tqdm import tqdm

        try:
            tqdm.write(line)
            sys.stdout.flush()
        except OSError:  # nobody reads it any more, or it goes to a disk that is full
            send_nowhere(sys.stdout)
        with dispensable(self.folder / "log.txt"):
            self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
            self._text.flush()

    def metrics(self, step: int, values: dict) -> None:
        """Numbers and per-layer lists of numbers of one step."""
        if self.folder is None:
            return
        with dispensable(self.folder / "metrics.jsonl"):
            self._metrics.write(json.dumps({"step": step} | values) + "\n")
            self._metrics.flush()
        flat = {}
        for name, value in values.items():
            if isinstance(value, list):
                flat |= {f"{name}/layer{i:02d}": number for i, number in enumerate(value)}
            else:
                flat[name] = value
        with dispensable(self.folder / "tensorboard"):
            for name, number in flat.items():
                self._board.add_scalar(name if "/" in name else f"train/{name}", number, step)
        if self._wandb is not None:
            self._wandb.log(flat, step=step)

    def image(self, step: int, name: str, pixels) -> None:
        """`pixels` (H, W, 3) uint8."""
        if self.folder is None:
            return
        with dispensable(self.folder / "tensorboard"):
            self._board.add_image(name, pixels, step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(pixels)}, step=step)

    def close(self) -> None:
        if self.folder is None:
            return
        for file, name in ((self._text, "log.txt"), (self._metrics, "metrics.jsonl"), (self._board, "tensorboard")):
            with dispensable(self.folder / name):
                file.close()
        if self._wandb is not None:
            self._wandb.finish()


def _own_id(folder: Path) -> str:
    """A name for this run alone, kept in its folder: folders of unrelated results may be called alike."""
    path = folder / "wandb-id.txt"
    if not path.exists():
        path.write_text(uuid.uuid4().hex, encoding="utf-8")
    return path.read_text(encoding="utf-8")
