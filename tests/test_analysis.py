"""What the experts did: tallies against slow loops, information against known cases, maps, the page in a browser."""

import dataclasses
import itertools
import json
import math
import signal
from collections import Counter
from pathlib import Path

import faults
import numpy as np
import pytest
import torch
from conftest import ROOT, asked_for, script
from sklearn.metrics import mutual_info_score
from test_sampling import publish, random_model
from test_training import run_train

import checkpoint
import sampling
from analysis import expert_data, heatmaps, plots, report, routing
from analysis.routing import RoutingData, Tally, evaluation_times, mutual_information
from autoencoders import PixelSpace
from cli import UsageError
from configuration import DiTConfig, build_config
from diffusion import GaussianDiffusion, RectifiedFlow

COMMON = ["--vae-path", "none", "--device", "cpu", "--batch-size", "4", "--num-sampling-steps", "3"]


@pytest.fixture
def ckpt(tmp_path) -> Path:
    return publish(tmp_path / "tiny.pt", random_model(), rf=True)


def argv(ckpt: Path, output: Path, *more) -> list[str]:
    return [*COMMON, "--ckpt", str(ckpt), "--output", str(output), *map(str, more)]


def record(ckpt: Path, output: Path, *more) -> RoutingData:
    """Run the script in this process; what it wrote."""
    expert_data.main(expert_data.get_parser().parse_args(argv(ckpt, output, *more)))
    return RoutingData.load(output)


# --------------------------------------------------------------------------------------------------------------- tally


class Listener:
    """A model that keeps the routings of every evaluation."""

    def __init__(self, model):
        self.model, self.config, self.parameters, self.heard = model, model.config, model.parameters, []

    def __call__(self, x, t, y):
        output, routings = self.model(x, t, y, return_routing=True)
        self.heard.append([(r.probs.double().numpy(), r.expert_ids.numpy(), r.weights.numpy()) for r in routings])
        return output


