"""Pipelines for `diffusers`, which compute without this repository what it computes, and folders of `diffusers`."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import read_json
from test_checkpoint import tiny
from test_sampling import tiny_vae
from test_weights import call

import autoencoders
import checkpoint
import exported_code
import models
import sample
import text
import weights

WORDS = text.Words().record()
MODELS = {  # model, what its checkpoint says besides, what is asked of sample.py and of the pipeline
    "moe": (
        lambda: tiny(),
        {"objective": {"name": "rf"}, "data": {"class_names": list("abcde")}},
        (["--class-labels", "0", "b"], {"class_labels": [0, "b"]}),
    ),
    "dense": (
        lambda: tiny(num_experts=0, in_channels=3),  # of pixels
        {"objective": {"name": "ddpm", "prediction": "v"}, "space": autoencoders.PixelSpace().record()},
        (["--class-labels", 1, 2], {"class_labels": [1, 2]}),
    ),
    "large": (
        lambda: random(models.build_model("Large-DiT-Nano/2", input_size=8, num_classes=5)),
        {"objective": {"name": "rf", "time_scale": 1000.0}},
        (["--class-labels", 3, 4], {"class_labels": [3, 4]}),
    ),
    "texts": (
        lambda: tiny(num_experts=0, caption_width=WORDS["width"], caption_length=WORDS["length"]),
        {"objective": {"name": "rf"}, "text": WORDS},
        (["--prompt", "a seven", "two words"], {"prompt": ["a seven", "two words"]}),
    ),
}
ISOLATED = """
import json, sys
import numpy as np
from diffusers import DiffusionPipeline

root, asked = sys.argv[1], json.loads(sys.argv[2])
images = {}
for name, request in asked.items():
    folder = f"{root}/{name}-pipeline"
    pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    images[name] = pipeline(**request, generator=3, num_inference_steps=3, guidance_scale=2.0, output_type="np").images
