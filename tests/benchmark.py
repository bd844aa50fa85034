"""Times that the README quotes, each section beside what it is compared with.

    python tests/benchmark.py            all sections
    python tests/benchmark.py cutmix     one of them
"""

import contextlib
import io
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def section_cutmix():
    """A composite against decoding two JPEGs and encoding one with Pillow alone; and that cost is linear."""
    import numpy as np
    from PIL import Image

    import cutmix

    def make(folder, count, size, quality):
        """Photo-like files (1/f spectrum), 20 distinct ones under `count` names, in 10 classes."""
        rng = np.random.default_rng(0)
        for k in range(count):
            path = Path(folder) / f"class{k % 10}" / f"{k}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            if k < 20:
                octaves = [np.asarray(Image.fromarray(rng.integers(0, 256, (3 << o, 4 << o, 3), dtype=np.uint8))
                                      .resize(size, Image.Resampling.BICUBIC), np.float32) / 1.3 ** o for o in range(8)]
                Image.fromarray((sum(octaves) / 3.8).clip(0, 255).astype(np.uint8)).save(path, quality=quality)
            else:
                os.link(path.parents[1] / f"class{k % 20 % 10}" / f"{k % 20}.jpg", path)

    def composites(images, *more):
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
            start = time.process_time()
            cutmix.main(["--images", str(images), "--out", out, "--workers", "0", *more])
            return time.process_time() - start

    with tempfile.TemporaryDirectory() as folder:
        make(folder, 300, (500, 375), 94)                       # as large as most ImageNet photos
        files = [f"{folder}/{file}" for file in cutmix.list_images(folder)]
        composite = Image.open(files[0]).resize((256, 256))

        def pillow():
            start = time.process_time()
            for a, b in zip(files, files[::-1]):
                for path in (a, b):
                    with Image.open(path) as image:
                        image.convert("RGB")
                composite.save(io.BytesIO(), "JPEG", quality=95, subsampling=0)
            return time.process_time() - start

        best = {}
        for _ in range(3):                                      # in turns, so that a busy machine disturbs all alike
            for setting in ("Pillow", *cutmix.SETTINGS, "all"):
                took = pillow() if setting == "Pillow" else composites(folder, "--setting", setting)
                best[setting] = min(best.get(setting, 1e9), took / len(files))
        weight = sum(os.path.getsize(file) for file in files) / len(files) / 1000
        print(f"cutmix: 500 x 375 pixels, {weight:.0f} kB a file; one core, best of 3; "
              f"Pillow alone (two decodes, one encode) {1e3 * best['Pillow']:.2f} ms")
        for setting in (*cutmix.SETTINGS, "all"):
            print(f"cutmix: {setting:>4} {1e3 * best[setting]:.2f} ms a composite, {1 / best[setting]:.0f}/s, "
                  f"{best[setting] / best['Pillow']:.2f} x Pillow alone")
    times = {}
    for count in (2_000, 20_000):
        with tempfile.TemporaryDirectory() as folder:
            make(folder, count, (40, 32), 90)
            times[count] = composites(folder, "--size", "32") / count
            print(f"cutmix: {count} tiny images, {1e3 * times[count]:.3f} ms each")
    print(f"cutmix: 20,000 against 2,000: {times[20_000] / times[2_000]:.3f} x the time per image")



def full_matrix_prdc(real, fake, k):
    """Precision, recall, density, coverage as they are usually written: three whole matrices of distances."""
    import numpy as np

    def distances(a, b):
        return np.sqrt(np.maximum((a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T, 0))
    R, Q = (np.partition(distances(x, x), k, axis=1)[:, k] for x in (real, fake))
    d = distances(real, fake)
    inside = d < R[:, None]
    return {"precision": inside.any(0).mean(), "recall": (d < Q).any(1).mean(),
            "density": inside.sum() / (k * len(fake)), "coverage": (d.min(1) < R).mean()}


def measured(which, n, D):
    """Runs in a process of its own: seconds, and the bytes by which its peak memory rose."""
    import resource

    import numpy as np

    import evaluate
    real, fake = (np.random.default_rng(seed).normal(size=(n, D)).astype(np.float32) for seed in (0, 1))
    evaluate.prdc(real[:500], fake[:500], 3)                    # threads and libraries are up
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    result = (evaluate.prdc if which == "ours" else full_matrix_prdc)(real, fake, 3)
    seconds = time.perf_counter() - start
    return result, seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def section_evaluate():
    """P/R/D/C against whole distance matrices, and the Fréchet distance against scipy's matrix square root."""
    import multiprocessing

    import numpy as np
    import scipy.linalg

    import evaluate
    n, D = int(os.environ.get("BENCHMARK_N", 20_000)), 256
    found = []
    for which in "ours", "full":
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found.append(pool.apply(measured, (which, n, D)))
    (ours, t, memory), (full, t_full, memory_full) = found
    print(f"evaluate: prdc of {n} and {n} x {D}: {t:.1f} s, {memory / 2 ** 20:.0f} MB; whole matrices {t_full:.1f} s, "
          f"{memory_full / 2 ** 20:.0f} MB; {t / t_full:.2f} of the time, {memory / memory_full:.3f} of the memory; "
          f"results differ by at most {max(abs(ours[key] - full[key]) for key in ours):.1e}")
    n, D = int(os.environ.get("BENCHMARK_N", 10_000)), int(os.environ.get("BENCHMARK_D", 2048))
    a, b = (np.random.default_rng(seed).normal(size=(n, D)) * np.geomspace(1, 1e-3, D) for seed in (0, 1))
    start = time.perf_counter()
    ours = evaluate.frechet_distance(a, b)
    t = time.perf_counter() - start
    S_a, S_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    start = time.perf_counter()
    root = scipy.linalg.sqrtm(S_a @ S_b).real
    t_root = time.perf_counter() - start
    theirs = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(S_a + S_b - 2 * root)
    print(f"evaluate: frechet_distance of {n} and {n} x {D}: {t:.1f} s with covariances; sqrtm alone {t_root:.1f} s; "
          f"{t / t_root:.2f} of its time; {ours:.6g} and {theirs:.6g}")


if __name__ == "__main__":
    sections = {name.removeprefix("section_"): function for name, function in list(globals().items())
                if name.startswith("section_")}
    for name in sys.argv[1:] or sections:
        if name not in sections:
            sys.exit(f"benchmark.py: no section {name!r}, there are {', '.join(sections)}")
        sections[name]()
