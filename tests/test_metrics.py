"""Metrics against closed forms, SciPy and loops; the command line from images and checkpoints to numbers."""

import json
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import timm
import torch
from conftest import script, write_images
from PIL import Image
from test_sampling import publish, random_model
from test_training import TINY, metrics, refused, run_train
from torch.utils._python_dispatch import TorchDispatchMode
from torch_fidelity import feature_extractor_inceptionv3 as fidelity

import calculate_metrics
import evaluation
import extractors
import metrics as scores
import sample_ddp
from cli import UsageError
from distributed import Processes
from evaluation import Statistics
from metrics import Judge, Moments, diversity, frechet_distance, inception_score, nearest_distances, precision_recall
from scripts.digits import Digits, split_digits

ALONE = Processes(0, 0, 1, torch.device("cpu"))


def normal(*shape, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


# ----------------------------------------------------------------------------------------------------- Frechet distance


@pytest.mark.parametrize("offset", [0, 1e4])
def test_streaming_moments_are_those_of_all_at_once(offset):
    x = normal(103, 7) @ normal(7, 7, seed=1) + offset
    moments = Moments()
    for part in x.split([1, 0, 40, 2, 60]):
        moments.update(part)
    assert moments.count == 103
    np.testing.assert_allclose(moments.mean, x.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(x.numpy(), rowvar=False), atol=1e-9)


def test_moments_of_processes_are_those_of_all_images():
    x = normal(50, 5) + 3
    parts = [Moments() for _ in range(3)]
    for part, rows in zip(parts, x.split([30, 20, 0]), strict=False):
        part.update(rows)
    parts[2].update(x[:0])  # a process that had no image
    # What each process puts into each sum, noted in a first pass without the others, is handed out in turn.
    means = torch.stack([part.mean * part.count for part in parts])
    mean = means.sum(0) / 50
    shifts = [part.mean - mean for part in parts]
    scatters = [p._scatter + p.count * torch.outer(s, s) for p, s in zip(parts, shifts, strict=True)]
    for mine in range(3):
        sums = iter([torch.tensor(50), means.sum(0), torch.stack(scatters).sum(0)])
        given = []

        def sum_over_processes(tensor, sums=sums, given=given):
            given.append(tensor)
            return next(sums)

        whole = parts[mine].merged(sum_over_processes)
        torch.testing.assert_close(given[1], means[mine])
        torch.testing.assert_close(given[2], scatters[mine])
        np.testing.assert_allclose(whole.mean, x.numpy().mean(0), rtol=1e-12)
        np.testing.assert_allclose(whole.covariance, np.cov(x.numpy(), rowvar=False), atol=1e-12)


def test_frechet_distance_against_scipy():
    a, b = normal(40, 8), normal(60, 8, seed=1) * 2 + 1
    one, other = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    shift = a.mean(0).numpy() - b.mean(0).numpy()
    expected = shift @ shift + np.trace(one + other - 2 * scipy.linalg.sqrtm(one @ other).real)
    assert frechet_distance(a.mean(0), one, b.mean(0), other) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(b.mean(0), other, a.mean(0), one) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(a.mean(0), one, a.mean(0), one) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_in_closed_form():
    # One dimension: (m1 - m2)^2 + (s1 - s2)^2.
    assert frechet_distance([1.0], [[4.0]], [3.0], [[25.0]]) == pytest.approx(4 + 9)
    # Covariances that commute: the same for each common axis; here some have no width at all.
    axes, _ = torch.linalg.qr(normal(6, 6))
    one, other = torch.tensor([4.0, 1, 0, 0, 9, 0]).double(), torch.tensor([1.0, 0, 16, 0, 25, 0]).double()
    expected = (one.sqrt() - other.sqrt()).square().sum().item()
    zero = torch.zeros(6)
    covariances = [(axes * values) @ axes.T for values in (one, other)]
    assert frechet_distance(zero, covariances[0], zero, covariances[1]) == pytest.approx(expected, abs=1e-12)


def test_frechet_distance_of_singular_covariances():
    """Few images with many features: S = A A^T, and tr (S1 S2)^1/2 is the sum of the singular values of A1^T A2."""
    a, b = (normal(rows, 200, seed=rows) * 100 for rows in (10, 14))
    roots = [(x - x.mean(0)).T / (len(x) - 1) ** 0.5 for x in (a, b)]
    expected = (a.mean(0) - b.mean(0)).square().sum() + sum(root.square().sum() for root in roots)
    expected -= 2 * torch.linalg.svdvals(roots[0].T @ roots[1]).sum()
    one, other = (root @ root.T for root in roots)
    assert frechet_distance(a.mean(0), one, b.mean(0), other) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(a.mean(0), one, a.mean(0), one) == pytest.approx(0, abs=1e-8 * one.trace().item())


def sparse_covariance(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance (180, 180) of features that lie in 20 places of 180, the largest variance about 1e-2."""
    features = np.zeros((len(images), 180))
    features[:, ::9] = images * np.geomspace(1e-4, 0.1, 20)
    return features.mean(0), np.cov(features, rowvar=False)


@pytest.mark.parametrize("solver", ["torch", "numpy"])
def test_frechet_distance_of_tiny_covariances_full_of_zeros(monkeypatch, solver):
    """What features of few images look like; with duplicates of images and constant features too. Against the
    definition by roots of the data, and the same where PyTorch's solvers give up."""
    if solver == "numpy":

        def gives_up(_):
            raise torch.linalg.LinAlgError("the algorithm failed to converge")

        for name in ("eigh", "svdvals"):
            monkeypatch.setattr(torch.linalg, name, gives_up)
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((6, 20)), rng.standard_normal((9, 20))
    b[3:6] = b[:3]
    (mean1, one), (mean2, other) = sparse_covariance(a), sparse_covariance(b)
    scale = np.geomspace(1e-4, 0.1, 20)
    roots = [(x - x.mean(0)) * scale / (len(x) - 1) ** 0.5 for x in (a, b)]
    expected = ((mean1 - mean2) ** 2).sum() + sum((root**2).sum() for root in roots)
    expected -= 2 * scipy.linalg.svdvals(roots[0] @ roots[1].T).sum()
    assert frechet_distance(mean1, one, mean2, other) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(mean1, one, mean1, one) == pytest.approx(0, abs=1e-9 * one.trace())
    nothing = np.zeros_like(one)  # all images alike
    assert frechet_distance(mean1, one, mean1, nothing) == pytest.approx(one.trace(), rel=1e-12)
    assert frechet_distance(mean1, nothing, mean1, nothing) == 0
    lopsided = one + np.triu(np.full_like(one, 1e-18), 1)  # rounding may leave it not quite symmetric
    assert frechet_distance(mean1, lopsided, mean2, other) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_metric_is_made_of_nan(bad):
    features, labels = normal(8, 4), torch.arange(8) % 2
    broken = features.clone()
    broken[3, 1] = bad
    mean, covariance = features.mean(0), torch.eye(4)
    for arguments in ((mean * bad, covariance, mean, covariance), (mean, covariance, mean, covariance * bad)):
        with pytest.raises(UsageError, match="Frechet distance: .* not finite"):
            frechet_distance(*arguments)
    for function, arguments in (
        (inception_score, (broken,)),
        (precision_recall, (features, broken)),
        (precision_recall, (broken, features)),
        (nearest_distances, (features, broken)),
        (diversity, (broken, labels, features, labels)),
    ):
        with pytest.raises(UsageError, match="1 of 32 values are not finite"):
            function(*arguments)


def test_what_is_no_covariance_is_refused():
    zero, one = torch.zeros(3), torch.eye(3)
    for wrong in (-one, torch.tensor([[1.0, 0, 5], [0, 1, 0], [5, 0, 1]])):
        with pytest.raises(UsageError, match="needs covariances, whose eigenvalues are not negative; got one of -"):
            frechet_distance(zero, one, zero, wrong)


def test_a_distance_is_never_turned_positive():
    """What rounding leaves below zero becomes zero, not its absolute value."""
    rng = np.random.default_rng(1)
    for rows in range(3, 9):
        features = rng.standard_normal((rows, 30)) * 1e3
        covariance = np.cov(features, rowvar=False)
        assert 0 <= frechet_distance(features.mean(0), covariance, features.mean(0), covariance) < 1e-6
    found = scores._singular_values
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "_singular_values", lambda matrix: found(matrix) * (1 + 1e-9))
        assert frechet_distance(features.mean(0), covariance, features.mean(0), covariance) == 0


def test_diversity_leaves_out_classes_without_any():
    labels = torch.tensor([0, 0, 1, 1])
    features, real = torch.tensor([[0.0], [3], [5], [6]]), torch.tensor([[0.0], [1], [7], [7]])
    assert diversity(features, labels, real, labels) == pytest.approx(3)  # class 1 has one image, twice


# ------------------------------------------------------------------------------------------- scores, manifolds, judging


def test_inception_score_is_the_formula():
    logits = normal(25, 6) * 3
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    scores = []
    for part in (p[:10], p[10:20], p[20:]):
        divergence = (part * (np.log(part) - np.log(part.mean(0)))).sum(1)
        scores.append(np.exp(divergence.mean()))
    assert inception_score(logits, split_size=10) == pytest.approx(np.mean(scores), rel=1e-12)
    assert inception_score(torch.zeros(10, 6)) == pytest.approx(1)
    assert inception_score(torch.eye(6) * 1e4) == pytest.approx(6)  # certain, of all classes; exp(-1e4) is 0


def on_manifold(points: np.ndarray, manifold: np.ndarray, k: int) -> float:
    """By loops."""
    hits = 0
    for point in points:
        inside = False
        for i, center in enumerate(manifold):
            others = sorted(np.linalg.norm(center - other) for j, other in enumerate(manifold) if j != i)
            inside |= bool(np.linalg.norm(point - center) <= others[k - 1] + 1e-9)
        hits += inside
    return hits / len(points)


@pytest.mark.parametrize("block", [4, 7, 100])
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_against_loops(k, block):
    reference, samples = normal(23, 3), normal(17, 3, seed=1) + 1
    reference[5] = reference[6]  # twins: the radius of one is 0 for k = 1
    samples[2] = reference[5]
    expected = on_manifold(samples.numpy(), reference.numpy(), k), on_manifold(reference.numpy(), samples.numpy(), k)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1 and expected[0] != expected[1]
    assert precision_recall(reference, samples, k, block) == pytest.approx(expected)


def test_precision_and_recall_far_from_zero():
    """fp32 features with a large mean: differences of squares would lose the digits that decide."""
    reference, samples = normal(40, 3), normal(40, 3, seed=1)
    expected = precision_recall(reference, samples)
    assert precision_recall((reference + 3000).float(), (samples + 3000).float()) == expected


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_distances_never_stand_in_memory_all_at_once():
    count, width, block = 600, 4, 50
    with LargestTensor() as largest:
        precision_recall(normal(count, width), normal(count, width, seed=1), block=block)
        nearest_distances(normal(count, width), normal(count, width, seed=1), block=block)
    assert largest.numel == max(count * width, count * 4, block * block)  # features, neighbours, a block


def test_nearest_distances_and_diversity_against_loops():
    a, b = normal(12, 3), normal(9, 3, seed=1)
    a[4] = b[2]
    expected = [min(np.linalg.norm(x - y) for y in b.numpy()) for x in a.numpy()]
    np.testing.assert_allclose(nearest_distances(a, b, block=4), expected, atol=1e-7)

    labels, others = torch.tensor([0] * 5 + [1] * 6 + [2]), torch.tensor([0] * 4 + [1] + [2] * 4)

    def spread(x: torch.Tensor) -> float:
        return np.mean([(x[i] - x[j]).norm().item() for i in range(len(x)) for j in range(i)])

    # Class 1 has one reference image and class 2 one sample: neither says anything.
    assert diversity(a, labels, b, others) == pytest.approx(spread(a[:5]) / spread(b[:4]))
    assert np.isnan(diversity(a, labels, b, others + 5))


@pytest.fixture(scope="module")
def halves() -> list[Digits]:
    """In colour, as samples are."""
    return [half._replace(images=np.repeat(half.images[..., None], 3, axis=3)) for half in split_digits()]


@pytest.fixture(scope="module")
def judge(halves) -> Judge:
    return Judge(halves[1].images, halves[1].labels)


def test_judge_knows_real_digits_it_has_not_seen(halves, judge):
    assert judge.recognises(halves[0].images, halves[0].labels).mean() >= 0.988  # measured: 0.9933


def test_judge_is_at_chance_when_labels_say_nothing(halves, judge):
    labels = np.random.default_rng(0).permutation(halves[0].labels)
    assert 0.06 < judge.recognises(halves[0].images, labels).mean() < 0.14


# ----------------------------------------------------------------------------------------------------------- extractors


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory) -> Path:
    """Random weights that keep the scale of activations, in the file's published form."""

    class Blank(fidelity.FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            torch.manual_seed(0)
            for name, parameter in self.named_parameters():
                if name.endswith("conv.weight"):
                    torch.nn.init.kaiming_normal_(parameter)

    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda url, progress: None)
        torch.save(Blank("inception", ["2048"]).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception(inception_weights) -> extractors.Inception:
    return extractors.Inception(inception_weights, ALONE.device)


def random_images(count: int, size: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def test_inception_features(inception, inception_weights):
    images = random_images(3, 20)
    with torch.autocast("cpu", torch.bfloat16):  # of training around it
        output = inception(images)
    assert {name: tuple(value.shape) for name, value in output.items()} == {"features": (3, 2048), "spatial": (3, 2023)}
    assert all(value.dtype == torch.float32 for value in output.values())
    assert len(output["features"].unique(dim=0)) == 3 and (output["spatial"] >= 0).all()  # after the ReLU

    library = fidelity.FeatureExtractorInceptionV3(
        "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_weights)
    )
    maps = []
    library.Mixed_6d.register_forward_hook(lambda module, inputs, output: maps.append(output))
    with torch.no_grad():
        pool, logits = library(torch.from_numpy(images).permute(0, 3, 1, 2))
    torch.testing.assert_close(output["features"], pool)
    torch.testing.assert_close(inception.logits(output["features"]), logits)
    # Row by row, and in a row place by place, the first seven channels.
    torch.testing.assert_close(output["spatial"].view(3, 17, 17, 7)[:, 2, 5], maps[0][:, :7, 2, 5])


@pytest.fixture(scope="module")
def dinov2_weights(tmp_path_factory) -> Path:
    """A small network in the form of the published file: positions for 37x37 patches, a token that is not used."""
    torch.manual_seed(0)
    state = timm.create_model("vit_small_patch14_dinov2", num_classes=0).state_dict()
    path = tmp_path_factory.mktemp("weights") / "dinov2.pth"
    torch.save(state | {"mask_token": torch.zeros(1, 384)}, path)
    return path


def test_dinov2_features(dinov2_weights, monkeypatch):
    monkeypatch.setattr(extractors, "DINOV2_MODEL", "vit_small_patch14_dinov2")
    extractor = extractors.DINOv2(dinov2_weights, ALONE.device)
    images = random_images(2, 224)
    features = extractor(images)["features"]
    assert features.shape == (2, 384)
    # The published normalisation, and the class token behind the last norm.
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        tokens = extractor.network.forward_features(x.float())
    torch.testing.assert_close(features, tokens[:, 0], atol=1e-4, rtol=1e-4)


def test_dinov2_positions_shrink_as_published():
    """A ramp stays nearly one (bicubic: within 0.05), with the offset of 0.1, which moves its end by 0.2."""
    ramp = torch.arange(37.0).expand(37, 37)
    table = torch.cat([torch.full((1, 1, 2), 7.0), torch.stack([ramp, ramp.T], dim=-1).view(1, -1, 2)], dim=1)
    shrunk = extractors._positions(table, side=16)
    assert shrunk.shape == (1, 257, 2) and (shrunk[:, 0] == 7).all()
    expected = (torch.arange(16) + 0.5) * 37 / 16.1 - 0.5
    grid = shrunk[0, 1:].view(16, 16, 2)
    torch.testing.assert_close(grid[8, 1:-1, 0], expected[1:-1], atol=0.06, rtol=0)
    torch.testing.assert_close(grid[1:-1, 8, 1], expected[1:-1], atol=0.06, rtol=0)


@pytest.mark.parametrize("name, file", [("inception", "inception-2015-12-05"), ("dinov2", "dinov2_vitl14_pretrain")])
def test_missing_weights_are_named(name, file, tmp_path, monkeypatch):
    def silent(request, timeout):
        assert timeout <= 5
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", silent)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(UsageError) as error:
        extractors.load_extractor(name, None, f"--{name}-weights", ALONE)
    for part in (file, str(tmp_path / "hub"), "no route", f"--{name}-weights PATH"):
        assert part in str(error.value)
    with pytest.raises(UsageError, match=f"--{name}-weights .*nowhere.pth does not exist; expected the file .*{file}"):
        extractors.load_extractor(name, tmp_path / "nowhere.pth", f"--{name}-weights", ALONE)


def test_weights_are_taken_from_the_cache(inception_weights, tmp_path, monkeypatch):
    cached = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    cached.parent.mkdir()
    cached.symlink_to(inception_weights)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert extractors.find_weights("inception", None, "--inception-weights") == cached


class Runs:
    def __reduce__(self):
        return Path.touch, (Path("it-ran"),)


@pytest.mark.parametrize("name", ["inception", "dinov2"])
def test_wrong_weights_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(extractors, "DINOV2_MODEL", "vit_small_patch14_dinov2")
    other, evil = tmp_path / "other.pth", tmp_path / "evil.pth"
    torch.save({"pos_embed": torch.zeros(1, 1370, 384)}, other)
    torch.save({"x": Runs()}, evil)
    with pytest.raises(UsageError, match="does not hold the weights of"):
        extractors.load_extractor(name, other, "", ALONE)
    with pytest.raises(UsageError, match="refused to load .*it wants to run"):
        extractors.load_extractor(name, evil, "", ALONE)
    assert not Path("it-ran").exists()


# --------------------------------------------------------------------------------------------------------- command line


class TinyInception:
    """Stands for Inception where its size would only take time: 8 features, 6 of them spatial."""

    def __init__(self, weights: str = "a" * 64):
        self.weights = weights

    def describe(self) -> dict:
        return {"name": "inception", "weights": self.weights}

    def __call__(self, images: np.ndarray) -> dict[str, torch.Tensor]:
        x = torch.from_numpy(images.reshape(len(images), -1)).float() / 255
        mixed = torch.tanh(x @ normal(x.shape[1], 8).float() / 4)
        return {"features": mixed, "spatial": mixed[:, :6].square()}

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        return features @ normal(8, 10, seed=1).float()


@pytest.fixture
def tiny(monkeypatch) -> TinyInception:
    extractor = TinyInception()
    for module in (calculate_metrics, evaluation):
        monkeypatch.setattr(module, "load_extractor", lambda *_: extractor)
    return extractor


def run(*argv) -> None:
    calculate_metrics.main(calculate_metrics.get_parser().parse_args([str(arg) for arg in argv]))


def evaluate(tmp_path: Path, *argv) -> dict:
    output = tmp_path / "results.json"
    run("eval", *argv, "--output", output, "--device", "cpu")
    return json.loads(output.read_text())


def save_npz(path: Path, images: np.ndarray, **labels) -> Path:
    np.savez(path, arr_0=images, **labels)
    return path


def save_folder(path: Path, images: np.ndarray, labels=None) -> Path:
    for index, image in enumerate(images):
        folder = path if labels is None else path / f"class{labels[index]}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{index:03d}.png")
    return path


def test_a_folder_an_npz_and_statistics_give_the_same_numbers(tiny, tmp_path, capsys):
    real, drawn = random_images(30), random_images(21, seed=1)
    folder = save_folder(tmp_path / "real", real)
    packed = save_npz(tmp_path / "real.npz", real)
    np.savez_compressed(tmp_path / "compressed.npz", arr_0=real)
    classes = save_folder(tmp_path / "classes", real, [0] * 15 + [1] * 15)
    run("ref", folder, "--output", tmp_path / "ref.npz", "--device", "cpu", "--batch-size", "7")
    samples = save_npz(tmp_path / "samples.npz", drawn)
    found = [
        evaluate(tmp_path, samples, "--ref", reference, "--batch-size", batch)
        for reference, batch in [
            (folder, 32),
            (packed, 4),
            (tmp_path / "ref.npz", 1),
            (tmp_path / "compressed.npz", 32),
            (classes, 32),
        ]
    ]
    names = {"fid", "sfid", "inception_score", "precision", "recall"}
    for results in found:
        assert results["metrics"].keys() == names
        assert results["metrics"] == pytest.approx(found[0]["metrics"], rel=1e-6)
        assert results["samples"]["count"] == 21 and results["reference"]["count"] == 30
        assert results["reference"]["size"] == 8 and len(results["reference"]["sha256"]) == 64
        assert results["evaluator"]["version"] == evaluation.VERSION and not results["warnings"]
    assert len({results["reference"]["sha256"] for results in found}) == 5

    # The numbers are those of the functions, on features computed at once.
    a, b = tiny(real), tiny(drawn)
    for kind, name in (("features", "fid"), ("spatial", "sfid")):
        one, other = a[kind].double(), b[kind].double()
        expected = frechet_distance(one.mean(0), one.T.cov(), other.mean(0), other.T.cov())
        assert found[0]["metrics"][name] == pytest.approx(expected, rel=1e-9)
    assert found[0]["metrics"]["precision"] == precision_recall(a["features"], b["features"])[0]
    assert found[0]["metrics"]["inception_score"] == pytest.approx(inception_score(tiny.logits(b["features"])))
    printed = capsys.readouterr().out
    assert f"(sha256 {found[0]['reference']['sha256'][:16]})" in printed
    assert f"{found[0]['metrics']['fid']:.4f}" in printed and "21 images of 8x8" in printed and str(folder) in printed

    same = evaluate(tmp_path, packed, "--ref", tmp_path / "ref.npz")["metrics"]
    assert same["fid"] == pytest.approx(0, abs=1e-9) and same["precision"] == same["recall"] == 1


def test_images_of_a_folder_are_cut_as_training_does(tiny, tmp_path):
    save_folder(tmp_path / "mixed", random_images(5, 8))
    Image.fromarray(random_images(1, 20)[0]).save(tmp_path / "mixed" / "large.png")
    run("ref", tmp_path / "mixed", "--output", tmp_path / "ref.npz", "--image-size", "8", "--device", "cpu")
    assert Statistics.load(tmp_path / "ref.npz").size == 8


def test_references_of_adm(tiny, tmp_path):
    """`mu` and the like are of images that are not in the file; precision and recall need some that are."""
    real, drawn = random_images(40), save_npz(tmp_path / "samples.npz", random_images(21, seed=1))
    features = {kind: values.double() for kind, values in tiny(real).items()}
    stored = {
        "mu": features["features"].mean(0),
        "sigma": features["features"].T.cov(),
        "mu_s": features["spatial"].mean(0),
        "sigma_s": features["spatial"].T.cov(),
    }
    stored = {name: value.numpy() for name, value in stored.items()}
    np.savez(tmp_path / "with.npz", arr_0=real[:30], arr_1=np.zeros(30, dtype=np.int64), **stored)
    np.savez(tmp_path / "without.npz", **stored)
    whole = evaluate(tmp_path, drawn, "--ref", save_npz(tmp_path / "whole.npz", real))
    part = evaluate(tmp_path, drawn, "--ref", save_npz(tmp_path / "part.npz", real[:30]))
    found = evaluate(tmp_path, drawn, "--ref", tmp_path / "with.npz")
    for name in ("fid", "sfid", "inception_score"):
        assert found["metrics"][name] == pytest.approx(whole["metrics"][name], rel=1e-9)
        assert name == "inception_score" or abs(part["metrics"][name] / whole["metrics"][name] - 1) > 1e-3
    for name in ("precision", "recall"):
        assert found["metrics"][name] == part["metrics"][name]
    bare = evaluate(tmp_path, drawn, "--ref", tmp_path / "without.npz")
    assert bare["metrics"] == pytest.approx({name: found["metrics"][name] for name in bare["metrics"]}, rel=1e-9)
    assert "recall" not in bare["metrics"] and "no precision and recall" in bare["warnings"][0]


def test_features_of_a_large_reference_are_kept_of_some(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "KEPT", 10)
    real = random_images(40)
    packed = save_npz(tmp_path / "real.npz", real, labels=np.arange(40))
    run("ref", packed, "--output", tmp_path / "ref.npz", "--device", "cpu", "--batch-size", "3")
    kept = Statistics.load(tmp_path / "ref.npz")
    torch.testing.assert_close(kept.features, tiny(real)["features"][::4])
    assert kept.labels.tolist() == list(range(0, 40, 4)) and kept.count == 40
    torch.testing.assert_close(kept.moments["features"][0], tiny(real)["features"].double().mean(0))


def test_few_images_are_warned_of(tiny, tmp_path):
    real, drawn = save_npz(tmp_path / "a.npz", random_images(30)), save_npz(tmp_path / "b.npz", random_images(8))
    (warning,) = evaluate(tmp_path, drawn, "--ref", real)["warnings"]
    assert warning.startswith("8 images of samples for 8 features: their covariance is singular")


CKPT = ["--vae-path", "none", "--num-sampling-steps", "4", "--device", "cpu"]


def test_a_checkpoint_gives_the_numbers_of_its_images(tiny, tmp_path):
    ckpt = publish(tmp_path / "tiny.pt", random_model(), rf=True)
    drawing = [*CKPT, "--cfg-scale", "1.5", "--seed", "3", "--num-samples", "20"]
    place = tmp_path / "samples"
    sample_ddp.main(
        sample_ddp.get_parser().parse_args(
            [*drawing, "--ckpt", str(ckpt), "--sample-dir", str(place), "--per-proc-batch-size", "8"]
        )
    )
    (folder,) = place.iterdir()
    reference = save_npz(tmp_path / "real.npz", random_images(30))
    stored = evaluate(tmp_path, folder, "--ref", reference)
    drawn = evaluate(tmp_path, ckpt, "--ref", reference, *drawing, "--batch-size", "8")
    assert drawn["metrics"] == pytest.approx(stored["metrics"], rel=1e-9)
    shared = {"sampler": "euler", "steps": "4", "seed": 3, "cfg_scale": 1.5, "labels": "random"}
    for results in (stored, drawn):
        assert shared.items() <= results["samples"]["settings"].items() and results["samples"]["count"] == 20
    assert drawn["samples"]["settings"]["weights"] == stored["samples"]["settings"]["weights"]


def test_small_images(halves, tmp_path):
    """Copies of training digits: known, as diverse as real ones, and no farther from the training digits than 0."""
    training, held_out = halves
    places = [save_folder(tmp_path / name, h.images, h.labels) for name, h in zip("tr", halves, strict=True)]
    real = ["--features", "pixels", "--ref", places[1], "--train", places[0]]
    copies = evaluate(tmp_path, save_npz(tmp_path / "copies.npz", training.images, labels=training.labels), *real)
    numbers = copies["metrics"]
    assert numbers["accuracy"] == numbers["accuracy_of_real"] >= 0.988
    assert numbers["nearest"] == pytest.approx(0, abs=1e-6) and numbers["memorisation"] == pytest.approx(0, abs=1e-6)
    assert 0.9 < numbers["diversity"] < 1.1 and 0 < numbers["fd_pixels"] < 0.5

    one_each = np.repeat([np.flatnonzero(held_out.labels == digit)[0] for digit in range(10)], 3)
    repeated = save_npz(tmp_path / "one.npz", held_out.images[one_each], labels=held_out.labels[one_each])
    numbers = evaluate(tmp_path, repeated, *real)["metrics"]
    assert numbers["diversity"] == 0 and numbers["fd_pixels"] > 1 and 0.5 < numbers["memorisation"] < 2

    unlabelled = evaluate(tmp_path, save_npz(tmp_path / "bare.npz", training.images), *real)["metrics"]
    assert "accuracy" not in unlabelled and "diversity" not in unlabelled and "memorisation" in unlabelled


# --------------------------------------------------------------------------------------------------------- wrong inputs


def test_wrong_images(tiny, tmp_path):
    good = save_npz(tmp_path / "good.npz", random_images(10))

    def refuse(match: str, samples: Path, *more, reference: Path = good) -> None:
        with pytest.raises(UsageError, match=match):
            run("eval", samples, "--ref", reference, "--device", "cpu", *more)

    mixed = save_folder(tmp_path / "mixed", random_images(3))
    Image.fromarray(random_images(1, 12)[0]).save(mixed / "z.png")
    refuse(r"several sizes: .*000.png of 8x8, .*z.png of 12x12; --image-size", mixed)
    (mixed / "000.png").write_bytes(b"no image")
    refuse(r"000.png cannot be read", mixed)
    wide = tmp_path / "wide"
    wide.mkdir()
    Image.fromarray(random_images(1)[0, :4]).save(wide / "a.png")
    refuse("a.png of 8x4 is not square", wide)
    (tmp_path / "empty").mkdir()
    refuse("no images .* in .*empty", tmp_path / "empty")
    refuse("nowhere.npz does not exist", tmp_path / "nowhere.npz")
    refuse("reference .*nowhere.npz does not exist", good, reference=tmp_path / "nowhere.npz")
    refuse(r"8x8, but .*good.npz is of|images of 12x12, but", save_npz(tmp_path / "b.npz", random_images(9, 12)))
    refuse("--image-size 12 contradicts", good, "--image-size", "12")
    one, three = (save_npz(tmp_path / f"{count}.npz", random_images(count)) for count in (1, 3))
    refuse("3.npz: 3 images are too few, at least 4 are needed", three)
    refuse("1.npz holds 1 image: too few", good, reference=one)
    refuse("more than 3 images, got 3 and 10", good, reference=three)
    np.save(tmp_path / "array.npy", random_images(5))
    refuse("array.npy is not a whole .npz file", good, reference=tmp_path / "array.npy")
    refuse(r"uint8, got \(5, 8, 8, 3\) float64", save_npz(tmp_path / "float.npz", np.zeros((5, 8, 8, 3))))
    refuse(r"got \(2,\) int64", save_npz(tmp_path / "labels.npz", random_images(5), labels=np.array([1, 2])))
    (tmp_path / "cut.npz").write_bytes(good.read_bytes()[:1000])
    refuse("not a whole .npz file", tmp_path / "cut.npz")
    refuse("not a whole .npz file", good, reference=tmp_path / "cut.npz")
    refuse("--train is for --features pixels", good, "--train", mixed)
    refuse("there is no folder", good, "--output", tmp_path / "nowhere" / "x.json")
    refuse("expected the name of a file", good, "--output", tmp_path)


def test_pixels_are_for_small_images():
    assert extractors.Pixels(ALONE.device)(random_images(2, 36))["features"].shape == (2, 3888)
    with pytest.raises(UsageError, match="at most 36x36, got 40x40"):
        extractors.Pixels(ALONE.device)(random_images(2, 40))


def test_wrong_statistics(tiny, tmp_path):
    good = save_npz(tmp_path / "good.npz", random_images(10))
    statistics = tmp_path / "ref.npz"
    run("ref", good, "--output", statistics, "--device", "cpu")

    def refuse(match: str, samples: Path = good, *more) -> None:
        with pytest.raises(UsageError, match=match):
            run("eval", samples, "--ref", statistics, "--device", "cpu", *more)

    refuse("images of 12x12, but .* is of 8x8", save_npz(tmp_path / "b.npz", random_images(9, 12)))
    tiny.weights = "b" * 64
    refuse("with weights aaaaaaaa..., the weights here are bbbbbbbb...")
    tiny.describe = lambda: {"name": "pixels"}
    refuse("has statistics of inception features, not of pixels")
    with np.load(statistics) as file:
        arrays = dict(file)
    np.savez(statistics, **arrays | {"record": np.array(json.dumps({"format": 99}))})
    refuse("has format 99, this version reads 1")


def test_labels_that_the_reference_has_not(tmp_path):
    reference = save_npz(tmp_path / "real.npz", random_images(20), labels=np.arange(20) % 2)
    samples = save_npz(tmp_path / "samples.npz", random_images(9), labels=np.arange(9))
    with pytest.raises(UsageError, match="label 2 of the samples is not one of the reference's 2 classes, 0 to 1"):
        run("eval", samples, "--ref", reference, "--features", "pixels", "--device", "cpu")


# ------------------------------------------------------------------------------------------------------------- training


@pytest.fixture
def reference(images, tmp_path) -> Path:
    run("ref", images, "--features", "pixels", "--output", tmp_path / "ref.npz", "--device", "cpu")
    return tmp_path / "ref.npz"


def test_metrics_while_training_change_nothing_else(images, reference):
    flags = ["--metrics-every", "2", "--metrics-samples", "5", "--metrics-ref", reference]
    plain, measured = run_train(images, steps=3), run_train(images, *flags, steps=3)
    rows = metrics(measured)
    found = [row for row in rows if "metrics/fd_pixels" in row]
    assert [row["step"] for row in found] == [2, 3]  # and at the end
    assert [row for row in rows if row not in found] == metrics(plain)
    for row in found:
        assert {"metrics/precision", "metrics/recall", "metrics/accuracy", "metrics/diversity"} <= row.keys()
    log = (measured / "log.txt").read_text()
    assert f"step 3: fd_pixels {found[1]['metrics/fd_pixels']:.4g}" in log and "(5 images)" in log
    assert "WARNING: 5 images of samples for 192 features" in log
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(measured / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("metrics/fd_pixels")] == [2, 3]


def test_metrics_while_training_are_those_of_the_checkpoint(images, reference, tmp_path):
    """Of its averaged weights, with the labels in turn."""
    flags = ["--metrics-every", "4", "--metrics-samples", "6", "--metrics-ref", reference]
    measured = run_train(images, *flags)
    (row,) = [row for row in metrics(measured) if "metrics/fd_pixels" in row]
    drawing = ["--labels", "balanced", "--num-samples", "6", "--num-sampling-steps", "50", "--batch-size", "8"]
    found = evaluate(tmp_path, measured, "--ref", reference, "--features", "pixels", *drawing)["metrics"]
    assert {f"metrics/{name}": value for name, value in found.items()} == pytest.approx(
        {name: value for name, value in row.items() if name != "step"}, rel=1e-5
    )


def test_wrong_flags_of_metrics_while_training(images, reference, tmp_path, capsys):
    every = ["--metrics-every", "2"]
    assert "needs --metrics-ref FILE" in refused(images, capsys, *every)
    assert "is no file of statistics" in refused(images, capsys, *every, "--metrics-ref", images)
    few = [*every, "--metrics-ref", reference, "--metrics-samples", "3"]
    assert "3 images are too few, at least 4 are needed" in refused(images, capsys, *few)
    run("ref", images, "--features", "pixels", "--image-size", "4", "--output", tmp_path / "4.npz", "--device", "cpu")
    assert "images of 8x8, but" in refused(images, capsys, *every, "--metrics-ref", tmp_path / "4.npz")
    assert not (images.parent / "results").exists()


# ----------------------------------------------------------------------------------------------------------- real thing


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu": np.full(192, np.nan)}, "mu in .*: 192 of 192 values are not finite"),
        ({"sigma": np.full((192, 192), np.inf)}, "sigma in .* not finite"),
        ({"sigma": -np.eye(192)}, "eigenvalues are not negative"),
        ({"sigma": np.eye(3)}, r"sigma is \(3, 3\), expected \(192, 192\)"),
        ({"mu": np.zeros(192, dtype=np.int64)}, "mu holds int64, expected floating point"),
        ({"labels": np.zeros(3, dtype=np.int64)}, r"labels is \(3,\), expected \(10,\)"),
        ({"record": np.array("[]")}, "ref.npz: the whole is"),
        ({"record": np.array("{")}, "is not JSON"),
        ({"record": {"size": "8"}}, "size is '8'"),
        ({"record": {"format": 99}}, "has format 99, this version reads 1"),
    ],
)
def test_broken_statistics_are_refused(tmp_path, change, message):
    good = save_npz(tmp_path / "good.npz", random_images(10), labels=np.arange(10) % 2)
    run("ref", good, "--output", tmp_path / "ref.npz", "--features", "pixels", "--device", "cpu")
    with np.load(tmp_path / "ref.npz") as file:
        arrays = dict(file)
    if isinstance(change.get("record"), dict):
        change = {"record": np.array(json.dumps(json.loads(str(arrays["record"])) | change["record"]))}
    np.savez(tmp_path / "ref.npz", **(arrays | change))
    with pytest.raises(UsageError, match=message):
        run("eval", good, "--ref", tmp_path / "ref.npz", "--features", "pixels", "--device", "cpu")