def choices(model, objective, settings, labels: list[int], batch_size: int):
    """Every choice of every router: (image, evaluation, half, layer, patch, probs, experts by falling weight)."""
    patches = (model.config.input_size // model.config.patch_size) ** 2
    for start in range(0, len(labels), batch_size):
        images = range(start, min(start + batch_size, len(labels)))
        listener = Listener(model)
        part = labels[images.start : images.stop]
        next(sampling.generate(listener, objective, PixelSpace(), part, settings, indices=images, batch_size=len(part)))
        for step, layers in enumerate(listener.heard):
            for layer, (probs, ids, weights) in enumerate(layers):
                for token in range(len(probs)):
                    row, patch = divmod(token, patches)
                    half, row = divmod(row, len(images))
                    order = np.argsort(-weights[token], kind="stable")
                    yield images[row], step, half, layer, patch, probs[token], ids[token][order].tolist()


@pytest.mark.parametrize(
    ("flags", "model", "objective"),
    [
        (["--sampler", "heun", "--cfg-scale", "2", "--cfg-interval", "0.3", "0.9"], {}, RectifiedFlow()),
        (["--cfg-scale", "1"], dict(num_experts_per_tok=1, moe_layers="0,2"), GaussianDiffusion()),
        (["--cfg-scale", "1.5"], dict(num_experts_per_tok=3), RectifiedFlow()),
    ],
    ids=["heun, guided in part", "ddpm, not guided, 1 expert", "guided, 3 experts"],
)
def test_everything_recorded_equals_a_slow_loop(tmp_path, flags, model, objective):
    model, labels = random_model(**model), [3, 3, 3, 0, 0, 0]
    config = model.config
    flags = [*flags, "--class-labels", 3, 0, "--images-per-class", 3, "--examples", 2]
    ckpt = tmp_path / "ckpt"
    facts = {"format": 1, "model": config.to_dict(), "objective": objective.config(), "space": {"path": "none"}}
    checkpoint.save(
        ckpt, {"ema": model.state_dict()}, {"config": facts | {"data": {"class_names": ["a", "b", "c", "d"]}}}
    )
    data = record(ckpt, tmp_path / "data.npz", *flags)
    args = expert_data.get_parser().parse_args(argv(ckpt, tmp_path / "x", *flags))
    settings = sampling.Settings.from_args(args, objective, config.in_channels)

    shape = data["step_counts"].shape
    halves, layers, steps, experts = shape
    assert halves == (1 if settings.cfg_scale == 1 else 2) and steps == (5 if settings.sampler == "heun" else 3)
    assert (
        layers == len(config.moe_indices)
        and data.about["class_names"] == ["a", "d"]
        and data.about["top_k"] == config.num_experts_per_tok
    )
    bins = [step * min(16, steps) // steps for step in range(steps)]
    expected = {name: np.zeros(data[name].shape) for name in data.arrays}
    tokens = {by: np.zeros(data[f"{by}_counts"].shape[:-1]) for by in ("step", "class", "patch")}
    both: dict[tuple, list] = {}
    dealt = [1, 0, 1, 0, 1, 0]  # class 3 is row 1: its images go to rows 1, 0, 1; those of class 0 to rows 0, 1, 0
    assert routing.class_rows(labels, [0, 3])[1].tolist() == [1, 0, 1, 0, 1, 0]
    for image, step, half, layer, patch, probs, chosen in choices(model, objective, settings, labels, 4):
        row = [0, 3].index(labels[image])
        places = {
            "step": (half, layer, step),
            "class": (half, layer, bins[step], row),
            "patch": (half, layer, bins[step], patch),
        }
        for by, place in places.items():
            tokens[by][place] += 1
            expected[f"{by}_probs"][place] += probs
            for expert in chosen:
                expected[f"{by}_counts"][(*place, expert)] += 1
        for expert in chosen:
            expected["floor_counts"][half, layer, dealt[image], expert] += 1
        expected["entropy"][half, layer, step] += -(probs * np.log(probs)).sum() / math.log(experts)
        both.setdefault((layer, step, image, patch), []).append(set(chosen))
        if image in (0, 5):
            example = [0, 5].index(image)
            expected["examples"][example, half, layer, step, patch] = [1 + expert for expert in chosen[:2]]
    for (layer, step, _, _), sets in both.items():
        same = len(sets[0] & sets[1]) / len(sets[0]) if len(sets) == 2 else np.nan
        expected["overlap"][layer, step] += same / (len(labels) * data.side**2)
    with np.errstate(invalid="ignore"):
        expected["entropy"] /= tokens["step"]

    for name in ("step_counts", "class_counts", "patch_counts", "floor_counts", "examples"):
        assert np.array_equal(data[name], expected[name]), name
    for by, count in tokens.items():
        assert np.allclose(data[f"{by}_probs"], expected[f"{by}_probs"] / np.maximum(count, 1)[..., None], atol=5e-4)
    assert np.allclose(data["entropy"], expected["entropy"], atol=1e-5, equal_nan=True)
    assert np.allclose(data["overlap"], expected["overlap"], atol=1e-6, equal_nan=True)
    assert np.isnan(data["overlap"]).any() == (settings.cfg_interval != (0, 1) or halves == 1)
    batches = sampling.generate(model, objective, PixelSpace(), labels, settings, batch_size=4)
    assert np.array_equal(data["example_images"], np.concatenate(list(batches))[[0, 5]])


def test_evaluation_times():
    config = build_config("DiT-Nano/2", input_size=8, in_channels=3)

    def times(objective, sampler, steps):
        return evaluation_times(config, objective, sampling.Settings(steps, sampler))

    assert times(RectifiedFlow(), "euler", 4) == [1, 0.75, 0.5, 0.25]
    assert times(RectifiedFlow(time_scale=1000), "heun", 2) == [1, 0.5, 0.5]
    ddpm = times(GaussianDiffusion(), "ddpm", "5")
    assert len(ddpm) == 5 and ddpm == sorted(ddpm, reverse=True) and ddpm[-1] == 0


def test_xl_with_a_thousand_classes_stays_below_200_mb(ckpt, tmp_path):
    config = build_config("DiT-XL/2", num_experts=16)
    labels = [label for label in range(1000) for _ in range(50)]
    tally = Tally(config, labels, [0.0] * 250, True, range(4), 256, device="meta")
    H, L, S, B, C, P, E, X = 2, 28, 250, 16, 1000, 256, 16, 4
    cells = H * L * (S + B * C + B * P) * E  # by step, class and patch: a count (4 bytes) and a probability (2)
    rest = 4 * (H * L * C * E + H * L * S + L * S) + X * H * L * S * P * 2 + X * 256 * 256 * 3
    assert tally.file_bytes == 6 * cells + rest < 200e6
    data = record(ckpt, tmp_path / "data.npz")
    tiny = Tally(random_model().config, [0, 1, 2, 3] * 4, [0.0] * 3, True, range(4), 8)
    assert sum(array.nbytes for array in data.arrays.values()) == tiny.file_bytes
    assert (tmp_path / "data.npz").stat().st_size < tiny.file_bytes


def test_dealing_anew_keeps_sizes_and_mixes_classes():
    labels = [7] * 6 + [2] * 6 + [5] * 6
    rows, dealt = routing.class_rows(labels, [2, 5, 7])
    assert rows.tolist() == [2] * 6 + [0] * 6 + [1] * 6
    assert Counter(dealt) == Counter(rows)
    assert Counter(zip(rows.tolist(), dealt.tolist(), strict=True)) == {(a, b): 2 for a in range(3) for b in range(3)}


# --------------------------------------------------------------------------------------------------------- information


def test_information_of_known_cases():
    assert mutual_information(np.diag([5, 5, 5, 5])) == pytest.approx(2)  # expert = class: the entropy of the class
    uneven = np.array([8, 4, 2, 2]) / 16
    assert mutual_information(np.diag(uneven)) == pytest.approx(-(uneven * np.log2(uneven)).sum())
    assert mutual_information(np.outer([1, 2, 3], [4, 1, 1, 7])) == pytest.approx(0, abs=1e-12)
    halves = np.array([[4, 4, 0, 0], [0, 0, 4, 4]])  # two classes with two experts of their own each
    assert mutual_information(halves) == pytest.approx(1)


def test_information_equals_a_direct_computation():
    counts = np.random.default_rng(0).integers(0, 9, (3, 2, 10, 6))
    found = mutual_information(counts)
    assert found.shape == (3, 2)
    for place in np.ndindex(3, 2):
        assert found[place] * math.log(2) == pytest.approx(mutual_info_score(None, None, contingency=counts[place]))


def test_numbers_of_a_layer():
    data = synthetic(layers=2, experts=4)
    data["step_counts"][0, 0] = np.array([300, 100, 0, 0])
    data["step_counts"][0, 1] = 100
    data["class_counts"][0] = np.eye(4)[None, None]
    data["floor_counts"][0] = 1
    data["overlap"][:] = [[0.5, np.nan, 1.0], [np.nan] * 3]
    numbers = data.layer_numbers(0)
    assert numbers["load_max"].tolist() == [3, 1] and numbers["dead"].tolist() == [2, 0]
    assert numbers["load_cv"] == pytest.approx([math.sqrt(1.5), 0])
    assert numbers["class_bits"] == pytest.approx(2) and numbers["class_floor"] == pytest.approx(0)
    assert numbers["overlap"][0] == 0.75 and np.isnan(numbers["overlap"][1])
    assert np.isnan(data.layer_numbers(1)["overlap"]).sum() == 1


# ------------------------------------------------------------------------------------------- processes, killed, resumed


def test_killed_and_resumed_gives_the_same_bytes(ckpt, tmp_path, capsys, monkeypatch):
    flags = ["--images-per-class", 8, "--save-every", 0, "--num-sampling-steps", 8]  # 8 batches
    record(ckpt, tmp_path / "whole.npz", *flags)
    cut, parts = tmp_path / "cut.npz", tmp_path / "cut.npz.parts"

    def batches_done() -> int:
        found = parts / "000000.npz"
        return int(expert_data.read_part(found)["done"].sum()) if found.exists() else 0

    child = faults.Child(lambda: record(ckpt, cut, *flags), tmp_path / "output.txt")
    faults.wait_until(lambda: batches_done() > 1)
    child.kill()
    assert child.wait() == -signal.SIGKILL, (tmp_path / "output.txt").read_text()
    kept = batches_done()
    assert 1 < kept < 8 and not cut.exists()

    drawn, generate = [], sampling.generate
    monkeypatch.setattr(
        sampling, "generate", lambda *a, indices, **k: drawn.extend(indices) or generate(*a, indices=indices, **k)
    )
    record(ckpt, cut, *flags)
    assert drawn == list(range(4 * kept, 32)) and not parts.exists()
    assert cut.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    drawn.clear()
    record(ckpt, cut, *flags)
    assert drawn == []


def test_a_damaged_part_is_recorded_again(ckpt, tmp_path):
    whole, cut = tmp_path / "whole.npz", tmp_path / "cut.npz"
    record(ckpt, whole)
    args = expert_data.get_parser().parse_args(argv(ckpt, cut))
    loaded = sampling.load_for_sampling(args, torch.device("cpu"))
    job = expert_data.plan(args, loaded, "fp32")
    assert job.open() == ([0, 1, 2, 3], 0)
    for number in (0, 1):
        done = job.no_batch()
        done[number] = 1
        tally = job.tally("cpu")
        expert_data.draw_batch(loaded, job, number, tally, expert_data.progress_bar(1, SILENT))
        expert_data.write_part(job.part(number), tally, done)
    assert job.open() == ([2, 3], 2)
    damaged = bytearray(job.part(1).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    job.part(1).write_bytes(damaged)
    assert job.open() == ([1, 2, 3], 2)
    record(ckpt, cut)
    assert cut.read_bytes() == whole.read_bytes()


class SILENT:
    is_main = False


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(ckpt, tmp_path):
    flags = ["--images-per-class", 3]  # 3 batches for 2 processes
    record(ckpt, tmp_path / "one.npz", *flags)
    result = script("analysis/expert_data.py", *argv(ckpt, tmp_path / "two.npz", *flags), processes=2)
    assert result.stdout.count("12 images") == 2  # before and after, once each
    assert (tmp_path / "two.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()


# --------------------------------------------------------------------------------------------------------- wrong input


def test_wrong_input(ckpt, tmp_path):
    def refused(message: str, *flags, path: Path = ckpt, output: Path = tmp_path / "data.npz"):
        with pytest.raises(UsageError, match=message):
            record(path, output, *flags)

    refused("class label 4 is not one of the model's classes 0..3", "--class-labels", 4)
    refused("dense model", path=publish(tmp_path / "dense.pt", random_model(num_experts=0), rf=True))
    refused("--output .* cannot be written", output=ROOT / "LICENSE" / "data.npz")
    assert not (tmp_path / "data.npz").exists()
    record(ckpt, tmp_path / "data.npz", "--cfg-scale", 1)
    refused("recorded with cfg_scale 1.0, now it is 2.0: remove it, or use another --output", "--cfg-scale", 2)
    with pytest.raises(UsageError, match="no unconditional half"):
        run(heatmaps, tmp_path / "data.npz", "--half", "unconditional")
    whole = (tmp_path / "data.npz").read_bytes()
    (tmp_path / "data.npz").write_bytes(whole[: len(whole) // 2])
    for tool in (heatmaps, report):
        with pytest.raises(UsageError, match="not a whole file of routing data"):
            run(tool, tmp_path / "data.npz")
        with pytest.raises(UsageError, match="not a whole file of routing data.*No such file"):
            run(tool, tmp_path / "absent.npz")
    refused("not a whole file of routing data", "--cfg-scale", 1)
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(UsageError, match="not a whole file of routing data"):
        run(report, tmp_path / "images.npz")


def run(tool, *arguments) -> None:
    tool.main(tool.get_parser().parse_args([str(argument) for argument in arguments]))


# ---------------------------------------------------------------------------------------------------------------- maps


def synthetic(layers: int = 3, experts: int = 4, side: int = 4, classes: int = 4, steps: int = 3) -> RoutingData:
    """Random choices in place of a network's: each layer prefers some experts for some classes, patches and steps."""
    rng = np.random.default_rng(0)
    config = DiTConfig(layers, 64, 2, 4, 2 * side, num_classes=classes, num_experts=experts)
    tally = Tally(config, list(range(classes)), np.linspace(1, 0, steps), True, range(2), 2 * side)
    for by in ("step", "class", "patch", "floor"):
        counts = tally.sums[f"{by}_counts"]
        prefers = torch.from_numpy(rng.normal(size=(layers, 1, 1, experts))).view(
            1, layers, *[1] * (counts.ndim - 3), experts
        )
        counts.copy_(1000 * (prefers + torch.from_numpy(rng.normal(size=counts.shape))).softmax(-1))
        if by != "floor":
            tally.sums[f"{by}_probs"].copy_(counts / routing.PROBABILITY_UNIT / config.num_experts_per_tok)
    tally.sums["entropy"].fill_(1 << 20)
    tally.sums["examples"].copy_(torch.from_numpy(rng.integers(1, experts + 1, tally.sums["examples"].shape)))
    for image in range(2):
        tally.keep_image(image, rng.integers(0, 256, (2 * side, 2 * side, 3), dtype=np.uint8))
    about = dict(
        model="synthetic", checkpoint="a <synthetic> network", settings="euler3-cfg1.5-seed0", precision="fp32"
    )
    return tally.result(**about, class_names=[f"the name of class {label}" for label in range(classes)])


def overlapping(labels, renderer) -> list[str]:
    """The texts that lie on the next one."""
    boxes = [(label.get_text(), label.get_window_extent(renderer)) for label in labels if label.get_text()]
    return [a for (a, box), (_, other) in itertools.pairwise(boxes) if box.overlaps(other)]


@pytest.mark.parametrize("by", plots.MAPS)
@pytest.mark.parametrize(
    "size",
    [
        dict(layers=3, experts=4, steps=10),
        dict(layers=12, experts=8, classes=60, side=8, steps=50),
        pytest.param(dict(layers=40, experts=16, classes=1000, steps=250), marks=pytest.mark.slow),
        pytest.param(dict(layers=12, experts=64, classes=100, side=8, steps=50), marks=pytest.mark.slow),
    ],
    ids=lambda size: f"{size['layers']}x{size['experts']}",
)
def test_maps_are_readable_at_every_size(by, size):
    figure = plots.draw(by, synthetic(**size))
    plots.pixels(figure, 100)
    renderer = figure.canvas.get_renderer()
    shown = [axes for axes in figure.axes if axes.get_visible()]
    panels = [axes for axes in shown if axes.images and axes.get_label() != "<colorbar>"]
    assert len(panels) == (2 if by == "layer" else size["layers"])
    for axes in panels:
        height = axes.get_window_extent(renderer)
        assert min(height.width, height.height) > 50, "a panel is too small to read"
    for axes in shown:
        for axis in (axes.xaxis, axes.yaxis):
            labels = [label for label in axis.get_ticklabels() if label.get_visible()]
            low, high = sorted(axis.get_view_interval())
            inside = [label for label, tick in zip(labels, axis.get_ticklocs(), strict=False) if low <= tick <= high]
            assert overlapping(inside, renderer) == [], axes.get_title()
    titles = [axes.title for axes in panels]
    assert overlapping(titles, renderer) == [] and all(title.get_text() for title in titles)
    frame = figure.bbox.padded(2)
    for text in [figure._suptitle, *titles, *(axes.yaxis.label for axes in shown)]:
        box = text.get_window_extent(renderer)
        if text.get_text():
            assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1, (
                text.get_text()
            )


def test_colours_are_load_over_an_even_share():
    data = synthetic()
    data["class_counts"][0] = 100
    data["class_counts"][0, 1, :, 2] = [300, 100, 0, 0]
    panels = [axes.images[0] for axes in plots.draw("class", data).axes if axes.images and axes.get_title()]
    assert (panels[0].get_array() == 0).all() and panels[0].cmap(panels[0].norm(0))[:3] == pytest.approx(
        (0.97,) * 3, abs=0.01
    )
    row = panels[1].get_array()[2]
    assert row[1] == 0 and row[2] == row[3] == panels[1].norm.vmin and row[0] == panels[1].norm.vmax == 1  # E/K = 2
    with_probs = plots.relative(data, "class", "conditional", "probability")
    assert not np.allclose(with_probs, plots.relative(data, "class", "conditional", "load"))
    picture, corners, size = plots.mosaic(np.arange(32).reshape(16, 2), 1, 4)
    assert size == 8 and corners == [(0, 0), (9, 0)] and picture.shape == (17, 8) and np.isnan(picture[8]).all()
    assert picture[9, 0] == 1 and picture[16, 7] == 31 and picture[9, 6] == 7  # patch 3 of expert 1


def test_maps_as_files(tmp_path):
    synthetic().save(tmp_path / "data.npz")
    flags = ["--by", "class", "step", "--half", "unconditional"]
    for folder in ("a", "b"):
        run(heatmaps, tmp_path / "data.npz", *flags, "--output", tmp_path / folder)
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    names = {f"data-by-{by}-unconditional.{suffix}" for by in ("class", "step") for suffix in ("png", "pdf")}
    assert set(files) == names and files == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    starts = {"png": b"\x89PNG", "pdf": b"%PDF"}
    assert all(content.startswith(starts[name[-3:]]) for name, content in files.items())


def test_maps_of_one_half(ckpt, tmp_path):
    data = record(ckpt, tmp_path / "data.npz", "--cfg-scale", 1)
    for by in plots.MAPS:
        assert plots.pixels(plots.draw(by, data), 50).std() > 10


def test_training_shows_routing_in_tensorboard(images):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def pictures(*flags) -> dict[str, list[int]]:
        folder = run_train(images, "--sample-every", "2", *flags, steps=2) / "tensorboard"
        events = EventAccumulator(str(folder), size_guidance={"images": 0})
        events.Reload()
        return {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}

    assert pictures() == {tag: [2] for tag in ("samples", *(f"routing/{by}" for by in plots.MAPS))}
    assert pictures("--num_experts", "0") == {"samples": [2]}


# -------------------------------------------------------------------------------------------------------------- report


def test_the_page_is_complete_in_itself(tmp_path):
    data = synthetic()
    data["overlap"][:] = np.nan
    page = report.make_page(data, examples=1, steps=2, dpi=30)
    assert "{{" not in page and "a &lt;synthetic&gt; network" in page and "<synthetic>" not in page
    assert "http" not in page and 'src="' not in page.replace('src="data:', "") and "@import" not in page
    contents = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert contents["steps"] == [0, 2] and len(contents["examples"]) == 1
    assert contents["numbers"]["conditional"]["overlap"] == [None] * 3


def test_names_cannot_break_out_of_the_page():
    """Names are the user's: they are neither script, nor a place of the template, nor a formula."""
    data = synthetic()
    names = ["</script><script>alert(1)</script>", "{{DATA}}", "$x_{$", r"$\frac{$ and $"]
    data.about.update(checkpoint="{{DATA}} <b>", class_names=names, model="a $ and a $")
    page = report.make_page(data, dpi=30)
    assert "{{DATA}} &lt;b&gt;" in page and page.count("</script>") == report.TEMPLATE.read_text().count("</script>")
    contents = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert names[0] in contents["examples"][0]["title"] and names[1] in contents["examples"][1]["title"]
    figure = plots.draw("class", data)
    plots.pixels(figure)  # drawing is what a formula that does not parse would break
    ticks = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert ticks == [plots.plain(plots.shortened(name)) for name in names]


@pytest.mark.parametrize("half", [0, 1])
def test_entropy_is_that_of_the_half_asked_for(half):
    data = synthetic(layers=2)
    data["entropy"][0], data["entropy"][1] = 0.25, 0.75
    assert data.layer_numbers(half)["entropy"] == pytest.approx([(0.25, 0.75)[half]] * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"about": "["}, "is not JSON"),
        ({"about": {"times": "now"}}, "times is 'now'"),
        ({"about": {"classes": None}}, "classes is None"),
        ({"about": {"class_names": ["a"]}}, "class_names and classes are not of one length"),
        ({"about": {"example_labels": [7, 7]}}, "its examples are of other classes"),
        ({"about": {"num_experts": 5}}, r"step_counts is \(2, 3, 3, 4\), expected \(H, 3, 3, 5\)"),
        ({"step_counts": np.zeros((2, 3))}, r"step_counts is \(2, 3\)"),
        ({"examples": None}, "there is no examples"),
        ({"example_images": np.zeros((1, 8, 8, 3), np.uint8)}, "example_images is"),
    ],
)
def test_files_that_disagree_with_themselves_are_refused(tmp_path, change, message):
    path = tmp_path / "data.npz"
    synthetic().save(path)
    with np.load(path) as file:
        arrays = dict(file)
    about = change.pop("about", {})
    if isinstance(about, dict):
        about = json.dumps(json.loads(str(arrays["about"])) | about)
    arrays = {name: value for name, value in (arrays | change).items() if value is not None}
    np.savez(path, **(arrays | {"about": np.array(about)}))
    for tool in (report, heatmaps):
        with pytest.raises(UsageError, match=message):
            run(tool, path)


@pytest.mark.slow
def test_the_page_in_a_browser(browser, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select, WebDriverWait

    data = synthetic(layers=3, experts=4, steps=3)
    path = tmp_path / "data.npz"
    data.save(path)
    run(report, path, "--dpi", 50)
    browser.get(path.with_suffix(".html").as_uri())

    def find(name: str):
        return browser.find_element(By.ID, name)

    def picture() -> str:
        return browser.execute_script("return document.getElementById('map').toDataURL()")

    def colours() -> list[list[int]]:
        """Of the middle of each patch."""
        return browser.execute_script(
            "const pen = document.getElementById('map').getContext('2d'), cell = SIZE / data.side;"
            "return Array.from({length: data.side ** 2}, (_, p) => Array.from(pen.getImageData("
            "(p % data.side + .5) * cell, (Math.floor(p / data.side) + .5) * cell, 1, 1).data.slice(0, 3)));"
        )

    WebDriverWait(browser, 20).until(lambda _: find("caption").text)
    assert browser.title == "Experts of a <synthetic> network"
    seen = [picture()]
    find("step").send_keys(Keys.ARROW_RIGHT)
    seen.append(picture())
    assert "evaluation 2 of 3" in find("when").text
    Select(find("layer")).select_by_visible_text("2")
    seen.append(picture())
    assert find("caption").text.startswith("layer 2")
    Select(find("half")).select_by_visible_text("unconditional")
    seen.append(picture())
    Select(find("rank")).select_by_visible_text("second")
    seen.append(picture())
    before = find("photo").get_attribute("src")
    Select(find("image")).select_by_index(1)
    WebDriverWait(browser, 20).until(lambda _: find("photo").get_attribute("src") != before and picture() != seen[-1])
    seen.append(picture())
    find("blend").click()
    seen.append(picture())
    assert len(set(seen)) == len(seen), "a control does not change the picture"

    palette = [[0x00, 0x72, 0xB2], [0xE6, 0x9F, 0x00], [0x00, 0x9E, 0x73], [0xCC, 0x79, 0xA7]]
    took = data["examples"][1, 1, 2, 1, :, 1] - 1  # image, half, layer, step, every patch, second expert
    assert colours() == [palette[expert] for expert in took]
    shares = [button.text.split("\n")[-1] for button in find("legend").find_elements(By.TAG_NAME, "button")]
    assert [int(share.split()[-2]) for share in shares] == [round(100 * (took == e).mean() + 1e-9) for e in range(4)]

    find("legend").find_elements(By.TAG_NAME, "button")[took[0]].click()
    alone = colours()
    assert all((alone[p] == palette[took[p]]) == (took[p] == took[0]) for p in range(16))

    rows = find("table").find_elements(By.CSS_SELECTOR, "tbody tr")
    assert len(rows) == 3 and "chosen" in rows[2].get_attribute("class")
    numbers = data.layer_numbers(1)  # the table follows the half
    assert rows[0].text.split()[:3] == ["0", f"{numbers['load_cv'][0]:.3f}", f"{numbers['load_max'][0]:.2f}"]
    rows[0].click()
    assert find("caption").text.startswith("layer 0") and picture() != seen[-1]
    find("play").click()
    WebDriverWait(browser, 20).until(lambda _: "evaluation 3 of 3" in find("when").text and find("play").text == "play")

    maps = browser.find_elements(By.CSS_SELECTOR, "img.map")
    assert len(maps) == 4 and all(image.get_property("naturalWidth") > 100 for image in maps)
    first = maps[0].get_attribute("src")
    Select(find("mapHalf")).select_by_visible_text("unconditional")
    assert maps[0].get_attribute("src") != first

    assert asked_for(browser) == [path.with_suffix(".html").as_uri()]


# -------------------------------------------------------------------------------------- what no other test would notice


def test_edges_of_what_is_stored():
    config = build_config("DiT-Nano/2", num_experts=256)
    assert routing.stored_dtype("examples", config) is np.uint16  # 1 + 255 does not fit into eight bits
    assert routing.stored_dtype("examples", dataclasses.replace(config, num_experts=255)) is np.uint8
    unit = routing.PROBABILITY_UNIT
    assert routing.in_units(torch.tensor([0.6 * unit, 1.4 * unit])).tolist() == [1, 1]
    model, labels = random_model(), [0, 1]
    weak = sampling.Settings(3, "euler", cfg_scale=0.5)
    assert len(routing.recording(model, RectifiedFlow(), labels, weak).tally.sums["step_counts"]) == 2


def test_sums_over_bins_steps_and_halves():
    """Against plain numpy, on counts that differ from bin to bin and half to half."""
    data, rng = synthetic(), np.random.default_rng(0)
    for name, array in data.arrays.items():
        if name.endswith("_counts"):
            data.arrays[name] = rng.integers(1, 50, array.shape)
        if name.endswith("_probs"):
            data.arrays[name] = rng.random(array.shape)
    assert [data.half(name) for name in ("conditional", "unconditional")] == [0, 1]
    for half in (0, 1):
        for by in ("class", "patch"):
            counts = data[f"{by}_counts"][half]
            assert np.array_equal(data.counts(by, half), counts.sum(axis=1))
            weighted = (data[f"{by}_probs"][half] * counts.sum(axis=-1, keepdims=True)).sum(axis=1)
            assert np.allclose(data.shares(by, half, "probability"), weighted / weighted.sum(axis=-1, keepdims=True))
        steps = data["step_counts"][half]
        assert np.array_equal(data.counts("layer", half)[:, 0], steps.sum(axis=1))
        weighted = (data["step_probs"][half] * steps.sum(axis=-1, keepdims=True)).sum(axis=1)
        shares = data.shares("layer", half, "probability")[:, 0]
        assert np.allclose(shares, weighted / weighted.sum(axis=-1, keepdims=True))
        numbers = data.layer_numbers(half)
        assert np.array_equal(numbers["position_bits"], mutual_information(data.counts("patch", half)))
        assert np.array_equal(numbers["time_bits"], mutual_information(data.counts("step", half)))


def test_an_expert_with_next_to_no_load_is_dead():
    data = synthetic()
    counts = data.arrays["step_counts"] = np.full(data["step_counts"].shape, 1000)
    counts[..., 0] = 1
    assert data.layer_numbers(0)["dead"].tolist() == [1] * len(data.about["layers"])


def test_patches_that_make_no_square_are_refused(tmp_path):
    data = synthetic()
    for name, axis in (("patch_counts", 3), ("patch_probs", 3), ("examples", 4)):
        data.arrays[name] = np.delete(data[name], 0, axis=axis)
    data.save(tmp_path / "data.npz")
    with pytest.raises(UsageError, match="15 patches no square"):
        RoutingData.load(tmp_path / "data.npz")
