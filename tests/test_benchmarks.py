"""The speed benchmarks at tiny sizes: they run, check before they time, and write what they found."""

import json
import os
import signal
import subprocess

import pytest
import torch
from conftest import read_json, script, traces_fp32
from test_moe import gradients, make_moe, per_token
from torch._subclasses.fake_tensor import FakeTensorMode

import sampling
from analysis.plan import flops
from benchmarks import __main__ as everything
from benchmarks import attention, data, harness, moe_block, optimizer_ema, quickstart, sample_step, traffic, train_step
from benchmarks.harness import Rates, Times, WrongResult
from benchmarks.naive import NaiveMoE, in_another_way, naive_model
from benchmarks.report import Goal
from cli import RunStopped
from configuration import build_config

ROWS = {  # of the table of goals, that each speaks of on a CPU
    moe_block: {"1", "2", "7"},
    train_step: {"3", "6", "9", "10", "11"},
    sample_step: {"4", "6"},
    optimizer_ema: {"8"},
    data: set(),
    traffic: set(),
    attention: set(),
}


def run(benchmark, folder, *flags) -> dict:
    """What a benchmark writes."""
    benchmark.main(benchmark.get_parser().parse_args(arguments(folder, *flags)))
    return read_json(folder, "new/out")


def arguments(folder, *flags) -> list[str]:
    return ["--quick", "--rounds", "2", "--device", "cpu", "--output", str(folder / "new" / "out.json"), *flags]


@pytest.mark.parametrize("benchmark", ROWS, ids=lambda module: module.__name__)
def test_runs_and_writes_what_it_found(benchmark, tmp_path, capsys):
    record = run(benchmark, tmp_path)
    assert record["versions"]["torch"] == torch.__version__ and record["machine"]["threads"] == 1
    assert record["settings"]["rounds"] == 2 and record["command"] and len(record["date"]) == 10
    assert {goal["row"] for goal in record["goals"]} == ROWS[benchmark]
    printed = capsys.readouterr().out
    assert not record["missing"] and record["seconds"]
    for rows in (rows for cases in record["tables"].values() for rows in cases.values()):
        assert "| " + " | ".join(rows[0]) + " |" in printed
        assert "over" in next(iter(rows[0])) or "slower" in next(iter(rows[0]))  # ratios come first
        for row in rows:
            assert all(value > 0 for value in row.values() if isinstance(value, float)), row
    assert "needs a GPU" in printed or ROWS[benchmark] <= {"8"}


@pytest.mark.parametrize("benchmark", [moe_block, train_step, sample_step], ids=lambda module: module.__name__)
def test_wrong_results_are_not_timed(benchmark, tmp_path, monkeypatch):
    right = NaiveMoE.forward

    def wrong(self, x, null=None):
        out, routing = right(self, x, null)
        return out * 1.1, routing

    monkeypatch.setattr(NaiveMoE, "forward", wrong)
    monkeypatch.setattr(harness, "measured_rates", lambda *_: Rates(1.0, 1.0))
    monkeypatch.setattr(harness, "measure", lambda *_, **__: pytest.fail("timed"))
    monkeypatch.setattr(moe_block, "growth_rows", lambda bench: ())
    with pytest.raises(RunStopped, match="failed: .*WrongResult: naive"):
        run(benchmark, tmp_path)
    record = read_json(tmp_path, "new/out")
    assert all("WrongResult: naive" in why for why in record["missing"].values())
    assert not {"one MoE layer", "steps", "guided sampling step"} & set(record["tables"])


def test_updates_that_differ_are_not_timed(tmp_path, monkeypatch):
    monkeypatch.setitem(optimizer_ema.WAYS, optimizer_ema.OURS, lambda model: lambda: None)
    with pytest.raises(WrongResult, match="ours"):
        optimizer_ema.check_updates(build_config("DiT-Nano/2", num_experts=4), torch.device("cpu"))


@pytest.mark.parametrize("way", ["naive", "loop", "padded", "grouped_mm"])
@pytest.mark.parametrize("experts", [4, 64])
def test_every_way_computes_the_layer(way, experts):
    moe = make_moe(experts=experts)
    layer = in_another_way(moe, way)
    x = torch.randn(2, 7, 8, requires_grad=True)
    expected = per_token(moe, x)
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], expected, rtol=1e-5, atol=1e-6)
    want = gradients(moe, expected.square().sum())["gate.weight"]
    torch.testing.assert_close(gradients(layer, layer(x)[0].square().sum())["gate.weight"], want, rtol=1e-4, atol=1e-6)


