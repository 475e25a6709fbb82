"""The training loop, and the engine that it drives.

N images of a micro-batch · C latent channels · L MoE layers · E experts

`train` is the one loop, over a `Run` that `runs.prepare` has checked. What differs between trainers, where parameters
live and how gradients meet, is an `Engine`.
"""

import math
import resource
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

import checkpoint
import evaluation
import image_files
import sampling
from analysis.routing import Recorder, recording
from cli import RunStopped
from data import UnreadableImages, make_loader
from diffusion import NoisedBatch, stratify
from files import dispensable, remedy
from models import DiT, count_parameters
from moe import load_statistics, router_entropy
from optim import lr_factor
from profiling import StepProfiler
from routers import Routing, load_balancing_loss, sequence_balancing_loss, z_loss
from runs import Run, flags

BAD_STEPS_IN_A_ROW = 5  # updates skipped for a loss that is not finite before the run gives up
FAILED_SAVES_IN_A_ROW = 3
GRID, GRID_STEPS = 16, 50  # images that are drawn while training, and their sampling steps

# --------------------------------------------------------------------------------------------------------------- engine


class Update(NamedTuple):
    """What an optimizer step did."""

    grad_norm: float  # before clipping
    applied: bool  # False: skipped, because loss or gradient was not finite


class Engine(Protocol):
    """Where parameters live and how gradients meet; the loop knows no more of a trainer than this."""

    all_write: bool  # each process has a part of a checkpoint to write, not rank 0 alone
    module: DiT  # whose routers are told what happened

    def forward(self, x: Tensor, t: Tensor, condition, aligned: bool = False) -> tuple[Tensor, list[Routing], ...]:
        """`DiT.forward(..., return_routing=True)` in the engine's precision; `aligned`: its projected tokens, too."""

    def accumulating(self, last: bool) -> AbstractContextManager:
        """Around forward and backward of a micro-batch; gradients need to meet only in the `last` of a step."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, which is already divided by the number of micro-batches."""

    def step(self, lr: float, loss_is_finite: bool) -> Update:
        """Clip, update the parameters and the EMA, clear the gradients; skip what is not finite."""

    def averaged(self) -> AbstractContextManager[DiT]:
        """The model with the weights of the EMA, in the engine's precision."""

    def snapshot(self, folder: Path, config: dict, state: dict) -> Callable[[], None]:
        """Copy the state; called by all processes. Returns what writes it, on any thread.

        Raises:
            OSError: on all processes; what is returned may raise it too, on those that write.
        """

    def load(self, folder: Path) -> None:
        """Take model, EMA and optimizer from a verified checkpoint."""

    def extra_metrics(self) -> dict[str, float]:
        """Numbers of the engine's own for the log."""


# ----------------------------------------------------------------------------------------------------------------- loop


class Window:
    """Sums since the last log line; saved with a checkpoint, so that a resumed run logs the same averages."""

    def __init__(self, num_layers: int, num_experts: int):
        self.shape = (num_layers, num_experts)
        self.clear()

    def clear(self) -> None:
        self.steps, self.sums, self.times = 0, {}, {}
        self.counts = torch.zeros(self.shape, dtype=torch.float64)

    def add(self, values: dict[str, float], counts: Tensor) -> None:
        self.steps += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.times[name] = self.times.get(name, 0) + 1  # some are not there in every step
        self.counts += counts.view(self.shape)

    def means(self) -> dict[str, float]:
        return {name: total / self.times[name] for name, total in self.sums.items()}

    def state(self) -> dict:
        sums = {"sums": dict(self.sums), "times": dict(self.times)}
        return {"steps": self.steps, **sums, "counts": self.counts.tolist()}

    def load(self, state: dict) -> None:
        self.steps, self.sums = state["steps"], dict(state["sums"])
        self.times = dict(state.get("times") or dict.fromkeys(self.sums, self.steps))
        self.counts = torch.tensor(state["counts"], dtype=torch.float64).view(self.shape)


class StopSignals:
    """Turns SIGTERM and SIGINT into a wish that the loop reads at the end of a step."""

    numbers = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.received = [0.0, 0.0]
        self.before = [signal.signal(number, self._note) for number in self.numbers]

    def _note(self, number, frame) -> None:
        self.received[self.numbers.index(number)] = 1.0
        self.restore()  # a second one ends the process at once

    def restore(self) -> None:
        for number, handler in zip(self.numbers, self.before, strict=True):
            signal.signal(number, handler)

    @staticmethod
    def exit_code(agreed: list[float]) -> int | None:
        """128 + the signal's number, of whichever signal any process got; None if none did."""
        return next((128 + n for n, got in zip(StopSignals.numbers, agreed, strict=True) if got), None)


