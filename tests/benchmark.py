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


def photographs(folder, count, size):
    """Write `count` JPEGs of smooth noise, of which 50 differ; the others are links to them."""
    import numpy as np
    from PIL import Image
    rng = np.random.default_rng(0)
    Path(folder).mkdir()
    for k in range(count):
        path = Path(folder, f"{k:06}.jpg")
        if k < 50:
            noise = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            noise.resize(size, Image.Resampling.BICUBIC).save(path, quality=95)
        else:
            os.link(Path(folder, f"{k % 50:06}.jpg"), path)
    return folder


def quality_command(folder, real, fake, *options):
    """Run `evaluate.py quality` on two folders, and return the seconds that it took."""
    import evaluate
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        evaluate.main(["quality", f"--inception={folder}/inception.pth", f"--dino={folder}/dino",
                       f"--real={real}", f"--fake={fake}", *options])
    return time.perf_counter() - start


def quality_against_bare_networks():
    """Time the features of photographs, from files, against the networks on ready batches."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    import evaluate
    count = int(os.environ.get("BENCHMARK_PHOTOS", "128"))
    with tempfile.TemporaryDirectory() as folder:
        torch.save(evaluate.Inception().state_dict(), f"{folder}/inception.pth")
        Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518,
                                 patch_size=14)).save_pretrained(f"{folder}/dino")
        few = photographs(f"{folder}/few", 4, (500, 375))
        quality_command(folder, few, few, "--k=1")              # loads and warms up the networks
        real = photographs(f"{folder}/real", count, (500, 375))
        seconds = quality_command(folder, real, few, "--k=1")

        inception = evaluate.load_inception(f"{folder}/inception.pth")
        dinov2 = evaluate.load_dinov2(f"{folder}/dino")
        pixels = torch.randint(0, 256, (evaluate.BATCH, 3, 256, 256), dtype=torch.uint8)
        small = torch.randn(evaluate.BATCH, 3, 224, 224)
        start = time.perf_counter()
        with torch.no_grad():
            for _ in range(count // evaluate.BATCH):
                inception(pixels.to(evaluate.DEVICE)).cpu()
                dinov2(small.to(evaluate.DEVICE)).last_hidden_state.cpu()
        bare = time.perf_counter() - start
    print(f"evaluate: quality of {count} JPEGs of 500 x 375, Inception-v3 and a DINOv2 of ViT-S's "
          f"size: {count / seconds:.1f} images/s, networks alone {count / bare:.1f} images/s; "
          f"{seconds / bare:.2f} x their time", flush=True)


def means_of_parts(images, side):
    """Return the means of side x side parts of images, as a network that takes no time does."""
    import torch
    return torch.nn.functional.adaptive_avg_pool2d(images.float(), side).flatten(1)


def quality_of_tiny_images(count, folder, peak):
    """Run in a process of its own: `quality` of tiny images with networks that take no time."""
    import resource
    from types import SimpleNamespace

    import evaluate

    def tokens(images):
        return SimpleNamespace(last_hidden_state=means_of_parts(images, 3)[:, None])
    evaluate.load_inception = lambda weights: lambda images: means_of_parts(images, 4)
    evaluate.load_dinov2 = lambda name: tokens
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = quality_command(folder, f"{folder}/real", f"{folder}/fake", "--size=32")
    peak.put((seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))


def quality_of_many_images():
    """Time `quality` of 50,000 tiny images, kill it on the way, and let it go on."""
    import multiprocessing

    from transformers import Dinov2Config, Dinov2Model
    count = int(os.environ.get("BENCHMARK_TINY", "50000"))
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "inception.pth").write_bytes(b"not read here")
        Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                 image_size=28)).save_pretrained(f"{folder}/dino")
        photographs(f"{folder}/real", 1000, (40, 30))
        photographs(f"{folder}/fake", count, (40, 30))
        parts = Path(folder, "fake", ".features")
        peak = spawn.Queue()
        killed = spawn.Process(target=quality_of_tiny_images, args=(count, folder, peak))
        killed.start()
        while len(list(parts.glob("*.safetensors"))) < count // 256 // 2:
            time.sleep(0.05)
        killed.kill()
        killed.join()
        kept = 256 * len(list(parts.glob("*.safetensors")))
        again = spawn.Process(target=quality_of_tiny_images, args=(count, folder, peak))
        again.start()
        seconds, megabytes = peak.get()
        again.join()
    left = count - kept
    print(f"evaluate: quality of {count} tiny JPEGs without networks: killed after {kept}, the "
          f"other {left} and all the figures took {seconds:.0f} s ({left / seconds:.0f} images/s), "
          f"memory rose by {megabytes:.0f} MB")


def section_evaluate():
    """P/R/D/C against whole distance matrices, the Fréchet distance against scipy's matrix square
    root, `quality` against its bare networks, and 50,000 images."""
    import multiprocessing

    import numpy as np
    import scipy.linalg

    import evaluate
    n = int(os.environ.get("BENCHMARK_N", "5000"))
    D = 256
    found = []
    for which in "ours", "full":
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found.append(pool.apply(measured, (which, n, D)))
    (ours, t, memory), (full, t_full, memory_full) = found
    print(f"evaluate: prdc of {n} and {n} x {D}: {t:.1f} s, {memory / 2 ** 20:.0f} MB; "
          f"whole matrices {t_full:.1f} s, {memory_full / 2 ** 20:.0f} MB; "
          f"{t / t_full:.2f} of the time, {memory / memory_full:.3f} of the memory; "
          f"results differ by at most {max(abs(ours[key] - full[key]) for key in ours):.1e}",
          flush=True)
    n = int(os.environ.get("BENCHMARK_N", "10000"))
    D = int(os.environ.get("BENCHMARK_D", "1024"))
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
          f"{t / t_root:.2f} of its time; {ours:.6g} and {theirs:.6g}", flush=True)
    quality_against_bare_networks()
    quality_of_many_images()


def section_encode():
    """Reading a sample beside copying its bytes; what float8 and a bfloat16 VAE lose; cost is linear."""
    for text_dtype in ("bfloat16", "float8"):
        reading_of_encoded_data(text_dtype)
    losses_of_precision()
    encoding_in_the_small()


def write_encoded_data(folder, text_dtype):
    """Write two shards of random numbers, as of flan-t5-xl and 256 x 256 pixels."""
    import json

    import torch
    from safetensors.torch import save

    import encode
    rng = torch.Generator().manual_seed(0)
    count = 400
    longest = 0
    for k in range(2):
        lengths = torch.randint(100, 200, (count,), generator=rng)
        longest = max(longest, int(lengths.max()))
        tokens = torch.randn(int(lengths.sum()), 2048, generator=rng)
        shard = encode.store_text(tokens, text_dtype)
        shard["mean"] = torch.randn(count, 4, 32, 32, generator=rng).half()
        shard["std"] = torch.rand(count, 4, 32, 32, generator=rng).half()
        shard["offset"] = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        (folder / encode.shard_name(k)).write_bytes(save(shard, {"samples": "{}"}))
    null = save({"text": torch.zeros(1, 2048, dtype=torch.bfloat16)})
    (folder / "null.safetensors").write_bytes(null)
    meta = {"version": 1, "size": 256, "vae": "", "text_encoder": "", "text_dtype": text_dtype,
            "text_dim": 2048, "latent_shape": [4, 32, 32], "scaling_factor": 0.18215,
            "shards": 2, "counts": [count, count], "count": 2 * count, "longest": longest}
    (folder / "meta.json").write_text(json.dumps(meta))


def reading_of_encoded_data(text_dtype):
    """Print the time that a sample costs in random order, and that of copying as many bytes."""
    import numpy as np

    import encode
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_encoded_data(folder, text_dtype)
        data = encode.Encoded(folder)
        order = np.random.default_rng(0).permutation(len(data)).tolist()

        def microseconds(read):
            times = []
            # The first round reads the file into memory.
            for _ in range(6):
                start = time.perf_counter()
                for i in order:
                    read(i)
                times.append((time.perf_counter() - start) / len(order) * 1e6)
            return min(times)

        raw = np.memmap(folder / encode.shard_name(0), np.uint8, "r")
        width = 1 if text_dtype == "float8" else 2
        pieces = np.split(raw[:400 * 150 * 2048 * width], 400)
        located = microseconds(data.text)
        copied = microseconds(lambda i: data.text(i).clone())
        moments = microseconds(data.moments)
        bare = microseconds(lambda i: pieces[i % 400].copy())
    print(f"encode: reading a sample of 150 {text_dtype} tokens: {copied:.0f} us ({located:.1f} us "
          f"before its bytes are copied), moments {moments:.0f} us; numpy.memmap, same size: "
          f"{bare:.0f} us", flush=True)


def losses_of_precision():
    """Print the relative errors of float8 tokens and of the autoencoder in 16 bits."""
    import torch

    import encode

    def relative(a, b):
        return float((a.float() - b.float()).norm() / b.float().norm())

    rng = torch.Generator().manual_seed(0)
    tokens = torch.randn(2000, 2048, generator=rng)
    outlying = tokens.clone()
    outlying[:, 7] *= 100
    # Of the tokens with an outlier, the other features tell what it costs them.
    for name, text, first in [("normal", tokens, 0),
                              ("normal, one feature 100 times as large (the others)", outlying, 8)]:
        restored = encode.restore_text(**encode.store_text(text, "float8"))
        float8 = relative(restored[:, first:], text[:, first:])
        bfloat16 = relative(text.bfloat16()[:, first:], text[:, first:])
        print(f"encode: relative error of float8 {float8:.4f}, of bfloat16 {bfloat16:.4f} ({name})",
              flush=True)

    # Stable Diffusion's size with random weights. 64 pixels, because 16-bit convolutions are
    # slow on a CPU that has no instructions for them.
    torch.manual_seed(0)
    vae = encode.AutoencoderKL().eval().requires_grad_(False)
    image = torch.nn.functional.interpolate(torch.randn(1, 3, 8, 8), size=64, mode="bicubic")
    mean, std = vae.encode(image.clamp(-1, 1))
    for dtype in (torch.bfloat16, torch.float16):
        low_mean, low_std = vae.to(dtype).encode(image.clamp(-1, 1).to(dtype))
        name = str(dtype).removeprefix("torch.")
        print(f"encode: VAE in {name}: mean {relative(low_mean, mean):.4f}, std "
              f"{relative(low_std, std):.4f} relative to float32 (weights rounded too)", flush=True)
        vae.float()


def encoding_in_the_small():
    """Print what encode.py costs an image with small encoders, for two numbers of images."""
    import json

    import numpy as np
    import torch
    from PIL import Image
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    import encode
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        words = [f"w{i}" for i in range(50)]
        vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", *words])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, "</s>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.TemplateProcessing(
            "$A </s>", special_tokens=[("</s>", 1)])
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")
        fast.save_pretrained(folder / "t5")
        config = T5Config(vocab_size=52, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4)
        T5EncoderModel(config).save_pretrained(folder / "t5")
        vae = encode.AutoencoderKL(latent_channels=8, block_out_channels=(32, 32, 64),
                                   layers_per_block=1, norm_num_groups=8, patch_size=2)
        (folder / "vae").mkdir()
        (folder / "vae" / "config.json").write_text(json.dumps(vae.config))
        save_file(vae.state_dict(), folder / "vae" / "diffusion_pytorch_model.safetensors")

        draw = np.random.default_rng(0)
        # The first one warms up.
        for count in (100, 500, 2000):
            images = folder / str(count)
            images.mkdir()
            rows = []
            for i in range(count):
                pixels = draw.integers(0, 256, (64, 64, 3), np.uint8)
                Image.fromarray(pixels).save(images / f"{i}.png")
                caption = " ".join(draw.choice(words, draw.integers(20, 60)))
                rows.append(json.dumps({"file": f"{i}.png", "caption": caption}) + "\n")
            (folder / f"{count}.jsonl").write_text("".join(rows))
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()), \
                    contextlib.redirect_stderr(io.StringIO()):
                encode.main([f"--images={images}", f"--captions={images}.jsonl",
                             f"--out={images}-out", "--workers=0", f"--vae={folder / 'vae'}",
                             f"--text-encoder={folder / 't5'}", "--size=64"])
            took = (time.perf_counter() - start) / count * 1e3
            if count > 100:
                print(f"encode: toy encoders, 64 x 64 pixels: {took:.2f} ms a picture for {count}",
                      flush=True)

    x = torch.rand(64, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.no_grad():
        vae.encode(x)
        start = time.perf_counter()
        for _ in range(5):
            vae.encode(x)
    bare = (time.perf_counter() - start) / (5 * 64) * 1e3
    print(f"encode: the toy VAE's convolutions alone: {bare:.2f} ms a picture", flush=True)


def section_train():
    """The loader beside copying its bytes, the optimiser beside touching each tensor, a step."""
    import train
    from common import local_device
    device = local_device()
    speed_of_the_loader()
    speed_of_the_optimiser(device)

    # On a GPU the paper's networks and its share of a batch for each of 8 GPUs.
    runs = [("dit", "S/2", "4"), ("cad", "B", "4")]
    if device.type == "cuda":
        runs = [("dit", "L/2", "128"), ("cad", "L", "128")]
    for model, preset, batch_size in runs:
        train.main(["--benchmark", "--model", model, "--preset", preset, "--batch-size", batch_size])


def best_of(function, *values):
    """Return the CPU seconds of the fastest of six calls; other processes hardly change them."""
    seconds = []
    for _ in range(6):
        start = time.process_time()
        function(*values)
        seconds.append(time.process_time() - start)
    return min(seconds)


def best_on(device, function, *values):
    """Return the seconds of the fastest of six calls on a device, until it has done its work."""
    if device.type == "cpu":
        return best_of(function, *values)
    from metrics.speed import seconds_of
    return min(seconds_of(device, function, *values) for _ in range(6))


def speed_of_the_loader():
    """Print how fast one process reads batches of 128, and how fast it copies as many bytes."""
    import train
    with tempfile.TemporaryDirectory() as folder:
        write_encoded_data(Path(folder), "bfloat16")
        args = train.arguments(["--data", folder, "--out", "unused", "--batch-size", "128"])
        original, augmented, _ = train.open_data(args)
        loader = train.Batches(original, augmented, args, 0, 1)
        batch = loader[0]
        rows = [tensor for tensor in batch.values() if tensor.ndim > 1]
        ours = best_of(lambda: loader[0]) / 128
        bare = best_of(lambda: [tensor.clone() for tensor in rows]) / 128
    size = sum(tensor.nbytes for tensor in rows) / 128 / 1000
    print(f"train: loader, a process: {1e6 * ours:.0f} us a sample of {size:.0f} kB, copying these "
          f"bytes {1e6 * bare:.0f} us: {bare / ours:.0%} of the speed of a copy", flush=True)


def speed_of_the_optimiser(device):
    """Print what clipping, LAMB or AdamW and the average cost beside touching their tensors."""
    import torch

    import train
    # The matrices of two blocks of DiT-L, on a GPU of all 24.
    blocks = 24 if device.type == "cuda" else 2
    model = torch.nn.Sequential()
    for _ in range(blocks):
        for columns, rows in ((1, 1), (1, 2), (1, 1), (1, 1), (1, 2), (1, 1), (1, 4), (4, 1)):
            model.append(torch.nn.Linear(1024 * columns, 1024 * rows))
    model.to(device)
    parameters = list(model.parameters())
    gradients = [torch.randn_like(p) for p in parameters]
    loss = torch.ones((), device=device)
    for name in ("lamb", "adamw"):
        args = train.arguments(["--data", "x", "--out", "y", "--optimizer", name])
        averages = {p: p.detach().clone() for p in parameters}
        optimizer = train.make_optimizer(model, args)

        def step(optimizer=optimizer, averages=averages, args=args):
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient
            train.finish_step(optimizer, averages, loss, 100, args)

        step()
        tensors = [*averages.values(), *gradients, *(p.detach() for p in parameters)]
        for parameter in parameters:
            tensors += [optimizer.state[parameter]["m"], optimizer.state[parameter]["v"]]

        def touch(tensors=tensors):
            for tensor in tensors:
                tensor.mul_(1.0)

        ours = best_on(device, step)
        bare = best_on(device, touch)
        print(f"train: {name}, clipping and average of {len(tensors) // 5} tensors: "
              f"{1e3 * ours:.0f} ms, {ours / bare:.2f} x reading and writing each once", flush=True)


def section_sample():
    """A step of sampling beside a matrix product; what keeping the caption's part saves."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import sample
    from common import autocast, compile_blocks, local_device, peak_flops
    device = local_device()
    cuda = device.type == "cuda"
    L = 160
    if cuda:
        B = 64
        presets = (("dit", "L/2"), ("cad", "L"))
        peak, source = peak_flops(device, "auto")
    else:
        B = 4
        presets = (("dit", "S/2"), ("cad", "B"))
        # In CPU time, as all the rest here.
        a = torch.randn(2048, 2048)
        peak = 2 * 2048 ** 3 / best_of(torch.matmul, a, a)
        source = "a matrix product's speed"
    for name, preset in presets:
        torch.manual_seed(0)
        with device:
            model = sample.MODELS[name].network(**sample.MODELS[name].presets[preset]).eval()
            x = torch.randn(B, model.config["channels"], model.config["size"], model.config["size"])
            text = torch.randn(B, L, model.config["text_dim"])
            mask = torch.ones(B, L, dtype=torch.bool)
            one = torch.ones(B)
        with torch.no_grad(), autocast(device, "auto"):
            context = model.condition(text, mask, one)
            with FlopCounterMode(display=False) as counter:
                model.denoise(x, 0.5 * one, context)
            if cuda:
                compile_blocks(model, dynamic=False)
                model.denoise(x, 0.5 * one, model.condition(text, mask, one))
            denoise = best_on(device, model.denoise, x, 0.5 * one, context)
            condition = best_on(device, model.condition, text, mask, one)
        reached = counter.get_total_flops() / denoise / peak
        print(f"sample: {name} {preset}, {B} images: {1e3 * denoise:.0f} ms a step without "
              f"guidance, {reached:.0%} of {source}; the captions' part, computed once, "
              f"{1e3 * condition:.0f} ms, would be {condition / (condition + denoise):.0%} of each "
              f"step", flush=True)


if __name__ == "__main__":
    sections = {name.removeprefix("section_"): function for name, function in list(globals().items())
                if name.startswith("section_")}
    for name in sys.argv[1:] or sections:
        if name not in sections:
            sys.exit(f"benchmark.py: no section {name!r}, there are {', '.join(sections)}")
        sections[name]()