def test_dense_way_has_the_flops_of_the_activated_experts():
    from torch.utils.flop_counter import FlopCounterMode

    moe, x = make_moe(experts=4, top_k=2, width=16, hidden=8, shared=16), torch.randn(32, 8)
    with FlopCounterMode(display=False) as counter:
        in_another_way(moe, "dense")(x)
    assert counter.get_total_flops() == 2 * 3 * 32 * 8 * (2 * 16 + 16)


def test_naive_model_is_the_same_network():
    config = build_config("DiT-Nano/2", num_experts=4)
    model = harness.random_model(config, torch.device("cpu"))
    inputs = harness.random_inputs(config, 2, torch.device("cpu"))
    out = model(*inputs)
    assert out.std() > 0.1  # no block is multiplied by zero
    torch.testing.assert_close(naive_model(model)(*inputs), out, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------------------------------- traffic


def test_bytes_and_flops_of_operations():
    with FakeTensorMode():
        x, w, rows = torch.empty(4, 8), torch.empty(8, 16), torch.empty(2, dtype=torch.long)
        with traffic.Recorder() as recorder:
            y = x @ w
            y.view(64).mul_(2)  # a view launches nothing
            y[:2].copy_(y[2:])
            y.index_select(0, rows)
            torch.mul(y, y[:1].expand(4, 16), out=torch.empty(4, 16))
            torch.empty(9, 16).index_put_((rows,), y[:2])
            torch.mul(y, 2, out=y)
    assert [tuple(operation)[1:] for operation in recorder.operations] == [
        ((128, 512), (256,), 2 * 4 * 8 * 16),
        ((256,), (256,), 0),
        ((128,), (128,), 0),
        ((128, 16), (128,), 0),  # two of the rows
        ((256, 64), (256,), 0),  # the expanded row is there once
        ((16, 128), (128,), 0),  # nothing is read of what is overwritten
        ((256,), (256,), 0),  # but of what is also an input
    ]


@traces_fp32
def test_flops_of_a_block_are_the_planners():
    forward, backward = traffic.counted(traffic.Case("block", "S", "8", 256))["MoE"]
    one, two = (flops(build_config("DiT-S/2", num_experts=8, depth=depth)) for depth in (1, 2))
    assert sum(operation.flops for operation in forward.operations) == two.forward - one.forward
    both = forward.operations + backward.operations
    assert sum(operation.flops for operation in both) == two.training - one.training


# -------------------------------------------------------------------------------------------------------------- harness


def test_ways_take_turns_after_warm_up(monkeypatch):
    calls = []
    monkeypatch.setattr(harness, "SHORTEST", 0.0)
    ways = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = harness.measure(ways, torch.device("cpu"), rounds=3, warmup=2)
    assert "".join(calls) == "aabb" + "ab" * 3
    assert len(times.seconds["a"]) == 3


def test_ratios_are_medians_within_rounds():
    times = Times({"slow": [2.0, 30.0, 4.0], "fast": [1.0, 10.0, 4.0]})
    assert times.ratio("slow", "fast") == 2 and times.median("slow") == 4


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"out": torch.tensor([1.0, 1.1])}, "differs"),
        ({"out": torch.tensor([1.0, float("nan")])}, "differs"),
        ({}, "differs"),
    ],
)
def test_check(results, message):
    expected = {"out": torch.ones(2)}
    harness.check(expected, {"same": {"out": torch.ones(2)}}, 1e-6)
    with pytest.raises(WrongResult, match=message):
        harness.check(expected, {"way": results}, 1e-2)


@pytest.mark.parametrize(
    ("goal", "value", "verdict"),
    [
        ("<= 1.15", 1.15, "met"),
        ("<= 1.15", 1.2, "not met"),
        (">= 0.65", 0.7, "met"),
        (">= 0.65", 0.6, "not met"),
        ("reported", 3.0, "reported"),
        ("<= 1.15", None, "needs a GPU"),
    ],
)
def test_verdicts(goal, value, verdict):
    assert Goal("1", "what", goal, value).verdict == verdict


def test_rounds_end_when_they_take_long():
    ways = {"a": lambda: None}
    assert harness.measure(ways, torch.device("cpu"), rounds=7, seconds=0).rounds == harness.FEWEST
    assert harness.measure(ways, torch.device("cpu"), rounds=2, seconds=0).rounds == 2


