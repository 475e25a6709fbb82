"""Numbers that compare generated images with real ones: pure functions of features, and a judge of classes.

N images · F features of an image · C classes · H, W image size

Frechet distance (arXiv 1706.08500), Inception Score (1606.03498), precision and recall (1904.06991), as the evaluator
of ADM (2105.05233) computes them; for small images, which Inception says nothing about, the share of samples that a
classifier takes for what they should be, diversity within a class, and distance to the training images.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from cli import UsageError

BLOCK = 8192  # rows and columns of distances at once: 268 MB in fp32
NEGATIVE = 1e-4  # what an eigenvalue may be below zero, over the largest: statistics are kept in single precision too
SHIFTS = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))  # pixels down and right; the judge learns each image in all of them


# ---------------------------------------------------------------------------------------------------- Frechet distance


class Moments:
    """Mean and covariance of features that come in batches: float64, on the device of the first batch.

    Batches are merged as Chan, Golub and LeVeque (1979) do, so nothing is lost to cancellation.
    """

    def __init__(self):
        self.count = 0
        self.mean: Tensor | None = None  # (F,)
        self._scatter: Tensor | None = None  # (F, F) sum of outer products of what is left without the mean

    @property
    def covariance(self) -> Tensor:
        """(F, F), unbiased."""
        return self._scatter / (self.count - 1)

    def update(self, features: Tensor | np.ndarray) -> None:
        """Add (n, F); n may be 0."""
        x = torch.as_tensor(features).double()
        n, dim = x.shape
        if self.mean is None:
            self.mean, self._scatter = x.new_zeros(dim), x.new_zeros(dim, dim)
        if n == 0:
            return
        mean = x.mean(dim=0)
        x, shift = x - mean, mean - self.mean
        self._scatter.addmm_(x.T, x).addr_(shift, shift, alpha=self.count * n / (self.count + n))
        self.count += n
        self.mean = self.mean + shift * (n / self.count)

    def merged(self, sum_over_processes: Callable[[Tensor], Tensor]) -> "Moments":
        """The moments of the images of all processes, on each of them; all have had an `update`."""
        whole = Moments()
        whole.count = int(sum_over_processes(torch.tensor(self.count, device=self.mean.device)))
        whole.mean = sum_over_processes(self.mean * self.count) / whole.count
        shift = self.mean - whole.mean
        whole._scatter = sum_over_processes(self._scatter.addr(shift, shift, alpha=self.count))
        return whole


def frechet_distance(mean1, covariance1, mean2, covariance2) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) of two Gaussians, each a mean (F,) and a covariance (F, F).

    tr (S1 S2)^1/2 is the sum of the roots of the eigenvalues of the symmetric S1^1/2 S2 S1^1/2. With S = A A^T those
    roots are the singular values of A1^T A2: taken from there, without squaring, and without what is only rounding in
    the eigenvalues of S, they are right for singular covariances too.
    """
    mean1, covariance1, mean2, covariance2 = (
        torch.as_tensor(part).double() for part in (mean1, covariance1, mean2, covariance2)
    )
    check_finite("the Frechet distance", mean1, covariance1, mean2, covariance2)
    roots = _singular_values(_factor(covariance1).T @ _factor(covariance2))
    spread = covariance1.trace() + covariance2.trace()
    distance = ((mean1 - mean2).square().sum() + spread - 2 * roots.sum()).item()
    assert distance >= -1e-6 * spread, f"a distance of {distance}"
    return max(0.0, distance)  # what is below is rounding


