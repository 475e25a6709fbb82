"""`weights.py`, and reading large files."""

import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, Golden
from safetensors.torch import load_file, save_file
from test_checkpoint import evil_files, tiny
from test_training import run_train

import checkpoint
import cli
import configuration
import families
import models
import sample
import weights


def call(monkeypatch, capsys, module, *argv, code=0):
    """Run a script in this process as its command line would; returns (stdout, stderr)."""
    monkeypatch.setattr("sys.argv", [module.__name__, *map(str, argv)])
    if code:
        with pytest.raises(SystemExit) as end:
            cli.run(module.main, module.get_parser())
        assert end.value.code == code
    else:
        cli.run(module.main, module.get_parser())
    return capsys.readouterr()


@pytest.mark.parametrize("golden", ["dit_moe_timm_attention", "dit_moe_flash_attention", "dit_dense"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_published_to_ours_to_published_is_bit_identical(tmp_path, monkeypatch, capsys, golden, suffix):
    published = Golden(golden).part("model.")
    torch.save({"ema": published}, tmp_path / "a.pt")
    output = tmp_path / f"b{suffix}"
    call(monkeypatch, capsys, weights, "export", tmp_path / "a.pt", "--output", output, "--num-heads", 4)
    again = torch.load(output, weights_only=True)["ema"] if suffix == ".pt" else load_file(output)
    published.setdefault("pos_embed", again.get("pos_embed"))
    assert {n: t for n, t in again.items() if n != "pos_embed"}.keys() == published.keys() - {"pos_embed"}
    assert all(torch.equal(again[name], published[name]) for name in again)


def test_export_of_a_run_and_halves(images, tmp_path, monkeypatch, capsys):
    run = run_train(images, steps=2)
    outputs = {}
    for name, flags in {"ema": [], "model": ["--use-ema", "False"], "half": ["--dtype", "fp16"]}.items():
        output = tmp_path / f"{name}.safetensors"
        call(monkeypatch, capsys, weights, "export", run, "--output", output, *flags)
        outputs[name] = load_file(output)
    assert "blocks.2.moe.experts.3.gate_proj.weight" in outputs["ema"]
    folder = run / "checkpoints" / "0000002"
    for which in ("ema", "model"):
        ours = families.to_published(checkpoint.read_tensors(folder, which))
        assert all(torch.equal(outputs[which][name], ours[name]) for name in ours)
    assert any((outputs["ema"][n] != outputs["model"][n]).any() for n in outputs["ema"])
    assert all(torch.equal(outputs["half"][n], outputs["ema"][n].half()) for n in outputs["ema"])
    call(monkeypatch, capsys, sample, "--ckpt", tmp_path / "half.safetensors", "--vae-path", "none", "--rf",
         "--output", tmp_path / "out", "--num-sampling-steps", 2)  # fmt: skip
    assert (tmp_path / "out" / "grid.png").is_file()


def test_inspect_shows_what_a_file_holds(images, tmp_path, monkeypatch, capsys):
    run = run_train(images, steps=2)
    out, _ = call(monkeypatch, capsys, weights, "inspect", run, "--norms")
    for expected in (
        "DiT-Nano/2, 4 experts, 4 classes",
        "rf (t_distribution lognormal, shift 1.0, time_scale 1.0) (recorded)",
        "num_experts_per_tok 2",
        "step         2",
        "block 2",
        "float32",
    ):
        assert expected in out
    norms = [float(value) for value in out.splitlines()[-1].split()[2:]]
    state = checkpoint.load_weights(run).state_dict
    parts = [state[f"blocks.2.moe.experts.{name}"] for name in ("gate_up_proj", "down_proj")]
    expected = [sum(p[e].square().sum() for p in parts).sqrt().item() for e in range(4)]
    assert norms == pytest.approx(expected, abs=0.01)

    model = tiny()
    torch.save(model.state_dict(), tmp_path / "m.pt")
    out, _ = call(monkeypatch, capsys, weights, "inspect", tmp_path / "m.pt")
    total, activated = models.count_parameters(model)
    assert f"{total:,} in total, {activated:,} activated" in out and "ddpm (from the weights)" in out


def test_inspect_reads_headers_only(tmp_path, monkeypatch, capsys):
    model = tiny()
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, tmp_path / "m.safetensors")
    monkeypatch.setattr(checkpoint.Weights, "state_dict", property(lambda self: pytest.fail("the tensors were read")))
    call(monkeypatch, capsys, weights, "inspect", tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["inspect", "nowhere.pt"], "nowhere.pt does not exist"),
        (["export", "LICENSE", "--output", "x.pt"], "LICENSE is not a (readable )?PyTorch file|refused"),
        (["export", "{m}", "--output", "x.bin"], "x.bin must end in .safetensors or .pt"),
        (["export", "{m}", "--output", "{m}"], "m.pt exists; name another file"),
        (["export", "{m}", "--output", "LICENSE/x.pt"], "LICENSE/x.pt cannot be written"),
        (["export", "{odd}", "--output", "x.pt"], "hidden size 48 is in no row"),
    ],
)
def test_wrong_input_gets_one_line(tmp_path, monkeypatch, capsys, argv, message):
    torch.save(tiny().state_dict(), tmp_path / "m.pt")
    torch.save(models.DiT(configuration.DiTConfig(1, 48, 2, 6)).state_dict(), tmp_path / "odd.pt")
    monkeypatch.chdir(ROOT)
    argv = [a.format(m=tmp_path / "m.pt", odd=tmp_path / "odd.pt") for a in argv]
    _, error = call(monkeypatch, capsys, weights, *argv, code=2)
    assert error.startswith("weights.py: error: ") and re.search(message, error) and error.count("\n") == 1


