"""CLIP score and GenEval: the rules on detections by hand, the plumbing on tiny random networks."""

import csv
import json

import numpy as np
import pytest
import torch
from conftest import script
from PIL import Image
from test_text_networks import WORDS, save_tokenizer

import clip_score
import geneval
from cli import UsageError
from geneval import Detection, judge, kept, relations


def at(x: float, y: float, size: float = 10, score: float = 0.95) -> Detection:
    """Around a centre."""
    return Detection((x - size / 2, y - size / 2, x + size / 2, y + size / 2), score)


# ---------------------------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ((10, 50), {"left of"}),
        ((90, 50), {"right of"}),
        ((50, 10), {"above"}),
        ((50, 90), {"below"}),
        ((10, 10), {"left of", "above"}),
        ((51, 51), set()),  # too near
        ((52.5, 50), {"right of"} if 0.5 / 2.5 > 0.5 else set()),  # beyond the margin, but hardly
        ((55, 50), {"right of"}),
        ((90, 65), {"right of"}),  # 13 of 42.7 upwards is less than half
    ],
)
def test_where_an_object_is(place, expected):
    assert relations(at(*place), at(50, 50)) == expected


def test_which_detections_count():
    found = [at(0, 0, score=score) for score in (0.2, 0.31, 0.95, 0.89)]
    assert [each.score for each in kept(found, "colors")] == [0.95, 0.89, 0.31]
    assert [each.score for each in kept(found, "counting")] == [0.95]
    assert len(kept([at(0, 0)] * 20, "position")) == 16