def _factor(covariance: Tensor) -> Tensor:
    """A (F, rank) with A A^T = S, for a symmetric positive semidefinite S (F, F).

    Scaled to a largest entry of 1 and without what is zero: eigensolvers give up on tiny entries and many zero rows.
    """
    symmetric = (covariance + covariance.T) / 2
    used = symmetric.any(dim=1)
    if not used.any():
        return symmetric[:, :0]
    part = symmetric[used][:, used]
    scale = part.abs().amax()
    values, vectors = _eigh(part / scale)
    largest = values.amax()
    if values.amin() < -NEGATIVE * largest.abs():
        raise UsageError(
            f"the Frechet distance needs covariances, whose eigenvalues are not negative; got one of "
            f"{(values.amin() * scale).item():.3g}, the largest {(largest * scale).item():.3g}: broken statistics"
        )
    real = values > largest * len(values) * torch.finfo(values.dtype).eps
    factor = symmetric.new_zeros(len(symmetric), int(real.sum()))
    factor[used] = vectors[:, real] * (values[real] * scale).sqrt()
    return factor


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh`, or NumPy's where that gives up: it brings another library of solvers."""
    try:
        return torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(matrix.cpu().numpy())
        return torch.from_numpy(values).to(matrix), torch.from_numpy(vectors).to(matrix)


def _singular_values(matrix: Tensor) -> Tensor:
    try:
        return torch.linalg.svdvals(matrix)
    except torch.linalg.LinAlgError:
        return torch.from_numpy(np.linalg.svdvals(matrix.cpu().numpy())).to(matrix)


def check_finite(what: str, *tensors: Tensor) -> None:
    """Raises UsageError for NaN or infinity, of which no metric can be made."""
    for tensor in tensors:
        if bad := int((~tensor.isfinite()).sum()):
            raise UsageError(f"{what}: {bad} of {tensor.numel()} values are not finite (NaN or infinity)")


# ----------------------------------------------------------------------------------------------------- Inception Score


def inception_score(logits: Tensor, split_size: int = 5000) -> float:
    """exp of the mean divergence of p(y|x) from p(y), of each `split_size` images in turn; the mean of those.

    Args:
        logits: (N, C), without the bias of the last layer, as ADM's evaluator has them.
    """
    check_finite("the Inception Score", logits)
    scores = []
    for part in logits.double().split(split_size):
        log_p = part.log_softmax(dim=1)
        p = log_p.exp()
        # A probability that is 0 everywhere adds 0 times an infinite logarithm, which is to count as 0.
        scores.append((p * (log_p - p.mean(dim=0).log())).nan_to_num().sum(dim=1).mean().exp())
    return torch.stack(scores).mean().item()


# ------------------------------------------------------------------------------------------------ distances of features


def precision_recall(reference: Tensor, samples: Tensor, k: int = 3, block: int = BLOCK) -> tuple[float, float]:
    """The share of samples (N, F) on the reference's manifold, and of the reference (M, F) on that of the samples.

    A manifold is the union of balls around its images, each as far as the k-th nearest other one. ADM's evaluator
    computes distances in fp16 where they do not overflow, this in the features' own precision.

    Args:
        block: rows and columns of distances in memory at once.

    Raises:
        UsageError: there are not more than k images.
    """
    if min(len(reference), len(samples)) <= k:
        raise UsageError(f"precision and recall need more than {k} images, got {len(reference)} and {len(samples)}")
    check_finite("precision and recall", reference, samples)
    samples, reference = _centred(samples, reference)
    radii_reference, radii_samples = _radii(reference, k, block), _radii(samples, k, block)
    on_reference = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    on_samples = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for rows, columns, distances in _distances(samples, reference, block):
        on_reference[rows] |= (distances <= radii_reference[columns]).any(dim=1)
        on_samples[columns] |= (distances <= radii_samples[rows, None]).any(dim=0)
    return on_reference.double().mean().item(), on_samples.double().mean().item()


def nearest_distances(queries: Tensor, targets: Tensor, block: int = BLOCK) -> Tensor:
    """(N,) the Euclidean distance of each of (N, F) to the nearest of (M, F); float64, in which a copy is one."""
    check_finite("distances to the nearest", queries, targets)
    queries, targets = _centred(queries.double(), targets.double())
    nearest = queries.new_full((len(queries),), torch.inf)
    for rows, _, distances in _distances(queries, targets, block):
        nearest[rows] = nearest[rows].minimum(distances.amin(dim=1))
    return nearest.sqrt()


def diversity(features: Tensor, labels: Tensor, reference: Tensor, reference_labels: Tensor) -> float:
    """Mean distance between two samples of a class over that between two reference images of it; the mean over classes.

    Classes of which either set has fewer than two different images do not count: nan if none is left.
    """
    check_finite("diversity", features, reference)
    ratios = []
    for label in labels.unique().tolist():
        inside, real = features[labels == label], reference[reference_labels == label]
        if min(len(inside), len(real)) > 1 and (spread := torch.pdist(real).mean()) > 0:
            ratios.append(torch.pdist(inside).mean() / spread)
    return torch.stack(ratios).mean().item() if ratios else float("nan")


def _radii(features: Tensor, k: int, block: int) -> Tensor:
    """(N,) squared distance to the k-th nearest other one; the nearest of all is the image itself."""
    nearest = features.new_full((len(features), k + 1), torch.inf)
    for rows, _, distances in _distances(features, features, block):
        found = distances.topk(min(k + 1, distances.shape[1]), largest=False).values
        nearest[rows] = torch.cat([nearest[rows], found], dim=1).topk(k + 1, largest=False).values
    return nearest.amax(dim=1)


def _distances(a: Tensor, b: Tensor, block: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Squared distances between the rows of `a` and of `b`, block by block: which rows, which columns, (n, m)."""
    norms = [x.square().sum(dim=1) for x in (a, b)]
    for i in range(0, len(a), block):
        for j in range(0, len(b), block):
            rows, columns = slice(i, i + block), slice(j, j + block)
            distances = a[rows] @ b[columns].T
            distances.mul_(-2).add_(norms[0][rows, None]).add_(norms[1][columns]).clamp_(min=0)
            yield rows, columns, distances


def _centred(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Moved so that `b` has no mean: distances stay, and small ones lose fewer digits."""
    mean = b.mean(dim=0)
    return a - mean, b - mean


# -------------------------------------------------------------------------------------------------------- small images


def pixel_features(images: np.ndarray) -> np.ndarray:
    """(N, H, W, 3) uint8 -> (N, 3HW) float32 in 0..1."""
    return images.reshape(len(images), -1).astype(np.float32) / 255


class Judge:
    """Says of which class a small image is: an SVM with an RBF kernel on pixels.

    It learns each image as it is and shifted by one pixel in four directions. C and gamma (3 over features times their
    variance) were chosen by cross-validation on one half of scikit-learn's digits, with an eye on the other half.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        """`images` (N, H, W, 3) uint8 of at least two classes, `labels` (N,)."""
        from sklearn.svm import SVC

        features = np.concatenate([pixel_features(_shifted(images, *shift)) for shift in SHIFTS])
        gamma = 3 / (features.shape[1] * features.var())
        self.classifier = SVC(kernel="rbf", C=10.0, gamma=gamma).fit(features, np.tile(labels, len(SHIFTS)))

    def recognises(self, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """(N,) bool: each of `images` (N, H, W, 3) uint8 looks like the class that `labels` (N,) say."""
        return self.classifier.predict(pixel_features(images)) == labels


def _shifted(images: np.ndarray, down: int, right: int) -> np.ndarray:
    """(N, H, W, 3) moved by at most one pixel; what comes in at the border is black."""
    height, width = images.shape[1:3]
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return padded[:, 1 - down : 1 - down + height, 1 - right : 1 - right + width]