class Clock:
    """Images per second and the share of time spent waiting for data, since the last log line."""

    def __init__(self):
        self.start()

    def start(self) -> None:
        self.began, self.waited, self.paused, self.images = time.perf_counter(), 0.0, 0.0, 0

    @contextmanager
    def waiting(self):
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    @contextmanager
    def pausing(self):
        """Around what is not training: checkpoints, sample grids, metrics."""
        began = time.perf_counter()
        yield
        self.paused += time.perf_counter() - began

    def rates(self) -> dict[str, float]:
        elapsed = max(1e-9, time.perf_counter() - self.began - self.paused)
        return {"images_per_second": self.images / elapsed, "data_wait_share": self.waited / elapsed}


@dataclass
class Progress:
    """Where a run stands; with the engine's state, all that resuming needs."""

    window: Window
    step: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0
    unreadable: set[int] = field(default_factory=set)  # images that could not be read so far
    idle: Tensor | None = None  # (L, E) steps since an expert had a token

    def note_idle(self, counts: Tensor, limit: int) -> list[tuple[int, int]]:
        """The (layer, expert) that have just had no token for `limit` steps, of (L, E) counts of a step."""
        before = torch.zeros(counts.shape, dtype=torch.int64) if self.idle is None else self.idle
        self.idle = torch.where(counts > 0, 0, before + 1)
        return (self.idle == limit).nonzero().tolist()

    def state(self) -> dict:
        """A copy: it is written while the next steps go on."""
        idle = None if self.idle is None else self.idle.tolist()
        return vars(self) | {"window": self.window.state(), "unreadable": sorted(self.unreadable), "idle": idle}

    def load(self, state: dict) -> None:
        self.step, self.skipped, self.bad_in_a_row = state["step"], state["skipped"], state["bad_in_a_row"]
        self.unreadable = set(state["unreadable"])
        self.window.load(state["window"])
        self.idle = None if state.get("idle") is None else torch.tensor(state["idle"])


def train(run: Run, engine: Engine) -> None:
    """Train until `run.total_steps`, from wherever `run.resume_from` stands.

    Raises:
        RunStopped: the loss is not finite in several steps in a row, or checkpoints cannot be written.
        SystemExit: a signal asked for the end; the state has been saved.
    """
    run.processes.set_timeout(run.args.start_timeout)  # of the groups that the engine made too
    progress = Progress(window=Window(len(run.config.moe_indices), run.config.expert_count))
    if run.resume_from is not None:
        engine.load(run.resume_from)
        progress.load(checkpoint.read_state(run.resume_from))
    run.open(progress.step, shared=engine.all_write)
    introduce(run, progress.step)
    saver = Saver(run, engine)
    try:
        _loop(run, engine, progress, saver)
    except RunStopped as reason:
        run.log.info(f"stopped: {reason}")
        saver.thread.shutdown()  # all processes stop here: what they were writing becomes whole
        raise
    finally:
        run.close()


