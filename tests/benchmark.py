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


def noise_photos(folder, count, size, quality):
    """Save `count` JPEGs in 10 classes that are like photos; 20 of them are different.

    Octaves of noise, each a little weaker than the last, give the spectrum of a photo.
    """
    import numpy as np
    from PIL import Image
    rng = np.random.default_rng(0)
    for k in range(count):
        path = Path(folder) / f"class{k % 10}" / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if k >= 20:
            first = k % 20
            os.link(Path(folder) / f"class{first % 10}" / f"{first}.jpg", path)
            continue
        levels = 0
        for octave in range(8):
            shape = (3 << octave, 4 << octave, 3)
            noise = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
            noise = noise.resize(size, Image.Resampling.BICUBIC)
            levels = levels + np.asarray(noise, np.float32) / 1.3 ** octave
        levels = (levels / 3.8).clip(0, 255).astype(np.uint8)
        Image.fromarray(levels).save(path, quality=quality)


def decode_two_encode_one(files, pairs, is_floor):
    """Decode each pair of files and encode one composite, with Pillow and nothing else.

    For the floor, decode them as small as JPEG allows, and resize them as for 1/4.
    """
    from PIL import Image
    composite = Image.open(files[0]).resize((256, 256))
    for pair in pairs:
        for k, decoded, side in zip(pair, (358, 179), (256, 128)):
            with Image.open(files[k]) as image:
                if is_floor:
                    image.draft(None, (decoded, decoded))
                image = image.convert("RGB")
            if is_floor:
                square = (0, 0, min(image.size), min(image.size))
                image.resize((side, side), Image.Resampling.HAMMING, square)
        composite.save(io.BytesIO(), "JPEG", quality=95, subsampling=0)