def test_flags_of_drawing_are_refused_for_images_that_are_there(tmp_path):
    good = save_npz(tmp_path / "good.npz", random_images(10))
    for flag, value in {"--cfg-scale": 4, "--num-samples": 5, "--use-ema": False, "--sampler": "x"}.items():
        with pytest.raises(UsageError, match=f"{flag} does nothing for images that are there"):
            run("eval", good, "--ref", good, "--features", "pixels", flag, value)


def test_inception_from_folder_to_numbers(inception_weights, tmp_path):
    """With random weights: a set compared with itself, by way of a folder, an `.npz` and statistics."""
    images = random_images(6, 32)
    folder, packed = save_folder(tmp_path / "images", images), save_npz(tmp_path / "images.npz", images)
    weights = ["--inception-weights", inception_weights]
    run("ref", folder, "--output", tmp_path / "ref.npz", "--device", "cpu", *weights)
    results = evaluate(tmp_path, packed, "--ref", tmp_path / "ref.npz", *weights)
    scale = Statistics.load(tmp_path / "ref.npz").moments["features"][1].trace().item()
    assert scale > 0.01 and results["metrics"]["fid"] < 1e-6 * scale and results["metrics"]["sfid"] < 1e-6 * scale
    assert results["metrics"]["precision"] == results["metrics"]["recall"] == 1
    assert len(results["warnings"]) == 2 and "6 images of samples for 2048 features" in results["warnings"][0]


