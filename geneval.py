"""GenEval (arXiv 2310.11513): are the objects that a prompt asks for there, as many, so coloured, so placed?

A prompt's `metadata` says what has to be found:

    tag        single_object, two_object, counting, colors, position or color_attr
    include    a list of {"class", "count", perhaps "color", perhaps "position": ["left of", place in this list]}
    exclude    a list of {"class", "count"}: fewer than so many

`judge` decides from detections; where these come from is another matter: `Detector` and `ColourReader` are networks of
transformers, which stand in for the published code's of mmdet and open_clip.

H W image height and width
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NotRequired

import numpy as np
import torch
from PIL import Image
from typing_extensions import TypedDict

from cli import UsageError
from clip_score import CLIP
from hub import brief, fetch, file_of, load_network, place_of
from records import parse_record

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # of a detection's score
MAX_OBJECTS = 16  # of one class
POSITION_THRESHOLD = 0.1  # share of both objects' sizes that a distance must exceed
BACKGROUND = "#999"  # around an object whose colour is read
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
DETECTORS = {"mask2former": "facebook/mask2former-swin-small-coco-instance"}
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

NAMES = """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, parking
    meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie,
    suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis
    racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot
    dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse, tv
    remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors,
    teddy bear, hair drier, toothbrush
"""
COCO = [name.strip() for name in NAMES.split(",")]  # the 80 classes in their order, as GenEval's prompts call them


@dataclass
class Detection:
    """An object: (x0, y0, x1, y1) in pixels, how sure, and the pixels that are its, (H, W) bool."""

    box: tuple[float, float, float, float]
    score: float
    mask: np.ndarray | None = None

    @property
    def centre(self) -> np.ndarray:
        return np.array(self.box).reshape(2, 2).mean(axis=0)

    @property
    def size(self) -> np.ndarray:
        return np.abs(np.subtract(self.box[2:], self.box[:2]))


Wanted = TypedDict(  # an object that a prompt asks for, or how many of it must not be there
    "Wanted",
    {"class": str, "count": int, "color": NotRequired[str], "position": NotRequired[tuple[str, int]]},
)


class Metadata(TypedDict):
    """metadata.jsonl of a prompt."""

    tag: str
    prompt: str
    include: list[Wanted]
    exclude: NotRequired[list[Wanted]]


@dataclass
class Verdict:
    correct: bool
    reasons: list[str] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------------------------- rules


def kept(found: Sequence[Detection], tag: str) -> list[Detection]:
    """Of the detections of one class those that count, the surest first."""
    least = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    return sorted((each for each in found if each.score > least), key=lambda each: -each.score)[:MAX_OBJECTS]


def relations(one: Detection, other: Detection) -> set[str]:
    """Where `one` is, seen from `other`; nothing where they are too near each other to tell."""
    offset = one.centre - other.centre
    beyond = np.maximum(np.abs(offset) - POSITION_THRESHOLD * (one.size + other.size), 0) * np.sign(offset)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    x, y = beyond / np.linalg.norm(offset)
    is_so = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, so in is_so.items() if so}


def judge(
    metadata: Metadata, found: dict[str, list[Detection]], colours: Callable[[Sequence[Detection], str], list[str]]
) -> Verdict:
    """Whether an image is what its prompt asks for, and all that is wrong with it.

    Args:
        found: by class, what `kept` leaves.
        colours: reads those of some objects of a class.
    """
    verdict, groups = Verdict(True), []
    for wanted in metadata["include"]:
        name, count = wanted["class"], wanted["count"]
        objects = found.get(name, [])[:count]
        wrong = _what_is_wrong(wanted, objects, groups, colours)
        verdict.reasons += wrong
        groups.append(None if wrong else objects)
    for unwanted in metadata.get("exclude", ()):
        name, count = unwanted["class"], unwanted["count"]
        there = len(found.get(name, []))
        if there >= count:
            verdict.reasons.append(f"expected {name}<{count}, found {there}")
    verdict.correct = not verdict.reasons
    return verdict


def _what_is_wrong(wanted: Wanted, objects: list[Detection], groups: list, colours) -> list[str]:
    name, count = wanted["class"], wanted["count"]
    if len(objects) < count:
        return [f"expected {name}>={count}, found {len(objects)}"]
    if "color" in wanted:
        seen = colours(objects, name)
        if seen.count(wanted["color"]) < count:
            others = ", ".join(f"{seen.count(colour)} {colour}" for colour in sorted(set(seen)))
            return [f"expected {wanted['color']} {name}>={count}, found {others}"]
    if "position" in wanted:
        relation, place = wanted["position"]
        targets = groups[place]
        if targets is None:
            return [f"no target for {name} to be {relation}"]
        for each in objects:
            for target in targets:
                if relation not in (there := relations(each, target)):
                    return [f"expected {name} {relation} target, found {' and '.join(sorted(there)) or 'neither'}"]
    return []


def summary(rows: Sequence[dict]) -> dict:
    """Of results: how many images and prompts, and which share of them is right; by task, and the mean over tasks."""
    by_prompt: dict[str, list[bool]] = {}
    by_tag: dict[str, list[bool]] = {}
    for row in rows:
        by_prompt.setdefault(row["metadata"], []).append(row["correct"])
        by_tag.setdefault(row["tag"], []).append(row["correct"])
    tasks = {tag: float(np.mean(by_tag[tag])) for tag in sorted(by_tag, key=lambda t: (*TAGS, t).index(t))}
    return {
        "images": len(rows),
        "prompts": len(by_prompt),
        "correct_images": float(np.mean([row["correct"] for row in rows])),
        "correct_prompts": float(np.mean([any(found) for found in by_prompt.values()])),
        "tasks": tasks,
        "overall": float(np.mean(list(tasks.values()))),
    }


# --------------------------------------------------------------------------------------------------------------- images


def open_samples(folder: Path) -> list[tuple[Path, Metadata]]:
    """The images of `00000/samples/*.png`, each with what `00000/metadata.jsonl` asks for.

    Raises:
        UsageError: there are none, or a prompt says nothing that can be found.
    """
    found = []
    for about in sorted(folder.glob("[0-9]*/metadata.jsonl")):
        text = about.read_text(encoding="utf-8")
        metadata = parse_record(text, Metadata, about, "GenEval's prompts have tag and include")
        images = sorted((about.parent / "samples").glob("*.png"))
        if not images:
            raise UsageError(f"{about.parent} has no samples/*.png")
        found += [(path, metadata) for path in images]
    if not found:
        how = "sample_ddp.py --prompts FILE --layout geneval draws them"
        raise UsageError(f"no 00000/metadata.jsonl in {folder}: {how}")
    return found


class Detector:
    """Mask2Former of transformers, trained on COCO's instances: a folder, a hub name, or a key of `DETECTORS`."""

    def __init__(self, path: str, device: torch.device):
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        place = place_of(path, DETECTORS, "detector")
        folder = str(Path(file_of(place, "config.json", "detector")).parent)
        fetch(place, "detector")
        self.network = load_network(Mask2FormerForUniversalSegmentation, folder, "detector").to(device)
        try:
            self.processor = AutoImageProcessor.from_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(f"cannot load the detector's preprocessing in {folder}: {brief(error)}") from None
        if self.network.config.num_labels != len(COCO):
            classes = self.network.config.num_labels
            raise UsageError(f"the detector {place} knows {classes} classes, COCO's instances are of {len(COCO)}")
        self.device = device

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> dict[str, list[Detection]]:
        """By class, all that it is at least `THRESHOLD` sure of."""
        inputs = self.processor(images=image, return_tensors="pt").to(self.device)
        outputs = self.network(**inputs)
        (found,) = self.processor.post_process_instance_segmentation(
            outputs, threshold=THRESHOLD, target_sizes=[image.size[::-1]], return_binary_maps=True
        )
        detections: dict[str, list[Detection]] = {}
        masks = found["segmentation"]
        for segment, mask in zip(found["segments_info"], () if masks is None else masks, strict=True):
            mask = mask.cpu().numpy().astype(bool)
            if mask.any():
                box = box_of(mask)
                detections.setdefault(COCO[segment["label_id"]], []).append(Detection(box, segment["score"], mask))
        return detections


