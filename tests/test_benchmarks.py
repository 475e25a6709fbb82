"""The speed benchmarks at tiny sizes: they run, check before they time, and write what they found."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, traces_fp32
from test_moe import gradients, make_moe, per_token
from torch._subclasses.fake_tensor import FakeTensorMode

import sampling
from analysis.plan import flops
from benchmarks import __main__ as everything
from benchmarks import attention, data, harness, moe_block, optimizer_ema, quickstart, sample_step, traffic, train_step
from benchmarks.harness import Goal, Rates, Times, WrongResult
from benchmarks.naive import NaiveMoE, in_another_way, naive_model
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
    output = folder / "new" / "out.json"
    argv = ["--quick", "--rounds", "2", "--device", "cpu", "--output", str(output), *flags]
    benchmark.main(benchmark.get_parser().parse_args(argv))
    return json.loads(output.read_text())


@pytest.mark.parametrize("benchmark", ROWS, ids=lambda module: module.__name__)
def test_runs_and_writes_what_it_found(benchmark, tmp_path, capsys):
    record = run(benchmark, tmp_path)
    assert record["versions"]["torch"] == torch.__version__ and record["machine"]["threads"] == 1
    assert record["settings"]["rounds"] == 2 and record["command"] and len(record["date"]) == 10
    assert {goal["row"] for goal in record["goals"]} == ROWS[benchmark]
    printed = capsys.readouterr().out
    for rows in filter(None, record["tables"].values()):
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
    monkeypatch.setattr(harness, "measure", lambda *_: pytest.fail("timed"))
    with pytest.raises(WrongResult, match="naive"):
        run(benchmark, tmp_path)
    assert not list(tmp_path.rglob("*.json"))


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


def test_late_cases_are_left_out():
    limit = harness.TimeLimit(0)
    assert not limit.allows("a case") and limit.left_out == ["a case"]
    assert harness.TimeLimit(None).allows("a case")


def test_limits_are_those_computed_for_an_h200():
    """790 TFLOP/s and 4.3 TB/s give the images/s that the goals speak of: training, and 50 guided steps."""
    rates = Rates(790e12, 4.3e12)
    for name, training, sampled in (("S", 4981, 149), ("B", 1573, 47), ("XL", 329, 9.9), ("G", 160, 4.8)):
        config = build_config(f"DiT-{name}/2", num_experts=8)
        assert 1 / harness.training_limit(config, torch.bfloat16, rates) == pytest.approx(training, rel=0.01)
        assert 0.01 / harness.forward_limit(config, torch.bfloat16, rates) == pytest.approx(sampled, rel=0.01)


# ------------------------------------------------------------------------------------------------------ the whole suite


def test_quickstart_times_the_stages(tmp_path, monkeypatch):
    script = tmp_path / "quickstart.sh"
    script.write_text('echo "== Data: some"; sleep 0.1; echo "== Result"; echo "$STEPS good"; echo "picture: no"')
    monkeypatch.setattr(quickstart, "SCRIPT", script)
    record = run(quickstart, tmp_path, "--steps", "7")
    assert [row["stage"] for row in record["tables"]["quick start"]] == ["Data", "Result", "all"]
    assert record["tables"]["quick start"][0]["s"] > 0.09
    assert record["result"] == ["7 good"]


def test_suite_goes_on_after_a_failure(tmp_path, monkeypatch, capsys):
    def fake(command, **_):
        name, output = command[2].rpartition(".")[2], command[command.index("--output") + 1]
        goal = {"row": "8", "what": name, "goal": "<= 1.3", "value": 1.0, "absent": ""}
        with open(output, "w") as file:
            json.dump({"goals": [goal]}, file)
        return subprocess.CompletedProcess(command, int(name == "train_step"))

    monkeypatch.setattr(subprocess, "run", fake)
    args = everything.get_parser().parse_args(["--quick", "--output", str(tmp_path)])
    with pytest.raises(everything.cli.RunStopped, match="failed: train_step$"):
        everything.main(args)
    printed = capsys.readouterr().out
    assert "| 8 | sample_step | <= 1.3 | 1 | met |" in printed and "| 8 | train_step |" not in printed


@pytest.mark.slow
def test_suite_by_one_command(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--quick", "--device", "cpu", "--output", str(tmp_path)]
    result = subprocess.run([*command, "--only", "moe_block", "data"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "data.json").read_text())["command"].startswith(
        "python -m benchmarks.data --device cpu"
    )
    assert "s in all" in result.stdout


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
