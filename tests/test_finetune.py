"""What a run's files say and who listens: classes, exported descriptions, fine-tuning, flags without effect."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_sampling import tiny_vae

import calculate_metrics
import checkpoint
import extract_features
import finetune
import models
import sample
import sample_ddp
import sampling
import train
import weights
from analysis import expert_data
from autoencoders import space_info
from benchmarks.data import write_files
from cli import UsageError
from conditions import Classes
from data import AS_BEFORE, ImageData
from diffusion import objective_from_config

TINY = ["--model", "DiT-Nano/2", "--vae-path", "none", "--image-size", 8, "--flip", "False", "--num-workers", 0]
TINY += ["--global-batch-size", 8, "--device", "cpu", "--lr", 1e-2, "--ema-decay", 0.5]
STEPS = ["--num-sampling-steps", 4, "--cfg-scale", 1]


def run_train(folder: Path, data: Path, *flags, steps: int = 2) -> Path:
    results = folder / "results"
    argv = [*TINY, "--data-path", data, "--results-dir", results, "--max-steps", steps, *flags]
    before = set(results.glob("*"))
    train.main(train.get_parser().parse_args(argv))
    return (set(results.glob("*")) - before or set(results.glob("*"))).pop()


def draw(folder: Path, *flags) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels."""
    sample.main(sample.get_parser().parse_args(["--output", folder, "--device", "cpu", *STEPS, *flags]))
    with np.load(folder / "samples.npz") as file:
        return file["arr_0"], file["labels"]


def shake(run: Path) -> None:
    """Give the newest checkpoint random weights: what is freshly made answers zero to everything."""
    folder = checkpoint.newest_good(run)
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(folder / "ema.safetensors")
    tensors |= {n: torch.randn(t.shape, generator=generator) * 0.1 for n, t in tensors.items() if n != "pos_embed"}
    records = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("config", "state")}
    stems = ("model", "ema", "optimizer")
    kept = {stem: load_file(folder / f"{stem}.safetensors") for stem in stems} | {"model": tensors, "ema": tensors}
    checkpoint.save(folder, kept, records)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    write_images(folder / "odd", classes=3)
    return folder


@pytest.fixture(scope="module")
def flow(place) -> Path:
    """A run on three classes, nothing said of how many there are, with every option that shapes do not tell."""
    flags = ["--num_experts", 4, "--num_experts_per_tok", 3, "--norm-topk-prob"]
    flags += ["--rf", "--time-scale", 1000, "--timestep-shift", 3, "--sample-every", 2]
    run = run_train(place / "flow", place / "odd", *flags)
    shake(run)
    return run


@pytest.fixture(scope="module")
def ddpm(place) -> Path:
    run = run_train(place / "ddpm", place / "odd", "--prediction", "v", "--noise-schedule", "cosine")
    shake(run)
    return run


# -------------------------------------------------------------------------------------------------------------- classes


def test_the_number_of_classes_follows_the_data_and_samplers_draw_trained_ones(place, flow, tmp_path, capsys):
    record = checkpoint.read_config(checkpoint.newest_good(flow))
    assert record["model"]["num_classes"] == 3
    images, labels = draw(tmp_path / "a", "--ckpt", flow)
    assert labels.tolist() == [0, 1, 2]
    named, labels = draw(tmp_path / "b", "--ckpt", flow, "--class-labels", "class2", "0")
    assert labels.tolist() == [2, 0] and not np.array_equal(named[0], images[0])
    with pytest.raises(UsageError, match="unknown class 'clas1'; did you mean class"):
        draw(tmp_path / "c", "--ckpt", flow, "--class-labels", "clas1")
    with pytest.raises(UsageError, match=r"class label 3 is not one of the model's classes 0\.\.2"):
        draw(tmp_path / "c", "--ckpt", flow, "--class-labels", "3")
    assert not (tmp_path / "c").exists()


