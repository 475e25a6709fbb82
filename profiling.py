"""A profile of a few training steps: a trace for a viewer, and a table of the kernels that took the most time."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from files import dispensable

SKIPPED, WARMUP = 3, 2  # steps before those that are recorded: compilation, caches, the profiler's own start
BEFORE = SKIPPED + WARMUP
TABLE_ROWS = 25


class StepProfiler:
    """Records `steps` training steps after the first few; `step()` at the end of each. 0: does nothing.

    Writes `trace.json` (chrome://tracing, ui.perfetto.dev) and `kernels.txt` to `folder` when they are done.
    """

    def __init__(self, steps: int, folder: Path):
        self.folder, self.profiler, self.written = folder, None, False
        if steps:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self.profiler = profile(
                activities=activities,
                schedule=schedule(wait=SKIPPED, warmup=WARMUP, active=steps, repeat=1),
                on_trace_ready=self._write,
            )
            self.profiler.start()

    def step(self) -> bool:
        """Returns True once: when the files have been written."""
        if self.profiler is None:
            return False
        self.profiler.step()
        if self.written:
            self.profiler.stop()
            self.profiler = None
        return self.written

    def _write(self, profiler: profile) -> None:
        by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=TABLE_ROWS, max_name_column_width=80)
        with dispensable(self.folder):
            self.folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(self.folder / "trace.json"))
            (self.folder / "kernels.txt").write_text(table + "\n", encoding="utf-8")
        self.written = True