@pytest.mark.slow
def test_two_processes_find_the_numbers_of_one(images, tmp_path):
    """Statistics of a folder, then a checkpoint against them; at the end one process has fewer images, or none."""
    ckpt = publish(tmp_path / "tiny.pt", random_model(), rf=True)
    common = ["--features", "pixels", "--device", "cpu", "--batch-size", "7"]
    drawing = [*common, *CKPT[:4], "--num-samples", "30", "--train", images]
    one, two, output = tmp_path / "one.npz", tmp_path / "two.npz", tmp_path / "two.json"
    run("ref", images, "--output", one, *common)
    alone = evaluate(tmp_path, ckpt, "--ref", one, *drawing)["metrics"]
    script("calculate_metrics.py", "ref", images, "--output", two, *common, processes=2)
    script("calculate_metrics.py", "eval", ckpt, "--ref", two, *drawing, "--output", output, processes=2)
    assert json.loads(output.read_text())["metrics"] == pytest.approx(alone, rel=1e-9)
    one, two = Statistics.load(one), Statistics.load(two)
    assert torch.equal(one.features, two.features) and one.labels.tolist() == two.labels.tolist()
    torch.testing.assert_close(one.moments, two.moments, rtol=1e-12, atol=1e-12)

    broken = write_images(tmp_path / "broken")
    (broken / "class3" / "009.png").write_bytes(b"no image")
    refused = script("calculate_metrics.py", "ref", broken, "--output", output, *common, processes=2, check=None)
    lines = [line for line in refused.stderr.splitlines() if "calculate_metrics.py: error" in line]
    assert refused.returncode and len(lines) == 1 and "009.png cannot be read" in lines[0]