np.savez(f"{root}/isolated.npz", **images)
assert not {"cli", "models", "checkpoint"} & sys.modules.keys()
assert len([name for name in sys.modules if name.startswith("sparse_dit_") and "." not in name]) == 1
"""


def random(model):
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def save(folder, model, vae, objective, **more):
    facts = {"space": autoencoders.space_info(str(vae)).record(), "step": 1, **more}
    record = {"format": 1, "model": model.config.to_dict(), "objective": objective, **facts}
    tensors = {"ema": dict(model.state_dict())}
    checkpoint.save(folder / "checkpoints" / "0000001", tensors, {"config": record})
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Runs, their pipelines, and the images of both."""
    root = tmp_path_factory.mktemp("diffusers")
    vae = tiny_vae(root / "vae")
    for name, (model, record, _) in MODELS.items():
        save(root / name, model(), vae, **record)
        argv = ["export", str(root / name), "--to", "diffusers", str(root / f"{name}-pipeline")]
        weights.main(weights.get_parser().parse_args(argv))
    asked = json.dumps({name: request for name, (_, _, (_, request)) in MODELS.items()})
    env = os.environ | {"HF_MODULES_CACHE": str(root / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", ISOLATED, str(root), asked]
    done = subprocess.run(command, cwd="/", env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_pipeline_draws_the_images_of_sample_py(root, tmp_path, name):
    """From another folder, without this repository: the same pixels."""
    flags, _ = MODELS[name][2]
    argv = [
        "--ckpt",
        root / name,
        *flags,
        "--seed",
        3,
        "--num-sampling-steps",
        3,
        "--cfg-scale",
        2,
        "--output",
        tmp_path,
    ]
    sample.main(sample.get_parser().parse_args(list(map(str, argv))))
    drawn = np.load(tmp_path / "samples.npz")["arr_0"]
    with np.load(root / "isolated.npz") as isolated:
        found = isolated[name] * 255
    assert drawn.shape == ((2, 8, 8, 3) if name == "dense" else (2, 16, 16, 3)) and drawn.std() > 10
    assert np.abs(found - drawn).max() < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_pipeline_is_read_as_the_checkpoint_it_was(root, name):
    for folder in (root / f"{name}-pipeline", root / f"{name}-pipeline" / "transformer"):
        found, before = checkpoint.load_weights(folder), checkpoint.load_weights(root / name)
        assert found.config == before.config and found.objective.items() >= before.objective.items()
        place = "none" if name == "dense" else str(root / f"{name}-pipeline" / "vae")
        assert found.record["space"]["path"] == place
        assert found.record.get("text") == before.record.get("text")
        assert found.condition.names == before.condition.names if name != "texts" else True
        assert all(torch.equal(found.state_dict[key], tensor) for key, tensor in before.state_dict.items())


def test_an_autoencoder_of_the_hub_stays_a_name(tmp_path, monkeypatch, capsys):
    space = {"path": "owner/vae", "channels": 4, "downsample": 8, "scaling_factor": 0.5, "kind": "AutoencoderTiny"}
    record = {"format": 1, "model": tiny().config.to_dict(), "objective": {"name": "rf"}, "space": space, "step": 1}
    checkpoint.save(tmp_path / "1", {"ema": dict(tiny().state_dict())}, {"config": record})
    call(
        monkeypatch, capsys, weights, "export", tmp_path / "1", "--to", "diffusers", tmp_path / "out", "--dtype", "bf16"
    )
    assert read_json(tmp_path / "out", "model_index")["vae"] == [None, None] and not (tmp_path / "out" / "vae").exists()
    found = checkpoint.load_weights(tmp_path / "out")
    assert found.record["space"] == space | {"shift_factor": 0.0} and found.record["image_size"] == 64
    assert {tensor.dtype for tensor in found.meta.values()} == {torch.bfloat16}


def test_modules_that_stand_alone_are_all_there_and_relative(tmp_path):
    exported_code.write_package(tmp_path / "code", "models")
    written = {path.relative_to(tmp_path / "code").as_posix() for path in (tmp_path / "code").rglob("*.py")}
    assert {"__init__.py", "models.py", "moe.py", "diffusion/guidance.py", "diffusion/__init__.py"} <= written
    assert "train.py" not in written and (tmp_path / "code" / "LICENSE").is_file()
    for path in (tmp_path / "code").rglob("*.py"):
        for _, name in exported_code._imports(path.read_text()):
            assert exported_code.source(name) is None, f"{path} imports {name} by its full name"


# --------------------------------------------------------------------------------------------------- diffusers' own DiT


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    """A dense DiT of ImageNet's classes, as a run and as `DiTPipeline`; and what was said in writing it."""
    root = tmp_path_factory.mktemp("dit")
    record = {"objective": {"name": "ddpm", "schedule": "cosine", "prediction": "v"}}
    record["data"] = {"class_names": [f"n{label}" for label in range(1000)]}
    save(root / "run", tiny(num_experts=0, num_classes=1000), tiny_vae(root / "vae"), **record)
    return root


def test_dit_pipeline_differs_by_its_frequencies_alone(dit, tmp_path, monkeypatch, capsys):
    from diffusers import DiTPipeline

    folder = tmp_path / "theirs"
    out, _ = call(monkeypatch, capsys, weights, "export", dit / "run", "--to", "DiTPipeline", folder)
    said = float(out.partition("answers differ by ")[2].partition("%")[0])
    assert "10000^(-k/127), trained with 10000^(-k/128)" in out and said > 0.1
    pipeline = DiTPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.prediction_type == "v_prediction" and pipeline.labels["n7"] == 7
    assert pipeline([7], num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)

    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 1000])
    model = checkpoint.load_weights(dit / "run").build()
    with torch.no_grad():
        ours = model(x, t.float(), y)
        assert not torch.allclose(pipeline.transformer(x, timestep=t, class_labels=y).sample, ours, atol=1e-3)
        for block in pipeline.transformer.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        theirs = pipeline.transformer(x, timestep=t, class_labels=y).sample
    torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=1e-4)

    # and back
    output = tmp_path / "again.safetensors"
    _, error = call(monkeypatch, capsys, weights, "export", folder, "--from", "diffusers", "--output", output)
    assert "trained in diffusers draws other images here" in error
    found, before = checkpoint.load_weights(output), checkpoint.load_weights(dit / "run")
    assert found.config == before.config and found.objective == before.objective | {"name": "ddpm"}
    assert found.condition.names[999] == "n999" and found.record["space"]["path"] == str(folder / "vae")
    whole = found.build().state_dict()
    assert all(torch.equal(whole[name], tensor) for name, tensor in before.state_dict.items())

    trained = checkpoint.load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    trained = dict(trained) | {"transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias": torch.ones(64)}
    torch.save(trained, folder / "transformer" / "diffusion_pytorch_model.bin")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    _, error = call(monkeypatch, capsys, weights, "inspect", folder, code=2)
    assert "transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias is not as in block 0" in error


