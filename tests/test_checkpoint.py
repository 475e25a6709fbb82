"""Files: whole or absent, verified, free of code; published ones in every form."""

import argparse
import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import Golden, read_json
from safetensors.torch import save_file

import checkpoint
import families
from checkpoint import DamagedCheckpoint, load_weights
from cli import UsageError
from models import DiT, build_model


def tiny(**options) -> DiT:
    torch.manual_seed(0)
    model = build_model("DiT-Nano/2", **(dict(input_size=8, num_classes=5, num_experts=4) | options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def write(folder, value=1.0):
    checkpoint.save(folder, {"model": {"w": torch.full((64,), value)}}, {"config": {"step": 1}, "state": {}})


def test_what_is_written_is_read(tmp_path):
    folder = tmp_path / "checkpoints" / "0000001"
    write(folder)
    checkpoint.verify(folder)
    assert torch.equal(checkpoint.read_tensors(folder, "model")["w"], torch.ones(64))
    assert read_json(folder, "config") == {"step": 1}
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
        "state.json",
    ]
    write(folder, 2.0)  # again, as a run resumed from an older checkpoint does
    checkpoint.verify(folder)
    assert torch.equal(checkpoint.read_tensors(folder, "model")["w"], torch.full((64,), 2.0))
    assert [p.name for p in folder.parent.iterdir()] == ["0000001"]


def test_a_failure_while_writing_leaves_the_old_one(tmp_path, monkeypatch):
    folder = tmp_path / "0000001"
    write(folder)
    for point in ("save_file", "write_json", "digest", "flush_to_disk"):

        def fail(*_, point=point, **__):
            raise OSError(28, f"No space left on device ({point})")

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, point, fail)
            with pytest.raises(OSError, match=point):
                write(folder, 2.0)
        checkpoint.verify(folder)
        assert torch.equal(checkpoint.read_tensors(folder, "model")["w"], torch.ones(64))
        assert [p.name for p in tmp_path.iterdir()] == ["0000001"]


def test_every_flipped_bit_is_noticed(tmp_path):
    folder = tmp_path / "0000001"
    write(folder)
    for path in (folder / "model.safetensors", folder / "config.json"):
        data = path.read_bytes()
        for place in range(0, len(data), 7):
            damaged = bytearray(data)
            damaged[place] ^= 1 << place % 8
            path.write_bytes(damaged)
            with pytest.raises(DamagedCheckpoint, match=path.name):
                checkpoint.verify(folder)
        path.write_bytes(data[:-1])
        with pytest.raises(DamagedCheckpoint):
            checkpoint.verify(folder)
        path.write_bytes(data)
    checkpoint.verify(folder)
    (folder / "state.json").unlink()
    with pytest.raises(DamagedCheckpoint, match="lacks state.json"):
        checkpoint.verify(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(DamagedCheckpoint, match="no good manifest"):
        checkpoint.verify(folder)


def test_newest_good_skips_damaged_and_unfinished(tmp_path, capsys):
    run = tmp_path / "run"
    assert checkpoint.newest_good(run) is None
    for step in (1, 2, 3):
        write(run / "checkpoints" / f"{step:07d}")
    (run / "checkpoints" / f"{checkpoint.UNFINISHED}0000004-1").mkdir()
    (run / "checkpoints" / "0000003" / "model.safetensors").unlink()
    assert checkpoint.newest_good(run).name == "0000002"
    assert re.findall(r"WARNING: skipping a damaged checkpoint: .*0000003", capsys.readouterr().err)
    checkpoint.sweep(run / "checkpoints")
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"0000001", "0000002", "0000003"}


# ------------------------------------------------------------------------------------------------------ published files


def published_forms(model: DiT) -> dict:
    names = families.to_published(model.state_dict())
    flash = families.to_published(model.state_dict(), flash_names=True)
    arguments = argparse.Namespace(model="DiT-Nano/2", lr=1e-4)
    zeros = {name: torch.zeros_like(t) for name, t in names.items()}
    return {
        "bare": names,
        "ema alone": {"ema": names},
        "training checkpoint": {
            "model": zeros,
            "ema": names,
            "opt": {"state": {}, "param_groups": []},
            "args": arguments,
        },
        "flash names": {"ema": flash},
        "without pos_embed": {n: t for n, t in names.items() if n != "pos_embed"},
        "wrapped": {"model": {f"module._orig_mod.{n}": t for n, t in names.items()}},
    }


