"""evaluate.py: metrics against closed forms and brute force, networks against a second way, commands."""

import csv
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FIXTURES, photo, refusal, refused
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

import evaluate
from common import read_jsonl, write_json, write_jsonl
from metrics import geneval as geneval_rules
from toy.text_encoder import make_text_encoder

RNG = np.random.default_rng


# ---- Fréchet distance, precision, recall, density, coverage

@pytest.mark.parametrize("n, m, D", [(500, 300, 32), (20, 9, 300), (20, 900, 300)])
def test_frechet_distance_is_that_of_its_definition_in_other_words(n, m, D):
    # tr (S_a S_b)^1/2 is the sum of the singular values of A^T B, for centred samples A, B over sqrt(N - 1).
    a, b = RNG(0).normal(size=(n, D)), RNG(1).normal(size=(m, D)) * 3 + 1
    a[:, :4] = 0.5                                          # features that never vary
    A, B = (a - a.mean(0)) / (n - 1) ** 0.5, (b - b.mean(0)) / (m - 1) ** 0.5
    roots = np.linalg.svd(A @ B.T, compute_uv=False).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + (A ** 2).sum() + (B ** 2).sum() - 2 * roots
    assert evaluate.frechet_distance(a, b) == pytest.approx(expected, rel=1e-7)


def brute_force(real, fake, k):
    """The definitions, pair by pair in float64."""
    def distances(a, b):
        return np.linalg.norm(a[:, None].astype(float) - b[None].astype(float), axis=-1)

    def radii(a):
        return np.sort(distances(a, a))[:, k]               # before it are k, and the 0 to itself
    d, R, Q = distances(real, fake), radii(real), radii(fake)
    inside = d < R[:, None]
    return {"precision": inside.any(0).mean(), "recall": (d < Q[None]).any(1).mean(),
            "density": inside.sum(0).mean() / k, "coverage": (d.min(1) < R).mean()}


def normal(seed, *shape):
    return RNG(seed).normal(size=shape).astype(np.float32)


GRID = np.stack(np.meshgrid(*[np.arange(5.0)] * 3), -1).reshape(-1, 3)


@pytest.mark.parametrize("real, fake, k", [
    (normal(0, 270, 64), 0.9 * normal(1, 530, 64) + 0.1, 5),
    (normal(0, 40, 3), normal(1, 1000, 3), 1),
    (GRID, GRID[::2] + 1, 3),
    (GRID + 1e8, GRID[::2] + 1e8 + 1, 3),                   # where products lose digits
    (np.tile(normal(0, 99, 50), (2, 1)), normal(0, 99, 50), 1)])        # balls of reals are empty
def test_prdc_is_that_of_its_definition_and_decides_ties_as_exact_arithmetic_does(real, fake, k):
    assert evaluate.prdc(real, fake, k) == pytest.approx(brute_force(real, fake, k), abs=1e-12)


@pytest.mark.parametrize("measure, real, words", [
    (evaluate.frechet_distance, np.zeros((1, 4)), "at least 2"), (evaluate.prdc, np.zeros((3, 4)), "k = 3"),
    (evaluate.frechet_distance, np.full((9, 4), np.nan), "finite"),
    (evaluate.prdc, np.full((9, 4), np.inf), "finite")])
def test_distances_refuse_what_they_cannot_measure(measure, real, words):
    assert words in refusal(measure, real, np.zeros((9, 4)))


def test_prdc_is_the_mean_over_chunks_that_the_seed_fixes():
    real, fake = RNG(0).normal(size=(230, 6)), RNG(1).normal(size=(250, 6)) * 1.1
    found = evaluate.mean_prdc(torch.tensor(real), torch.tensor(fake), 3, 100, 7)
    rng = torch.Generator().manual_seed(7)
    of_real, of_fake = torch.randperm(230, generator=rng), torch.randperm(250, generator=rng)
    parts = [evaluate.prdc(real[of_real[part]], fake[of_fake[part]], 3)
             for part in (slice(0, 100), slice(100, 200))]
    assert found == {name: pytest.approx(np.mean([part[name] for part in parts])) for name in found}


# ---- Inception

