"""From prompts: captions of a data set, the word encoder, scenes of digits, a run that reads them, its images."""

import json

import numpy as np
import pytest
import torch
from conftest import read_json, script, write_images
from PIL import Image
from test_training import assert_same_state

import text
from autoencoders import space_info
from captions import open_captioned, read_captions
from cli import UsageError
from conditions import Captions, Prompts
from data import Reading
from files import replace_lines
from metrics import Judge
from prompts import read_prompts
from scripts import scenes
from scripts.digits import split_digits

DIGITS, HELD_OUT = split_digits()


# ------------------------------------------------------------------------------------------------------------ the words


def test_words_are_the_same_always_and_know_their_neighbours():
    encoder = text.Words(width=64)
    features, mask = encoder(["a seven left of a two", "", "A seven, left of a TWO!"])
    assert features.shape == (3, 7, 64) and mask.sum(dim=1).tolist() == [7, 1, 7]  # a token for the end
    assert torch.equal(features[0], features[2])
    assert torch.equal(text.Words(width=64)(["a seven left of a two"])[0][0], features[0])
    assert not torch.allclose(features[0, 0], features[0, 4])  # "a", beside other words
    alone = encoder(["a seven left of a two"])[0]
    assert torch.equal(alone[0], features[0])
    assert 0.5 < features[0].std() < 1.5
    long, mask = encoder(["one " * 100])
    assert long.shape[1] == encoder.length == mask.sum()


def test_a_recorded_encoder_is_the_same_one():
    encoder = text.Words(width=32, length=9)
    again = text.open_encoder(**encoder.record())
    assert torch.equal(again(["two words"])[0], encoder(["two words"])[0]) and again.length == 9
    with pytest.raises(UsageError, match="unknown text encoder 'wrods'; did you mean words"):
        text.open_encoder("wrods")


# ------------------------------------------------------------------------------------------------------------- captions


def captioned(folder, texts: dict[str, str | bytes], images=("a.png", "sub/b.png")):
    for name in images:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), len(name), dtype=np.uint8)).save(folder / name)
    for name, content in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def table(*rows) -> str:
    return "".join(f"{json.dumps({'path': name, 'caption': caption})}\n" for name, caption in rows)


PAIRS = {"a.txt": "first\n", "sub/b.txt": "zweites ü"}
TABLE = {"captions.jsonl": table(("a.png", "first"), ("sub/b.png", "zweites ü"))}


SHEET = {"captions.csv": "path,caption\na.png,first\nsub/b.png,zweites ü\n"}


@pytest.mark.parametrize("texts", [PAIRS, TABLE, SHEET], ids=["pairs", "table", "sheet"])
def test_captions_beside_images_and_in_a_table(texts, tmp_path):
    data = open_captioned(captioned(tmp_path, texts), 8, space_info("none"), 0, False, Reading())
    assert len(data) == 2 and data.num_classes == 0
    items = [data[0, index] for index in range(2)]
    assert [data.caption(int(item["y"])) for item in items] == ["first", "zweites ü"]
    assert items[1]["x"].mean() != items[0]["x"].mean()
    assert data.record()["captions"] == ["first", "zweites ü"]
    (tmp_path / next(iter(texts))).write_bytes(next(iter(texts.values())).replace("first", "other").encode())
    again = open_captioned(tmp_path, 8, space_info("none"), 0, False, Reading())
    assert again.fingerprint() != data.fingerprint()