@pytest.mark.slow
@pytest.mark.usefixtures("few_grid_steps")
@pytest.mark.parametrize("sharing", ["ddp", "fsdp"])
def test_metrics_while_two_processes_train(sharing, images, reference, tmp_path):
    """The numbers of one process, and the curve of a run without; 10 images in batches of 4 leave one process idle."""
    flags = ["--metrics-every", "2", "--metrics-samples", "10", "--metrics-ref", reference]
    argv = [*TINY, "--data-path", images, "--max-steps", "4", "--global-batch-size", "8", "--log-every", "1"]

    def measured(name: str, *more) -> list[dict]:
        place = ["--results-dir", tmp_path / name, "--data-parallel", sharing]
        script("train.py", *argv, *place, *more, processes=2)
        return metrics(next((tmp_path / name).iterdir()))

    rows = measured("measured", *flags)
    found = [row for row in rows if "metrics/fd_pixels" in row]
    if sharing == "ddp":
        assert [row for row in rows if row not in found] == measured("plain")
    alone = [row for row in metrics(run_train(images, *flags)) if "metrics/fd_pixels" in row]
    for one, two in zip(alone, found, strict=True):
        assert two == pytest.approx(one, rel=1e-3)


# -------------------------------------------------------------------------------------- what no other test would notice