@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """A file with the names of the released one, and variances that keep activations alive."""
    generator = torch.Generator().manual_seed(0)
    state = evaluate.Inception().state_dict()
    for name, x in state.items():
        if x.is_floating_point():
            noise = torch.randn(x.shape, generator=generator)
            state[name] = noise * (2 / x[0].numel()) ** 0.5 if x.ndim == 4 else \
                1 + 0.2 * noise.abs() if name.endswith(("weight", "var")) else 0.1 * noise
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({**state, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, path)
    return path


def test_inception_features_are_those_of_the_network_written_out_a_second_time(inception_file):
    # Recorded from float64, call by call: see tests/fixtures/README.md.
    images = torch.from_numpy(RNG(0).integers(0, 256, (2, 3, 64, 350), dtype=np.uint8))
    found = evaluate.Inception(inception_file)(images)
    expected = torch.tensor(json.loads((FIXTURES / "inception.json").read_text()))
    assert found.shape == (2, 2048)
    assert (found[:, ::64] - expected).abs().max() < 1e-5 * expected.abs().max()


def test_inception_takes_torch_fidelitys_file_and_refuses_torchvisions(inception_file, models, tmp_path):
    state = torch.load(inception_file)
    evaluate.Inception().load_state_dict({key: x for key, x in state.items() if "num_batches" not in key})
    for wrong in ({"AuxLogits.fc.weight": torch.zeros(1000, 768)}, {"fc.weight": torch.zeros(1000, 2048)}):
        torch.save({**state, **wrong}, tmp_path / "wrong.pth")
        line = refusal(evaluate.load_networks.__wrapped__, tmp_path / "wrong.pth", models / "dino")
        assert "wrong.pth: not the Inception weights" in line and "torchvision's inception_v3" in line


# ---- GenEval's verdicts, DPG's score

BOX = [0, 0, 10, 10]
THING = {"box": BOX, "score": 0.9}
RED, BLUE = [{**THING, "color": color} for color in ("red", "blue")]
NEAR, FAR, OTHER = [{"box": [x, 0, x + 10, 10]} for x in (30, 90, -90)]


def clauses(count, name, **more):
    return [{"class": name, "count": count, **more}]


TWO_RED_CUPS = clauses(2, "cup", color="red")
LEFT = clauses(2, "dog") + clauses(1, "cat", position=["left of", 0])


@pytest.mark.parametrize("include, objects, fault", [
    (clauses(3, "dog"), {"dog": [THING] * 3}, ""),
    (clauses(3, "dog"), {"dog": [THING] * 2}, "expected dog>=3, found 2"),
    (clauses(3, "dog"), {"dog": [THING] * 4}, "expected dog<4, found 4"),
    (TWO_RED_CUPS, {"cup": [RED, RED, BLUE]}, ""),          # the third is not looked at
    (TWO_RED_CUPS, {"cup": [RED, BLUE, RED]}, "expected red cup>=2, found red, blue"),
    (TWO_RED_CUPS, {"cup": [THING]}, "expected cup>=2, found 1"),       # whose colour is not asked
    (LEFT, {"cat": [THING], "dog": [NEAR, FAR, OTHER]}, ""),
    (LEFT, {"cat": [THING], "dog": [NEAR, OTHER]}, "expected cat left of dog"),
    (LEFT, {"cat": [THING], "dog": [NEAR]},
     "expected dog>=2, found 1; no target for cat to be left of")])
def test_verdicts_are_those_of_genevals_rules(include, objects, fault):
    metadata = {"include": include, "exclude": clauses(4, "dog")}
    found = evaluate.geneval_verdict(objects, metadata, lambda thing, name: thing["color"])
    assert found == (not fault, fault)


@pytest.mark.parametrize("box, holds", [
    ([-40, 0, -30, 10], {"left of"}), ([0, -40, 10, -30], {"above"}),
    ([40, 40, 50, 50], {"right of", "below"}),
    ([2, 0, 12, 10], set()),                                # offset 2 = 0.1 x (10 + 10): shrunk to nothing
    ([3.9, 0, 13.9, 10], set()), ([4.1, 0, 14.1, 10], {"right of"}),        # (4.1 - 2) / 4.1 > 0.5
    ([30, 14, 40, 24], {"right of"})])                      # y: 12 / |(30, 14)| = 0.36
def test_relations_follow_the_shrunk_offset_over_the_whole_ones_length(box, holds):
    assert geneval_rules.relations(box, BOX) == holds


def test_equal_scores_and_scores_at_the_threshold_count_as_in_genevals_float32():
    # GenEval: order = np.argsort(scores)[::-1], then scores > 0.3, in float32.
    a, b, c = [{"box": BOX, "score": score} for score in (0.5, 0.5, 0.3 + 1e-9)]
    assert geneval_rules.confident([a, b, c], "colors") == [b, a]
    a["score"] = 0.91
    assert geneval_rules.confident([a, b, c], "counting") == [a]
    assert len(geneval_rules.confident([a] * 30, "two_object")) == 16


def test_a_no_reaches_grandchildren_and_questions_without_parents_stand_alone():
    dependency = {1: [0], 2: [1], 3: [2], 4: [0], 5: [4, 1]}
    yes = dict.fromkeys(range(1, 6), True)
    assert evaluate.dpg_score({**yes, 1: False}, dependency) == 1 / 5       # only 4 is left
    assert evaluate.dpg_score({**yes, 4: False}, dependency) == 3 / 5
    assert evaluate.dpg_score({2: True, 1: False}, {1: [0], 2: [1]}) == 0  # by id, not by the dict's order
    # 3 depends on 5, 5 on 1: at the turn of 3, 5 is still as it was answered.
    assert evaluate.dpg_score({1: False, 3: True, 5: True}, {1: [0], 3: [5], 5: [1]}) == 1 / 3


# ---- Tiny models of the same classes as the real ones, with random weights

@pytest.fixture(scope="module")
def models(tmp_path_factory):
    import transformers as tf
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    dino = tf.Dinov2Config(**size, image_size=28, patch_size=14)
    tf.Dinov2Model(dino).save_pretrained(folder / "dino")
    words = ["a photo of the dog cup bench in object colored apple", *geneval_rules.COLORS]
    make_text_encoder(folder / "clip", words, seed=0)       # Its tokenizer is used.
    vision = {**size, "image_size": 32, "patch_size": 8}
    text = {**size, "vocab_size": 24, "eos_token_id": 1, "max_position_embeddings": 20}
    clip = tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    tf.CLIPModel(clip).save_pretrained(folder / "clip")
    backbone = tf.SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=7,
                             out_features=["stage1", "stage2", "stage3", "stage4"])
    detector = tf.Mask2FormerForUniversalSegmentation(tf.Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2,
        dim_feedforward=16, num_queries=10, num_labels=80))
    # Each query is half sure of a dog and of a cup (16 and 41), and sure of its mask.
    detector.class_predictor.weight.data[:] = 0
    detector.class_predictor.bias.data = torch.zeros(81).index_fill(0, torch.tensor([16, 41]), 20)
    detector.class_predictor.bias.data[16] += 0.1
    for name, x in detector.named_parameters():
        x.data *= 100_000 if "mask_embedder.2" in name else 1
    detector.save_pretrained(folder / "detector")
    text |= {"encoder_hidden_size": 16, "bos_token_id": 2, "pad_token_id": 0, "sep_token_id": 1}
    vqa = tf.BlipConfig(text_config=text, vision_config=vision)
    tf.BlipForQuestionAnswering(vqa).save_pretrained(folder / "vqa")
    tf.BlipProcessor(tf.BlipImageProcessorPil(size={"height": 32, "width": 32}),
                     tf.AutoTokenizer.from_pretrained(folder / "clip")).save_pretrained(folder / "vqa")
    return folder