@pytest.mark.parametrize(
    ("options", "record", "flags", "message"),
    [
        ({}, {}, [], "DiTPipeline has no word for num_experts 4: --to diffusers"),
        ({"num_experts": 0, "qk_norm": "head"}, {}, [], "no word for qk_norm head"),
        ({"num_experts": 0}, {}, [], r"no word for 5 classes \(its null class is 1000\)"),
        ({"num_experts": 0, "num_classes": 1000}, {"objective": {"name": "rf"}}, [], "no word for objective rf"),
        ({}, {}, ["--rf"], "--rf True contradicts .* trained with ddpm"),
        ({}, {}, ["--output", "x.pt"], "one of --output FILE and --to"),
        ({}, {}, ["--from", "diffusers"], "--from diffusers: .* is no folder of a DiTTransformer2DModel"),
        ({}, {}, ["--push-to-hub", "name"], "a repository has the form OWNER/NAME"),
        ({}, {}, ["--private"], "--private does nothing without --push-to-hub"),
        ({}, {}, ["--push-to-hub", "owner/name"], "--push-to-hub owner/name needs a token of the hub"),
    ],
)
def test_what_cannot_be_written_is_said_before_it_is(
    dit, tmp_path, monkeypatch, capsys, options, record, flags, message
):

    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    save(tmp_path / "run", tiny(**options), dit / "vae", **({"objective": {"name": "ddpm"}} | record))
    argv = ["export", tmp_path / "run", "--to", "DiTPipeline", tmp_path / "out", *flags]
    _, error = call(monkeypatch, capsys, weights, *argv, code=2)
    assert re.search(message, error) and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_pipeline_is_uploaded_with_its_card(dit, tmp_path, monkeypatch, capsys):
    uploads = []
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, name, **options: f"https://hub/{name}")
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, **options: uploads.append(options))
    run = tmp_path / "run"
    shutil.copytree(dit / "run", run)
    flags = {"model": "DiT-Nano/2", "data_path": "/home/someone/imagenet", "lr": 0.002, "num_experts": 0, "flip": False}
    flags |= {"rf": False, "t_distribution": "lognormal", "balance": ["aux"], "compile": False}  # which do nothing here
    (run / "args.json").write_text(json.dumps(flags))
    lines = [{"step": 1, "loss": 2.0}, {"step": 1, "metrics/fid": 12.5}, {"step": 9, "metrics/fid": 3.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": ')
    argv = ["export", run, "--to", "diffusers", tmp_path / "out", "--push-to-hub", "owner/name"]
    out, _ = call(monkeypatch, capsys, weights, *argv)
    assert "is at https://hub/owner/name" in out
    assert uploads[0]["repo_id"] == "owner/name" and uploads[0]["folder_path"] == tmp_path / "out"
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: "diffusers"\n') and "# name\n" in card
    assert 'FOLDER = "owner/name"' in card
    assert "| fid at step 1 | 12.5 |" in card and "| model | DiT-Nano/2, dense, 1000 classes, input 8x8 |" in card
    assert "python train.py --model DiT-Nano/2 --data-path DATA_PATH --lr 0.002 --flip False --rf False\n" in card
    assert "someone" not in card and read_json(tmp_path / "out", "model_index")["vae"] == ["diffusers", "AutoencoderKL"]

    def refuse(self, **options):
        raise OSError("403")

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", refuse)
    argv[4] = tmp_path / "other"
    _, error = call(monkeypatch, capsys, weights, *argv, code=1)
    assert f"is written and was not uploaded (403): `hf upload owner/name {tmp_path / 'other'}`" in error