def section_cutmix():
    """Composites against decoding two JPEGs and encoding one; and that cost is linear."""
    import multiprocessing

    import numpy as np

    import common
    import cutmix

    # In memory: for half a minute after thousands of files were deleted, ext4 is slow to
    # make new ones.
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    cores = len(os.sched_getaffinity(0))
    photos = 300
    times = 3
    composites = photos * times

    def best_of_three(work):
        """Return the milliseconds of a core that one composite takes."""
        seconds = []
        for _ in range(3):
            with tempfile.TemporaryDirectory(dir=memory) as out:
                start = time.perf_counter()
                work(out)
                seconds.append(time.perf_counter() - start)
        return 1e3 * min(seconds) * cores / composites

    def pillow(is_floor):
        fork = multiprocessing.get_context("fork")
        processes = []
        for k in range(cores):
            work = (files, pairs[k::cores], is_floor)
            processes.append(fork.Process(target=decode_two_encode_one, args=work))
        for process in processes:
            process.start()
        for process in processes:
            process.join()

    def ours(folder, out, *options):
        with contextlib.redirect_stdout(io.StringIO()):
            with contextlib.redirect_stderr(io.StringIO()):
                cutmix.main(["--images", folder, "--out", out, *map(str, options)])

    with tempfile.TemporaryDirectory() as folder:
        # About 110 kB, as most photos of ImageNet.
        noise_photos(folder, photos, (500, 375), 98)
        files = [f"{folder}/{file}" for file in common.list_images(folder)]
        pairs = np.random.default_rng(1).integers(photos, size=(composites, 2))
        weight = sum(os.path.getsize(file) for file in files) / photos / 1000
        print(f"cutmix: 500 x 375 pixels, {weight:.0f} kB a file, {cores} processes, best of 3")
        alone = best_of_three(lambda out: pillow(False))
        print(f"cutmix: {alone:.2f} ms of a core for Pillow alone, two decodes and one encode",
              flush=True)
        floor = best_of_three(lambda out: pillow(True))
        print(f"cutmix: {floor:.2f} ms with decoding as small as JPEG allows, and resizing "
              "(the floor)", flush=True)
        for setting in (*cutmix.SETTINGS, "all"):
            options = ["--setting", setting, "--times", times, "--workers", cores]
            took = best_of_three(lambda out, options=options: ours(folder, out, *options))
            print(f"cutmix: {setting:>4} {took:.2f} ms a composite, {1e3 / took:.0f}/s a core, "
                  f"{took / alone:.2f} x Pillow alone, {took / floor:.2f} x the floor",
                  flush=True)

    took = {}
    for count in (2_000, 20_000):
        with tempfile.TemporaryDirectory() as folder:
            noise_photos(folder, count, (40, 32), 90)
            with tempfile.TemporaryDirectory(dir=memory) as out:
                start = time.process_time()
                ours(folder, out, "--size", 32, "--workers", 0)
                took[count] = 1e3 * (time.process_time() - start) / count
    print(f"cutmix: tiny images, {took[2_000]:.3f} ms each for 2,000, {took[20_000]:.3f} ms "
          f"for 20,000: {took[20_000] / took[2_000]:.3f} x the time per image", flush=True)


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
    """P/R/D/C against whole distance matrices, the Fréchet distance against scipy's matrix square root."""
    import multiprocessing

    import numpy as np
    import scipy.linalg

    import evaluate
    n, D = int(os.environ.get("BENCHMARK_N", "20000")), 256
    found = []
    for which in "ours", "full":
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found.append(pool.apply(measured, (which, n, D)))
    (ours, t, memory), (full, t_full, memory_full) = found
    print(f"evaluate: prdc of {n} and {n} x {D}: {t:.1f} s, {memory / 2 ** 20:.0f} MB; "
          f"whole matrices {t_full:.1f} s, {memory_full / 2 ** 20:.0f} MB; "
          f"{t / t_full:.2f} of the time, {memory / memory_full:.3f} of the memory; "
          f"results differ by at most {max(abs(ours[key] - full[key]) for key in ours):.1e}")
    n, D = int(os.environ.get("BENCHMARK_N", "10000")), int(os.environ.get("BENCHMARK_D", "2048"))
    a, b = (np.random.default_rng(seed).normal(size=(n, D)) * np.geomspace(1, 1e-3, D) for seed in (0, 1))
    start = time.perf_counter()
    ours = evaluate.frechet_distance(a, b)
    t = time.perf_counter() - start
    S_a, S_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    start = time.perf_counter()
    root = scipy.linalg.sqrtm(S_a @ S_b).real
    t_root = time.perf_counter() - start
    theirs = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(S_a + S_b - 2 * root)
    print(f"evaluate: frechet_distance of {n} and {n} x {D}: {t:.1f} s with covariances; "
          f"sqrtm alone {t_root:.1f} s; "
          f"{t / t_root:.2f} of its time; {ours:.6g} and {theirs:.6g}")