def test_limits_are_those_computed_for_an_h200():
    """790 TFLOP/s and 4.3 TB/s give the images/s that the goals speak of: training, and 50 guided steps."""
    rates = Rates(790e12, 4.3e12)
    for name, training, sampled in (("S", 4981, 149), ("B", 1573, 47), ("XL", 329, 9.9), ("G", 160, 4.8)):
        config = build_config(f"DiT-{name}/2", num_experts=8)
        assert 1 / harness.training_limit(config, torch.bfloat16, rates) == pytest.approx(training, rel=0.01)
        assert 0.01 / harness.forward_limit(config, torch.bfloat16, rates) == pytest.approx(sampled, rel=0.01)


# ---------------------------------------------------------------------------------------------------- what is missing


def test_killed_and_resumed(tmp_path, monkeypatch):
    """The file has what was measured and says what is missing; the rest alone is measured then."""
    times = []

    def killed_in_the_third(ways, device, rounds, **_):
        times.append(list(ways))
        if len(times) == 3:  # the first case has two measurements; then comes growth
            os.kill(os.getpid(), signal.SIGKILL)
        return Times({way: [1.0 + place] for place, way in enumerate(ways)})

    monkeypatch.setattr(harness, "measured_rates", lambda *_: Rates(1.0, 1.0))
    monkeypatch.setattr(harness, "measure", killed_in_the_third)
    script("benchmarks/moe_block.py", *arguments(tmp_path), check=-signal.SIGKILL)
    left = read_json(tmp_path, "new/out")
    first, *others = map(str, moe_block.QUICK_CASES)
    assert list(left["tables"]["one MoE layer"]) == list(left["seconds"]) == [first]
    assert left["missing"] == {"growth": "begun, not finished"} | dict.fromkeys(others, "not begun")

    times[:] = ["one", "two", "three"]
    record = run(moe_block, tmp_path, "--resume", "--budget", "1000")
    assert len(times) == 3 + 1 + 2 * len(others) and not record["missing"]
    assert record["tables"]["one MoE layer"][first] == left["tables"]["one MoE layer"][first]
    assert list(record["tables"]["one MoE layer"]) == [first, *others]
    assert next(goal["value"] for goal in record["goals"] if goal["row"] == "7") == 2

    record = run(moe_block, tmp_path, "--resume", "--rounds", "3", "--budget", "0")  # other settings: anew
    assert not record["seconds"] and set(record["missing"].values()) == {"not begun in 0 s"}
    assert len(read_json(tmp_path, "new/out.previous")["seconds"]) == 2 + len(others)


def test_a_case_that_fails_takes_no_other_with_it(tmp_path, monkeypatch, capsys):
    def rows(bench, case):
        yield "one MoE layer", [{"over dense": 1.0, "tokens": case.tokens}]
        if case == moe_block.QUICK_CASES[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")

    monkeypatch.setattr(harness, "measured_rates", lambda *_: Rates(1.0, 1.0))
    monkeypatch.setattr(moe_block, "case_rows", rows)
    monkeypatch.setattr(moe_block, "growth_rows", lambda bench: ())
    record = run(moe_block, tmp_path)  # what does not fit is an answer: no failure
    first, *others = map(str, moe_block.QUICK_CASES)
    assert record["missing"] == {first: "out of memory: CUDA out of memory. Tried to allocate 2 GiB"}
    assert list(record["seconds"]) == ["growth", *others]
    assert f"missing: {first}: out of memory" in capsys.readouterr().out

    def fails(bench):
        raise RuntimeError("no such kernel\nat all")

    monkeypatch.setattr(moe_block, "growth_rows", fails)
    with pytest.raises(RunStopped, match=r"failed: growth \(RuntimeError: no such kernel\)$"):
        run(moe_block, tmp_path)
    assert list(read_json(tmp_path, "new/out")["seconds"]) == others


def test_profile_lists_what_takes_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "measured_rates", lambda *_: Rates(1.0, 1.0))
    record = run(sample_step, tmp_path, "--profile")
    (rows,) = record["tables"]["kernels of one call"].values()
    everything, *kernels = rows
    assert everything["kernel"] == "all" and everything["count"] > len(kernels) and everything["way"] == "ours"
    assert {"aten::mm", "aten::addmm"} & {row["kernel"] for row in kernels} and everything["over the call"] > 0
    assert [row["ms"] for row in kernels] == sorted((row["ms"] for row in kernels), reverse=True)
    assert sum(row["ms"] for row in kernels) <= everything["ms"] * 1.001


