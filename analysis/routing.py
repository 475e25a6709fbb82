"""What the experts do while images are drawn: a tally of every choice, and the numbers that describe it.

H halves of a guided batch: conditional, unconditional · L MoE layers · S network evaluations from noise to image
B bins of evaluations · C classes · P patches · E experts · K experts per token · N images of a batch · X examples

All sums are of integers, so their order does not matter: any number of processes finds the same, and so does a command
that was killed and given again.
"""

import json
import math
import re
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from cli import UsageError
from configuration import DiTConfig
from files import replacing
from layers import RowEnds
from records import BadRecord, Name, check_arrays, parse_record
from routers import Routing

STEP_BINS = 16  # of the evaluations, for what is also kept by class or by patch
PROBABILITY_UNIT = 2**-20  # probabilities are summed as whole multiples of it
HALVES = ("conditional", "unconditional")
DEAD = 0.01  # an expert with less than this share of an even load counts as dead
AXES = {  # of what a file holds: see `Tally`
    **{"step_counts": "HLSE", "step_probs": "HLSE", "class_counts": "HLBCE", "class_probs": "HLBCE"},
    **{"patch_counts": "HLBPE", "patch_probs": "HLBPE", "floor_counts": "HLCE", "entropy": "HLS", "overlap": "LS"},
    **{"examples": "XHLSPR", "example_images": "Xhwc"},
}

Natural = Annotated[int, Field(ge=0)]


class About(TypedDict):
    """What a file says of its arrays."""

    checkpoint: Name
    model: str
    settings: Name
    precision: str
    num_experts: Annotated[int, Field(ge=1)]
    top_k: Annotated[int, Field(ge=1)]
    images: Natural
    times: list[float]
    layers: list[Natural]
    classes: list[Natural]
    class_names: list[Name]
    examples: list[Natural]
    example_labels: list[Natural]


# ---------------------------------------------------------------------------------------------------------------- tally


def evaluation_times(config: DiTConfig, objective, settings) -> list[float]:
    """When a sampler evaluates the network, (S,), 1 at pure noise and 0 at the data: it goes through all its steps."""
    times = []

    def silent(x: Tensor, t: float) -> Tensor:
        times.append(t / objective.time_scale)
        return x.new_zeros(len(x), config.out_channels, *x.shape[2:])

    x = torch.zeros(1, config.in_channels, 1, 1)
    objective.sample(silent, x, settings.steps, settings.sampler, randn=lambda: x)
    return times