def box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    """The smallest box around a mask (H, W) that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


class ColourReader:
    """Which colour CLIP takes an object for, cut out of its image and put on grey."""

    def __init__(self, clip: CLIP):
        self.clip, self._known = clip, {}

    def __call__(self, image: Image.Image, objects: Sequence[Detection], name: str) -> list[str]:
        """(N,) of `COLOURS`."""
        crops = [cut_out(image, each) for each in objects]
        nearest = (self.clip.of_images(crops) @ self._texts(name).T).argmax(dim=-1)
        return [COLOURS[index] for index in nearest.tolist()]

    def _texts(self, name: str) -> torch.Tensor:
        """(colours, F): the mean direction of what is said of each."""
        if name not in self._known:
            said = [[template.format(colour=colour, name=name) for template in TEMPLATES] for colour in COLOURS]
            means = torch.stack([self.clip.of_texts(texts).mean(dim=0) for texts in said])
            self._known[name] = means / means.norm(dim=-1, keepdim=True)
        return self._known[name]


def cut_out(image: Image.Image, found: Detection) -> Image.Image:
    if found.mask is not None:
        ground = Image.new("RGB", image.size, BACKGROUND)
        image = Image.composite(image.convert("RGB"), ground, Image.fromarray(found.mask))
    return image.crop(tuple(round(edge) for edge in found.box))


def evaluate(path: Path, image: Image.Image, metadata: Metadata, detector, colours) -> dict:
    """A row of the results: what was asked for, whether it is there, why not, and what was found."""
    found = {name: objects for name, all_ in detector(image).items() if (objects := kept(all_, metadata["tag"]))}
    verdict = judge(metadata, found, lambda objects, name: colours(image, objects, name))
    boxes = {name: [[*each.box, each.score] for each in objects] for name, objects in found.items()}
    return {
        "filename": str(path),
        "tag": metadata["tag"],
        "prompt": metadata["prompt"],
        "correct": verdict.correct,
        "reason": "\n".join(verdict.reasons),
        "metadata": json.dumps(metadata),
        "details": json.dumps(boxes),
    }