def pictures(folder, count, seed=0, names="{:04}.png", size=(40, 40)):
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        photo(seed + n, size).save(folder / names.format(n))
    return folder


def run(*args):
    # Remembered within a process, in which a command runs but once.
    evaluate.sha256.cache_clear()
    evaluate.main([str(arg) for arg in args])


def section(folder, command):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))[command]


# ---- `quality`

def dinov2_positions(positions, side):
    """The original code's interpolation of (1, 1 + n * n, D) positions, in float64.

    Output i lies at (i + 0.5) / scale - 0.5 among the inputs, scale = (side + 0.1) / n; it is
    Keys' cubic (a = -0.75) of the four nearest inputs, those beyond the border repeated.
    """
    n = int(positions.shape[1] ** 0.5)
    grid = positions[0, 1:].double().numpy().reshape(n, n, -1)
    grid = np.pad(grid, [(4, 4), (4, 4), (0, 0)], "edge")
    source = (np.arange(side) + 0.5) / ((side + 0.1) / n) - 0.5
    t = np.abs(source[:, None] - np.arange(-4, n + 4))
    near = 1.25 * t ** 3 - 2.25 * t ** 2 + 1
    far = -0.75 * (t ** 3 - 5 * t ** 2 + 8 * t - 4)
    weights = np.where(t <= 1, near, np.where(t < 2, far, 0))
    grid = torch.tensor(np.einsum("ai,bj,ijd->abd", weights, weights, grid)).flatten(0, 1)
    return torch.cat([positions[0, :1].double(), grid])[None].float()