def test_classes_beyond_the_data_are_drawn_on_demand_alone(place, tmp_path, capsys, monkeypatch):
    run = run_train(tmp_path, place / "odd", "--rf", "--num-classes", 10, "--sample-every", 1, steps=1)
    shake(run)
    _, labels = draw(tmp_path / "a", "--ckpt", run)
    assert labels.tolist() == [0, 1, 2] and "WARNING" not in capsys.readouterr().err
    _, labels = draw(tmp_path / "b", "--ckpt", run, "--class-labels", "7", "class1")
    assert labels.tolist() == [7, 1]
    assert "WARNING: class 7 was not in the training data, which had classes 0..2" in capsys.readouterr().err

    sample_ddp.main(
        sample_ddp.get_parser().parse_args(
            ["--ckpt", run, "--sample-dir", tmp_path / "set", "--num-samples", 24, "--device", "cpu", *STEPS]
        )
    )
    with np.load(next((tmp_path / "set").rglob("samples.npz"))) as file:
        assert set(file["labels"]) == {0, 1, 2}
    parser = calculate_metrics.get_parser()
    for kind in ("random", "balanced"):
        args = parser.parse_args(
            ["eval", str(run), "--ref", "x", "--num-samples", "30", "--labels", kind, *map(str, STEPS)]
        )
        assert set(calculate_metrics.open_samples(args, torch.device("cpu")).labels) == {0, 1, 2}


def test_classes():
    some, published = Classes(10, ("cat", "dog")), Classes(1000)
    assert list(some.trained) == [0, 1] and published.trained == range(1000)
    assert [some.label(text) for text in ("dog", "9", "0")] == [1, 9, 0]
    assert [some.name(label) for label in (1, 5)] == ["dog", "5"] and some.untrained([1, 5, 2, 5]) == [2, 5]
    with pytest.raises(UsageError, match="the file names no classes; give numbers"):
        published.label("cat")


# -------------------------------------------------------------------------------------------------------------- exports


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("which", ["flow", "ddpm"])
def test_an_exported_file_draws_what_its_run_draws(request, which, suffix, tmp_path, capsys):
    run = request.getfixturevalue(which)
    expected, _ = draw(tmp_path / "run", "--ckpt", run)
    file = tmp_path / f"exported{suffix}"
    export(run, file)
    capsys.readouterr()
    found, labels = draw(tmp_path / "file", "--ckpt", file)
    assert np.array_equal(found, expected) and labels.tolist() == [0, 1, 2]
    assert "taken for" not in capsys.readouterr().err
    again = tmp_path / f"again{suffix}"  # what was exported is exported with its description
    export(file, again)
    assert checkpoint.load_weights(again).record == checkpoint.load_weights(run).record
    for flags, message in {
        ("--rf", str(which == "ddpm")): "--rf .* contradicts",
        ("--time-scale", "5"): "--time-scale 5.0 contradicts",
        ("--prediction", "x0"): "--prediction x0 contradicts",
    }.items():
        with pytest.raises(UsageError, match=message):
            draw(tmp_path / "no", "--ckpt", file, *flags)
    if which == "flow":
        with pytest.raises(UsageError, match="--norm-topk-prob False contradicts"):
            draw(tmp_path / "no", "--ckpt", file, "--norm-topk-prob", "False")


def export(ckpt: Path, output: Path, *flags) -> None:
    weights.main(weights.get_parser().parse_args(["export", str(ckpt), "--output", str(output), *flags]))