@pytest.mark.parametrize("form", published_forms(tiny()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_published_form_loads(tmp_path, form, dtype):
    model = tiny(qk_norm=True).to(dtype).float()
    torch.save(published_forms(model.to(dtype))[form], tmp_path / "model.pt")
    weights = load_weights(tmp_path / "model.pt", input_size=8)
    assert weights.record is None and weights.config == model.config
    other = tiny(qk_norm=True)
    checkpoint.load_into(other, weights)
    model = model.float()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    torch.testing.assert_close(other.pos_embed, model.pos_embed, rtol=0, atol=1e-3)


def test_safetensors_and_legacy_files_load(tmp_path):
    model = tiny()
    save_file(
        {n: t.contiguous() for n, t in families.to_published(model.state_dict()).items()}, tmp_path / "m.safetensors"
    )
    torch.save(model.state_dict(), tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    for name in ("m.safetensors", "m.pt"):
        weights = load_weights(tmp_path / name)
        assert weights.config == model.config
        assert torch.equal(weights.state_dict["blocks.0.moe.experts.down_proj"], model.blocks[0].moe.experts.down_proj)


@pytest.mark.parametrize("golden", ["dit_moe_timm_attention", "dit_moe_flash_attention"])
def test_golden_file_loads_and_agrees(tmp_path, golden):
    golden = Golden(golden)
    torch.save({"ema": golden.part("model.")}, tmp_path / "golden.pt")
    weights = load_weights(tmp_path / "golden.pt", num_heads=4)
    model = DiT(weights.config)
    checkpoint.load_into(model, weights)
    out = model(golden["in.x"], golden["in.t"], golden["in.y"])
    torch.testing.assert_close(out, golden["out.eval"], rtol=0, atol=1e-5)


def test_weights_betray_their_objective(tmp_path):
    model = tiny()
    torch.save(model.state_dict(), tmp_path / "m.pt")
    assert load_weights(tmp_path / "m.pt").objective == {"name": "ddpm"}
    with torch.no_grad():
        model.final_layer.linear.weight.unflatten(0, (-1, 2, 4))[:, 1] = 0
    torch.save(model.state_dict(), tmp_path / "m.pt")
    assert load_weights(tmp_path / "m.pt").objective == {"name": "rf"}
    torch.nn.init.zeros_(model.final_layer.linear.weight)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    assert load_weights(tmp_path / "m.pt").objective == {}


def test_a_misfit_names_what_the_file_looks_like(tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "m.pt")
    with pytest.raises(
        UsageError, match=r"gate_up_proj is .*and \d+ more.*DiT-Nano/2, 4 experts, 5 classes, input 8x8"
    ):
        checkpoint.load_into(tiny(num_experts=8), load_weights(tmp_path / "m.pt"))
    with pytest.raises(UsageError, match=r"no blocks\.0\.mlp\.fc1"):
        checkpoint.load_into(tiny(num_experts=0), load_weights(tmp_path / "m.pt"))


def test_headers_are_compared_before_a_tensor_is_read(tmp_path, monkeypatch):
    """A file whose header promises other shapes costs no memory: nothing is read."""
    state = {n: t.contiguous() for n, t in tiny().state_dict().items()}
    save_file(state, tmp_path / "m.safetensors")
    weights = load_weights(tmp_path / "m.safetensors")
    monkeypatch.setattr(checkpoint.LazyTensors, "__getitem__", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(UsageError, match="does not fit the model"):
        checkpoint.load_into(tiny(num_experts=8), weights)


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def evil_files(marker: str) -> dict:
    shell = Evil(os.system, f"touch {marker}")
    return {
        "os.system": {"ema": shell},
        "eval": {"ema": Evil(eval, f"open({marker!r}, 'w')")},
        "nested": {"ema": {"a": [{"b": (shell,)}]}},
        "in args": {"ema": {}, "args": argparse.Namespace(callback=shell)},
        "getattr": {"ema": Evil(getattr, argparse.Namespace, "__init__")},
    }


@pytest.mark.parametrize("form", evil_files(""))
@pytest.mark.parametrize("legacy", [False, True])
def test_files_that_would_run_code_are_refused(tmp_path, form, legacy):
    marker = tmp_path / "was-run"
    path = tmp_path / "evil.pt"
    torch.save(evil_files(str(marker))[form], path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        UsageError, match=r"refused to load .*evil.pt: it wants to run (posix\.system|[\w]*\.?eval|.*getattr)"
    ):
        load_weights(path)
    assert not marker.exists()


def test_other_strange_files_are_refused(tmp_path):
    marker = tmp_path / "was-run"
    plain = tmp_path / "plain.pt"
    plain.write_bytes(pickle.dumps({"ema": Evil(os.system, f"touch {marker}")}))
    odd = tmp_path / "odd.pt"
    with zipfile.ZipFile(odd, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil(os.system, f"touch {marker}")))
        archive.writestr("archive/../../escape", b"x")
    empty, text = tmp_path / "empty.pt", tmp_path / "text.pt"
    empty.write_bytes(b"")
    text.write_text("not a checkpoint")
    number = tmp_path / "number.pt"
    torch.save(3, number)
    cut = tmp_path / "cut.safetensors"
    save_file({"w": torch.ones(8)}, cut)
    cut.write_bytes(cut.read_bytes()[:-4])
    for path in (plain, odd, empty, text, number, cut, tmp_path / "absent.pt", tmp_path):
        with pytest.raises(UsageError, match=path.name):
            load_weights(path)
    assert not marker.exists() and not (tmp_path.parent / "escape").exists()


# -------------------------------------------------------------------------------------- what no other test would notice


def save(folder: Path, value: float) -> None:
    checkpoint.save(folder, {"model": {"w": torch.full((3,), value)}}, {"config": {"value": value}})


def saved(folder: Path) -> float:
    checkpoint.verify(folder)
    return checkpoint.read_tensors(folder, "model")["w"][0].item()


def test_a_checkpoint_that_is_replaced_is_never_gone(tmp_path, monkeypatch):
    folder = tmp_path / "0000001"
    save(folder, 1.0)
    rename = Path.rename

    def fails(self, target):
        if target == folder and not self.name.endswith(checkpoint.REPLACED):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="Input/output"):
        save(folder, 2.0)
    assert saved(folder) == 1 and not list(tmp_path.glob(".*"))
    monkeypatch.undo()

    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    save(folder, 2.0)  # killed before the old one is removed: the new one stays
    monkeypatch.undo()
    checkpoint.sweep(tmp_path)
    assert saved(folder) == 2 and not list(tmp_path.glob(".*"))
    folder.rename(folder.with_name(f"{checkpoint.UNFINISHED}{folder.name}{checkpoint.REPLACED}"))  # killed between
    checkpoint.sweep(tmp_path)
    assert saved(folder) == 2


def test_what_is_begun_anew_is_empty_and_all_of_it_is_in_the_manifest(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(checkpoint, "flush_to_disk", flushed.append)
    folder = tmp_path / "0000001"
    (checkpoint.begin(folder) / "left").write_text("by a kill")
    beside = checkpoint.begin(folder)
    assert not list(beside.iterdir())
    (beside / "sharded").mkdir()
    (beside / "sharded" / "part").write_bytes(b"12345")
    checkpoint.commit(beside, folder, {}, {})
    assert flushed[-1] == tmp_path and beside / "sharded" / "part" in flushed and beside / "sharded" in flushed
    (folder / "sharded" / "part").write_bytes(b"12346")
    with pytest.raises(checkpoint.DamagedCheckpoint, match="sharded/part is damaged"):
        checkpoint.verify(folder)


def test_which_checkpoints_are_kept(tmp_path):
    for step in range(2, 22, 2):
        (tmp_path / f"{step:07d}").mkdir()
    (tmp_path / "0000099").write_text("no folder")
    checkpoint.prune(tmp_path, keep_last=2, keep_every=6)
    assert [int(path.name) for path in checkpoint.checkpoints_of(tmp_path)] == [20, 18, 12, 6]
    (tmp_path / "12345678").mkdir()  # numbers, not names, are in order
    assert checkpoint.checkpoints_of(tmp_path)[0].name == "12345678"


def test_what_is_written_is_a_copy_of_any_layout_and_errors_keep_their_number(tmp_path, monkeypatch):
    value = torch.ones(2, 3)
    copy = checkpoint.copied({"w": value})["w"]
    value.zero_()
    assert copy.tolist() == [[1] * 3] * 2
    turned = torch.arange(6.0).view(2, 3).T
    checkpoint.save(tmp_path / "1", {"model": {"w": turned}}, {"config": {}})
    assert torch.equal(checkpoint.read_tensors(tmp_path / "1", "model")["w"], turned)

    def full(*_):
        raise checkpoint.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError) as error:
        checkpoint.save(tmp_path / "2", {"model": {"w": turned}}, {"config": {}})
    assert error.value.errno == 28


def test_only_the_files_that_are_read_are_verified(tmp_path):
    save(tmp_path / "1", 1.0)
    (tmp_path / "1" / "model.safetensors").write_bytes(b"damaged")
    checkpoint.verify(tmp_path / "1", ("config.json",))
    with pytest.raises(DamagedCheckpoint):
        checkpoint.verify(tmp_path / "1", ("config.json", "model.safetensors"))


def test_a_newer_format_is_no_damage_to_step_over(tmp_path):
    for step in (99, 100):  # in order as numbers, not as names
        save(tmp_path / str(step), float(step))
    assert saved(checkpoint.newest_good(tmp_path)) == 100
    manifest = read_json(tmp_path / "100", "manifest")
    (tmp_path / "100" / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(UsageError, match="99") as error:
        checkpoint.newest_good(tmp_path)
    assert not isinstance(error.value, DamagedCheckpoint)


def test_several_files_are_one(tmp_path):
    for name in ("a", "b"):
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors", {f"of {name}": "text"})
    both = checkpoint.LazyTensors(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert set(both) == {"a", "b"} and set(both.metadata) == {"of a", "of b"} and both["a"].item() == 1


def test_a_file_within_a_checkpoint_is_the_one_asked_for(tmp_path, monkeypatch):
    model = build_model("DiT-Nano/2", input_size=8, learn_sigma=False)
    torch.nn.init.ones_(model.final_layer.linear.weight)
    config = {"format": 1, "model": model.config.to_dict(), "objective": {"name": "rf"}}
    state = model.state_dict()
    average = {name: tensor * 2 for name, tensor in state.items()}
    checkpoint.save(tmp_path / "1", {"model": state, "ema": average}, {"config": config})
    monkeypatch.setenv("HOME", str(tmp_path))
    for stem, tensors in (("model", state), ("ema", average)):
        weights = load_weights(f"~/1/{stem}.safetensors")
        assert torch.equal(weights.state_dict["pos_embed"], tensors["pos_embed"])
    save_file(dict(state), tmp_path / "bare.safetensors")
    assert load_weights(tmp_path / "bare.safetensors").objective == {}  # no variance channels, so nothing tells


def test_an_index_names_no_file_elsewhere(tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    index = {"weight_map": {"a": "../secret.safetensors", "b": "part.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert checkpoint.sharded_files(folder) == [folder / "secret.safetensors", folder / "part.safetensors"]


def test_a_table_of_positions_of_another_size_is_named(tmp_path):
    small, large = (build_model("DiT-Nano/2", input_size=side) for side in (8, 16))
    save_file(dict(small.state_dict()), tmp_path / "small.safetensors")
    with pytest.raises(UsageError, match=r"pos_embed is \(1, 16, 64\), expected \(1, 64, 64\)"):
        checkpoint.load_into(large, load_weights(tmp_path / "small.safetensors"))


def test_a_model_of_half_precision_is_all_of_it(tmp_path):
    """The table of positions too, which files may leave out."""
    state = build_model("DiT-Nano/2", input_size=8).state_dict()
    save_file({name: tensor for name, tensor in state.items() if name != "pos_embed"}, tmp_path / "m.safetensors")
    model = load_weights(tmp_path / "m.safetensors", input_size=8).build(dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}


def test_what_a_manifest_does_not_know_is_missing(tmp_path):
    save(tmp_path / "1", 1.0)
    (tmp_path / "1" / "ema.safetensors").write_bytes(b"put here by hand")
    with pytest.raises(DamagedCheckpoint, match=r"lacks ema\.safetensors"):
        checkpoint.verify(tmp_path / "1", ("ema.safetensors",))


def test_a_training_checkpoint_gives_the_weights_asked_for_and_no_numbers(tmp_path):
    state = build_model("DiT-Nano/2", input_size=8).state_dict()
    average = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"model": dict(state) | {"step": 7}, "ema": average | {"decay": 0.9}}, tmp_path / "m.pt")
    for which, expected in (("model", state), ("ema", average)):
        weights = load_weights(tmp_path / "m.pt", which)
        assert weights.state_dict.keys() == state.keys()
        assert torch.equal(weights.state_dict["pos_embed"], expected["pos_embed"])
