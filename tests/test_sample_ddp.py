"""Many images over all processes: the same set whoever draws it, resumed without redoing, in a file that streams."""

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

import faults
import numpy as np
import pytest
import torch
from conftest import ROOT, script, started_together
from PIL import Image
from test_sampling import publish, random_model
from test_scripts import accepted_by, bash, flags, torchrun  # noqa: F401 (a fixture)

import checkpoint
import image_files
import sample_ddp
import sampling
from autoencoders import PixelSpace
from cli import RunStopped, UsageError, run
from conditions import Classes
from diffusion import RectifiedFlow

COMMON = ["--vae-path", "none", "--num-sampling-steps", "4", "--device", "cpu"]


@pytest.fixture
def ckpt(tmp_path) -> Path:
    return publish(tmp_path / "tiny.pt", random_model(), rf=True)


def argv(ckpt: Path, place: Path, *more) -> list[str]:
    return [*COMMON, "--ckpt", str(ckpt), "--sample-dir", str(place), *map(str, more)]


def draw(ckpt: Path, place: Path, *more) -> Path:
    """Run the script in this process; the folder it made."""
    sample_ddp.main(sample_ddp.get_parser().parse_args(argv(ckpt, place, *more)))
    (folder,) = place.iterdir()
    return folder


def load(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(folder / "samples.npz") as file:
        return file["arr_0"], file["labels"]


def pngs(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png"))


@pytest.fixture
def drawn(monkeypatch) -> list[int]:
    """Notes the index of every image that the network draws."""
    noted, generate = [], sampling.generate

    def noting(*args, indices, **kwargs):
        noted.extend(indices)
        return generate(*args, indices=indices, **kwargs)

    monkeypatch.setattr(sampling, "generate", noting)
    return noted


def adm_images(path: Path) -> np.ndarray:
    """As the evaluation suite reads them: the header of version 1.0, then bytes off the zip member as a stream."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
        assert np.lib.format.read_magic(member) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
        assert not fortran and not dtype.hasobject
        return np.frombuffer(member.read(), dtype).reshape(shape)


# -------------------------------------------------------------------------------------------------------------- the set


def test_npz_and_png_files_are_the_same_images(ckpt, tmp_path, capsys, drawn):
    folder = draw(ckpt, tmp_path / "a", "--num-fid-samples", 11, "--per-proc-batch-size", 4)
    assert folder.name == "tiny-8px-euler4-cfg1.5-seed0-random-fp32-11"
    images, labels = load(folder)
    assert images.shape == (11, 8, 8, 3) and images.dtype == np.uint8
    assert labels.shape == (11,) and labels.dtype == np.int64 and drawn == list(range(11))
    assert np.array_equal(adm_images(folder / "samples.npz"), images)
    mapped, same_labels = image_files.open_npz(folder / "samples.npz")
    assert isinstance(mapped, np.memmap) and np.array_equal(mapped, images) and np.array_equal(same_labels, labels)
    names = [f"{i:06d}.png" for i in range(11)]
    assert [path.name for path in pngs(folder)] == names
    assert np.array_equal(np.stack([np.asarray(Image.open(path)) for path in pngs(folder)]), images)
    assert {path.name for path in folder.iterdir()} == {*names, "samples.npz", "settings.json"}
    out = capsys.readouterr()
    assert "11 images of 8x8 (euler4-cfg1.5-seed0, fp32)" in out.out and "images/s" in out.out and "11/11" in out.err


def test_an_image_is_that_of_sample_py_with_the_same_index_and_label(ckpt, tmp_path):
    images, labels = load(draw(ckpt, tmp_path / "a", "--num-fid-samples", 3, "--per-proc-batch-size", 3, "--seed", 5))
    model = random_model()
    model.load_state_dict(torch.load(ckpt, weights_only=True)["ema"])
    settings = sampling.Settings(4, "euler", 1.5, seed=5)
    expected = next(sampling.generate(model, RectifiedFlow(), PixelSpace(), labels.tolist(), settings))
    assert np.array_equal(images, expected)


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_batch_size_changes_an_image_by_rounding_only(ckpt, tmp_path, batch):
    reference, labels = load(draw(ckpt, tmp_path / "a", "--num-fid-samples", 8, "--per-proc-batch-size", 8))
    images, same_labels = load(draw(ckpt, tmp_path / "b", "--num-fid-samples", 8, "--per-proc-batch-size", batch))
    assert np.abs(images.astype(int) - reference).max() <= 1 and np.array_equal(labels, same_labels)
    assert np.abs(reference[0].astype(int) - reference[1]).max() > 20


def test_labels(ckpt, tmp_path):
    _, balanced = load(draw(ckpt, tmp_path / "a", "--num-fid-samples", 10, "--labels", "balanced"))
    assert balanced.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    _, labels = load(draw(ckpt, tmp_path / "b", "--num-fid-samples", 10))
    assert labels.tolist() == Classes(4).requests(10, 0)


def test_random_labels_are_uniform_and_depend_on_seed_and_index_alone():
    labels = Classes(10).requests(4000, 0)
    counts = np.bincount(labels, minlength=10)
    assert len(counts) == 10 and ((counts - 400) ** 2 / 400).sum() < 27.9  # chi-squared, 9 degrees: 0.1 %
    assert Classes(10).requests(100, 0) == labels[:100]
    assert Classes(10).requests(100, 1) != labels[:100]


def test_without_png_files_and_then_with(ckpt, tmp_path, drawn):
    folder = draw(ckpt, tmp_path / "a", "--num-fid-samples", 5, "--per-proc-batch-size", 2, "--png", "False")
    assert {path.name for path in folder.iterdir()} == {"samples.npz", "settings.json"}
    written = (folder / "samples.npz").stat().st_mtime_ns
    drawn.clear()
    draw(ckpt, tmp_path / "a", "--num-fid-samples", 5, "--per-proc-batch-size", 2)
    assert drawn == [] and (folder / "samples.npz").stat().st_mtime_ns == written
    assert np.array_equal(np.stack([np.asarray(Image.open(path)) for path in pngs(folder)]), load(folder)[0])
    assert not (folder / "parts").exists()


def test_published_command(tmp_path):
    """Every flag that the sampling scripts of DiT and fast-DiT have, under both spellings."""
    ddpm = publish(tmp_path / "ddpm.pt", random_model(), rf=False)
    published = ["--model", "DiT-Nano/2", "--vae", "none", "--per-proc-batch-size", "4", "--num-fid-samples", "5"]
    published += ["--image-size", "8", "--num-classes", "4", "--cfg-scale", "1.4", "--num-sampling-steps", "6"]
    published += ["--global-seed", "3", "--no-tf32", "--ckpt", str(ddpm), "--sample-dir", str(tmp_path / "a")]
    sample_ddp.main(sample_ddp.get_parser().parse_args(published))
    (folder,) = (tmp_path / "a").iterdir()
    assert folder.name == "ddpm-8px-ddpm6-cfg1.4-seed3-random-fp32-5"
    assert len(load(folder)[0]) == 5
    published = [flag.replace("-", "_").replace("__", "--", 1) if flag[:2] == "--" else flag for flag in published]
    published[published.index("--no_tf32")] = "--tf32"
    args = sample_ddp.get_parser().parse_args([*published, "--rf", "False", "--cfg-interval", "0.1", "0.9"])
    sample_ddp.main(args)
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert "ddpm-8px-ddpm6-cfg1.4-interval0.1-0.9-seed3-random-tf32-5" in names


def test_precision_flags():
    def precision(*flags):
        return sample_ddp.requested_precision(sample_ddp.get_parser().parse_args(["--ckpt", "x", *flags]))

    assert precision() is None and precision("--tf32") == "tf32" and precision("--no-tf32") == "fp32"
    assert precision("--tf32", "False") == "fp32" and precision("--no-tf32", "--precision", "bf16") == "bf16"
    assert precision("--tf32", "--precision", "tf32") == "tf32"


def test_the_folder_of_a_runs_checkpoint_names_the_run():
    source = Path("000-run/checkpoints/0000002")
    settings = sampling.Settings("50", "euler")
    model = random_model()
    loaded = sampling.Loaded(model, model, RectifiedFlow(), PixelSpace(), 8, source, settings, Classes(4))
    args = sample_ddp.get_parser().parse_args(["--ckpt", "x", "--num-fid-samples", "2", "--use-ema", "False"])
    plan = sample_ddp.plan(args, loaded, settings, "fp32")
    assert plan.folder == Path("samples/000-run-0000002-no-ema-8px-euler50-cfg1-seed0-random-fp32-2")


# ------------------------------------------------------------------------------------------------------------ processes


@pytest.mark.slow
def test_two_processes_draw_the_same_bits(ckpt, tmp_path):
    flags = ["--num-fid-samples", 11, "--per-proc-batch-size", 2]  # 6 batches, the last with one image
    one = draw(ckpt, tmp_path / "one", *flags)
    result = script("sample_ddp.py", *argv(ckpt, tmp_path / "two", *flags), processes=2)
    assert "11/11" in result.stderr and result.stdout.count("11 images of 8x8") == 1
    two = tmp_path / "two" / one.name
    assert (one / "samples.npz").read_bytes() == (two / "samples.npz").read_bytes()
    assert [path.read_bytes() for path in pngs(one)] == [path.read_bytes() for path in pngs(two)]
    assert not (two / "parts").exists()

    more = ["--num-fid-samples", 1, "--per-proc-batch-size", 2]  # fewer batches than processes
    script("sample_ddp.py", *argv(ckpt, tmp_path / "two", *more), processes=2)
    assert len(load(tmp_path / "two" / (one.name.removesuffix("11") + "1"))[0]) == 1


@pytest.mark.slow
def test_two_processes_say_an_error_once(ckpt, tmp_path):
    place = tmp_path / "a"
    draw(ckpt, place, "--num-fid-samples", 4, "--per-proc-batch-size", 2)
    wrong = argv(ckpt, place, "--num-fid-samples", 4, "--cfg-channels", 9)
    result = script("sample_ddp.py", *wrong, processes=2, check=None)
    assert result.returncode != 0 and result.stderr.count("sample_ddp.py: error:") == 1


# ----------------------------------------------------------------------------------------------------- killed, resumed


def parts(place: Path) -> list[Path]:
    return [path for path in place.glob("*/parts/*.npz") if not path.name.startswith(".")]


def finished_batches(place: Path, batch_size: int) -> set[int]:
    return {int(part.stem.partition("-")[0]) // batch_size for part in parts(place)}


def finished_files(place: Path, batch_size: int) -> dict[Path, int]:
    """The PNG files of finished batches, with the times when they were written."""
    numbers = finished_batches(place, batch_size)
    folder = next(place.iterdir())
    paths = [folder / f"{b * batch_size + i:06d}.png" for b in numbers for i in range(batch_size)]
    return {path: path.stat().st_mtime_ns for path in paths}


def assert_same_set(folder: Path, expected: Path) -> None:
    assert (folder / "samples.npz").read_bytes() == (expected / "samples.npz").read_bytes()
    assert {p.name: p.read_bytes() for p in pngs(folder)} == {p.name: p.read_bytes() for p in pngs(expected)}
    assert {p.name for p in folder.iterdir()} == {p.name for p in expected.iterdir()}


@contextlib.contextmanager
def slow_batches():
    """In processes that begin here: time to kill them before they are done."""
    once = sample_ddp.draw_batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_ddp, "draw_batch", lambda *a: (time.sleep(0.3), once(*a))[1])
        yield


def test_killed_and_resumed(ckpt, tmp_path, drawn, capsys):
    flags = ["--num-fid-samples", 40, "--per-proc-batch-size", 2]
    whole = draw(ckpt, tmp_path / "whole", *flags)
    with slow_batches():
        child = faults.Child(lambda: draw(ckpt, tmp_path / "cut", *flags), tmp_path / "output.txt")
    faults.wait_until(lambda: len(parts(tmp_path / "cut")) >= 3)
    child.kill()
    assert child.wait() == -signal.SIGKILL, (tmp_path / "output.txt").read_text()
    finished = finished_batches(tmp_path / "cut", 2)
    before = finished_files(tmp_path / "cut", 2)
    drawn.clear(), capsys.readouterr()

    cut = draw(ckpt, tmp_path / "cut", *flags)
    assert 3 <= len(finished) < 20 and drawn == [i for i in range(40) if i // 2 not in finished]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert f"{len(drawn)} drawn now" in capsys.readouterr().out
    assert_same_set(cut, whole)

    stamp = (cut / "samples.npz").stat().st_mtime_ns
    draw(ckpt, tmp_path / "cut", *flags)
    assert "all were there already" in capsys.readouterr().out
    assert (cut / "samples.npz").stat().st_mtime_ns == stamp


def held(place: Path) -> bool:
    """A killed process lets its locks go when the last of its threads has ended."""
    with open(next(place.glob("*/.lock")), "r+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


@pytest.mark.slow
def test_two_processes_killed_and_resumed_by_one(ckpt, tmp_path, drawn):
    flags = ["--num-fid-samples", 61, "--per-proc-batch-size", 2]
    command = ["sample_ddp.py", *argv(ckpt, tmp_path / "cut", *flags)]
    with slow_batches():
        pair = started_together(*command, processes=2, folder=tmp_path)
    faults.wait_until(lambda: len(parts(tmp_path / "cut")) >= 4)
    for process in pair:
        os.kill(process.pid, signal.SIGKILL)
    assert [process.wait()[0] for process in pair] == [-signal.SIGKILL] * 2
    faults.wait_until(lambda: not held(tmp_path / "cut"))
    finished = finished_batches(tmp_path / "cut", 2)
    before = finished_files(tmp_path / "cut", 2)
    cut = draw(ckpt, tmp_path / "cut", *flags)
    assert 4 <= len(finished) < 31 and drawn == [i for i in range(61) if i // 2 not in finished]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert_same_set(cut, draw(ckpt, tmp_path / "whole", *flags))


def interrupt(ckpt: Path, place: Path, after: int, *more) -> Path:
    """Draw until `after` batches are finished, as if the network then failed."""
    write = sample_ddp.ImageSet.write

    def failing(self, batch, images, new):
        if batch.start == after * self.batch_size:
            raise OSError(28, "No space left on device")
        write(self, batch, images, new)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_ddp.ImageSet, "write", failing)
        with pytest.raises(RunStopped, match="No space left on device.*the same command goes on"):
            draw(ckpt, place, *more)
    return next(place.iterdir())


def test_full_disk_stops_the_run_with_one_line_and_it_goes_on(ckpt, tmp_path, drawn):
    flags = ["--num-fid-samples", 9, "--per-proc-batch-size", 2]
    whole = draw(ckpt, tmp_path / "whole", *flags)
    interrupt(ckpt, tmp_path / "cut", 2, *flags)
    drawn.clear()
    assert_same_set(draw(ckpt, tmp_path / "cut", *flags), whole)
    assert drawn == [4, 5, 6, 7, 8]


def test_damaged_parts_are_drawn_again(ckpt, tmp_path, drawn):
    flags = ["--num-fid-samples", 11, "--per-proc-batch-size", 2, "--labels", "balanced"]
    whole = draw(ckpt, tmp_path / "whole", *flags)
    folder = interrupt(ckpt, tmp_path / "cut", 5, *flags)
    cut, relabelled, short, flipped, _ = sorted(parts(tmp_path / "cut"))
    cut.write_bytes(cut.read_bytes()[:-30])
    image_files.save_npz(relabelled, [np.zeros((2, 8, 8, 3), np.uint8)], [3, 2])
    image_files.save_npz(short, [np.zeros((1, 8, 8, 3), np.uint8)], [0])
    content = bytearray(flipped.read_bytes())
    content[300] ^= 4
    flipped.write_bytes(content)
    (folder / "000008.png").unlink()  # its part stays
    (folder / ".unfinished-000001.png-1").write_bytes(b"cut")
    drawn.clear()
    assert_same_set(draw(ckpt, tmp_path / "cut", *flags), whole)
    assert drawn == [*range(8), 10]


def test_damaged_file_in_the_end_is_joined_again_or_drawn_again(ckpt, tmp_path, drawn):
    flags = ["--num-fid-samples", 5, "--per-proc-batch-size", 2]
    folder = draw(ckpt, tmp_path / "a", *flags)
    good = (folder / "samples.npz").read_bytes()
    (folder / "samples.npz").write_bytes(good[:-1])
    drawn.clear()
    draw(ckpt, tmp_path / "a", *flags)
    assert drawn == [0, 1, 2, 3, 4] and (folder / "samples.npz").read_bytes() == good


# ------------------------------------------------------------------------------------------------------ wrong input


def refused(capsys, monkeypatch, arguments: list[str], message: str) -> None:
    """The script as the shell starts it, but in this process: code 2 and one line."""
    monkeypatch.setattr(sys, "argv", ["sample_ddp.py", *arguments])
    with pytest.raises(SystemExit) as end:
        run(sample_ddp.main, sample_ddp.get_parser())
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and line.startswith("sample_ddp.py: error: ")
    assert re.search(message, line), line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-fid-samples", "0"], "--num-fid-samples.*at least 1, got '0'"),
        (["--num-fid-samples", "many"], "at least 1, got 'many'"),
        (["--per-proc-batch-size", "-1"], "at least 1, got '-1'"),
        (["--labels", "sorted"], "invalid choice: 'sorted'"),
        (["--png", "perhaps"], "expected True or False, got 'perhaps'"),
        (["--global-seed", "-3"], "at least 0, got '-3'"),
        (["--tf32", "--precision", "bf16"], "--tf32 contradicts --precision bf16"),
        (["--no-tf32", "--precision", "tf32"], "--no-tf32 contradicts --precision tf32"),
        (["--ckpt", "nowhere.pt"], "nowhere.pt does not exist"),
        (["--model", "DiT-XL/2"], "--model DiT-XL/2 contradicts"),
        (["--model", "DiT-Nano/3"], "unknown model 'DiT-Nano/3'; did you mean DiT-Nano/2"),
        (["--num-classes", "1000"], "--num-classes 1000 contradicts"),
        (["--image-size", "256"], "--image-size 256 contradicts"),
        (["--num_experts", "8"], "--num_experts 8 contradicts"),
        (["--vae-path", "./nowhere"], "nowhere"),
        (["--sampler", "ddpm"], "belongs to the objective 'ddpm'"),
        (["--sampler", "best"], "best"),
        (["--num-sampling-steps", "0"], "at least 1, got '0'"),
        (["--num-sampling-steps", "ddim10"], "ddim10"),
        (["--cfg-scale", "nan"], "from 0 to 1000, got .nan"),
        (["--cfg-interval", "0.5", "0.2"], "LOW <= HIGH"),
        (["--cfg-channels", "few"], "--cfg-channels expects"),
        (["--sample-dir", "LICENSE"], "--sample-dir LICENSE cannot be written"),
        (["--what"], "unrecognized arguments: --what"),
    ],
)
def test_wrong_flags_get_one_line_and_leave_nothing_behind(ckpt, tmp_path, flags, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = argv(ckpt, tmp_path / "a", "--num-fid-samples", 4, *flags)
    refused(capsys, monkeypatch, arguments, message)
    assert not (tmp_path / "a").exists()


def test_guidance_without_a_null_class_is_refused(tmp_path, capsys, monkeypatch):
    model = random_model(class_dropout_prob=0)
    record = {"format": 1, "model": asdict(model.config), "objective": {"name": "rf"}, "space": {"path": "none"}}
    checkpoint.save(tmp_path / "ckpt", {"ema": model.state_dict()}, {"config": record})
    refused(capsys, monkeypatch, argv(tmp_path / "ckpt", tmp_path / "a", "--num-fid-samples", 4), "needs a null class")
    assert not (tmp_path / "a").exists()
    draw(tmp_path / "ckpt", tmp_path / "a", "--num-fid-samples", 4, "--cfg-scale", 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu(ckpt, tmp_path, capsys, monkeypatch):
    refused(capsys, monkeypatch, argv(ckpt, tmp_path / "a", "--device", "cuda"), "PyTorch sees no GPU")


def test_other_settings_do_not_mix(ckpt, tmp_path, capsys, monkeypatch):
    flags = ["--num-fid-samples", 9, "--per-proc-batch-size", 2]
    folder = interrupt(ckpt, tmp_path / "a", 2, *flags)
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def refuse(message, *more):
        refused(capsys, monkeypatch, argv(ckpt, tmp_path / "a", *flags, *more), message)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == kept

    model = random_model()
    torch.nn.init.normal_(model.blocks[0].attn.proj.bias, std=0.1)
    before = ckpt.read_bytes()
    publish(ckpt, model, rf=True)  # other weights under the same name
    refuse("drawn with weights [0-9a-f]{16}, now it is")
    ckpt.write_bytes(before)

    settings = folder / "settings.json"
    record = json.loads(settings.read_text())
    assert (record["labels"], record["seed"], record["cfg_scale"]) == ("random", 0, 1.5)
    settings.write_text("[1")
    kept[settings] = b"[1"
    refuse("settings.json is not JSON .*; remove")
    settings.unlink()
    del kept[settings]
    refuse("holds 000000.png but no settings.json")


def test_a_set_goes_on_with_another_batch_size(ckpt, tmp_path, drawn):
    """What is finished stays as it is; the rest is drawn in the new size, which changes rounding alone."""
    whole, _ = load(draw(ckpt, tmp_path / "whole", "--num-fid-samples", 11, "--per-proc-batch-size", 3))
    folder = interrupt(ckpt, tmp_path / "a", 2, "--num-fid-samples", 11, "--per-proc-batch-size", 3)
    settings = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps(settings | {"per-proc-batch-size": 3}))  # as it once was
    assert sorted(path.name for path in (folder / "parts").iterdir()) == ["000000-000003.npz", "000003-000006.npz"]
    (folder / "parts" / "000000-000003.npz").unlink()
    (folder / "parts" / "000002-000005.npz").write_bytes((folder / "parts" / "000003-000006.npz").read_bytes())
    (folder / "000004.png").unlink()
    kept = (folder / "000003.png").stat().st_mtime_ns
    drawn.clear()
    sizes = []
    with pytest.MonkeyPatch.context() as patch:
        once = sample_ddp.draw_batch
        patch.setattr(sample_ddp, "draw_batch", lambda *a: (sizes.append(len(a[2])), once(*a))[1])
        draw(ckpt, tmp_path / "a", "--num-fid-samples", 11, "--per-proc-batch-size", 2)
    images, _ = load(folder)
    assert sorted(drawn) == [0, 1, 2, 6, 7, 8, 9, 10] and sizes == [2, 1, 2, 2, 1]
    assert np.array_equal(images[3:6], whole[3:6]) and np.abs(images.astype(int) - whole).max() <= 1
    assert (folder / "000003.png").stat().st_mtime_ns == kept and len(pngs(folder)) == 11
    assert np.array_equal(np.asarray(Image.open(folder / "000004.png")), whole[4])


def test_two_commands_do_not_share_a_folder(ckpt, tmp_path):
    folder = interrupt(ckpt, tmp_path / "a", 1, "--num-fid-samples", 5, "--per-proc-batch-size", 2)
    other = faults.holder_of(folder, tmp_path / "holder.txt")
    try:
        with pytest.raises(UsageError, match="another command draws into .*: wait for its end"):
            draw(ckpt, tmp_path / "a", "--num-fid-samples", 5, "--per-proc-batch-size", 2)
    finally:
        other.kill()
        other.wait()
    assert len(load(draw(ckpt, tmp_path / "a", "--num-fid-samples", 5, "--per-proc-batch-size", 2))[0]) == 5


def test_a_network_that_breaks_keeps_what_was_good(ckpt, tmp_path, drawn, monkeypatch):
    """NaN from the third batch on, at the second evaluation."""
    once = sampling.classifier_free_guidance

    def breaking(model, y, *more, **options):
        denoise, calls = once(model, y, *more, **options), []

        def broken(x, t):
            calls.append(t)
            return denoise(x, t) * (float("nan") if len(drawn) > 4 and len(calls) == 2 else 1)

        return broken

    flags = ["--num-fid-samples", 9, "--per-proc-batch-size", 2]
    whole = draw(ckpt, tmp_path / "whole", *flags)
    drawn.clear()
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "classifier_free_guidance", breaking)
        with pytest.raises(RunStopped, match="from evaluation 2 of 4 of the network on: .*another --precision may"):
            draw(ckpt, tmp_path / "cut", *flags)
    assert len(parts(tmp_path / "cut")) == 2 and len(pngs(next((tmp_path / "cut").iterdir()))) == 4
    drawn.clear()
    assert_same_set(draw(ckpt, tmp_path / "cut", *flags), whole)
    assert drawn == [4, 5, 6, 7, 8]


def test_out_of_memory_says_what_to_do(ckpt, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sampling, "generate", fail)
    with pytest.raises(RunStopped, match="smaller --per-proc-batch-size"):
        draw(ckpt, tmp_path / "a", "--num-fid-samples", 4)


def test_a_disk_that_is_not_shared_is_noticed(ckpt, tmp_path):
    class Elsewhere:
        is_main = True

        def on_main(self, function):
            return function()

        def gather(self, value):
            return [value, False]

    args = sample_ddp.get_parser().parse_args(argv(ckpt, tmp_path / "a", "--num-fid-samples", 4))
    loaded = sampling.load_for_sampling(args, torch.device("cpu"))
    images = sample_ddp.plan(args, loaded, sampling.Settings("4", "euler"), "fp32")
    with pytest.raises(UsageError, match="must be on a shared disk"):
        sample_ddp.open_together(images, Elsewhere())


def test_help_and_missing_checkpoint_as_a_process(tmp_path):
    result = script("sample_ddp.py", "--help")
    assert "--num-fid-samples" in result.stdout and "(default: 50000)" in result.stdout and "1.5)" in result.stdout
    result = script("sample_ddp.py", "--ckpt", tmp_path / "no.pt", "--sample-dir", tmp_path / "a", check=2)
    assert result.stderr.strip() == f"sample_ddp.py: error: checkpoint {tmp_path / 'no.pt'} does not exist"


# ------------------------------------------------------------------------------------------------------------- the file


def test_npz_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.npz"
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 6, 3), dtype=np.uint8)
    image_files.save_npz(path, [images[:3], images[3:7:1]], range(7))
    before = path.read_bytes()
    with np.load(path) as file:
        assert np.array_equal(file["arr_0"], images) and file["labels"].tolist() == list(range(7))
    with pytest.raises(AssertionError, match="3 images for 7 labels"):
        image_files.save_npz(path, [images[:3]], range(7))
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.npz"]
    image_files.save_npz(path, [images[:1], images[1:]], range(7))
    assert path.read_bytes() == before, "the bytes depend on the images alone"
    for cut in (b"", before[:100], before[: len(before) // 2], before[:-1]):
        path.write_bytes(cut)
        with pytest.raises(UsageError, match="not a whole .npz"):
            image_files.open_npz(path)


MEMORY = """
import sys
from pathlib import Path
import numpy as np
import image_files

def held():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) / 1024

folder, before, most = Path(sys.argv[1]), held(), 0.0

def parts():
    global most
    for i in range(50):
        path = folder / f"{i}.npz"
        image_files.save_npz(path, [np.full((32, 256, 256, 3), i, np.uint8)], [i] * 32)
        yield image_files.open_npz(path)[0]
        path.unlink()
        most = max(most, held())

image_files.save_npz(folder / "all.npz", parts(), [0] * 1600)
print(most - before)
"""


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """315 MB, through parts of 6 MB, as the script joins them."""
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (tmp_path / "all.npz").stat().st_size > 300e6
    assert float(result.stdout) < 30, result.stdout
    images, _ = image_files.open_npz(tmp_path / "all.npz")
    assert images.shape == (1600, 256, 256, 3) and (images[::32, 0, 0, 0] == np.arange(50)).all()
    (tmp_path / "all.npz").unlink()


def test_more_than_4_gb_fit_the_format(tmp_path, monkeypatch):
    """With the limit of the old zip format lowered, the file takes the extension that a large one needs."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    images = np.arange(40 * 8 * 8 * 3, dtype=np.uint32).astype(np.uint8).reshape(40, 8, 8, 3)
    image_files.save_npz(tmp_path / "a.npz", np.array_split(images, 3), range(40))
    with np.load(tmp_path / "a.npz") as file:
        assert np.array_equal(file["arr_0"], images)
    assert np.array_equal(image_files.open_npz(tmp_path / "a.npz")[0], images)


# -------------------------------------------------------------------------------------------------------- shell script


def test_shell_script(torchrun):  # noqa: F811
    result = bash(ROOT / "scripts" / "sample_ddp.sh")
    assert result.returncode != 0 and "CKPT: set it" in result.stderr

    command = torchrun("sample_ddp.sh", "--labels", "balanced", CKPT="my run")
    given = flags(command)
    accepted_by(sample_ddp, command)
    assert {"--ckpt": "my run", "--labels": "balanced", "--nproc-per-node": "auto"}.items() <= given.items()
    assert not given.keys() & {"--rf", "--num-fid-samples", "--sample-dir", "--per-proc-batch-size", "--vae-path"}

    variables = {"NUM_SAMPLES": "10000", "SAMPLE_DIR": "/my samples", "PER_PROC_BATCH_SIZE": "64", "OBJECTIVE": "rf"}
    command = torchrun("sample_ddp.sh", CKPT="x.pt", NPROC_PER_NODE="8", VAE_PATH="mse", **variables)
    accepted_by(sample_ddp, command)
    expected = {"--num-fid-samples": "10000", "--sample-dir": "/my samples", "--per-proc-batch-size": "64"}
    expected |= {"--rf": "True", "--vae-path": "mse", "--nproc-per-node": "8"}
    assert expected.items() <= flags(command).items()