@pytest.mark.parametrize("form", evil_files(""))
def test_malicious_files_are_refused_on_the_command_line(tmp_path, monkeypatch, capsys, form):
    marker = tmp_path / "was-run"
    torch.save(evil_files(str(marker))[form], tmp_path / "evil.pt")
    _, error = call(monkeypatch, capsys, sample, "--ckpt", tmp_path / "evil.pt", code=2)
    assert "refused to load" in error and "it wants to run" in error and not marker.exists()


def test_wrong_size_flags_are_recognised_from_the_file(tmp_path, monkeypatch, capsys):
    torch.save(families.to_published(tiny(in_channels=3).state_dict()), tmp_path / "m.pt")
    for flags, message in (
        (["--num_experts", 16], "--num_experts 16 contradicts .*which says 4"),
        (["--model", "DiT-XL/2"], "--model DiT-XL/2 contradicts .*which says DiT-Nano/2, 4 experts"),
    ):
        argv = ["--ckpt", tmp_path / "m.pt", "--vae-path", "none", *flags]
        _, error = call(monkeypatch, capsys, sample, *argv, code=2)
        assert re.search(message, error), error


def test_deepspeed_files_load(tmp_path):
    """Its consolidated file, the sharded form with an index, and the model states of ZeRO-1 and 2."""
    state = families.to_published(tiny().state_dict())
    names = sorted(state)
    (tmp_path / "sharded").mkdir()
    halves = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in halves.items():
        torch.save({name: state[name] for name in part}, tmp_path / "sharded" / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (tmp_path / "sharded" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch.save({f"module.{name}": t for name, t in state.items()}, tmp_path / "pytorch_model.bin")
    torch.save({"module": state, "ds_version": "0.19"}, tmp_path / "mp_rank_00_model_states.pt")
    for name in ("sharded", "pytorch_model.bin", "mp_rank_00_model_states.pt"):
        loaded = checkpoint.load_weights(tmp_path / name)
        model = models.DiT(loaded.config)
        checkpoint.load_into(model, loaded)
        assert torch.equal(model.blocks[1].moe.experts.down_proj, tiny().blocks[1].moe.experts.down_proj)


MEASURE = """
import sys, threading, time
sys.path.insert(0, {root!r})
import torch, checkpoint
from models import DiT, build_model

with torch.device("meta"):  # what PyTorch imports for this is not part of the measurement
    build_model("DiT-Nano/2", num_experts=4)

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
weights = checkpoint.load_weights({path!r}, num_heads=8)
with torch.device("meta"):
    model = DiT(weights.config)
checkpoint.load_into(model, weights)
size = sum(p.numel() * p.element_size() for p in model.parameters())
done = True; thread.join()
assert model.blocks[0].moe.experts.down_proj[3, 0, 0] == 3.0
print((peak - before) / size)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_loading_needs_one_copy_in_memory(tmp_path, suffix):
    """A 240 MB file with published names, whose experts have to be stacked, takes its own size of memory, not twice."""
    config = configuration.DiTConfig(2, 512, 2, 8, num_experts=16, input_size=8)
    with torch.device("meta"):
        meta = families.to_published(models.DiT(config).state_dict())
    state = {name: torch.zeros(t.shape, dtype=torch.float16) for name, t in meta.items()}
    for expert in range(16):
        state[f"blocks.0.moe.experts.{expert}.down_proj.weight"].fill_(expert)
    path = tmp_path / f"big{suffix}"
    torch.save({"ema": state}, path) if suffix == ".pt" else save_file(state, path)
    code = MEASURE.format(root=str(ROOT), path=str(path))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    copies = float(result.stdout)
    assert 0.5 < copies < 1.2, f"{copies} copies"