def test_a_bare_file_says_what_was_assumed_and_every_option_is_a_flag(flow, ddpm, tmp_path, capsys):
    """The description taken away, flags alone give the same images."""
    by_flags = {
        flow: ["--num_experts_per_tok", 3, "--norm-topk-prob", "--rf", "--time-scale", 1000, "--timestep-shift", 3],
        ddpm: ["--prediction", "v", "--noise-schedule", "cosine"],
    }
    for run, flags in by_flags.items():
        expected, _ = draw(tmp_path / f"{run.name}-run", "--ckpt", run)
        save_file(load_file(checkpoint.newest_good(run) / "ema.safetensors"), tmp_path / "bare.safetensors")
        capsys.readouterr()
        silent, _ = draw(tmp_path / f"{run.name}-silent", "--ckpt", tmp_path / "bare.safetensors")
        assert "does not describe itself; taken for ddpm (" in capsys.readouterr().err
        told, _ = draw(tmp_path / f"{run.name}-told", "--ckpt", tmp_path / "bare.safetensors", *flags)
        assert np.array_equal(told, expected) and not np.array_equal(silent, expected)
        line = capsys.readouterr().err
        assert "time_scale 1000.0" in line or "schedule cosine, prediction v" in line


def test_a_guess_from_weights_never_wins_over_a_flag(tmp_path):
    """A DDPM trained with the plain loss leaves its variance rows at zero, as flow does."""
    torch.manual_seed(0)
    model = models.build_model("DiT-Nano/2", input_size=8, in_channels=3, num_classes=3)
    with torch.no_grad():
        model.final_layer.linear.weight.unflatten(0, (-1, 2, 3))[:, 0].normal_()
    torch.save(model.state_dict(), tmp_path / "m.pt")
    args = sample.get_parser().parse_args(["--ckpt", str(tmp_path / "m.pt")])
    assert sampling.load_for_sampling(args, torch.device("cpu")).objective.name == "rf"
    flags = ["--rf", "False", "--diffusion-loss", "mse"]
    args = sample.get_parser().parse_args(["--ckpt", str(tmp_path / "m.pt"), *flags])
    objective = sampling.load_for_sampling(args, torch.device("cpu")).objective
    assert objective.name == "ddpm" and objective.config()["variance"] == "fixed_small"


def test_autoencoder_scaling_is_part_of_the_description(flow, tmp_path, monkeypatch):
    file = tmp_path / "m.safetensors"
    export(flow, file)
    with safe_open(file, "pt") as opened:
        record = json.loads(opened.metadata()["description"])
    record["space"]["scaling_factor"] = 0.5
    save_file(load_file(file), file, {"description": json.dumps(record)})
    with pytest.raises(UsageError, match=r"has scaling_factor 1.0, .* trained with 0.5: .*--vae-scaling-factor 0.5"):
        draw(tmp_path / "no", "--ckpt", file)
    with pytest.raises(UsageError, match="--vae-scaling-factor 0.7 contradicts"):
        draw(tmp_path / "no", "--ckpt", file, "--vae-scaling-factor", 0.7)
    draw(tmp_path / "yes", "--ckpt", file, "--vae-scaling-factor", 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format 99, this version reads 1"),
        ({"format": None}, "format is missing"),
        ({"model": {}}, "depth is missing"),
        ({"objective": {}}, "objective.name is missing"),
        ({"objective": {"name": "gan"}}, "unknown objective 'gan'"),
        ({"data": {"class_names": "cats"}}, "class_names is 'cats'"),
        ({"step": -1}, "step is -1"),
        ({"model depth": 10**6}, "depth must lie between 1 and 1000, got 1000000"),
        ({"model depth": "3"}, "depth is '3'"),
        ({"model depth": 4}, "does not fit the model: no blocks.3"),
        ({"model num_experts_per_tok": 9}, "num_experts_per_tok must lie between 1 and num_experts 4, got 9"),
        ({"model expert_ratio": math.nan}, "expert_ratio must lie between"),
    ],
)
def test_broken_descriptions_are_one_line(flow, tmp_path, change, message):
    """In a checkpoint, in a safetensors file, and beside a `.pt`."""
    record = json.loads(json.dumps(checkpoint.load_weights(flow).record))
    for key, value in change.items():
        part, _, field = key.partition(" ")
        if value is None:
            del record[part]
        elif field:
            record[part][field] = value
        else:
            record[part] = value
    tensors = load_file(checkpoint.newest_good(flow) / "ema.safetensors")
    save_file(tensors, tmp_path / "a.safetensors", {"description": json.dumps(record)})
    torch.save(tensors, tmp_path / "b.pt")
    (tmp_path / "b.json").write_text(json.dumps(record))
    checkpoint.save(tmp_path / "c", {"ema": tensors}, {"config": record})
    for name in ("a.safetensors", "b.pt", "c"):
        if name == "b.pt" and "format" in change and change["format"] is None:
            continue  # nothing says that such a file is ours
        with pytest.raises(UsageError, match=message) as error:
            draw(tmp_path / "no", "--ckpt", tmp_path / name)
        assert "\n" not in str(error.value)