def _loop(run: Run, engine: Engine, progress: Progress, saver: "Saver") -> None:
    args, processes, log = run.args, run.processes, run.log
    alignment, batches = run.alignment, batches_from(run, progress.step)
    unreadable = UnreadableImages(progress.unreadable)
    signals, clock, bar, start = StopSignals(), Clock(), progress_bar(run, progress.step), progress.step
    profiler = StepProfiler(args.profile if processes.is_main else 0, run.folder / "profile")
    while progress.step < run.total_steps:
        # Accumulate: forward and backward over the micro-batches of this step.
        aligned = alignment is not None and alignment.is_on(progress.step)
        if alignment is not None and alignment.until == progress.step > start:
            batches = batches_from(run, progress.step)  # without features from now on
        totals, seen, bad_images = [], [], []
        for micro in range(args.accum_iter):
            with clock.waiting():
                batch = next(batches)
            bad_images += batch["unreadable"][batch["unreadable"] >= 0].tolist()
            noised, condition = make_batch(run, batch, run.schedule.positions(micro))
            features = alignment.features(batch, processes.device) if aligned else None
            with engine.accumulating(last=micro == args.accum_iter - 1):
                output, routings, *projected = engine.forward(noised.x_t, noised.t, condition, aligned)
                terms = run.objective.loss(output.float(), noised)  # {name: (N,)}
                loss, values, counts = total_loss(
                    terms, routings, Balance.of(args), None if args.local_balance else processes.sum
                )
                if aligned:
                    more, values["alignment"] = alignment.loss(*projected, features)
                    loss = loss + more
                engine.backward(loss / args.accum_iter)
            observed = [routing.observed for routing in routings if routing.observed is not None]
            means = torch.cat([torch.stack(list(values.values())), *(each.to(loss.dtype) for each in observed)])
            totals.append(torch.cat([means / args.accum_iter, counts.flatten()]))
            seen.append((batch["index"], terms["loss"].detach()))
        names = list(values)

        # Agree: one exchange tells every process the loss, the experts' load and who was asked to stop.
        saver.settle(wait=False)
        wishes = [*signals.received, float(saver.gave_up is not None), float(len(bad_images))]
        wishes = torch.tensor(wishes, device=processes.device)
        agreed = processes.sum(torch.cat([wishes, torch.stack(totals).sum(dim=0)])).tolist()
        exit_code = signals.exit_code(agreed[:2])
        if agreed[2]:
            raise RunStopped(saver.gave_up or "another process could not write checkpoints")
        if agreed[3]:
            for name in unreadable.update([i for part in processes.gather(bad_images) for i in part], run.data):
                log.info(f"unreadable image, replaced by its successor: {name}")
        means = {name: value / processes.world_size for name, value in zip(names, agreed[4:], strict=False)}
        rest = torch.tensor(agreed[4 + len(names) :], dtype=torch.float64)
        counts = rest[len(rest) - counts.numel() :].view(counts.shape)  # (L, E)
        observed = rest[: len(rest) - counts.numel()] / processes.world_size
        observed = observed.view(len(counts), -1) if len(observed) else [None] * len(counts)

        # Update.
        lr = args.lr * lr_factor(progress.step, args.lr_schedule, args.warmup_steps, run.total_steps, args.cooldown)
        finite = all(math.isfinite(value) for value in means.values())
        update = engine.step(lr, finite)
        progress.step += 1
        if progress.step == start + 1:
            processes.set_timeout(args.timeout)
        clock.images += args.global_batch_size
        bar.update()
        if profiler.step():
            log.info(f"profile of {args.profile} steps: trace.json and kernels.txt in {profiler.folder}")
        if update.applied:
            progress.bad_in_a_row = 0
            progress.window.add(means | {"grad_norm": update.grad_norm}, counts)
            tell_routers(engine.module, counts, observed)
            if routings and (dead := progress.note_idle(counts, args.dead_after)):
                layers = run.config.moe_indices
                which = ", ".join(f"expert {expert} of block {layers[layer]}" for layer, expert in dead[:8])
                log.info(f"WARNING: {len(dead)} experts had no token in {args.dead_after} steps: {which}")
        else:
            note_bad_step(run, progress, seen, finite)

        # Report, draw, save.
        step, last = progress.step, progress.step == run.total_steps or exit_code is not None
        if step % args.log_every == 0 or step == run.total_steps:
            report(run, engine, progress, clock, lr, routings)
        with clock.pausing():
            if step % args.ckpt_every == 0 or last:  # first of all: what follows may take long, or fail
                saver.save(progress)
            for every, draw in ((args.sample_every, draw_grid), (args.metrics_every, report_metrics)):
                if every and (step % every == 0 or step == run.total_steps):
                    try:
                        draw(run, engine, step)
                    except sampling.BrokenNetwork as reason:
                        log.info(f"WARNING: no images at step {step}: {reason}")
            if last:
                saver.finish()
        if exit_code is not None:
            log.info(f"stopped by a signal after step {step}; --resume auto goes on from here")
            raise SystemExit(exit_code)
    bar.close()
    signals.restore()
    log.info(f"done: at step {progress.step}, {progress.skipped} skipped, in {run.folder}")


def batches_from(run: Run, step: int) -> Iterator[dict[str, Tensor]]:
    """Micro-batches of the steps from `step` on, as `make_loader` gives them."""
    if run.alignment is not None:
        run.alignment.begin(step)
    return iter(make_loader(run.data, run.schedule, step, run.args.num_workers, run.processes.device.type == "cuda"))