class Tally:
    """Sums over the network evaluations of a run that draws one image for each of `labels`.

    Args:
        times: of the evaluations (`evaluation_times`).
        guided: are there two halves?
        examples: the images of which every single choice is kept.
        image_size: of the examples, whose pixels are kept too.

    `sums` holds integers, by name:

        step_counts, step_probs     (H, L, S, E)     assignments to each expert; probabilities in PROBABILITY_UNIT
        class_counts, class_probs   (H, L, B, C, E)
        patch_counts, patch_probs   (H, L, B, P, E)
        floor_counts                (H, L, C, E)     as if labels had been dealt anew: see `floor_rows`
        entropy                     (H, L, S)        of each token's probabilities, in PROBABILITY_UNIT nats
        overlap                     (L, S)           experts that a patch has in both halves
        examples                    (X, H, L, S, P, min(K, 2))  1 + the chosen expert, by falling weight; 0: none
        example_images              (X, size, size, 3)
    """

    def __init__(
        self,
        config: DiTConfig,
        labels: Sequence[int],
        times: Sequence[float],
        guided: bool,
        examples: Sequence[int] = (),
        image_size: int = 0,
        device: torch.device | str = "cpu",
    ):
        self.config, self.times, self.labels, self.examples = config, list(times), list(labels), list(examples)
        self.classes = sorted(set(labels))
        self.rows, self.floor_rows = class_rows(self.labels, self.classes)
        halves, layers, steps = 1 + guided, len(config.moe_indices), len(self.times)
        self.bins, experts = min(STEP_BINS, steps), config.expert_count
        self.patches = config.side**2
        top = min(config.num_experts_per_tok, 2)
        by_class = halves, layers, self.bins, len(self.classes), experts
        by_patch = halves, layers, self.bins, self.patches, experts
        by_step = halves, layers, steps, experts
        shapes = {
            **{"step_counts": by_step, "step_probs": by_step},
            **{"class_counts": by_class, "class_probs": by_class, "patch_counts": by_patch, "patch_probs": by_patch},
            "floor_counts": (halves, layers, len(self.classes), experts),
            **{"entropy": (halves, layers, steps), "overlap": (layers, steps)},
            "examples": (len(self.examples), halves, layers, steps, self.patches, top),
            "example_images": (len(self.examples), image_size, image_size, 3),
        }
        small = {"examples": torch.int16, "example_images": torch.uint8}
        self.sums = {
            name: torch.zeros(shape, dtype=small.get(name, torch.int64), device=device)
            for name, shape in shapes.items()
        }

    def add(self, step: int, images: Sequence[int], routings: Sequence[Routing]) -> None:
        """Count evaluation `step` of a batch of `images`; conditional half first if there are two. Asks no host."""
        probs = torch.stack([routing.probs for routing in routings])  # (L, T, E), T = h*N*P
        chosen = torch.stack([routing.chosen for routing in routings])  # (L, T, E)
        halves = probs.shape[1] // (len(images) * self.config.tokens)
        split = (len(routings), halves, len(images), self.patches)
        probs, chosen = map(self._of_patches, (probs, chosen))
        sums, place = self.sums, step * self.bins // len(self.times)
        rows, floor_rows = (self._on_device(table[images]) for table in (self.rows, self.floor_rows))

        for name, values in {"counts": chosen, "probs": in_units(probs)}.items():
            values = values.view(*split, -1).transpose(0, 1)  # (h, L, N, P, E)
            by_image = values.sum(dim=3)  # (h, L, N, E)
            sums[f"step_{name}"][:halves, :, step] += by_image.sum(dim=2)
            sums[f"class_{name}"][:halves, :, place].index_add_(2, rows, by_image)
            sums[f"patch_{name}"][:halves, :, place] += values.sum(dim=2)
            if name == "counts":
                sums["floor_counts"][:halves].index_add_(2, floor_rows, by_image)
                if halves == 2:
                    sums["overlap"][:, step] += (values[0] * values[1]).sum(dim=(1, 2, 3))
        entropy = in_units(torch.special.entr(probs).sum(dim=-1)).view(*split)
        sums["entropy"][:halves, :, step] += entropy.sum(dim=(2, 3)).T

        if shown := [(row, image) for row, image in enumerate(images) if image in self.examples]:
            weights = self._of_patches(torch.stack([routing.dense_weights for routing in routings]))
            weights = torch.where(chosen > 0, weights, -torch.inf).view(*split, -1)  # (L, h, N, P, E)
            for row, image in shown:
                kept = sums["examples"][self.examples.index(image)]
                ranked = weights[:, :, row].topk(kept.shape[-1], dim=-1)
                ranks = torch.where(ranked.values > -torch.inf, 1 + ranked.indices, 0)
                kept[:halves, :, step] = ranks.transpose(0, 1).to(kept.dtype)

    def _of_patches(self, values: Tensor) -> Tensor:
        """(L, h*N*tokens, ...) -> (L, h*N*P, ...): without the ends of rows, where there are some."""
        if not self.config.row_ends:
            return values
        side = self.config.side
        tokens = values.unflatten(1, (-1, self.config.tokens))
        return RowEnds.without(tokens.flatten(0, 1), side, side).unflatten(0, (len(values), -1)).flatten(1, 2)

    def _on_device(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows).to(self.sums["overlap"].device, non_blocking=True)

    def keep_image(self, image: int, pixels: np.ndarray) -> None:
        """`pixels` (size, size, 3) uint8 of an example."""
        kept = self.sums["example_images"]
        kept[self.examples.index(image)] = torch.from_numpy(pixels).to(kept.device)

    def add_sums(self, sums: dict[str, np.ndarray]) -> None:
        """What another process, or an earlier call, found."""
        for name, total in self.sums.items():
            total += torch.from_numpy(sums[name].astype(np.int64)).to(total)

    def result(self, **about) -> "RoutingData":
        """All of it as means and counts; `about` is kept beside."""
        config, sums = self.config, {name: total.cpu().numpy() for name, total in self.sums.items()}
        arrays = {name: np.ascontiguousarray(total) for name, total in sums.items() if name.endswith("_counts")}
        for by in ("step", "class", "patch"):
            tokens = self._tokens(sums[f"{by}_probs"])
            arrays[f"{by}_probs"] = PROBABILITY_UNIT * sums[f"{by}_probs"] / np.maximum(tokens, 1)
        tokens = self._tokens(sums["step_probs"])[..., 0]  # (H, L, S)
        with np.errstate(invalid="ignore"):  # nan where a half was not evaluated
            arrays["entropy"] = sums["entropy"] * (PROBABILITY_UNIT / math.log(max(2, config.num_experts))) / tokens
            arrays["overlap"] = sums["overlap"] / (tokens[-1] * config.num_experts_per_tok)
        if len(tokens) == 1:
            arrays["overlap"] = np.full_like(arrays["overlap"], np.nan)
        arrays |= {name: sums[name] for name in ("examples", "example_images")}
        about |= {
            **{"num_experts": config.expert_count, "top_k": config.num_experts_per_tok, "times": self.times},
            **{"layers": list(config.moe_indices), "classes": self.classes, "images": len(self.labels)},
            **{"examples": self.examples, "example_labels": [self.labels[image] for image in self.examples]},
        }
        return RoutingData(about, {name: array.astype(stored_dtype(name, config)) for name, array in arrays.items()})

    @staticmethod
    def _tokens(probs: np.ndarray) -> np.ndarray:
        """(..., E) sums of probabilities -> (..., 1): how many tokens these are of, each of which has 1."""
        return np.round(PROBABILITY_UNIT * probs.sum(axis=-1, keepdims=True, dtype=np.float64))

    @property
    def file_bytes(self) -> int:
        """Of the result on disk, before it is compressed."""
        dtypes = {name: np.dtype(stored_dtype(name, self.config)) for name in self.sums}
        return sum(dtypes[name].itemsize * total.numel() for name, total in self.sums.items())