def section_encode():
    """What reading a sample costs beside its bytes; what float8 and a bfloat16 VAE lose; cost is linear."""
    import json

    import numpy as np
    import torch
    from PIL import Image
    from safetensors.torch import save, save_file
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    import encode

    def relative(a, b):
        return float((a.float() - b.float()).norm() / b.float().norm())

    order = np.random.default_rng(0).permutation(800).tolist()

    def timed(read):
        times = []
        for _ in range(6):                                      # the first one reads the file into memory
            start = time.perf_counter()
            for i in order:
                read(i)
            times.append((time.perf_counter() - start) / len(order) * 1e6)
        return min(times)

    rng = torch.Generator().manual_seed(0)
    for dtype in "bfloat16", "float8":
        with tempfile.TemporaryDirectory() as folder:       # two shards as of flan-t5-xl and 256 x 256 pixels
            for k in range(2):
                lengths = torch.randint(100, 200, (400,), generator=rng)
                shard = encode.pack(torch.randn(int(lengths.sum()), 2048, generator=rng), dtype)
                shard.update(mean=torch.randn(400, 4, 32, 32, generator=rng).half(),
                             std=torch.rand(400, 4, 32, 32, generator=rng).half(),
                             offset=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]))
                Path(folder, encode.shard_name(k)).write_bytes(save(shard, {"samples": "{}"}))
            save_file({"text": torch.zeros(1, 2048)}, Path(folder, "null.safetensors"))
            Path(folder, "meta.json").write_text(json.dumps(
                {"shards": 2, "counts": [400, 400], "count": 800}))
            ds, raw = encode.Encoded(folder), np.memmap(Path(folder, encode.shard_name(0)), np.uint8, "r")
            pieces = np.split(raw[:400 * 150 * 2048 * (1 if dtype == "float8" else 2)], 400)
            text, copied, moments, bare = map(timed, (
                ds.text, lambda i, ds=ds: ds.text(i).clone(), ds.moments,
                lambda i, pieces=pieces: pieces[i % 400].copy()))
            print(f"encode: reading a sample of 150 {dtype} tokens: {copied:.0f} us ({text:.0f} us before "
                  f"its bytes are copied), moments {moments:.0f} us; numpy.memmap, same size: {bare:.0f} us")

    x = torch.randn(2000, 2048, generator=rng)
    outlying = x.clone()
    outlying[:, 7] *= 100
    for name, text in ("normal", x), ("normal, one feature 100 times as large (the others)", outlying):
        back = encode.unpack(**encode.pack(text, "float8"))
        back, text = (back[:, 8:], text[:, 8:]) if "others" in name else (back, text)
        print(f"encode: relative error of float8 {relative(back, text):.4f}, "
              f"of bfloat16 {relative(text.bfloat16(), text):.4f} ({name})")

    torch.manual_seed(0)
    vae = encode.AutoencoderKL().eval()                         # Stable Diffusion's size, random weights
    image = torch.nn.functional.interpolate(torch.randn(1, 3, 32, 32), size=256, mode="bicubic").clamp(-1, 1)
    with torch.no_grad():
        mean, std = vae.encode(image)
        for dtype in torch.bfloat16, torch.float16:
            low = vae.to(dtype).encode(image.to(dtype))
            print(f"encode: VAE in {str(dtype).removeprefix('torch.')}: mean {relative(low[0], mean):.4f}, "
                  f"std {relative(low[1], std):.4f} relative to float32 (weights rounded too)")
            vae.float()

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        folder = Path(folder)
        words = [f"w{i}" for i in range(50)]
        vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", *words])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, "</s>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder / "t5")
        T5EncoderModel(T5Config(vocab_size=52, d_model=128, d_kv=32, d_ff=256, num_layers=2,
                                num_heads=4)).save_pretrained(folder / "t5")
        vae = encode.AutoencoderKL(latent_channels=8, block_out_channels=(32, 32, 64), layers_per_block=1,
                                   norm_num_groups=8, patch_size=2)
        (folder / "vae").mkdir()
        (folder / "vae" / "config.json").write_text(json.dumps(vae.config))
        save_file(vae.state_dict(), folder / "vae" / "diffusion_pytorch_model.safetensors")
        draw, times = np.random.default_rng(0), {}
        for count in 200, 1000, 4000:                           # the first one warms up
            images = folder / str(count)
            images.mkdir()
            with open(folder / f"{count}.jsonl", "w") as file:
                for i in range(count):
                    Image.fromarray(draw.integers(0, 256, (64, 64, 3), np.uint8)).save(images / f"{i}.png")
                    caption = " ".join(draw.choice(words, draw.integers(20, 60)))
                    file.write(json.dumps({"file": f"{i}.png", "caption": caption}) + "\n")
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                encode.main([f"--images={images}", f"--captions={images}.jsonl", f"--out={images}-out",
                             "--workers=0", f"--vae={folder / 'vae'}", f"--text-encoder={folder / 't5'}",
                             "--size=64"])
            times[count] = (time.perf_counter() - start) / count * 1e3
        x = torch.rand(64, 3, 64, 64).to(memory_format=torch.channels_last)
        with torch.no_grad():
            vae.encode(x)
            start = time.perf_counter()
            for _ in range(10):
                vae.encode(x)
        bare = (time.perf_counter() - start) / 640 * 1e3
        print(f"encode: toy encoders, 64 x 64 pixels: {times[1000]:.2f} ms a picture for 1,000, "
              f"{times[4000]:.2f} ms for 4,000; the VAE's convolutions alone {bare:.2f} ms")


if __name__ == "__main__":
    sections = {name.removeprefix("section_"): function for name, function in list(globals().items())
                if name.startswith("section_")}
    for name in sys.argv[1:] or sections:
        if name not in sections:
            sys.exit(f"benchmark.py: no section {name!r}, there are {', '.join(sections)}")
        sections[name]()