def test_nesting_and_state_of_another_step(place, tmp_path):
    run = run_train(tmp_path, place / "odd", "--rf", steps=1)
    folder = checkpoint.newest_good(run)
    records = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("config", "state")}
    tensors = {stem: load_file(folder / f"{stem}.safetensors") for stem in ("model", "ema", "optimizer")}

    def resume(**changed) -> None:
        checkpoint.save(folder, tensors, records | {"state": records["state"] | changed})
        run_train(tmp_path, place / "odd", "--rf", "--resume", "auto", steps=2)

    for changed, message in (
        ({"step": 7}, "state.json is of step 7, config.json of 1"),
        ({"step": "1"}, "step is '1'"),
        ({"step": 1.5}, "step is 1.5"),
        ({"window": {"steps": 0, "sums": {}, "counts": 3}}, "window.counts is 3"),
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            resume(**changed)
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(UsageError, match="nested too deeply"):
        checkpoint.read_config(folder)
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": {}, "sha256": 3}))
    with pytest.raises(checkpoint.DamagedCheckpoint, match="sha256 is 3"):
        checkpoint.verify(folder)


# ---------------------------------------------------------------------------------------------------------- fine-tuning


@pytest.fixture(scope="module")
def other(place) -> Path:
    """Four classes, of which two are called as before."""
    folder = write_images(place / "other", classes=4)
    (folder / "class0").rename(folder / "aardvark")
    (folder / "class3").rename(folder / "zebra")
    return folder


def test_the_label_table_keeps_rows_by_name(flow, other, tmp_path):
    run = run_train(tmp_path, other, "--init-from", flow, "--lr", 0, steps=1)
    before, after = checkpoint.load_weights(flow), checkpoint.load_weights(run, "model")
    old, new = before.state_dict[finetune.TABLE], after.state_dict[finetune.TABLE]
    assert after.condition.names == ("aardvark", "class1", "class2", "zebra") and new.shape[0] == 5
    assert torch.equal(new[[1, 2, 4]], old[[1, 2, 3]])  # two by name, and the null class
    fresh = new[[0, 3]]
    assert 0.01 < fresh.std() < 0.03 and not torch.equal(fresh[0], fresh[1])
    others = [name for name in after.meta if name != finetune.TABLE]
    assert all(torch.equal(before.state_dict[name], after.state_dict[name]) for name in others)
    log = (run / "log.txt").read_text()
    assert "label table: 3 of 5 rows from" in log
    # The objective is that of the file, with what no shape tells.
    assert after.objective == before.objective and after.config.norm_topk_prob and after.config.num_experts_per_tok == 3


def test_a_difference_from_the_file_is_said(flow, place, tmp_path):
    run = run_train(tmp_path, place / "odd", "--init-from", flow, "--time-scale", 1, steps=1)
    assert checkpoint.load_weights(run).objective["time_scale"] == 1
    log = (run / "log.txt").read_text()
    assert "was trained with objective time_scale 1000.0, this run trains with 1.0" in log and "label table" not in log
    run = run_train(tmp_path / "b", place / "odd", "--init-from", flow, "--rf", "False", steps=1)
    assert "was trained with objective name rf, this run trains with ddpm" in (run / "log.txt").read_text()


def test_a_published_file_of_other_classes(place, tmp_path):
    torch.manual_seed(0)
    model = models.build_model("DiT-Nano/2", input_size=8, in_channels=3, num_classes=12)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    run = run_train(tmp_path, place / "odd", "--init-from", tmp_path / "m.pt", "--rf", "--lr", 0, steps=1)
    table = checkpoint.load_weights(run, "model").state_dict[finetune.TABLE]
    assert table.shape[0] == 4 and torch.equal(table[3], model.y_embedder.embedding_table.weight[12])
    assert "label table: 1 of 4 rows from" in (run / "log.txt").read_text()
    run = run_train(
        tmp_path / "b", place / "odd", "--init-from", tmp_path / "m.pt", "--rf", "--num-classes", 12, "--lr", 0, steps=1
    )
    table = checkpoint.load_weights(run, "model").state_dict[finetune.TABLE]
    assert torch.equal(table, model.y_embedder.embedding_table.weight)


def test_other_channels_and_patches_begin_anew_behind_a_flag(place, tmp_path):
    torch.manual_seed(0)
    model = models.build_model("DiT-Nano/2", input_size=8, in_channels=4, num_classes=3)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    flags = ["--init-from", tmp_path / "m.pt", "--rf"]
    with pytest.raises(UsageError, match="channels 4 there, 3 here: .*--fresh-parts begins these anew"):
        run_train(tmp_path, place / "odd", *flags)
    assert not (tmp_path / "results").exists()
    run = run_train(tmp_path, place / "odd", *flags, "--fresh-parts", "--lr", 0, steps=1)
    after = checkpoint.load_weights(run, "model")
    assert after.config.in_channels == 3 and "fresh, not from" in (run / "log.txt").read_text()
    kept, own = "blocks.2.attn.qkv.weight", "x_embedder.proj.weight"
    assert torch.equal(after.state_dict[kept], model.state_dict()[kept]) and after.state_dict[own].std() > 0


# ----------------------------------------------------------------------------------------------------- flags and resume


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rf", "--prediction", "v"], "--prediction does nothing without --rf False"),
        (["--rf", "--noise-schedule", "cosine"], "--noise-schedule does nothing"),
        (["--rf", "--diffusion-loss", "mse"], "--diffusion-loss does nothing"),
        (["--timestep-shift", 2], "--timestep-shift does nothing without --rf"),
        (["--t-distribution", "uniform"], "--t-distribution does nothing"),
        (["--time_scale", 2], "--time-scale does nothing"),
        (["--aux-loss-alpha", 1], "--aux-loss-alpha does nothing without --num_experts N"),
        (["--local-balance"], "--local-balance does nothing"),
        (["--num_experts_per_tok", 2], "--num_experts_per_tok does nothing"),
        (["--keep-every", 2], "--keep-every does nothing without --keep-last"),
        (["--metrics-ref", "absent.npz"], "--metrics-ref does nothing without --metrics-every"),
        (["--sample-cfg-scale", 2], "--sample-cfg-scale does nothing without --sample-every"),
        (["--allow-changes"], "--allow-changes does nothing without --resume"),
        (["--fresh-parts"], "--fresh-parts does nothing without --init-from"),
        (["--warmup-steps", 3], "--warmup-steps 3: the run has only 2 steps"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(place, tmp_path, flags, message):
    with pytest.raises(UsageError, match=message):
        run_train(tmp_path, place / "odd", *flags)
    assert not (tmp_path / "results").exists()


def test_resuming_from_the_folder_of_checkpoints_goes_on_in_the_run(place, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run = run_train(tmp_path, place / "odd", "--rf", "--num-classes", 5, steps=1)
    argv = [*TINY, "--rf", "--data-path", place / "odd", "--max-steps", 2, "--results-dir=~/elsewhere"]
    # The recorded number of classes holds where none is said.
    train.main(train.get_parser().parse_args([*argv, f"--resume=~/results/{run.name}/checkpoints"]))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["0000001", "0000002"]
    assert checkpoint.load_weights(run).config.num_classes == 5
    assert not (tmp_path / "elsewhere").exists() and not Path("~").exists()
    train.main(train.get_parser().parse_args(argv))
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1


def test_advice_of_a_refused_resume_helps(place, tmp_path):
    run = run_train(tmp_path, place / "odd", "--rf", steps=1)
    flags = ["--rf", "--image-size", 16, "--resume", run]
    for more in ([], ["--allow-changes"]):
        with pytest.raises(UsageError, match="another network: --init-from .* starts a new run"):
            run_train(tmp_path, place / "odd", *flags, *more)
        with pytest.raises(UsageError, match="objective name was rf, is ddpm.*another network: --init-from"):
            run_train(tmp_path, place / "odd", "--resume", run, *more)
    found = checkpoint.newest_good(run)
    run_train(tmp_path / "new", place / "odd", "--image-size", 16, "--init-from", found)
    with pytest.raises(UsageError, match="--lr was 0.01, is 0.5; --allow-changes resumes all the same"):
        run_train(tmp_path, place / "odd", "--rf", "--resume", run, "--lr", 0.5)
    run_train(tmp_path, place / "odd", "--rf", "--resume", run, "--lr", 0.5, "--allow-changes", "--timestep-shift", 2)
    assert objective_from_config(checkpoint.load_weights(run).objective).shift == 2


def test_the_map_of_experts_names_classes(flow, tmp_path):
    args = ["--ckpt", flow, "--output", tmp_path / "r.npz", "--device", "cpu", *STEPS, "--class-labels", "class2"]
    args += ["--images-per-class", 1]
    expert_data.main(expert_data.get_parser().parse_args(args))
    with np.load(tmp_path / "r.npz") as file:
        assert any("class2" in str(file[name]) for name in file.files)


# ------------------------------------------------------------------------------------------------- data of resumed runs


def rewrite(run: Path, change) -> None:
    """The newest checkpoint of a run, with another config.json."""
    folder = checkpoint.newest_good(run)
    records = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("config", "state")}
    change(records["config"])
    tensors = {stem: load_file(folder / f"{stem}.safetensors") for stem in ("model", "ema", "optimizer")}
    checkpoint.save(folder, tensors, records)


def test_a_run_of_before_goes_on_reading_as_it_did(place, tmp_path):
    """One that did not record how pixels are read ignored transparency and rotation, and must not be bent."""
    data = str(place / "odd")
    run = run_train(tmp_path, data, "--rf", steps=1)
    assert checkpoint.read_config(checkpoint.newest_good(run))["data"]["reading"]["background"] == "white"
    with pytest.raises(UsageError, match="data fingerprint was"):
        run_train(tmp_path, data, "--rf", "--resume", run, "--background", "black")
    before = ImageData(data, 8, space_info("none"), 0, reading=AS_BEFORE)

    def as_once(config: dict) -> None:
        config["data"] = {"samples": 30, "fingerprint": before.fingerprint(), "class_names": before.class_names}

    rewrite(run, as_once)
    with pytest.raises(UsageError, match="data fingerprint was"):
        run_train(tmp_path, data, "--rf", "--resume", run, "--background", "white")
    for steps in (2, 3):  # and what it then writes is taken for the same
        run_train(tmp_path, data, "--rf", "--resume", run, steps=steps)
    assert "transparency and EXIF rotation are ignored, as when this run began" in (run / "log.txt").read_text()
    assert "reading" not in checkpoint.read_config(checkpoint.newest_good(run))["data"]


@pytest.fixture
def features(tmp_path) -> tuple[Path, Path]:
    """(features, autoencoder): moments of 8 images of 16 pixels."""
    autoencoder = tiny_vae(tmp_path / "vae")
    images = write_images(tmp_path / "images", classes=2, per_class=4, size=16)
    argv = ["--data-path", images, "--vae-path", autoencoder, "--image-size", 16, "--features-path", tmp_path / "f"]
    extract_features.main(
        extract_features.get_parser().parse_args([*argv, "--num-workers", 0, "--device", "cpu", "--precision", "fp32"])
    )
    return tmp_path / "f", autoencoder


def train_on_features(folder: Path, features: Path, *flags, steps: int = 1) -> Path:
    argv = ["--model", "DiT-Nano/2", "--rf", "--num-workers", 0, "--global-batch-size", 4, "--device", "cpu"]
    argv += ["--feature-path", features, "--results-dir", folder / "results", "--max-steps", steps, *flags]
    train.main(train.get_parser().parse_args(argv))
    return max((folder / "results").iterdir())


def test_runs_on_features_know_their_autoencoder(features, tmp_path):
    folder, autoencoder = features
    run = train_on_features(tmp_path, folder)
    record = checkpoint.read_config(checkpoint.newest_good(run))
    manifest = json.loads((folder / "manifest.json").read_text())["autoencoder"]
    assert record["space"] == manifest and record["image_size"] == 16 and len(record["space"]["sha256"]) == 64
    # Images may be wanted later, and a run of before, whose record named the path alone, goes on too.
    train_on_features(tmp_path, folder, "--resume", run, "--sample-every", 1, steps=2)
    assert (run / "samples" / "0000002.png").exists()
    rewrite(run, lambda config: config.update(space={"path": manifest["path"]}))
    train_on_features(tmp_path, folder, "--resume", run, "--sample-every", 1, steps=3)

    other = tiny_vae(tmp_path / "other", seed=1)  # the same shapes, other weights
    with pytest.raises(UsageError, match="were made by the autoencoder .* with sha256 .*; --vae-path .*other has"):
        train_on_features(tmp_path / "b", folder, "--sample-every", 1, "--vae-path", other)
    train_on_features(tmp_path / "c", folder, "--sample-every", 1, "--vae-path", autoencoder)


def test_another_autoencoder_of_the_same_shape_is_noticed(features, tmp_path, capsys):
    _, autoencoder = features
    other = tiny_vae(tmp_path / "other", seed=1)
    flags = ["--rf", "--image-size", 16, "--global-batch-size", 4]
    run = run_train(tmp_path, tmp_path / "images", "--vae-path", autoencoder, *flags, steps=1)
    with pytest.raises(UsageError, match="space sha256 was .*, is "):
        run_train(tmp_path, tmp_path / "images", "--vae-path", other, *flags, "--resume", run)
    moved = autoencoder.rename(tmp_path / "moved")
    run_train(tmp_path, tmp_path / "images", "--vae-path", moved, *flags, "--resume", run, steps=2)
    capsys.readouterr()
    draw(tmp_path / "a", "--ckpt", run, "--vae-path", moved)
    assert "WARNING" not in capsys.readouterr().err
    draw(tmp_path / "b", "--ckpt", run, "--vae-path", other)
    assert "has other weights than the autoencoder of the training" in capsys.readouterr().err


def test_features_of_one_file_per_image_say_what_applies(tmp_path):
    latents = np.random.default_rng(0).normal(size=(8, 4, 8, 8)).astype("f")
    folder = write_files(tmp_path / "f", latents, np.arange(8) % 2)
    run = train_on_features(tmp_path, folder)
    assert checkpoint.read_config(checkpoint.newest_good(run))["image_size"] == 64
    assert "taken for images of 64 pixels" in (run / "log.txt").read_text()
    with pytest.raises(UsageError, match="images of 64 pixels, not 256"):
        train_on_features(tmp_path, folder, "--image-size", 256)
    with pytest.raises(UsageError, match="--background does nothing without --data-path"):
        train_on_features(tmp_path, folder, "--background", "black")

    def as_once(config: dict) -> None:  # the size was that of the flag, which did not matter
        config["image_size"] = 256

    rewrite(run, as_once)
    train_on_features(tmp_path, folder, "--resume", run, steps=2)