# ------------------------------------------------------------------------------------------------------ the whole suite


def test_quickstart_times_the_stages(tmp_path, monkeypatch):
    fake = tmp_path / "quickstart.sh"
    fake.write_text('echo "== Data: some"; sleep 0.1; echo "== Result"; echo "$STEPS good"; echo "picture: no"')
    monkeypatch.setattr(quickstart, "SCRIPT", fake)
    record = run(quickstart, tmp_path, "--steps", "7")
    (rows,) = record["tables"]["quick start"].values()
    assert [row["stage"] for row in rows] == ["Data", "Result", "all"] and rows[0]["s"] > 0.09
    assert record["result"] == ["7 good"]


def test_suite_goes_on_after_a_failure(tmp_path, monkeypatch, capsys):
    shares = {}

    def fake(command, seconds):
        path = everything.Path(command[command.index("--output") + 1])
        shares[path.stem] = float(command[command.index("--budget") + 1])
        goal = {"row": "8", "what": path.stem, "goal": "<= 1.3", "value": 1.0, "absent": "missing"}
        goals = [goal, goal | {"row": "9", "what": "memory", "value": 2.0 if path.stem == "memory" else None}]
        if path.stem != "data":
            path.write_text(json.dumps({"goals": goals, "missing": {"late": "not begun in 5 s"}}))
        return {"train_step": 1, "attention": None}.get(path.stem, 0)

    (tmp_path / "data.json").write_text('{"goals": "of an earlier run"}')
    os.utime(tmp_path / "data.json", (0, 0))
    monkeypatch.setattr(everything, "run", fake)
    args = everything.get_parser().parse_args(["--device", "cpu", "--budget", "930", "--output", str(tmp_path)])
    with pytest.raises(RunStopped, match="failed: train_step$"):
        everything.main(args)
    printed = capsys.readouterr().out
    assert "| 8 | sample_step | <= 1.3 | 1 | met |" in printed and "| 9 | memory | <= 1.3 | 2 | not met |" in printed
    assert "missing: moe_block: late: not begun in 5 s" in printed and "train_step: failed: exit code 1" in printed
    summary = read_json(tmp_path, "summary")
    assert summary["parts"]["attention"]["ended"] == "stopped: it took too long"
    assert [goal["value"] for goal in summary["goals"] if goal["row"] == "9"] == [2.0]
    assert shares["moe_block"] == pytest.approx(100, abs=1)
    assert shares["quickstart"] == pytest.approx(930, abs=1)  # nobody before it has used its time


def test_a_part_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    started = tmp_path / "started"
    monkeypatch.setattr(everything, "GRACE", 0.2)
    assert everything.run(["bash", "-c", f"trap '' INT; sleep 60 & echo $! > {started}; wait"], 0.5) is None
    left = subprocess.run(["ps", "-o", "stat=", "-p", started.read_text().strip()], capture_output=True, text=True)
    assert left.stdout.strip()[:1] in ("", "Z")  # gone, or dead and not yet buried
    assert everything.run(["bash", "-c", "exit 3"], 5) == 3


@pytest.mark.slow
def test_suite_by_one_command(tmp_path, capfd):
    flags = ["--quick", "--device", "cpu", "--budget", "100", "--output", str(tmp_path), "--only", "attention"]
    everything.main(everything.get_parser().parse_args(flags))
    record = read_json(tmp_path, "attention")
    assert record["command"].startswith("python -m benchmarks.attention --device cpu --threads 1 --budget 100")
    assert read_json(tmp_path, "summary")["parts"] == {"attention": {"ended": "done", "missing": {}}}
    assert "s in all" in capfd.readouterr().out


# --------------------------------------------------------------------------------------------------------- CUDA graphs


def test_capture_leaves_a_network_on_the_cpu_alone():
    model = harness.random_model(build_config("DiT-Nano/2", num_experts=4), torch.device("cpu"))
    assert sampling.captured(model) is model


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@torch.no_grad()
def test_captured_network_is_the_same():
    device = torch.device("cuda")
    config = build_config("DiT-Nano/2", num_experts=4)
    model = harness.random_model(config, device).bfloat16()
    network = sampling.captured(model)
    for images in (2, 3, 2):  # another shape is another graph; the first one is used again
        inputs = harness.random_inputs(config, images, device)
        first = network(*inputs)
        kept = first.clone()
        torch.testing.assert_close(first, model(*inputs))
        network(*harness.random_inputs(config, images, device))
        assert torch.equal(first, kept)  # the next call leaves it alone