def test_factors_of_covariances(monkeypatch):
    """Eigensolvers get a symmetric part without zero rows, of largest entry 1; small eigenvalues count."""
    seen, solve = [], scores._eigh
    monkeypatch.setattr(scores, "_eigh", lambda matrix: seen.append(matrix) or solve(matrix))
    small = torch.zeros(6, 6, dtype=torch.float64)
    small[1:4, 1:4] = 1e-7 * (torch.eye(3) + 0.5)
    small[1, 2] += 1e-9  # a rounding that is not symmetric
    factor = scores._factor(small)
    assert seen[0].shape == (3, 3) and seen[0].max() == 1 and torch.equal(seen[0], seen[0].T)
    torch.testing.assert_close(factor @ factor.T, (small + small.T) / 2, rtol=1e-12, atol=0)
    one, other = torch.diag(torch.tensor([1, 1e-6])).double(), torch.diag(torch.tensor([1, 4e-6])).double()
    assert frechet_distance(torch.zeros(2), one, torch.zeros(2), other) == pytest.approx(1e-6, rel=1e-6)


def test_a_broken_decomposition_is_no_distance(monkeypatch):
    values = scores._singular_values
    monkeypatch.setattr(scores, "_singular_values", lambda matrix: 2 * values(matrix))
    with pytest.raises(AssertionError, match="a distance of -"):
        frechet_distance(torch.zeros(2), torch.eye(2), torch.zeros(2), torch.eye(2))


def test_a_class_that_no_image_shows_changes_no_inception_score():
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.5, 0.5]])
    absent = torch.cat([logits, torch.full((3, 1), -2000.0)], dim=1)
    assert inception_score(absent) == pytest.approx(inception_score(logits), rel=1e-12)


def test_pixels_and_shifts_of_the_judge():
    images = np.zeros((1, 4, 4, 3), dtype=np.uint8)
    images[0, 1, 1] = 255
    assert scores.pixel_features(images).max() == 1
    for down, right in scores.SHIFTS:
        assert np.argwhere(scores._shifted(images, down, right)[0, :, :, 0]).tolist() == [[1 + down, 1 + right]]
