"""How fast are AdamW and EMA, over the bytes that they must move?

    python -m benchmarks.optimizer_ema

Per parameter, in fp32, each value read or written once: parameter, two moments and average both ways, gradient one way:
36 bytes, at the bandwidth of a copy that takes its turn with the updates. Ours is `optim.build_optimizer` and
`optim.EMA`: two passes, 40 bytes. Muon, whose iterations are matrix products, is measured beside it on a GPU, and on a
CPU for a small model (`--model DiT-Nano/2`).
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

import cli
from analysis.plan import parameter_counts
from benchmarks import harness
from benchmarks.report import Bench, Goal, Tables, column
from configuration import build_config
from models import DiT
from muon import build_muon
from optim import ADAMW, EMA, build_optimizer

TITLE = "AdamW and EMA"
BYTES = 4 * 9
DECAY = 0.9999
LR = 1e-4


def get_parser() -> cli.Parser:
    parser = harness.get_parser("optimizer_ema", __doc__, budget=120)
    parser.add_argument("--model", help="row of the table of sizes, with 8 experts (GPU: DiT-B/2, CPU: DiT-S/8)")
    return parser


def main(args) -> None:
    bench = Bench(args, goals)
    name = args.model or ("DiT-Nano/2" if args.quick else "DiT-B/2" if bench.cuda else "DiT-S/8")
    bench.run({name: partial(case_rows, bench, name)})


def case_rows(bench: Bench, name: str) -> Iterator[tuple[str, list[dict]]]:
    device, config = bench.device, build_config(name, num_experts=8)
    check_updates(config, device)
    count = parameter_counts(config).trained
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    known = WAYS | (MUON if bench.cuda or name == "DiT-Nano/2" else {})
    ways = {way: make(random_state(config, device)) for way, make in known.items()}
    times = bench.measure(ways | {"copy": lambda: target.copy_(source)})
    yield (
        TITLE,
        [
            {
                "over its bytes": times.ratio(way, "copy") * 8 / BYTES,  # a copy reads 4 bytes and writes 4
                "over ours": times.ratio(way, OURS),
                "way": way,
                "model": name,
                "parameters": f"{count:,}",
                "ms": times.median(way) * 1e3,
                "copy, TB/s": 8 * count / times.median("copy") / 1e12,
                "rounds": times.rounds,
            }
            for way in known
        ],
    )


def goals(tables: Tables, cuda: bool) -> list[Goal]:
    over = column(tables.get(TITLE, ()), "over its bytes", way=OURS)
    return [Goal("8", "AdamW and EMA: over the bytes they must move", "<= 1.3", min(over, default=None), "missing")]


# ----------------------------------------------------------------------------------------------------------------- ways


def random_state(config, device: torch.device) -> DiT:
    """A model with gradients, the same each time."""
    torch.manual_seed(0)
    model = harness.random_model(config, device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def ours(model: DiT) -> Callable[[], None]:
    return update_with(build_optimizer(model, LR, weight_decay=0.0), model)


def foreach(model: DiT) -> Callable[[], None]:
    """A kernel for each operation of the formula, over all parameters."""
    return update_with(torch.optim.AdamW(model.parameters(), LR, weight_decay=0.0, foreach=True), model)


def update_with(optimizer: torch.optim.Optimizer, model: DiT) -> Callable[[], None]:
    """The optimizer's step, then that of our average."""
    ema = EMA(model, DECAY)

    def update() -> None:
        optimizer.step()
        ema.update(model)

    return update


def one_by_one(model: DiT) -> Callable[[], None]:
    """PyTorch's plain loop over parameters, and the loop of EMA as DiT has it."""
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.0, foreach=False)
    averages = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def update() -> None:
        optimizer.step()
        for average, parameter in zip(averages, model.parameters(), strict=True):
            average.mul_(DECAY).add_(parameter, alpha=1 - DECAY)

    return update


def muon(model: DiT) -> Callable[[], None]:
    return update_with(build_muon(model, LR, 0.0, ADAMW["eps"], False), model)


MUON = {"Muon for matrices, fused AdamW, foreach EMA": muon}
OURS = "fused AdamW, foreach EMA (ours)"
WAYS = {OURS: ours, "foreach AdamW, foreach EMA": foreach, "loops over parameters": one_by_one}


def check_updates(config, device: torch.device) -> None:
    """After three updates all ways have the same parameters."""
    results = {}
    for way, make in WAYS.items():
        model = random_state(config, device)
        update = make(model)
        for _ in range(3):
            update()
        results[way] = {"parameters": nn.utils.parameters_to_vector(model.parameters()).detach()}
    start = nn.utils.parameters_to_vector(random_state(config, device).parameters()).detach()
    moved = {way: {"parameters": found["parameters"] - start} for way, found in results.items()}
    harness.check(moved["loops over parameters"], moved, tolerance=1e-2)


if __name__ == "__main__":
    cli.run(main, get_parser())
