"""torch.compile of networks: where it pays, kept between runs, and given up in words where it fails."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch._functorch.config as functorch

from cli import UsageError, first_line
from configuration import DiTConfig


def by_itself(config: DiTConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether blocks are compiled, and kernels recorded, unasked: on a GPU in bf16, where no router asks the host."""
    return device.type == "cuda" and dtype == torch.bfloat16 and not config.pools_batch


def choose_compile(wanted: bool | str, config: DiTConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """`--compile`; `auto` as `by_itself` says.

    Raises:
        UsageError: it is wanted where PyTorch is too old to trace grouped products of this dtype.
    """
    if wanted == "auto":
        return by_itself(config, device, dtype)
    if wanted and config.num_experts and dtype != torch.bfloat16 and torch.__version__ < "2.15":
        what = f"--compile with experts in {str(dtype).removeprefix('torch.')}"
        raise UsageError(f"{what} needs PyTorch 2.15 or newer, this is {torch.__version__}; use --precision bf16")
    return wanted


class Compiling:
    """Compiles functions, and says so.

    what      is said to be compiled: a plural
    note      told in a line what it took, or why it failed
    or_plain  the first failure lets all of them run as they are; else it is raised
    """

    def __init__(self, what: str = "blocks", note: Callable[[str], None] = lambda line: None, or_plain: bool = False):
        self.what, self.note, self.or_plain = what, note, or_plain
        self.given_up, self.called = False, False
        folder = _kept_in()
        if hasattr(functorch, "force_non_lazy_backward_lowering"):
            # Else a backward that cannot be compiled is noticed in the backward, where there is no way back.
            functorch.force_non_lazy_backward_lowering = True
        self.where = f"kept in {folder}" if folder else "not kept"

    def __call__(self, function: Callable, fullgraph: bool = True) -> Callable:
        compiled = torch.compile(function, fullgraph=fullgraph)

        def run(*args):
            if self.given_up:
                return function(*args)
            began, first, self.called = time.perf_counter(), not self.called, True
            try:
                out = compiled(*args)
            except torch._dynamo.exc.TorchDynamoException as error:
                if not self.or_plain:
                    raise
                self.given_up = True
                self.note(f"WARNING: {self.what} run uncompiled, {type(error).__name__}: {first_line(error)}")
                return function(*args)
            if first:
                self.note(f"{self.what} compiled, in {time.perf_counter() - began:.1f} s ({self.where})")
            return out

        return run


def _kept_in() -> Path | None:
    """Where compiled code outlives the process: the user's cache, and not /tmp, which PyTorch would take."""
    if (said := os.environ.get("TORCHINDUCTOR_CACHE_DIR")) is not None:
        return Path(said)
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchinductor"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    return folder