def stored_dtype(name: str, config: DiTConfig) -> type:
    if name.endswith("_counts"):
        return np.uint32
    if name.endswith("_probs"):
        return np.float16
    if name == "examples" and config.num_experts > 255:
        return np.uint16
    return np.uint8 if name.startswith("example") else np.float32


def in_units(values: Tensor) -> Tensor:
    """Whole multiples of PROBABILITY_UNIT, int64."""
    return (values.double() / PROBABILITY_UNIT).round().long()


def class_rows(labels: Sequence[int], classes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """For each image the row of its class, and of another class that it is dealt to: the j-th of class c to c + j.

    Dealt so, a row has as many images as before, but of different classes. What the expert still seems to know of the
    row is what it knows of single images: the floor under its information about the class.
    """
    row_of = {label: row for row, label in enumerate(classes)}
    seen, rows, dealt = Counter(), [], []
    for label in labels:
        rows.append(row_of[label])
        dealt.append((row_of[label] + seen[label]) % len(classes))
        seen[label] += 1
    return np.array(rows), np.array(dealt)


class Recorder:
    """A model that tallies its own routing: stands in for it in `sampling.generate`, for one batch of `images`."""

    def __init__(self, model, tally: Tally, images: Sequence[int]):
        self.model, self.tally, self.images, self.step = model, tally, list(images), 0
        self.config, self.parameters = model.config, model.parameters

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        output, routings = self.model(x, t, y, return_routing=True)
        self.tally.add(self.step, self.images, routings)
        self.step += 1
        return output


def recording(model, objective, labels: Sequence[int], settings) -> "Recorder | object":
    """`model` with a tally of its own, to draw one batch of images of `labels`; as it is where it has no experts."""
    if not model.config.moe_indices:
        return model
    times = evaluation_times(model.config, objective, settings)
    device = next(model.parameters()).device
    return Recorder(
        model, Tally(model.config, labels, times, settings.cfg_scale != 1, device=device), range(len(labels))
    )


# ----------------------------------------------------------------------------------------------------------- its result


@dataclass(frozen=True)
class RoutingData:
    """What a `Tally` found. `arrays` are its sums, but mean probabilities, entropies over log E and overlaps over K.

    Where a half was not evaluated (guidance was off) counts and probabilities are 0, entropy and overlap nan.
    """

    about: dict
    arrays: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    @property
    def halves(self) -> tuple[str, ...]:
        return HALVES[: len(self["step_counts"])]

    @property
    def side(self) -> int:
        """Patches in a row of the image."""
        return math.isqrt(self["patch_counts"].shape[3])

    @property
    def of_texts(self) -> bool:
        """Whether its classes are prompts."""
        return "text" in self.about.get("recorded_with", {})

    @cached_property
    def words(self) -> dict[str, list[int]]:
        """The words that some prompts have and others have not, the commonest first, and the rows of these prompts."""
        rows = {}
        for row, text in enumerate(self.about["class_names"]):
            for word in sorted(set(re.findall(r"\w+", text.lower()))):
                rows.setdefault(word, []).append(row)
        telling = {word: found for word, found in rows.items() if 1 < len(found) < len(self.about["classes"])}
        return dict(sorted(telling.items(), key=lambda pair: (-len(pair[1]), pair[0])))

    def by_word(self, values: np.ndarray) -> np.ndarray:
        """(L, C, E) of prompts -> (L, W, E), sums over those that have a word."""
        return np.stack([values[:, rows].sum(axis=1) for rows in self.words.values()], axis=1)

    def half(self, name: str) -> int:
        """Raises UsageError for a half that was not recorded."""
        if name not in self.halves:
            raise UsageError(f"there is no {name} half: recorded without guidance (--cfg-scale 1)")
        return HALVES.index(name)

    def counts(self, by: str, half: int) -> np.ndarray:
        """(L, A, E) float64 assignments by class, patch, step or layer (A = 1)."""
        counts = self[f"{'step' if by == 'layer' else by}_counts"][half].astype(np.float64)
        counts = counts.sum(axis=1) if by in ("class", "patch") else counts
        return counts.sum(axis=1, keepdims=True) if by == "layer" else counts

    def shares(self, by: str, half: int, of: str = "load") -> np.ndarray:
        """(L, A, E) what each expert has of the load, or of the router's probability; sums to 1, nan where no token."""
        if by == "word":
            return self._shares_by_word(half, of)
        if of == "load":
            values = self.counts(by, half)
        else:
            name = "step" if by == "layer" else by
            weights = self[f"{name}_counts"][half].sum(axis=-1, keepdims=True, dtype=np.float64)
            values = self[f"{name}_probs"][half] * weights  # (L, B or S, ..., E)
            values = values if by == "step" else values.sum(axis=1, keepdims=by == "layer")
        with np.errstate(invalid="ignore"):
            return values / values.sum(axis=-1, keepdims=True)

    def _shares_by_word(self, half: int, of: str) -> np.ndarray:
        tokens = self.counts("class", half).sum(axis=-1, keepdims=True)
        values = self.by_word(self.shares("class", half, of) * tokens)
        with np.errstate(invalid="ignore"):
            return values / values.sum(axis=-1, keepdims=True)

    def layer_numbers(self, half: int) -> dict[str, np.ndarray]:
        """What describes each layer, (L,) each: load, certainty, and what the expert tells, in bits.

        `class_floor` is what the estimate of `class_bits` would be if classes did not matter.
        """
        load = self.shares("layer", half)[:, 0] * self.about["num_experts"]  # (L, E), 1 where even
        floor = self["floor_counts"][half]
        return {
            "load_cv": load.std(axis=1),
            "load_max": load.max(axis=1),
            "dead": (load < DEAD).sum(axis=1),
            "entropy": np.nanmean(self["entropy"][half], axis=1),
            "class_bits": mutual_information(self.counts("class", half)),
            "class_floor": mutual_information(floor),
            "position_bits": mutual_information(self.counts("patch", half)),
            "time_bits": mutual_information(self.counts("step", half)),
            "overlap": nan_mean(self["overlap"]),
        }

    def save(self, path: Path) -> None:
        """Write an `.npz` whose bytes depend on the data alone, without pickle. Raises OSError."""
        with replacing(path) as file:
            np.savez_compressed(file, about=np.array(json.dumps(self.about)), **self.arrays)

    @classmethod
    def load(cls, path: Path) -> "RoutingData":
        """Raises UsageError: it is missing, damaged or something else."""
        advice = "make one with python -m analysis.expert_data"
        try:
            with np.load(path) as file:
                arrays = {name: file[name] for name in file.files}
            text = str(arrays.pop("about"))
        except (OSError, ValueError, KeyError, EOFError, AttributeError, zipfile.BadZipFile) as error:
            raise UsageError(f"{path} is not a whole file of routing data ({error}); {advice}") from None
        about = parse_record(text, About, path, advice)
        sizes = {"L": "layers", "S": "times", "C": "classes", "X": "examples"}
        sizes = {letter: len(about[name]) for letter, name in sizes.items()} | {"E": about["num_experts"]}
        patches = check_arrays(arrays, AXES, path, advice, **sizes)["P"]
        lists = {"class_names": "classes", "example_labels": "examples"}
        if wrong := [name for name, other in lists.items() if len(about[name]) != len(about[other])]:
            raise BadRecord(f"{path}: {wrong[0]} and {lists[wrong[0]]} are not of one length; {advice}")
        if not set(about["example_labels"]) <= set(about["classes"]) or math.isqrt(patches) ** 2 != patches:
            raise BadRecord(f"{path}: its examples are of other classes, or {patches} patches no square; {advice}")
        return cls(about, arrays)


def nan_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the last axis over what is not nan; nan where nothing is."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(axis=-1) / known.sum(axis=-1)


def mutual_information(counts: np.ndarray) -> np.ndarray:
    """(..., A, E) counts -> (...) bits that an assignment's expert tells of its class, place or time A: the plug-in
    estimate, which is biased upwards by some (A-1)(E-1) / (2 ln 2) over the number of independent choices."""
    joint = counts / counts.sum(axis=(-2, -1), keepdims=True, dtype=np.float64)
    independent = joint.sum(axis=-1, keepdims=True) * joint.sum(axis=-2, keepdims=True)
    terms = np.log2(np.where(joint > 0, joint, 1) / np.where(joint > 0, independent, 1))
    return (joint * terms).sum(axis=(-2, -1))
