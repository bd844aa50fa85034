"""Two sets of features -> Fréchet distance; precision, recall, density, coverage (Table 1)."""

import numpy as np
import torch

from common import UserError


def mean_and_factor(x):
    """Return mean (D,) and F (min(N, D), D) of features (N, D), F^T F = covariance.

    Both are float64. Raises UserError for fewer than 2 samples or values that are not
    finite.
    """
    if len(x) < 2:
        raise UserError(f"a Fréchet distance needs at least 2 images on each side, here is "
                        f"{len(x)}")

    # A NaN or infinite value makes its mean NaN or infinite, so checking the mean is enough.
    mean = x.mean(0, dtype=torch.float64)
    if not mean.isfinite().all():
        raise UserError("a Fréchet distance needs finite features, here are NaN or infinite ones")

    scale = (len(x) - 1) ** 0.5

    # Few samples: they are themselves the factor.
    if len(x) <= x.shape[1]:
        return mean, (x.double() - mean) / scale

    # In parts, because all 50,000 x 2048 features in float64 would be 800 MB.
    covariance = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for part in x.split(8192):
        centred = (part.double() - mean) / scale
        covariance += centred.T @ centred

    lower, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        return mean, lower.T

    # A feature that never varies: Cholesky has no answer.
    values, vectors = torch.linalg.eigh(covariance)
    return mean, (vectors * values.clamp(min=0).sqrt()).T


def frechet_distance(a, b):
    """Return |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2) of features (N, D) and (M, D).

    m are means, S unbiased covariances; arrays or tensors. This is pytorch-fid's formula.
    Its FID of the same images differs, because it prepares them in another way:
    `Inception` resizes and scales as the original TensorFlow code and torch-fidelity do.

    With S = F^T F, the nonzero eigenvalues of S_a S_b are those of P P^T, P = F_a F_b^T.
    That matrix is symmetric: no Schur decomposition as in scipy's sqrtm is needed. Where N or
    M is below D some eigenvalues are zero, and the roots of their rounding move the distance
    by some 2e-9 of it.
    """
    mean_a, factor_a = mean_and_factor(torch.as_tensor(a))
    mean_b, factor_b = mean_and_factor(torch.as_tensor(b))
    P = factor_a @ factor_b.T                                          # (K_a, K_b)

    # P P^T and P^T P have the same nonzero eigenvalues, so the smaller one will do.
    smaller = P @ P.T if P.shape[0] <= P.shape[1] else P.T @ P
    trace_of_root = torch.linalg.eigvalsh(smaller).clamp(min=0).sqrt().sum()

    # The trace of F^T F is the sum of the squares in F.
    trace = factor_a.square().sum() + factor_b.square().sum() - 2 * trace_of_root
    distance = (mean_a - mean_b).square().sum() + trace

    # Rounding alone can make it negative.
    return max(float(distance), 0.0)


def squared_distances(a, b):
    """Yield (rows, |a_i - b_j|^2) for a (N, D) and b (M, D), 128 rows of a at a time."""
    norms_a = a.square().sum(1)
    norms_b = b.square().sum(1)

    # |a - b|^2 = |a|^2 + |b|^2 - 2 a.b needs one matrix product; keeping all differences
    # a_i - b_j would take D times the memory.
    for rows in torch.arange(len(a), device=a.device).split(128):
        products = a[rows] @ b.T
        yield rows, norms_a[rows, None] + norms_b - 2 * products


def squared_radii(x, k):
    """Return the squared distance (N,) of samples (N, D) to their k-th neighbour."""
    radii = []
    for rows, distance in squared_distances(x, x):                     # (128, N)
        # A sample is not its own neighbour.
        distance[torch.arange(len(rows)), rows] = torch.inf
        nearest = distance.topk(k, largest=False).values               # (128, k)
        radii.append(nearest.amax(1))
    return torch.cat(radii)


def prdc(real, fake, k=3):
    """Return precision, recall, density, coverage of fake (M, D) against real (N, D).

    Every sample is the centre of a ball that reaches to its k-th nearest neighbour in its
    own set; the border is outside. Then (Kynkäänniemi et al. 2019, Naeem et al. 2020)

        precision = share of fakes that lie in the ball of any real
        recall    = share of reals that lie in the ball of any fake
        density   = number of real balls that hold a fake, mean over the fakes, / k
        coverage  = share of reals whose ball holds any fake

    as in clovaai's package `prdc`. Arrays or tensors; memory grows with N + M, not N x M.
    Raises UserError for k samples or fewer, and for features that are not finite.
    """
    real = torch.as_tensor(real).double()
    fake = torch.as_tensor(fake).double()
    if not 1 <= k < min(len(real), len(fake)):
        raise UserError(f"k = {k} neighbours need more than k images: real {len(real)}, "
                        f"fake {len(fake)}")
    # A NaN is inside no ball: it would end in zeros that look like scores.
    if not (real.isfinite().all() and fake.isfinite().all()):
        raise UserError("precision, recall, density and coverage need finite features, here are "
                        "NaN or infinite ones")

    # Centred first: the expanded square loses digits where |a| is much larger than |a - b|.
    centre = real.mean(0)
    real = real - centre
    fake = fake - centre

    real_radius = squared_radii(real, k)                               # (N,)
    fake_radius = squared_radii(fake, k)                               # (M,)

    # Distances that differ by less than their rounding are equal, and equal is outside.
    rounding = 1e-12 * (real.square().sum(1).max() + fake.square().sum(1).max())

    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    recalled = torch.zeros_like(covered)
    precise = torch.zeros(len(fake), dtype=torch.bool, device=real.device)
    pairs = 0

    # One pass over all pairs gives the four figures; no N x M matrix is ever in memory.
    for rows, distance in squared_distances(real, fake):               # (128, M)
        in_real_ball = distance < real_radius[rows, None] - rounding
        in_fake_ball = distance < fake_radius - rounding
        covered[rows] = in_real_ball.any(1)
        recalled[rows] = in_fake_ball.any(1)
        precise |= in_real_ball.any(0)
        pairs += int(in_real_ball.sum())

    return {"precision": float(precise.double().mean()),
            "recall": float(recalled.double().mean()),
            "density": pairs / (k * len(fake)),
            "coverage": float(covered.double().mean())}


def mean_prdc(real, fake, k, chunk, seed):
    """Return precision, recall, density, coverage, averaged over chunks.

    Both sets are shuffled by `seed` and cut into chunks of `chunk` samples (0: one chunk
    of all), because the figures depend on the number of samples. What does not fill a
    last chunk is left out; a set smaller than `chunk` is taken whole.
    """
    chunk = chunk or max(len(real), len(fake))
    count = max(1, min(len(real), len(fake)) // chunk)

    # The chunks depend on nothing but the sizes and the seed, so figures can be repeated.
    generator = torch.Generator().manual_seed(seed)
    real_parts = torch.randperm(len(real), generator=generator).split(chunk)
    fake_parts = torch.randperm(len(fake), generator=generator).split(chunk)

    found = []
    for i in range(count):
        found.append(prdc(real[real_parts[i]], fake[fake_parts[i]], k))

    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}