CASES = {
    "one": ([{"class": "cat", "count": 1}], [], {"cat": [at(0, 0)]}, ""),
    "none": ([{"class": "cat", "count": 1}], [], {}, "expected cat>=1, found 0"),
    "three": ([{"class": "cat", "count": 3}], [{"class": "cat", "count": 4}], {"cat": [at(0, 0)] * 3}, ""),
    "four of three": (
        *([{"class": "cat", "count": 3}], [{"class": "cat", "count": 4}], {"cat": [at(0, 0)] * 4}),
        "expected cat<4, found 4",
    ),
    "colour": ([{"class": "cat", "count": 1, "color": "red"}], [], {"cat": [at(1, 0)]}, ""),
    "other colour": (
        *([{"class": "cat", "count": 1, "color": "blue"}], [], {"cat": [at(1, 0)]}),
        "expected blue cat>=1, found 1 red",
    ),
    "one of two colours": (
        *([{"class": "cat", "count": 2, "color": "red"}], [], {"cat": [at(1, 0), at(2, 0)]}),
        "expected red cat>=2, found 1 green, 1 red",
    ),
    "left": (
        [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
        *([], {"cat": [at(90, 50)], "dog": [at(10, 50)]}, ""),
    ),
    "right": (
        [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
        *([], {"cat": [at(10, 50)], "dog": [at(90, 50)]}, "expected dog left of target, found right of"),
    ),
    "on it": (
        [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["above", 0]}],
        *([], {"cat": [at(10, 50)], "dog": [at(10, 50)]}, "expected dog above target, found neither"),
    ),
    "of nothing": (
        [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
        *([], {"dog": [at(90, 50)]}, "expected cat>=1, found 0\nno target for dog to be left of"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_verdicts(case):
    include, exclude, found, reason = CASES[case]

    def colours(objects, name):  # by where they are
        return ["red" if each.centre[0] == 1 else "green" for each in objects]

    verdict = judge({"tag": "x", "prompt": "", "include": include, "exclude": exclude}, found, colours)
    assert "\n".join(verdict.reasons) == reason and verdict.correct == (reason == "")


def test_the_summary_is_the_mean_over_tasks():
    rows = [("counting", "a", True), ("counting", "a", False), ("counting", "b", False), ("colors", "c", True)]
    rows = [{"tag": tag, "metadata": prompt, "correct": correct} for tag, prompt, correct in rows]
    found = geneval.summary(rows)
    assert (found["images"], found["prompts"]) == (4, 3)
    assert found["correct_images"] == 0.5 and found["correct_prompts"] == pytest.approx(2 / 3)
    assert found["tasks"] == {"counting": pytest.approx(1 / 3), "colors": 1.0}
    assert found["overall"] == pytest.approx(2 / 3)


def test_objects_are_cut_out_on_grey():
    image = Image.fromarray(np.full((8, 8, 3), 200, dtype=np.uint8))
    mask = np.zeros((8, 8), dtype=bool)
    mask[2:5, 3:7] = True
    mask[2, 3] = False
    box = geneval.box_of(mask)
    assert box == (3, 2, 7, 5)
    cut = np.array(geneval.cut_out(image, Detection(box, 1.0, mask)))
    assert cut.shape == (3, 4, 3) and (cut[0, 0] == 0x99).all() and (cut.reshape(-1, 3)[1:] == 200).all()


# ------------------------------------------------------------------------------------------------------------- networks


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    import transformers

    home = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    layers = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    sizes = dict(vocab_size=len(WORDS), bos_token_id=3, eos_token_id=1, pad_token_id=0)
    config = transformers.CLIPConfig(
        text_config=layers | sizes | {"max_position_embeddings": 16},
        vision_config=layers | {"image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    transformers.CLIPModel(config).save_pretrained(home / "clip")
    save_tokenizer(home / "clip", "<s> $A </s>", length=16)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessor(**size).save_pretrained(home / "clip")
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = transformers.SwinConfig(
        image_size=32, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2, out_features=stages
    )
    small = dict(feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16, encoder_layers=1)
    small |= dict(decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=20, num_labels=80)
    detector = transformers.Mask2FormerForUniversalSegmentation(
        transformers.Mask2FormerConfig(backbone_config=swin, **small)
    )
    with torch.no_grad():
        detector.class_predictor.weight.mul_(200)  # so that it is sure of something
    detector.save_pretrained(home / "detector")
    transformers.Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(home / "detector")
    return home


def pictures(folder, names):
    folder.mkdir(parents=True)
    for index, name in enumerate(names):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


def test_clip_score(networks, tmp_path):
    """100 times the cosine that the library's own forward gives, for any number of processes."""
    import transformers

    captions = ["a cat", "seven of two", "one " * 40]
    pictures(tmp_path / "x", [f"{i}.png" for i in range(3)])
    rows = [{"path": f"{i}.png", "caption": caption} for i, caption in enumerate(captions)]
    (tmp_path / "x" / "captions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    command = ["calculate_metrics.py", "clip", tmp_path / "x", "--clip-weights", networks / "clip", "--device", "cpu"]
    tables = []
    for processes in (1, 2):
        output = tmp_path / f"{processes}.csv"
        said = script(*command, "--output", output, "--batch-size", 2, processes=processes).stdout
        tables.append(list(csv.DictReader(output.read_text().splitlines())))
    assert tables[0] == tables[1] and [row["filename"] for row in tables[0]] == ["0.png", "1.png", "2.png"]

    model = transformers.CLIPModel.from_pretrained(networks / "clip").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(networks / "clip")
    processor = transformers.CLIPImageProcessor.from_pretrained(networks / "clip")
    for index, caption in enumerate(captions):
        inputs = tokenizer([caption], truncation=True, max_length=16, return_tensors="pt")
        pixels = processor(images=Image.open(tmp_path / "x" / f"{index}.png"), return_tensors="pt")
        with torch.no_grad():
            scale = model.logit_scale.exp()
            cosine = model(**inputs, **pixels).logits_per_image.item() / scale.item()
        assert float(tables[0][index]["clip_score"]) == pytest.approx(100 * cosine, abs=2e-3)
    mean = np.mean([float(row["clip_score"]) for row in tables[0]])
    assert f"CLIP score {mean:.2f}"[:-1] in said and "of 3 images with captions" in said

    pictures(tmp_path / "named", ["a cat.png", "seven of two.jpg"])
    assert "of 2 images" in script(*command[:2], tmp_path / "named", *command[3:], "--names-are-captions").stdout
    error = script(*command[:2], tmp_path / "named", *command[3:], check=2).stderr
    assert "has no a cat.txt with the caption" in error


def test_geneval(networks, tmp_path):
    """From a folder of drawn prompts to the table, for any number of processes."""
    tags = ["single_object", "counting"]
    for number, tag in enumerate(tags):
        folder = tmp_path / "drawn" / f"{number:05d}"
        pictures(folder / "samples", ["00000.png", "00001.png"])
        about = {"tag": tag, "include": [{"class": "cat", "count": 1, "color": "red"}], "prompt": f"a {tag}"}
        (folder / "metadata.jsonl").write_text(json.dumps(about))
    command = ["calculate_metrics.py", "geneval", tmp_path / "drawn", "--detector", networks / "detector"]
    command += ["--clip-weights", networks / "clip", "--device", "cpu", "--output"]
    said = [script(*command, tmp_path / f"{n}.jsonl", processes=n).stdout for n in (1, 2)]
    assert said[0] == said[1] and (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "1.jsonl").read_text().splitlines()]
    assert [row["tag"] for row in rows] == ["single_object"] * 2 + ["counting"] * 2
    assert all({"filename", "prompt", "correct", "reason", "metadata", "details"} <= row.keys() for row in rows)
    assert "images" in said[0] and "single_object" in said[0] and "overall" in said[0]
    (tmp_path / "drawn" / "00001" / "metadata.jsonl").write_text('{"prompt": "a cat"}')
    error = script(*command, tmp_path / "x.jsonl", check=2).stderr
    assert "00001/metadata.jsonl" in error and "GenEval's prompts have tag and include" in error


def test_detections_are_those_of_the_masks(networks):
    detector = geneval.Detector(str(networks / "detector"), torch.device("cpu"))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    found = [each for all_ in detector(image).values() for each in all_]
    assert found and all(each.mask.shape == (40, 60) and each.score > 0.3 for each in found)
    assert all(geneval.box_of(each.mask) == each.box for each in found)
    reader = geneval.ColourReader(clip_score.CLIP(str(networks / "clip"), torch.device("cpu")))
    assert set(reader(image, found, "cat")) <= set(geneval.COLOURS)


@pytest.mark.parametrize("command", ["clip", "geneval"])
def test_what_is_not_there_is_one_line(command, tmp_path, networks):
    flags = ["--device", "cpu", "--clip-weights", networks / "clip"]
    error = script("calculate_metrics.py", command, tmp_path, *flags, check=2).stderr
    assert "Traceback" not in error and ("no images with captions" in error or "no 00000/metadata.jsonl" in error)
    with pytest.raises(UsageError, match="is no folder here and not in the hub's local cache"):
        clip_score.CLIP("ViT-B/32", torch.device("cpu"))
    with pytest.raises(UsageError, match=r"no config\.json in "):
        geneval.Detector(str(tmp_path), torch.device("cpu"))
    with pytest.raises(UsageError, match="cannot load CLIP|lack"):
        clip_score.CLIP(str(networks / "detector"), torch.device("cpu"))