def test_features_are_those_of_other_means(models, inception_file, tmp_path):
    from transformers import Dinov2Model
    fine = Image.fromarray(RNG(0).integers(0, 256, (1400, 1200, 3), dtype=np.uint8))
    fine.save(tmp_path / "large.jpg", quality=95)           # which must be decoded in full
    stats = tmp_path / "stats.safetensors"
    run("quality", "--real", tmp_path, "--save-stats", stats, "--inception", inception_file,
        "--dino", models / "dino")
    found = load_file(stats)

    image = ImageOps.fit(Image.open(tmp_path / "large.jpg"), (256, 256), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    expected = evaluate.Inception(inception_file)(pixels)
    assert (found["inception"] - expected).abs().max() < 1e-2 * expected.abs().max()
    dino = Dinov2Model.from_pretrained(models / "dino").eval()
    positions = dino.embeddings.position_embeddings
    positions.data = dinov2_positions(positions.data, 16)
    pixels = np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC)) / 255
    pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    expected = dino(torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None]).pooler_output
    assert (found["dino"] - expected).abs().max() < 1e-5


@pytest.fixture
def quality(monkeypatch, tmp_path):
    """Return `quality` against tmp_path/fake, by networks that take no time: means of parts of the image."""
    def means(images):
        return F.adaptive_avg_pool2d(images.float(), 2).flatten(1)

    def dino(images):
        return SimpleNamespace(last_hidden_state=means(images)[:, None])

    def compared(real, *words):
        run("quality", "--inception", __file__, "--dino", "dino", "--real", real, "--fake", fake, *words)
        return section(fake, "quality")

    monkeypatch.setattr(evaluate, "load_networks", lambda *weights: (means, dino))
    monkeypatch.setattr(evaluate, "weights_hash", lambda name: "hash of " + name)
    fake = pictures(tmp_path / "fake", 6, seed=50)
    return compared


def test_samples_of_coco_are_compared_with_the_photos_that_were_asked_for(quality, tmp_path):
    real = pictures(tmp_path / "real", 9, names="COCO_{:03}.jpg")
    photo(99, (400, 400)).save(tmp_path / "fake/sheet.png")
    stats = tmp_path / "stats.safetensors"
    for _ in range(2):
        found = quality(real, "--save-stats", stats)
        assert found["counts"] == {"real": 9, "fake": 6, "skipped": 0}
    rows = [{"file": f"{n:04}.png", "prompt": "é", "name": f"COCO_{n + 4:03}"} for n in range(6)]
    write_jsonl(tmp_path / "fake/samples.jsonl", rows)
    found = quality(real)
    assert found["counts"]["real"] == 5 and found["data"] == "COCO"
    # The same from saved features of the whole folder.
    assert quality(stats)["scores"] == found["scores"]
    (tmp_path / "foreign.safetensors").write_bytes(b"PK")
    for words, message in [
            ([stats, "--size", 200], "other weights or another --size"),
            ([real, "--save-stats", tmp_path / "foreign.safetensors"], "not a file of --save-stats"),
            ([pictures(tmp_path / "other", 5)], "bear the 6 names")]:
        assert message in refusal(quality, *words)
    # COCO's of another year are called by numbers.
    write_jsonl(tmp_path / "fake/samples.jsonl", [{**row, "name": row["file"][:4]} for row in rows])
    assert quality(pictures(tmp_path / "more", 8))["counts"] == {"real": 6, "fake": 6, "skipped": 0}
    # Other prompts may have names, too.
    of_files = [{**row, "prompt_file": "p.txt", "name": Path(row["file"]).stem} for row in rows]
    for others in ([{**row, "name": "mine"} for row in rows], of_files):
        write_jsonl(tmp_path / "fake/samples.jsonl", others)
        assert quality(real)["data"] == "ImageNet"


