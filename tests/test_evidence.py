"""The evidence benchmark: what must not change a run, equal activated compute, intervals, resuming, the whole chain."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from analysis.plan import flops
from benchmarks import digits_runs, evidence, scoring
from benchmarks.endless import Patterns
from benchmarks.harness import Times
from cli import UsageError
from scripts.digits import Digits, split_digits


@pytest.fixture
def tiny(monkeypatch):
    """The experiments as they are, on less data, with smaller networks and fewer samples."""
    halves = tuple(Digits(*(part[:60] for part in half)) for half in split_digits())
    for module in (evidence, scoring):
        monkeypatch.setattr(module, "split_digits", lambda: halves)
    monkeypatch.setattr(evidence, "BASE", evidence.BASE | dict(hidden_size=32, num_heads=2))
    monkeypatch.setattr(evidence, "EVALUATIONS", (3, 5))
    monkeypatch.setattr(evidence, "SWEEP_IMAGES", 20)
    monkeypatch.setattr(evidence, "STEP_ROUNDS", 1)
    monkeypatch.setattr(digits_runs, "BATCH", 32)
    whole = evidence.Endless.tensors
    monkeypatch.setattr(evidence.Endless, "tensors", lambda self, count=60: whole(self, min(count, 200)))
    monkeypatch.setattr(evidence, "RATES", (2e-3,))
    monkeypatch.setattr(evidence, "TRIALS", {name: evidence.TRIALS[name] for name in ("AdamW, 0.002", "Muon, 0.002")})
    for name, value in (("LENGTHS", (0.05,)), ("GUIDES", {"smaller": evidence.Guide(0.5, dict(depth=1))})):
        monkeypatch.setattr(evidence, name, value)
    monkeypatch.setattr(evidence, "SCALES", (2.0,))
    afterwards = dict(part=1.0, lengths=evidence.LENGTHS, guides=evidence.GUIDES, scales=evidence.SCALES)
    afterwards = dataclasses.replace(evidence.SETUPS["softmax, afterwards"], **afterwards)
    monkeypatch.setitem(evidence.SETUPS, "softmax, afterwards", afterwards)
    some = ("dense, scenes", "sigmoid, bias", "batch pool")
    monkeypatch.setitem(evidence.EXPERIMENTS, "routers", some)
    monkeypatch.setattr(evidence, "NUMBERS", (evidence.AMONG,))
    by_number = tuple(evidence.on_patterns(name, evidence.AMONG) for name in evidence.BY_NUMBER)
    monkeypatch.setitem(evidence.EXPERIMENTS, "memory", by_number)
    monkeypatch.setitem(evidence.EXPERIMENTS, "patterns", (*by_number, evidence.on_patterns(some[1], evidence.AMONG)))
    monkeypatch.setitem(evidence.EXPERIMENTS, "optimizers", ("softmax", "softmax, Muon", *evidence.TRIALS))
    monkeypatch.setattr(evidence, "JUDGED", {"euler 2": 30})
    for name, setup in evidence.SETUPS.items():
        samples = evidence.sweep(setup.objective) if len(setup.samples) > 1 else {}
        samples |= evidence.JUDGED if "euler 25" in setup.samples else {}
        monkeypatch.setitem(evidence.SETUPS, name, dataclasses.replace(setup, samples=samples))


def arrays(name: str, steps: int = 6) -> dict[str, np.ndarray]:
    """A short run without samples."""
    return evidence.run(dataclasses.replace(evidence.SETUPS[name], samples={}), 0, steps, 3)


def test_loss_scale_changes_nothing_and_accumulation_next_to_nothing(tiny):
    plain, scaled, accumulated = (arrays(name) for name in ("8 experts", "scaled by 2^16", "2 micro-batches"))
    assert np.array_equal(plain["losses"], scaled["losses"]) and np.array_equal(plain["load"], scaled["load"])
    assert np.abs(plain["losses"] - accumulated["losses"]).max() < 0.02 * plain["losses"].mean()
    assert not np.array_equal(plain["losses"], arrays("alpha 0.05")["losses"])  # it would show


def test_a_run_repeats_itself_and_counts_every_token(tiny):
    first, second = arrays("4 experts"), arrays("4 experts")
    assert all(np.array_equal(first[key], second[key]) for key in ("steps", "losses", "load"))
    assert first["steps"].tolist() == [0, 3, 6] and (np.diff(first["seconds"]) > 0).all()
    assert first["load"].shape == (3, 4, 4) and (first["load"].sum(axis=2) == 60 * 16 * 2).all()


def test_networks_cost_the_same_for_each_token():
    setups = {name: setup for name, setup in evidence.SETUPS.items() if setup.patterns in (0, evidence.AMONG)}
    configs = {name: setup.config for name, setup in setups.items() if not setup.scenes and not setup.patterns}
    costs = {name: flops(config).forward for name, config in configs.items()}
    assert max(costs.values()) < 1.03 * min(costs.values())
    routers = {name: 2 * 16 * 64 * config.num_experts * len(config.moe_indices) for name, config in configs.items()}
    assert len({costs[name] - routers[name] for name in costs}) == 1, "but for the router they cost exactly the same"
    on_scenes = {name: flops(setup.config).forward for name, setup in setups.items() if name not in configs}
    for pool in ("batch pool", evidence.on_patterns("batch pool", evidence.AMONG)):
        assert on_scenes.pop(pool) > 1.05 * on_scenes["softmax"]  # its predictor
    assert max(on_scenes.values()) < 1.03 * min(on_scenes.values())


def test_what_is_done_afterwards_leaves_the_run_alone(tiny):
    """Averages kept along change no curve, and who is guided away from its own likeness stays where it is."""
    guides = {"itself": evidence.Guide(1.0, {}), "smaller": evidence.Guide(0.5, dict(depth=1))}
    more = dict(samples=evidence.JUDGED, lengths=(0.02, 0.2), guides=guides, scales=(3.0,))
    setup = dataclasses.replace(evidence.SETUPS["softmax, afterwards"], **more)
    run = evidence.run(setup, 0, 6, 3)
    assert np.array_equal(run["losses"], arrays("softmax")["losses"])
    assert np.array_equal(run["images itself 3"], run["euler 2"])
    assert not np.array_equal(run["images smaller 3"], run["euler 2"])
    shortest, longest = run["losses length 0.02"].mean(), run["losses length 0.2"].mean()
    assert run["losses no average"].mean() <= shortest < longest < run["losses"][0].mean()  # the loss still falls


def test_time_is_measured_in_turns(tiny, monkeypatch):
    def measured(ways, device, rounds) -> Times:
        for way in ways.values():
            way()
        return Times({name: [1 + place, 2 * (1 + place), 9] for place, name in enumerate(ways)})

    monkeypatch.setattr(evidence.harness, "measure", measured)
    assert evidence.step_seconds(["dense", "8 experts", "softmax, Muon"], "dense") == {
        "dense": 2, "8 experts": 4, "softmax, Muon": 6
    }  # fmt: skip


def test_interval_is_paired_and_counts_seeds():
    rng = np.random.default_rng(0)
    image, seed = rng.normal(size=900), rng.normal(size=(3, 1))
    assert np.allclose(scoring.interval(0.5 + image - np.tile(image, (3, 1))), 0.5)  # pairing leaves no doubt
    mean, low, high = scoring.interval(np.tile(image, (3, 1)))
    assert low < mean < high and high - low == pytest.approx(2 * 1.96 / 30, rel=0.15)  # the standard error of 900
    mean, low, high = scoring.interval(np.array([[1.0], [2.0], [6.0]]))
    assert (mean, low, high) == (3.0, 1.0, 6.0)
    assert np.ptp(scoring.interval(np.tile(seed, 900))[1:]) > 10 * np.ptp(scoring.interval(image[None] * 0.01)[1:])


def test_scorer_knows_digits_from_noise():
    scorer, noise = scoring.Scorer(), np.random.default_rng(0).integers(0, 256, (200, 8, 8, 3), dtype=np.uint8)
    _, held_out = split_digits()
    by_label = np.concatenate([np.flatnonzero(held_out.labels == label)[:20] for label in range(10)])
    digits = scoring.as_rgb(held_out)[by_label.reshape(10, 20).T.ravel()]  # 0, 1, ..., 9, 0, ...
    assert scorer.recognised(digits).mean() == 1 and scorer.recognised(digits[1:]).mean() < 0.2
    assert scorer.distance(scorer.real) < 0.2 * scorer.distance(noise)
    assert scorer.distance(scoring.as_rgb(held_out)) == pytest.approx(0, abs=1e-8)


def test_scorer_knows_patterns_of_their_label():
    data, scorer = Patterns(100), scoring.PatternScorer(100)
    images, labels = data.tensors(200)
    cells = images.unflatten(2, (4, 4)).unflatten(4, (4, 4)).permute(0, 2, 4, 1, 3, 5)  # (N, rows, columns, 3, 4, 4)
    known = (cells.unsqueeze(3) == data.patterns[labels][:, None, None]).flatten(4).all(dim=4)  # (N, 4, 4, patterns)
    assert (known.sum(dim=3) == 1).all() and set(labels.tolist()) == set(range(10))
    real = scorer.real[:600]
    wrong, near = np.roll(real, 1, axis=0), (real * 0.85 + 10).astype(np.uint8)  # another label; within 28 of 255
    assert scorer.recognised(real).tolist() == [1] * 600 and not scorer.recognised(wrong).any()
    assert not scorer.recognised((real * 0.7 + 40).astype(np.uint8)).any() and scorer.recognised(near).all()
    one = real.copy()
    one[0, :4, :4] = 127
    assert scorer.recognised(one)[:2].tolist() == [15 / 16, 1]
    assert scorer.distance(real) < 0.1 * scorer.distance(wrong)


def test_dead_experts_and_load_of_known_counts():
    load = np.zeros((2, 2, 4), np.int32)  # two points, two layers
    load[0], load[1, 0], load[1, 1] = 100, (400, 0, 0, 0), (200, 200, 1, 0)
    runs = [{"load": load}]
    assert evidence.dead_experts(runs).tolist() == [[0, 5]]
    cv = load[1, 1].std() / load[1, 1].mean()
    assert np.allclose(evidence.load_cv(runs), [[0, (3**0.5 + cv) / 2]])
    columns = evidence.of_load({"dense": [{"load": load[:, :, :0]}], "4 experts": runs})
    of_four = [f"{(3**0.5 + cv) / 2:.3f}", "5.0 of 8"]
    assert [[name, *cells[:2]] for name, cells in columns] == [
        ["load CV", None, of_four[0]], ["dead experts", None, of_four[1]]
    ]  # fmt: skip
    unconditional = np.concatenate([load, np.zeros((2, 2, 5), np.int32)], axis=2)[:, :, :9]  # 8 and one more
    assert evidence.of_load({"prototypes": [{"load": unconditional}]})[1][1] == ["12.0 of 16"]


@pytest.mark.slow
def test_whole_chain_resumes_and_remakes_pictures(tiny, tmp_path, capfd, monkeypatch):
    flags = ["--seeds", "1", "--steps", "4", "--eval-every", "2", "--runs", str(tmp_path / "runs")]
    flags += ["--pictures", str(tmp_path)]
    evidence.main(evidence.get_parser().parse_args(["experts", *flags]))
    written = capfd.readouterr().out
    assert written.count(" s of training\n") == 6 and "| 16 experts |" in written

    (tmp_path / "runs" / "dense-0.npz").unlink()
    evidence.main(evidence.get_parser().parse_args([*flags, "--jobs", "2"]))
    again = capfd.readouterr().out
    assert again.count(" s of training\n") == 1 + 14 + 3 + 4 + 11  # what was missing, and those of the others
    assert "| AdamW | " in again and "| smaller, 2 |" in again and "| length 0.05 |" in again
    assert again.split("\nexperts\n")[1].startswith(written.split("\nexperts\n")[1].split("| dense")[0])
    pictures = {path.name: Image.open(path).size for path in tmp_path.glob("*.png")}
    assert set(pictures) == {f"evidence_{name}.png" for name in evidence.EXPERIMENTS}
    assert min(min(size) for size in pictures.values()) > 400

    monkeypatch.setattr(evidence, "train", None)  # no training: everything is there
    evidence.main(evidence.get_parser().parse_args(["balance", *flags]))
    with pytest.raises(TypeError):  # other settings are other runs
        evidence.main(evidence.get_parser().parse_args(["balance", *flags, "--steps", "8"]))


def test_a_broken_run_is_named_and_left(tmp_path):
    broken = tmp_path / "dense-30-patterns-0.npz"
    for content in (b"broken", b"PK\x03\x04 cut off", b""):
        broken.write_bytes(content)
        with pytest.raises(UsageError, match=r"dense-30-patterns-0.npz is not a finished run: delete it"):
            evidence.main(evidence.get_parser().parse_args(["memory", "--runs", str(tmp_path)]))
        assert broken.read_bytes() == content


def test_wrong_flags_are_named():
    with pytest.raises(UsageError, match="unknown experiment 'balanced'; did you mean balance"):
        evidence.main(evidence.get_parser().parse_args(["balanced"]))
    with pytest.raises(UsageError, match="--steps 100 must be a multiple of twice --eval-every 30"):
        evidence.main(evidence.get_parser().parse_args(["--steps", "100", "--eval-every", "30"]))