def make_batch(run: Run, batch: dict[str, Tensor], positions: Tensor) -> tuple[NoisedBatch, Tensor]:
    """What the network sees, from what the data set drew: latents, noised at each sample's time, and conditions."""
    batch = {name: value.to(run.processes.device, non_blocking=True) for name, value in batch.items()}
    x0 = batch["x"] if run.args.feature_path else run.space.encode(batch["x"], batch.get("vae_noise"))  # (N, C, h, w)
    u = batch["u"]
    if run.args.stratified_t:
        u = stratify(u, positions.to(u.device), run.args.global_batch_size)
    condition = run.condition.of_samples(batch, run.data)
    return run.objective.noised(x0, batch["noise"], u), run.condition.drop(condition, batch["drop_u"])


class Balance(NamedTuple):
    """Which losses of routing there are, and their factors; each is summed over the layers."""

    kinds: tuple[str, ...] = ("aux",)  # of runs.BALANCE
    aux: float = 0.005
    z: float = 1e-3
    own: float = 1.0  # of the losses that a router brings along

    @classmethod
    def of(cls, args) -> "Balance":
        return cls(tuple(args.balance), args.aux_loss_alpha, args.z_loss_alpha, args.router_loss_alpha)


def total_loss(
    terms: dict[str, Tensor], routings: list[Routing], balance: Balance, sum_over_processes
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The loss to minimise, and what the log wants of it: the mean of each term, of losses of routing, counts (L, E).

    These are part of the loss, so scaling, accumulation and sharding treat them as they treat the rest. The load of the
    balance loss is that of the micro-batch over all processes, so it does not depend on how many there are.
    """
    loss = terms["loss"].mean()
    values = {name: term.detach().mean() for name, term in terms.items()}
    if not routings:
        return loss, values, loss.new_zeros(0, 0)
    even = load_balancing_loss(routings, sum_over_processes)  # (L,)
    values["balance_loss"] = even.detach().mean()
    if "aux" in balance.kinds:
        loss = loss + balance.aux * even.sum()
    if "sequence" in balance.kinds:
        loss = loss + balance.aux * sequence_balancing_loss(routings, len(terms["loss"])).sum()
    if "z" in balance.kinds:
        large = z_loss(routings)
        loss, values["z_loss"] = loss + balance.z * large.sum(), large.detach().mean()
    for name in routings[0].losses:
        own = torch.stack([routing.losses[name] for routing in routings])
        loss, values[f"{name}_loss"] = loss + balance.own * own.sum(), own.detach().mean()
    return loss, values, torch.stack([routing.tokens_per_expert for routing in routings]).to(loss.dtype)


def tell_routers(model: DiT, counts: Tensor, observed) -> None:
    """Once a step, what all processes saw: (L, E) counts, and of each layer what its router wants the mean of."""
    for block, of_layer, seen in zip((b for b in model.blocks if b.is_moe), counts, observed, strict=True):
        block.moe.gate.after_step(of_layer, seen)


def note_bad_step(run: Run, progress: Progress, seen: list[tuple[Tensor, Tensor]], finite: bool) -> None:
    """Count a skipped update; give up after several in a row, naming the samples whose loss was not finite.

    In fp16 a finite loss whose scaled gradient overflows is the loss scaler at work, which needs a few tries.
    """
    progress.skipped += 1
    progress.bad_in_a_row += 1
    scaler_at_work = finite and run.args.precision == "fp16"
    limit = BAD_STEPS_IN_A_ROW * (5 if scaler_at_work else 1)
    if not scaler_at_work:
        what = "gradient" if finite else "loss"
        run.log.info(f"step {progress.step}: {what} not finite, update skipped ({progress.skipped} so far)")
    if progress.bad_in_a_row >= limit:
        bad = [index for indices, losses in seen for index in indices[~losses.isfinite().cpu()].tolist()]
        bad = sorted({index for part in run.processes.gather(bad) for index in part})
        or_bf16 = ", or with --precision bf16" if run.args.precision == "fp16" else ""
        names = ", ".join(run.data.name_of(index) for index in bad[:5]) or "no single sample"
        raise RunStopped(
            f"loss or gradient not finite in {limit} steps in a row, the last at step {progress.step}; "
            f"samples of that step with such a loss: {names} ({len(bad)} of {run.args.global_batch_size}). "
            f"Resume from the last checkpoint with --allow-changes and a lower --lr or --grad-clip 1{or_bf16}"
        )


def report(run: Run, engine: Engine, progress: Progress, clock: Clock, lr: float, routings: list[Routing]) -> None:
    """One line to the log, one record to the metrics: means since the last ones; entropy of the last micro-batch."""
    window = progress.window
    values = window.means() | {"lr": lr}
    if routings and window.steps:
        values |= load_statistics(window.counts[:, : run.config.num_experts])
    if routings:
        values["router_entropy"] = (run.processes.sum(router_entropy(routings)) / run.processes.world_size).tolist()
    values |= clock.rates() | engine.extra_metrics()
    values |= {"peak_memory_gb": peak_memory_gb(run.processes.device), "skipped_steps": progress.skipped}
    run.log.metrics(progress.step, values)

    line = f"step {progress.step}/{run.total_steps}  loss {values.get('loss', math.nan):.4f}"
    if routings:
        load, entropy = max(values.get("load_max_over_mean", [math.nan])), values["router_entropy"]
        line += f"  balance {values.get('balance_loss', math.nan):.3f}  load max {load:.2f}"
        line += f"  entropy {sum(entropy) / len(entropy):.2f}"
    if "alignment" in values:
        line += f"  aligned {values['alignment']:.3f}"
    line += f"  grad {values.get('grad_norm', math.nan):.3f}  lr {lr:.2e}  {values['images_per_second']:.1f} img/s"
    line += f"  data {values['data_wait_share']:.0%}  mem {values['peak_memory_gb']:.1f} GB"
    run.log.info(line)
    window.clear()
    clock.start()


def peak_memory_gb(device: torch.device) -> float:
    """In 1e9 bytes: the most that tensors took on the GPU so far; of a CPU process, its peak resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def draw_grid(run: Run, engine: Engine, step: int) -> None:
    """The same few images (noise and labels fixed) from the EMA of this step: `samples/NNNNNNN.png` and TensorBoard."""
    labels, settings = run.condition.spread(GRID), sampling_settings(run)
    with engine.averaged() as model:  # all processes draw: where parameters are sharded, each is needed
        numbers = list(range(len(labels))) if run.config.caption_width else labels
        network = recording(model, run.objective, numbers, settings)
        drawn = sampling.generate(network, run.objective, run.space, labels, settings, kind=run.condition)
        images = np.concatenate(list(drawn))
    if run.processes.is_main:
        grid, folder = image_files.image_grid(images, columns=8), run.folder / "samples"
        with dispensable(folder):
            folder.mkdir(exist_ok=True)
            image_files.save_png(folder / f"{step:07d}.png", grid)
        run.log.image(step, "samples", grid)
        if isinstance(network, Recorder):
            draw_routing(run, step, network, dict(zip(numbers, map(run.condition.name, labels), strict=True)))


def draw_routing(run: Run, step: int, network: Recorder, names: dict[int, str]) -> None:
    """What the experts did for those images, in TensorBoard under `routing/`."""
    from analysis import plots  # matplotlib takes a second to import, and nothing else of training needs it

    labels = [names[label] for label in network.tally.classes]
    data = network.tally.result(model=f"{run.folder.name}, step {step}", class_names=labels)
    for by in plots.maps_of(data):
        run.log.image(step, f"routing/{by}", plots.pixels(plots.draw(by, data)))


def report_metrics(run: Run, engine: Engine, step: int) -> None:
    """Images of all classes in turn, drawn by all processes from the EMA of this step, against the reference."""
    count, size = run.args.metrics_samples, run.args.image_size
    labels = sampling.Asked(run.condition.requests(count, run.args.global_seed, "balanced"))
    record = {"source": f"{run.folder} at step {step}"}
    with engine.averaged() as model:
        images = evaluation.DrawnImages(model, run.objective, run.space, labels, sampling_settings(run), size, record)
        samples = evaluation.measure(
            images, run.evaluator.extractor, run.processes, run.schedule.micro_batch_size, title="metrics"
        )
    values = run.processes.on_main(lambda: run.evaluator.compare(samples))
    run.log.metrics(step, {f"metrics/{name}": value for name, value in values.items()})
    numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
    run.log.info(f"step {step}: {numbers}  ({count} images)")
    for warning in run.evaluator.warnings(samples):
        run.log.info(f"WARNING: {warning}")


def sampling_settings(run: Run) -> sampling.Settings:
    """How images are drawn while training."""
    scale = run.args.sample_cfg_scale if run.condition.null is not None else 1.0
    objective = run.objective
    channels = objective.guided_channels(run.config.in_channels, objective.samplers[0])
    return sampling.Settings(GRID_STEPS, objective.samplers[0], scale, channels, seed=run.args.global_seed)


class Saver:
    """Writes checkpoints from a copy, in the background; training waits only where one is not done when the next comes.

    A full disk costs a warning, until it has failed several times in a row: then `gave_up` holds the reason. It is set
    on the process that writes; the loop tells the others.
    """

    def __init__(self, run: Run, engine: Engine):
        self.run, self.engine = run, engine
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.pending: tuple[Path, Future] | None = None
        self.failures, self.gave_up = 0, None

    def save(self, progress: Progress) -> None:
        """Begin to write the state of now."""
        self.settle()
        folder = self.run.folder / "checkpoints" / f"{progress.step:07d}"
        state = progress.state() | {"flags": flags(self.run.args), "total_steps": self.run.total_steps}
        try:
            write = self.engine.snapshot(folder, self.run.record | {"step": progress.step}, state)
        except OSError as error:
            self._note_failure(folder, error)
        else:
            self.pending = folder, self.thread.submit(self._write, write, folder)

    def _write(self, write: Callable[[], None], folder: Path) -> None:
        is_main, args = self.run.processes.is_main, self.run.args
        try:
            write()
        except OSError:
            if is_main:
                checkpoint.discard(folder)  # a full disk has no room for half a checkpoint
            raise
        if is_main and args.keep_last:
            checkpoint.prune(folder.parent, args.keep_last, args.keep_every)

    def settle(self, wait: bool = True) -> None:
        """Note how the write in progress ended, if it has (or when it will)."""
        if self.pending is None or not (wait or self.pending[1].done()):
            return
        (folder, future), self.pending = self.pending, None
        try:
            future.result()
        except OSError as error:
            self._note_failure(folder, error)
        else:
            self.failures = 0
            self.run.log.info(f"saved {folder}")

    def _note_failure(self, folder: Path, error: OSError) -> None:
        self.failures += 1
        self.run.log.info(f"WARNING: checkpoint {folder} not written ({error}); the one before it is untouched")
        if self.failures == FAILED_SAVES_IN_A_ROW:
            self.gave_up = f"could not write {folder}: {error}; {remedy(error)} and resume"

    def finish(self) -> None:
        """Wait for the last checkpoint, on all processes.

        Raises:
            RunStopped: it could not be written.
        """
        self.settle()
        if any(self.run.processes.gather(self.failures)):
            raise RunStopped(self.gave_up or "the last checkpoint could not be written; the log says why")


def progress_bar(run: Run, step: int):
    """On rank 0's terminal; absent where the output is a file."""
    from tqdm import tqdm

    disable = None if run.processes.is_main else True
    return tqdm(total=run.total_steps, initial=step, unit="step", dynamic_ncols=True, disable=disable)


def introduce(run: Run, step: int) -> None:
    """The first lines of the log: what is trained, on what, how."""
    args, processes, log = run.args, run.processes, run.log
    with torch.device("meta"):
        total, activated = count_parameters(DiT(run.config))
    experts = f"{run.config.num_experts} experts, {run.config.num_experts_per_tok} per token"
    kind = experts if run.config.num_experts else "dense; --num_experts 8 makes it a DiT-MoE"
    log.info(f"{args.model} ({kind}): {total:,} parameters, {activated:,} activated")
    of = "with captions" if run.config.caption_width else f"of {run.data.num_classes} classes"
    log.info(f"{len(run.data):,} samples {of}, latents {run.data.latent_shape}")
    log.info(
        f"{run.objective.name}, batch {args.global_batch_size} = {processes.world_size} processes x {args.accum_iter} "
        f"micro-batches, {run.args.precision} on {processes.device.type}, {run.total_steps} steps "
        f"({run.schedule.steps_per_epoch} an epoch) in {run.folder}"
    )
    if step:
        log.info(f"resumed from {run.resume_from} at step {step}")
    if step >= run.total_steps:
        log.info(f"nothing to do: step {step} of {run.total_steps}; --max-steps and --epochs say how far to go")