WRONG = {
    "no captions": ({}, "has no a.txt with the caption of that image, and no captions.jsonl"),
    "one without": ({"a.txt": "x"}, "has no sub/b.txt"),
    "no image": (PAIRS | {"c.txt": "x"}, "has a caption c.txt, but no image"),
    "not there": ({"captions.jsonl": table(("c.png", "x"))}, "has a caption for c.png, which is not in"),
    "empty": (PAIRS | {"a.txt": "  \n"}, "the caption of a.png is empty"),
    "endless": (PAIRS | {"a.txt": "x" * 10_001}, "the caption of a.png has 10001 characters, 10000 are the most"),
    "no UTF-8": (PAIRS | {"a.txt": b"\xff\xfe"}, "a.txt cannot be read"),
    "no table": ({"captions.jsonl": "a.png first\n"}, "captions.jsonl, line 1: expected"),
    "empty table": ({"captions.jsonl": ""}, "has no captions"),
    "other columns": ({"captions.csv": "file,text\na.png,first\n"}, "captions.csv, line 2: expected the columns path"),
    "a number": ({"captions.jsonl": '{"path": "a.png", "caption": 3}\n'}, "captions.jsonl, line 1: expected"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_captions_are_one_line(case, tmp_path):
    texts, message = WRONG[case]
    with pytest.raises(UsageError) as error:
        read_captions(captioned(tmp_path, texts))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_null_caption_is_as_long_as_the_caption():
    kind = Captions(
        4, 9, dropout=0.5, encode=lambda texts: (torch.ones(len(texts), 3, 4), torch.ones(len(texts), 3).bool())
    )
    batch = kind.batch(["a", "b"], torch.device("cpu"))
    assert kind.drop(batch, torch.tensor([0.4, 0.6])).null.tolist() == [True, False]
    nothing = kind.null_of(batch)
    assert nothing.null.all() and torch.equal(nothing.mask, batch.mask)
    assert isinstance(kind.blank("cpu"), Prompts)
    assert Captions(4, 9).null is None and Captions(4, 9).null_of(batch) is None


# --------------------------------------------------------------------------------------------------------------- scenes


def test_scenes_are_what_their_captions_say():
    """Every digit is one of the training half, in the cell that the words name; held-out pairs never come."""
    known = {image.tobytes(): int(label) for image, label in zip(DIGITS.images, DIGITS.labels, strict=True)}
    captions = set()
    for index in range(200):
        made = scenes.scene(DIGITS, 0, index)
        assert not scenes.is_new(made.layout) and 1 <= sum(value is not None for value in made.layout) <= 4
        for cell, value in enumerate(made.layout):
            row, column = divmod(cell, 2)
            tile = made.image[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            assert (not tile.any()) if value is None else known[np.ascontiguousarray(tile).tobytes()] == value
        assert sum(made.caption.count(f" {name}") for name in scenes.NAMES) == sum(v is not None for v in made.layout)
        captions.add(made.caption)
    assert len(captions) > 180
    assert all(scenes.is_new(scenes.scene(DIGITS, 0, index, new=True).layout) for index in range(50))
    assert scenes.scene(DIGITS, 3, 7).caption == scenes.scene(DIGITS, 3, 7).caption


@pytest.mark.parametrize(
    ("layout", "phrases"),
    [
        ((7, 2, None, None), {"a seven left of a two at the top", "at the top, a seven and then a two"}),
        ((None, 8, None, 4), {"an eight above a four on the right", "on the right, a four under an eight"}),
    ],
)
def test_captions_name_the_places_of_pairs(layout, phrases):
    said = {scenes.caption(layout, np.random.default_rng(seed)) for seed in range(200)}
    assert phrases <= said and len(said) > 20


def test_the_judge_reads_each_cell():
    made = [scenes.scene(HELD_OUT, 0, index) for index in range(20)]
    images = np.stack([np.repeat(each.image[..., None], 3, axis=2) for each in made])
    judge = Judge(np.repeat(HELD_OUT.images[..., None], 3, axis=3), HELD_OUT.labels)
    layouts = [each.layout for each in made]
    digits, blanks = scenes.read_cells(images, layouts, judge.recognises)
    assert digits.all() and blanks.all() and len(digits) + len(blanks) == 80
    digits, blanks = scenes.read_cells(images[:, :, ::-1], layouts, judge.recognises)  # left is right
    assert digits.mean() < 0.5 and not blanks.all()


# ----------------------------------------------------------------------------------------------------------------- runs

TINY = ["--model", "DiT-Nano/2", "--patch-size", 4, "--depth", 2, "--num_experts", 2, "--expert-ratio", 1, "--vae-path"]
TINY += ["none", "--image-size", 16, "--flip", "False", "--rf", "--device", "cpu", "--num-workers", 0]
TINY += ["--global-batch-size", 8, "--log-every", 1, "--text-encoder", "words"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """4 steps on 24 scenes, drawn from at the end; resumed from the second on two shards."""
    home = tmp_path_factory.mktemp("text")
    script("scripts/digits.py", "compose", home / "scenes", "--count", 24, "--prompts", 3)
    flags = [
        *TINY,
        "--data-path",
        home / "scenes" / "captions.jsonl",
        "--results-dir",
        home / "runs",
        "--ckpt-every",
        2,
    ]
    script("train.py", *flags, "--max-steps", 4, "--sample-every", 4)
    return next((home / "runs").iterdir())


def test_a_run_reads_its_captions(run):
    saved = run / "checkpoints" / "0000004"
    config = read_json(saved, "config")
    assert config["text"] == {"name": "words", "width": 128, "length": 40}
    assert (config["model"]["caption_width"], config["model"]["caption_length"]) == (128, 40)
    assert len(config["data"]["captions"]) == 16 and "class_names" not in config["data"]
    assert (run / "samples" / "0000004.png").is_file()
    assert "24 samples with captions, latents (3, 16, 16)" in (run / "log.txt").read_text()


def test_it_goes_on_to_the_bit_and_on_shards(run):
    home = run.parent.parent
    for name, more in (("again", {}), ("shards", {"processes": 2})):
        copy = home / name / "000-copy" / "checkpoints"
        copy.mkdir(parents=True)
        (copy / "0000002").symlink_to(run / "checkpoints" / "0000002")
        flags = [*TINY, "--data-path", home / "scenes", "--results-dir", home / name, "--resume", copy.parent]
        flags += ["--max-steps", 4, "--data-parallel", "fsdp"]
        script("train.py", *flags, **more)
        if name == "again":
            assert_same_state(run, copy.parent)
        else:
            lines = [(each / "metrics.jsonl").read_text().splitlines()[-1] for each in (run, copy.parent)]
            losses = [json.loads(line)["loss"] for line in lines]
            assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_images_of_prompts(run, tmp_path):
    draw = ["sample.py", "--ckpt", run, "--device", "cpu", "--num-sampling-steps", 2, "--cfg-scale", 2]
    prompts = ["a seven left of a two at the top", "bottom right: a nine"]
    script(*draw, "--prompt", *prompts, "--output", tmp_path / "both")
    script(*draw, "--prompt", prompts[0], "--output", tmp_path / "one")
    both, one = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("both", "one"))
    assert both.shape == (2, 16, 16, 3)
    assert np.abs(both[:1].astype(int) - one).max() <= 1  # whatever else is in the batch
    assert json.loads((tmp_path / "both" / "settings.json").read_text())["prompts"] == prompts
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    script(*draw, "--prompt-file", tmp_path / "prompts.txt", "--output", tmp_path / "file")
    assert np.array_equal(np.load(tmp_path / "file" / "samples.npz")["arr_0"], both)
    scenes_of = run.parent.parent / "scenes" / "new.jsonl"
    compose = ["scripts/digits.py", "compose", scenes_of.parent, "--prompts", 3, "--count"]
    assert "are there already" in script(*compose, 24).stdout
    assert "holds other captions than these 25" in script(*compose, 25, check=2).stderr
    script(*draw, "--prompt-file", scenes_of, "--output", tmp_path / "new")
    said = script("scripts/digits.py", "judge", tmp_path / "new" / "samples.npz", scenes_of).stdout
    assert "of 12 are as asked for" in said and "of 6 digits" in said
    for wrong in ([tmp_path / "no.npz", scenes_of], [tmp_path / "new" / "samples.npz", tmp_path / "prompts.txt"]):
        error = script("scripts/digits.py", "judge", *wrong, check=2).stderr
        assert "Traceback" not in error and ("no.npz" in error or "is no list of prompts" in error)


def test_other_words_make_another_image(run):
    import checkpoint

    weights = checkpoint.load_weights(run, "model")  # the average has hardly moved
    model, kind = weights.build().eval(), weights.condition
    encoder = text.open_encoder(**weights.record["text"])
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([0.5])
    outs = [model(x, t, encoder([words])) for words in ("a seven at the top left", "a two at the top left")]
    assert kind.known and not torch.equal(*outs)


REFUSED = {
    "a label": (["--class-labels", 3], "--class-labels: 0000004 draws from texts; give --prompt"),
    "another encoder": (["--text-encoder", "t5"], "--text-encoder t5 contradicts"),
    "no file": (["--prompt-file", "nowhere.txt"], "prompts nowhere.txt cannot be read: No such file"),
    "no prompts": (["--prompts", "nowhere.png"], "prompts are a file with one of the suffixes .txt .jsonl .csv .json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_model_of_texts_does_not_draw(case, run, tmp_path):
    flags, message = REFUSED[case]
    error = script("sample.py", "--ckpt", run, "--device", "cpu", *flags, "--output", tmp_path / "x", check=2).stderr
    assert message.replace("0000004", "") in error.replace(str(run / "checkpoints" / "0000004"), ""), error


@pytest.mark.parametrize("command", ["sample_ddp.py", "analysis/expert_data.py"])
def test_what_draws_classes_says_so(command, run):
    error = script(command, "--ckpt", run, "--device", "cpu", check=2).stderr
    assert "draws from texts: --prompts FILE says which" in error


DRAW = ["--device", "cpu", "--num-sampling-steps", 2, "--cfg-scale", 2]


def test_sets_of_prompts(run, tmp_path):
    """Several images of each, the same for any number of processes, in both layouts; to be read as a data set."""
    listed = run.parent.parent / "scenes" / "new.jsonl"
    command = ["sample_ddp.py", "--ckpt", run, *DRAW, "--prompts", listed, "--images-per-prompt", 2, "--sample-dir"]
    script(*command, tmp_path / "one", "--per-proc-batch-size", 4)
    script(*command, tmp_path / "two", "--layout", "geneval", "--per-proc-batch-size", 2, processes=2)
    one, two = (next((tmp_path / name).iterdir()) for name in ("one", "two"))
    with np.load(one / "samples.npz") as a, np.load(two / "samples.npz") as b:
        assert a["labels"].tolist() == b["labels"].tolist() == [0, 0, 1, 1, 2, 2]
        assert np.abs(a["arr_0"].astype(int) - b["arr_0"]).max() <= 1
        pixels = b["arr_0"]
    captions = [json.loads(line)["caption"] for line in listed.read_text().splitlines()]
    _, pairs = read_captions(one)
    assert pairs == [(f"{i:06d}.png", captions[i // 2]) for i in range(6)]
    for number in range(6):
        folder = two / f"{number // 2:05d}"
        assert np.array_equal(np.array(Image.open(folder / "samples" / f"{number % 2:05d}.png")), pixels[number])
        assert json.loads((folder / "metadata.jsonl").read_text())["caption"] == captions[number // 2]
    next((two / "00001" / "samples").iterdir()).unlink()
    again = script(*command, tmp_path / "two", "--layout", "geneval").stdout
    assert "all were there already" in again and len(list(two.rglob("*.png"))) == 6
    error = script(*command, tmp_path / "two", check=2).stderr
    assert "drawn with layout geneval, now it is None" in error


def test_measured_from_prompts(run, tmp_path):
    scenes_of = run.parent.parent / "scenes"
    common = ["calculate_metrics.py", "eval", run, "--ref", scenes_of / "images", "--features", "pixels", *DRAW]
    script(*common, "--prompts", scenes_of / "captions.jsonl", "--num-samples", 8, "--output", tmp_path / "x.json")
    found = read_json(tmp_path, "x")
    assert found["samples"]["count"] == 8 and found["samples"]["settings"]["images-per-prompt"] == 1
    assert "--prompts FILE says which" in script(*common, check=2).stderr


def test_which_expert_takes_which_word(run, tmp_path):
    """Prompts are the classes of the analysis; words, what some of them have."""
    from analysis.routing import RoutingData

    (tmp_path / "p.txt").write_text("a seven at the top\na two at the top\na seven below\n")
    path = tmp_path / "routing.npz"
    script("analysis/expert_data.py", "--ckpt", run, *DRAW, "--prompts", tmp_path / "p.txt", "--output", path)
    data = RoutingData.load(path)
    assert data.of_texts and data.about["class_names"][2] == "a seven below"
    assert data.words == {"at": [0, 1], "seven": [0, 2], "the": [0, 1], "top": [0, 1]}
    counts = data.counts("class", 0)
    expected = counts[:, [0, 2]].sum(axis=1)
    shares = data.shares("word", 0)[:, 1]
    assert np.allclose(shares, expected / expected.sum(axis=-1, keepdims=True))
    printed = script("analysis/heatmaps.py", path, "--formats", "png", "--dpi", 50).stdout
    assert "by-word.png" in printed and "by-class.png" in printed
    script("analysis/report.py", path)
    assert "3 prompts" in path.with_suffix(".html").read_text()


LISTS = {
    "lines.txt": "first\n\n second \n",
    "captions.jsonl": '{"caption": "first"}\n{"prompt": "second", "tag": "colors"}\n',
    "sheet.csv": "id,prompt\n1,first\n2,second\n",
    "meta_data.json": '{"a1": {"category": "people", "prompt": "first"}, "b2": {"prompt": "second"}}',
    "captions_val2014.json": '{"images": [], "annotations": [{"image_id": 9, "caption": "first"}, '
    '{"image_id": 8, "caption": "second"}]}',
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_prompts(name, tmp_path):
    (tmp_path / name).write_text(LISTS[name])
    assert [prompt.text for prompt in read_prompts(tmp_path / name)] == ["first", "second"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n", "there are none in it"),
        ("a.txt", "x" * 10_001, "number 1 has 10001 characters"),
        ("a.jsonl", '{"text": "x"}', "line 1: expected a text under prompt or caption"),
        ("a.jsonl", "x", "cannot be read: Expecting value"),
        ("a.csv", "prompt\nx\n\u0020\n", "number 2 is empty"),
        ("a.json", "3", "expected an object or a list"),
        ("a.json", '{"a": "x"}', "expected a text under"),
        ("a.txt", b"\xff\xfe", "cannot be read: 'utf-8' codec"),
    ],
)
def test_wrong_lists_are_one_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError) as error:
        read_prompts(tmp_path / name)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_texts_and_classes_do_not_mix(run, tmp_path):
    images = write_images(tmp_path / "images")
    scenes_of = run.parent.parent / "scenes"
    common = [
        "train.py",
        "--vae-path",
        "none",
        "--image-size",
        8,
        "--results-dir",
        tmp_path / "runs",
        "--device",
        "cpu",
    ]

    def refused(*flags) -> str:
        error = script(*common, *flags, check=2).stderr
        assert "Traceback" not in error and not (tmp_path / "runs").exists()
        return error

    assert "draws from texts: give --text-encoder" in refused("--data-path", images, "--init-from", run)
    assert "has no class0/000.txt" in refused("--data-path", images, "--text-encoder", "words")
    assert "--num_classes does nothing" in refused(
        "--data-path", scenes_of, "--text-encoder", "words", "--num-classes", 3
    )
    assert "nowhere does not exist" in refused("--data-path", "nowhere", "--text-encoder", "words")
    assert "nowhere.csv cannot be read" in refused("--data-path", "nowhere.csv", "--text-encoder", "words")
    assert "unknown text encoder 'wrods'" in refused("--data-path", scenes_of, "--text-encoder", "wrods")


def test_ends_of_lines_within_texts(tmp_path):
    """What Unicode calls the end of a line stays part of a text, from one command's list to the next one's reader."""
    written = "a seven\u2028left of\x85a two"
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    replace_lines(tmp_path / "captions.jsonl", [{"path": "x.png", "caption": written}])
    assert [prompt.text for prompt in read_prompts(tmp_path / "captions.jsonl")] == [written]
    assert read_captions(tmp_path)[1] == [("x.png", written)]