def test_what_cannot_be_read_is_named_beside_the_samples_and_what_has_changed_is_measured_again(
        quality, tmp_path, capsys):
    real = pictures(tmp_path / "real", 6)
    fake = tmp_path / "fake"
    (fake / "0003.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (real / "0001.png").write_bytes(b"")
    write_jsonl(fake / "skipped.jsonl", [{"file": "prompts.txt line 3", "reason": "empty"}])
    for _ in range(2):                                      # Also from what is kept.
        assert quality(real)["counts"] == {"real": 5, "fake": 5, "skipped": 2}
        rows = read_jsonl(fake / "skipped.jsonl")
        assert [row["file"] for row in rows] == ["prompts.txt line 3", f"{real}/0001.png", "0003.png"]
        assert "2 images could not be read" in capsys.readouterr().err
    # Nothing is written beside the user's own photos.
    assert len(list(real.iterdir())) == 6
    photo(7, (40, 40)).save(fake / "0003.png")
    assert quality(real)["counts"]["skipped"] == 1
    for path in fake.glob("*.png"):
        path.write_bytes(b"")
    line = refusal(quality, real)
    assert f"fake: none of its 6 images is readable; the first: {fake}/0000.png" in line


def test_ranks_share_the_units_that_are_missing_and_the_last_one_measures(models, tmp_path, monkeypatch):
    # Three units of at most 64 images.
    images = geneval_folder(tmp_path / "images", DOG, DOG, images=80)
    alone = shutil.copytree(images, tmp_path / "alone")
    detect = mock.Mock(side_effect=lambda model, image: {
        "dog": [{"box": BOX, "score": image.getpixel((0, 0))[0] / 255}]})
    monkeypatch.setattr(evaluate, "detect", detect)
    words = ["geneval", "--detector", models / "detector", "--clip", models / "clip", "--images"]
    run(*words, alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        run(*words, images)
    assert not stop.value.code and detect.call_count == 160 + 64 and not (images / "results.json").exists()
    monkeypatch.setenv("RANK", "0")
    run(*words, images)
    assert detect.call_count == 160 + 160
    assert section(images, "geneval")["scores"] == section(alone, "geneval")["scores"]
    assert (images / "geneval.jsonl").read_bytes() == (alone / "geneval.jsonl").read_bytes()


# ---- `clip`, `geneval`, `dpg`

def test_clip_score_is_the_cosine_of_transformers_own_pipeline(models, tmp_path):
    import transformers as tf
    prompts = ["a photo of a red dog", "a blue cup", "the bench of a dog " * 30]       # the last one is cut
    pictures(tmp_path, 3, size=(48, 32))                    # an even margin, which no crop has to round
    rows = [{"file": f"{n:04}.png", "prompt": prompt} for n, prompt in enumerate([*prompts, "no image"])]
    write_jsonl(tmp_path / "samples.jsonl", rows)
    run("clip", "--samples", tmp_path / "samples.jsonl", "--clip", models / "clip")
    model = tf.CLIPModel.from_pretrained(models / "clip").eval()
    processor = tf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tokenizer = tf.AutoTokenizer.from_pretrained(models / "clip")
    pixels = processor([Image.open(tmp_path / f"{n:04}.png") for n in range(3)], return_tensors="pt")
    texts = tokenizer(prompts, padding=True, truncation=True, max_length=20, return_tensors="pt")
    with torch.no_grad():
        output = model(**texts, **pixels)
    expected = 100 * (output.image_embeds * output.text_embeds).sum(1).clamp(min=0)
    found = section(tmp_path, "clip")
    assert expected.max() > 0 and found["counts"] == {"samples": 3, "skipped": 1}
    assert found["scores"] == pytest.approx({
        "clip": float(expected.mean()), "clip_error": float(expected.std()) / 3 ** 0.5}, abs=1e-3)


def geneval_folder(folder, *lines, images=2):
    for n, metadata in enumerate(lines):
        pictures(folder / f"{n:05}/samples", images, seed=100 * n)
        row = json.dumps({"prompt": "a photo", **metadata})             # no newline, as the benchmark's
        (folder / f"{n:05}/metadata.jsonl").write_text(row)
    return folder


DOG = {"tag": "single_object", "include": clauses(1, "dog")}
RED_DOG = {"tag": "colors", "include": clauses(1, "dog", color="red")}
TWO_DOGS = {"tag": "counting", "include": clauses(2, "dog"), "exclude": clauses(3, "dog")}
FIRST = "00000/samples/0000.png"


def test_geneval_judges_given_detections_by_task(tmp_path):
    folder = geneval_folder(tmp_path / "original", DOG, RED_DOG, TWO_DOGS)
    rows = []
    for i, scores in enumerate([[0.31], [0.3], [0.8], [0.8], [0.91, 0.95], [0.91, 0.5]]):
        dogs = [{"box": BOX, "score": score, "color": ["red", "blue"][i % 2]} for score in scores]
        rows.append({"file": f"{i // 2:05}/samples/{i % 2:04}.png", "objects": {"dog": dogs}})
    write_jsonl(tmp_path / "given.jsonl", rows)
    write_jsonl(tmp_path / "others.jsonl", [{"file": FIRST, "objects": {}}])
    run("geneval", "--images", folder, "--extended", geneval_folder(tmp_path / "extended", DOG, images=1),
        "--detections", tmp_path / "given.jsonl", tmp_path / "others.jsonl")
    found = section(folder, "geneval")
    tasks = ("overall", "single_object", "colors", "counting")
    assert found["scores"] == {"original": dict.fromkeys(tasks, 0.5), "extended": dict.fromkeys(tasks[:2], 0)}
    assert found["counts"]["original"] == {"prompts": 3, "tasks": 3, "images": 6}
    verdicts = read_jsonl(folder / "geneval.jsonl")
    assert [row["correct"] for row in verdicts] == [True, False] * 3
    assert verdicts[5] == {"filename": "00002/samples/0001.png", "tag": "counting", "prompt": "a photo",
                           "correct": False, "reason": "expected dog>=2, found 1"}


@pytest.mark.parametrize("metadata, name, change, words", [
    (DOG, "mouse", {}, "does not know: mouse. Its names are COCO's, but computer mouse"),
    ({**DOG, "exclude": clauses(1, "mouse")}, "dog", {}, "not a line of GenEval's"),
    ({**DOG, "include": clauses(1, "dog", color="violet")}, "dog", {}, "no clause of GenEval's"),
    ({**DOG, "include": clauses(0, "dog")}, "dog", {}, "no clause of GenEval's"),
    ({**DOG, "include": LEFT + clauses(1, "cup", position=["near", 0])}, "dog", {}, "'near'"),
    (RED_DOG, "dog", {"box": [0, 0, 1e5, 1e5]}, "0000.png: not in accord with"),
    *[(DOG, "dog", change, "0000.png: not in accord with") for change in [
        {"box": [0, 0, np.nan, 9]}, {"box": [0, 0, 1]}, {"color": "violet"}, {"score": np.nan},
        {"score": "0.9"}, {"score": 90}]]])
def test_detections_and_metadata_that_geneval_does_not_know_are_refused(
        tmp_path, metadata, name, change, words):
    folder = geneval_folder(tmp_path / "images", metadata, images=1)
    given = tmp_path / "given.jsonl"
    write_jsonl(given, [{"file": FIRST, "objects": {name: [{**THING, **change}]}}])
    assert words in refused("evaluate.py", "geneval", "--images", folder, "--detections", given)


def test_colors_that_detections_leave_out_are_told_again_by_another_clip(models, tmp_path):
    folder = geneval_folder(tmp_path / "original", RED_DOG)
    rows = [{"file": f"00000/samples/{i:04}.png", "objects": {"dog": [{"box": BOX, "score": 0.9}]}}
            for i in range(2)]
    write_jsonl(tmp_path / "given.jsonl", rows)
    clip = shutil.copytree(models / "clip", tmp_path / "clip")
    seen = []
    for _ in range(2):
        run("geneval", "--images", folder, "--detections", tmp_path / "given.jsonl", "--clip", clip)
        seen.append((section(folder, "geneval")["weights"][str(clip)], read_jsonl(folder / "geneval.jsonl")))
        # What was the best colour becomes the worst.
        weights = load_file(clip / "model.safetensors")
        weights["text_projection.weight"] *= -1
        save_file(weights, clip / "model.safetensors", {"format": "pt"})
        # Loaded once within a process, in which a command runs but once.
        evaluate.load_once.cache_clear()
    assert seen[0][0] != seen[1][0] and seen[0][1] != seen[1][1]


def test_detections_are_those_of_transformers(models):
    from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessorPil
    model = Mask2FormerForUniversalSegmentation.from_pretrained(models / "detector").eval()
    image = Image.fromarray(RNG(5).integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((384, 384))
    found = evaluate.detect(model, image)
    with torch.no_grad():
        large = evaluate.pixels_of(image.resize((800, 800), Image.Resampling.BILINEAR))
        output = model(pixel_values=evaluate.normalised(large, *evaluate.IMAGENET_PIXELS)[None])
        output.masks_queries_logits = F.interpolate(F.interpolate(
            output.masks_queries_logits, (800, 800), mode="bilinear"), (384, 384), mode="bilinear")
    [expected] = Mask2FormerImageProcessorPil().post_process_instance_segmentation(
        output, threshold=0.3, return_binary_maps=True)
    theirs = [(segment["score"], mask.bool().numpy())
              for segment, mask in zip(expected["segments_info"], expected["segmentation"])]
    # As many as queries: dogs.
    assert len(found["dog"]) == len(found["cup"]) == len(theirs) == 10
    for thing in found["dog"]:
        # Sure as they are, their scores are nearly equal: pairs are found by their masks.
        score, mask = max(theirs, key=lambda item: (thing["mask"] == item[1]).mean())
        assert (thing["mask"] == mask).mean() > 0.9999 and thing["score"] == pytest.approx(score, abs=1e-5)
        ys, xs = np.nonzero(thing["mask"])
        assert thing["box"] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_a_colour_is_asked_of_the_object_alone_grey_outside_its_mask(monkeypatch):
    clip_images = mock.Mock(return_value=torch.eye(10)[[4]])
    monkeypatch.setattr(geneval_rules, "clip_images", clip_images)
    monkeypatch.setattr(geneval_rules, "color_texts", lambda clip, name: torch.eye(10))
    mask = np.zeros((8, 8), bool)
    mask[2:4, 1:5] = True
    mask[2, 1] = False
    thing = {"box": [1, 2, 5, 4], "mask": mask}
    assert evaluate.color_of_object(tuple, Image.new("RGB", (8, 8), "red"), thing, "dog") == "blue"
    [piece] = clip_images.call_args[0][1]
    assert piece.size == (4, 2)
    assert [piece.getpixel((x, 0)) for x in (0, 1)] == [(0x99,) * 3, (255, 0, 0)]


def test_geneval_sees_by_itself_and_looks_again_where_the_metadata_have_changed(models, tmp_path):
    folder = geneval_folder(tmp_path / "images", DOG, images=1)
    words = "geneval", "--images", folder, "--detector", models / "detector", "--clip", models / "clip"
    run(*words)
    assert section(folder, "geneval")["scores"]["original"] == {"overall": 1, "single_object": 1}
    (folder / "00000/metadata.jsonl").write_text(json.dumps({"prompt": "a photo", **RED_DOG}))
    run(*words)
    rows = [json.loads(path.read_text()) for path in folder.glob("measured/*/*.jsonl")]
    assert sorted(sum("color" in dog for dog in row["objects"]["dog"]) for row in rows) == [0, 1]


@pytest.fixture
def dpg(tmp_path):
    """A command that asks three questions about each of two pictures; a third one is not there."""
    lines = ["item_id,proposition_id,dependency,tuple,question_natural_language"]
    for prompt in ("g0", "g1", "c"):
        lines += [f"{prompt},1,0,entity - whole (dog),Is there a dog?",
                  f'{prompt},2,1,"attribute - color (dog, red)",Is the dog red?',
                  f'{prompt},3,"1, 2","other - count (dog, ==2)",Are there just two dogs?']
    (tmp_path / "dpg.csv").write_text("\n".join(lines))
    folder = pictures(tmp_path / "grids", 2, names="g{}.png")
    return ["dpg", "--images", folder, "--questions", tmp_path / "dpg.csv"]


def test_dpg_scores_given_answers_of_all_images_of_a_grid(dpg, tmp_path):
    grids, given = tmp_path / "grids", tmp_path / "answers.jsonl"
    command = [*dpg, "--answers", given]
    yes, no_dog = {"1": 1, "2": "yes", "3": True}, {"1": 0, "2": 1, "3": 1}
    rows = [{"file": "g0.png", "answers": [yes, yes, no_dog, {**yes, "2": "no"}]},
            {"file": "g1.png", "answers": [yes] * 4}]
    write_jsonl(given, rows)
    run(*command)
    found = section(grids, "dpg")
    assert found["scores"] == pytest.approx({               # g0: (1 + 1 + 0 + 1/3) / 4
        "overall": 100 * (7 / 12 + 1) / 2, "entity": 100 * 7 / 8, "attribute": 100 * 7 / 8, "other": 100})
    assert found["counts"] == {"prompts": 2, "of": 3, "skipped": 0}
    for wrong in [yes] * 3, [{**yes, "1": "perhaps"}] * 4, [{"1": True}] * 4, 5, []:
        write_jsonl(given, [{**rows[0], "answers": wrong}, rows[1]])
        assert "g0.png: not answers to all questions" in refused("evaluate.py", *command)
    photo(0).save(grids / "g0.jpg")
    assert "g0.jpg and g0.png are both named after prompt g0" in refused("evaluate.py", *command)


def test_dpg_cuts_only_what_is_said_to_be_a_grid(dpg, models, tmp_path, monkeypatch):
    folder = tmp_path / "grids"
    command = [*dpg, "--vqa", models / "vqa"]
    run(*command)                                           # random weights, in earnest
    ask = mock.Mock(return_value=[True, False, True])
    monkeypatch.setattr(evaluate, "ask", ask)
    (folder / "settings.json").write_text('{"format": "dpg"}')
    for _ in range(2):                                      # The second time, all is known.
        run(*command)
    grid = Image.open(folder / "g0.png")
    asked = [call.args[1] for call in ask.call_args_list]
    places = [(0, 0), (20, 0), (0, 20), (20, 20)]
    assert asked[:4] == [grid.crop((x, y, x + 20, y + 20)) for x, y in places] and len(asked) == 8
    assert section(folder, "dpg")["scores"] == pytest.approx({
        "overall": 100 / 3, "entity": 100, "attribute": 0, "other": 100})
    photo(0, (41, 41)).save(folder / "g0.png")
    assert "g0.png: 41 x 41 pixels are not a 2 x 2 grid" in refused("evaluate.py", *command)


# ---- `compare`, `curve`

def write_results(folder, **sections):
    write_json(folder / "results.json", sections)
    return folder


def of_quality(fid, IA=None, p=0.5, data="ImageNet", weights="w", size=256):
    training = {"TA": True, "IA": IA, "p": p, "parameters": 396_000_000, "images": 1_281_167}
    return {"scores": {"fid": fid, "precision": 0.5}, "data": data, "settings": {"size": size, "k": 3},
            "weights": {"i.pth": "1" * 64}, "counts": {"real": 50000, "fake": 50000, "skipped": 0},
            "notes": ["k = 3"], "checkpoint": {"training": training}, "sampling": {"weights": weights}}


def test_compare_shows_a_row_for_each_argument_and_notes_below(tmp_path, capsys):
    write_results(tmp_path / "a/val", quality=of_quality(10.123),
                  clip={"scores": {"clip": 30.0, "clip_error": 0.1}, "data": "ImageNet"})
    write_results(tmp_path / "a/coco", quality=of_quality(12.0, data="COCO"))
    write_results(tmp_path / "b", dpg={"scores": {"overall": 70}}, quality=of_quality(9.0, size=512),
                  geneval={"scores": {"original": {"overall": 0.4}, "extended": {"overall": 0.5}}})
    run("compare", tmp_path / "a", tmp_path / "b/results.json")
    out = capsys.readouterr().out
    assert "| | TA | IA | COCO fid | COCO precision | fid | precision | clip |" in out
    assert f"| {tmp_path}/a | yes | no | 12.00 | 0.500 | 10.12 | 0.500 | 30.00 ± 0.10 |" in out
    assert f"| {tmp_path}/b/results.json | 396M | 1.28M | yes | no | 0.40 | 0.50 |" in out
    assert (f"- {tmp_path}/a: ImageNet quality: real: 50000, fake: 50000, skipped: 0, size: 256, k: 3, "
            "weights: 11111111. k = 3") in out
    assert "Table 4" not in out and "DiT-I" not in out
    write_results(tmp_path / "a", quality=of_quality(11.0))
    line = refused("evaluate.py", "compare", tmp_path / "a")
    assert f"{tmp_path}/a/results.json and {tmp_path}/a/val/results.json both hold fid" in line
    write_results(tmp_path / "a", dpg=of_quality(1, weights="other"))
    assert "results of several checkpoints" in refused("evaluate.py", "compare", tmp_path / "a")


def test_compare_paper_is_the_papers_five_tables_and_ours_only_where_they_belong(tmp_path, capsys):
    for name, IA, p in ("ta", None, 0), ("half", "1/2", 0.5), ("quarter|", "1/4", 0.25), ("all", "all", 0.5):
        write_results(tmp_path / name, quality=of_quality(20, IA, p))
    run("compare", "--paper", *sorted(tmp_path.iterdir()))
    found = {}
    for table in capsys.readouterr().out.split("\nTable ")[1:]:
        head, *lines = [[cell.removeprefix("| ").strip() for cell in line.split(" |")]
                        for line in table.splitlines() if line.startswith("| ")]
        found[table[0]] = {line[0]: dict(zip(head, line)) for line in lines}
    # Each of the paper's numbers, as it was published, in its row and column.
    with open(Path(evaluate.__file__).parent / "metrics/published.csv", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 493
    for line in lines:
        assert found[line["table"]][line["row"]][line["column"]] == line["value"]
    ours = {table: [name.split("/")[-1] for name in rows if str(tmp_path) in name]
            for table, rows in found.items()}
    assert ours == {"1": ["all", "half", "quarter\\|", "ta"], "2": [], "3": [],
                    "4": ["all CM all", "2"], "5": ["quarter\\| p = 0.25"]}


def test_curve_draws_each_run_against_the_steps_of_its_checkpoints(tmp_path):
    expected = []
    for name in "cad", "dit":
        for steps, fid in (9000, 80.0), (50000, 30.0), (100000, 25.0):
            write_results(tmp_path / name / f"step-{steps}" / "val", quality=of_quality(fid))
            expected.append({"run": os.path.relpath(tmp_path / name), "steps": steps, "fid": fid})
    places = sorted(tmp_path.glob("*/step-*"))
    for _ in range(2):
        run("curve", *places, "--out", tmp_path / "fig5.svg")
    assert read_jsonl(tmp_path / "fig5.jsonl") == expected
    assert (tmp_path / "fig5.svg").read_text().count("stroke-linecap") == 2
    (tmp_path / "captions.jsonl").write_text('{"file": "a", "caption": "b"}\n')
    other = write_results(tmp_path / "dit/step-1", quality=of_quality(80.0, size=64))
    final = write_results(tmp_path / "final", quality=of_quality(10.0))
    for words, message in [
            (["--score", "clip"], "no score 'clip'"),
            (["--out", tmp_path / "captions.svg"], "not of this command"),
            ([other], "measured in several ways"),
            ([final], "after how many steps")]:
        assert message in refused("evaluate.py", "curve", *places, *words)
