"""evaluate.py: metrics against closed forms and brute force, networks against a second way, commands."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

import evaluate
from common import UserError

RNG = np.random.default_rng


# ------------------------------------------------------------------------------------------------------------
# Fréchet distance

def sqrtm_distance(a, b):
    """The distance as pytorch-fid computes it."""
    mean_a, mean_b, S_a, S_b = a.mean(0), b.mean(0), np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(S_a @ S_b).real
    return ((mean_a - mean_b) ** 2).sum() + np.trace(S_a + S_b - 2 * root)


@pytest.mark.parametrize("n, m", [(500, 300), (33, 400), (32, 32)])
def test_frechet_distance_is_that_of_scipys_sqrtm(n, m):
    a = RNG(0).normal(size=(n, 32)) @ RNG(1).normal(size=(32, 32))
    b = RNG(2).normal(size=(m, 32)) @ RNG(3).normal(size=(32, 32)) + 0.5
    accuracy = 1e-5 if n == 32 else 1e-9
    assert evaluate.frechet_distance(a, b) == pytest.approx(sqrtm_distance(a, b), rel=accuracy)


def test_frechet_distance_is_exact_with_fewer_samples_than_dimensions():
    # tr (S_a S_b)^1/2 is the sum of the singular values of A^T B, for centred samples A, B over sqrt(N - 1)
    a, b = RNG(0).normal(size=(20, 300)), RNG(1).normal(size=(9, 300)) * 3 + 1
    A, B = (a - a.mean(0)) / 19 ** 0.5, (b - b.mean(0)) / 8 ** 0.5
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + (A ** 2).sum() + (B ** 2).sum() \
        - 2 * np.linalg.svd(A @ B.T, compute_uv=False).sum()
    assert evaluate.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert evaluate.frechet_distance(a, np.concatenate([b] * 100)) > 0                      # one side only


def test_frechet_distance_of_shifted_and_scaled_copies_has_a_closed_form():
    a = torch.randn(400, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert evaluate.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert evaluate.frechet_distance(a, a + 2) == pytest.approx(16 * 4, rel=1e-9)
    centred = a - a.mean(0)
    expected = 4 * float(a.var(0).sum())
    assert evaluate.frechet_distance(centred, 3 * centred) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_bears_features_that_never_vary():
    a, b = RNG(0).normal(size=(300, 24)), RNG(1).normal(size=(300, 24)) * 2
    a[:, :10], b[:, 5:12] = 0.5, 0
    # The trace of a root is the sum of the roots of the eigenvalues. (scipy's sqrtm of a singular
    # matrix depends on its version.)
    S_a, S_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(S_a @ S_b).real.clip(0))
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(S_a + S_b) - 2 * roots.sum()
    assert evaluate.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_names_what_it_cannot_do():
    with pytest.raises(UserError, match="at least 2"):
        evaluate.frechet_distance(np.zeros((1, 4)), np.zeros((9, 4)))
    with pytest.raises(UserError, match="finite"):
        evaluate.frechet_distance(np.full((9, 4), np.nan), np.zeros((9, 4)))


# ------------------------------------------------------------------------------------------------------------
# Precision, recall, density, coverage

def brute_force(real, fake, k):
    """The definitions, pair by pair in float64."""
    def distances(a, b):
        return np.sqrt(((a[:, None].astype(np.float64) - b[None].astype(np.float64)) ** 2).sum(-1))

    def radii(a):
        d = distances(a, a)
        return np.array([np.sort(np.delete(row, i))[k - 1] for i, row in enumerate(d)])
    d, R, Q = distances(real, fake), radii(real), radii(fake)
    inside = d < R[:, None]
    return {"precision": inside.any(0).mean(), "recall": (d < Q[None]).any(1).mean(),
            "density": inside.sum(0).mean() / k, "coverage": (d.min(1) < R).mean()}


@pytest.mark.parametrize("n, m, D, k, dtype", [(300, 200, 8, 3, np.float32), (270, 530, 64, 5, np.float64),
                                               (40, 1000, 3, 1, np.float32), (6, 6, 20, 5, np.float32)])
def test_prdc_is_that_of_its_definition(n, m, D, k, dtype):
    real = RNG(0).normal(size=(n, D)).astype(dtype)
    fake = (0.9 * RNG(1).normal(size=(m, D)) + 0.1).astype(dtype)
    expected = brute_force(real, fake, k)
    assert evaluate.prdc(real, fake, k) == pytest.approx(expected, abs=1e-12)
    assert evaluate.prdc(torch.tensor(real), torch.tensor(fake), k) == pytest.approx(expected, abs=1e-12)


def test_prdc_decides_ties_and_near_ties_as_exact_arithmetic_does():
    grid = np.stack(np.meshgrid(*[np.arange(5.0)] * 3), -1).reshape(-1, 3).astype(np.float32)       # ties
    moved = grid[RNG(0).permutation(125)[:90]] + np.float32(1)
    for offset in 0, 1000:                                  # far from the origin float32 products lose digits
        for k in 1, 3, 7:
            found = evaluate.prdc(grid + offset, moved + offset, k)
            assert found == pytest.approx(brute_force(grid, moved, k))
    x = RNG(1).normal(size=(200, 50)).astype(np.float32)    # against itself: borders are outside the balls
    assert evaluate.prdc(x, x, 3) == pytest.approx({"precision": 1, "recall": 1, "density": 1, "coverage": 1})
    doubled = np.concatenate([x, x])                  # every nearest neighbour at distance 0: balls are empty
    assert evaluate.prdc(doubled, x, 1) == {"precision": 0, "recall": 1, "density": 0, "coverage": 0}


def test_prdc_wants_more_than_k_images_on_both_sides():
    for n, m in (3, 9), (9, 3):
        with pytest.raises(UserError, match="k = 3"):
            evaluate.prdc(np.zeros((n, 2)), np.zeros((m, 2)), 3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_prdc_refuses_features_that_are_not_finite(value):
    good = RNG(0).normal(size=(9, 2))
    bad = good.copy()
    bad[4, 1] = value
    for real, fake in (good, bad), (bad, good):
        with pytest.raises(UserError, match="need finite features"):
            evaluate.prdc(real, fake, 3)


# ------------------------------------------------------------------------------------------------------------
# Inception

def random_inception(seed=0):
    """A state dict with the names of the released file, and variances that keep activations alive."""
    generator = torch.Generator().manual_seed(seed)
    state = evaluate.Inception().state_dict()
    for name, x in state.items():
        if x.is_floating_point():
            noise = torch.randn(x.shape, generator=generator)
            state[name] = noise * (2 / x[0].numel()) ** 0.5 if x.ndim == 4 else \
                1 + 0.2 * noise.abs() if name.endswith(("weight", "var")) else 0.1 * noise
    return {**state, "fc.weight": torch.randn(1008, 2048), "fc.bias": torch.randn(1008)}


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(random_inception(), path)
    return path


def reference_inception(state, images):
    """FID's Inception-v3 written out a second time, call by call, in float64."""
    w = {name: x.double() for name, x in state.items()}

    def conv(x, name, stride=1, padding=0):
        x = F.conv2d(x, w[f"{name}.conv.weight"], None, stride, padding)
        norm = (w[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, *norm, eps=0.001))

    def pooled(x):
        ones = torch.ones_like(x[:, :1])
        kernel = torch.ones(1, 1, 3, 3, dtype=x.dtype)
        total = F.conv2d(x.flatten(0, 1)[:, None], kernel, padding=1).view_as(x)
        return total / F.conv2d(ones, kernel, padding=1)    # the mean of the pixels that exist

    def A(x, n):
        return torch.cat([
            conv(x, n + "branch1x1"), conv(conv(x, n + "branch5x5_1"), n + "branch5x5_2", padding=2),
            conv(conv(conv(x, n + "branch3x3dbl_1"), n + "branch3x3dbl_2", padding=1), n + "branch3x3dbl_3",
                 padding=1),
            conv(pooled(x), n + "branch_pool")], 1)

    def C(x, n):
        a = conv(conv(x, n + "branch7x7_1"), n + "branch7x7_2", padding=(0, 3))
        b = conv(conv(x, n + "branch7x7dbl_1"), n + "branch7x7dbl_2", padding=(3, 0))
        b = conv(conv(b, n + "branch7x7dbl_3", padding=(0, 3)), n + "branch7x7dbl_4", padding=(3, 0))
        return torch.cat([conv(x, n + "branch1x1"), conv(a, n + "branch7x7_3", padding=(3, 0)),
                          conv(b, n + "branch7x7dbl_5", padding=(0, 3)),
                          conv(pooled(x), n + "branch_pool")], 1)

    def E(x, n, pool):
        a = conv(x, n + "branch3x3_1")
        b = conv(conv(x, n + "branch3x3dbl_1"), n + "branch3x3dbl_2", padding=1)
        return torch.cat([
            conv(x, n + "branch1x1"),
            conv(a, n + "branch3x3_2a", padding=(0, 1)), conv(a, n + "branch3x3_2b", padding=(1, 0)),
            conv(b, n + "branch3x3dbl_3a", padding=(0, 1)), conv(b, n + "branch3x3dbl_3b", padding=(1, 0)),
            conv(pool(x), n + "branch_pool")], 1)

    x = (tf1(images.double().numpy(), 299) - 128) / 128
    x = conv(conv(conv(x, "Conv2d_1a_3x3", 2), "Conv2d_2a_3x3"), "Conv2d_2b_3x3", padding=1)
    x = conv(conv(F.max_pool2d(x, 3, 2), "Conv2d_3b_1x1"), "Conv2d_4a_3x3")
    x = F.max_pool2d(x, 3, 2)
    for n in "Mixed_5b.", "Mixed_5c.", "Mixed_5d.":
        x = A(x, n)
    n = "Mixed_6a."
    x = torch.cat([conv(x, n + "branch3x3", 2), conv(conv(conv(x, n + "branch3x3dbl_1"), n + "branch3x3dbl_2",
                   padding=1), n + "branch3x3dbl_3", 2), F.max_pool2d(x, 3, 2)], 1)
    for n in "Mixed_6b.", "Mixed_6c.", "Mixed_6d.", "Mixed_6e.":
        x = C(x, n)
    n = "Mixed_7a."
    b = conv(conv(x, n + "branch7x7x3_1"), n + "branch7x7x3_2", padding=(0, 3))
    b = conv(b, n + "branch7x7x3_3", padding=(3, 0))
    x = torch.cat([conv(conv(x, n + "branch3x3_1"), n + "branch3x3_2", 2), conv(b, n + "branch7x7x3_4", 2),
                   F.max_pool2d(x, 3, 2)], 1)
    x = E(x, "Mixed_7b.", pooled)
    return E(x, "Mixed_7c.", lambda x: F.max_pool2d(x, 3, 1, 1)).mean((2, 3))


def tf1(x, size):
    """TensorFlow 1's resize_bilinear, pixel by pixel along each axis."""
    for axis in 2, 3:
        n, out = x.shape[axis], []
        for i in range(size):
            source = i * n / size
            low = int(source)
            high = min(low + 1, n - 1)
            out.append(x.take(low, axis) * (1 - (source - low)) + x.take(high, axis) * (source - low))
        x = np.stack(out, axis)
    return torch.from_numpy(x)


@pytest.mark.parametrize("height, width", [(64, 80), (400, 299)])
def test_inception_features_are_those_of_the_network_written_out(inception_file, height, width):
    images = torch.from_numpy(RNG(0).integers(0, 256, (2, 3, height, width), dtype=np.uint8))
    found = evaluate.Inception(inception_file)(images)
    expected = reference_inception(torch.load(inception_file, weights_only=True), images)
    assert found.shape == (2, 2048) and expected.std() > 0.01
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_resize_is_tensorflow_1s_not_torchs():
    x = torch.from_numpy(RNG(0).integers(0, 256, (1, 3, 50, 700)).astype(np.float32))
    assert (evaluate.resize_tf1(x) - tf1(x.double().numpy(), 299)).abs().max() < 1e-2
    assert (evaluate.resize_tf1(x) - F.interpolate(x, (299, 299), mode="bilinear")).abs().max() > 10
    same = x[..., :299].expand(-1, -1, -1, -1)[:, :, :1].expand(1, 3, 299, 299)
    assert torch.equal(evaluate.resize_tf1(same), same)


def test_inception_takes_the_released_files_with_or_without_classifier_in_eval_mode():
    state = random_inception()
    model = evaluate.Inception()
    model.load_state_dict(state)
    model.load_state_dict({name: x for name, x in state.items() if not name.startswith("fc.")})
    model.load_state_dict({name: x for name, x in state.items() if "num_batches" not in name})
    assert not model.training and "fc.weight" in state


@pytest.mark.parametrize("content", [b"not a checkpoint", b"", None])
def test_a_wrong_inception_file_is_named(tmp_path, content):
    path = tmp_path / "wrong.pth"
    torch.save({"weight": torch.zeros(3)}, path) if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match="wrong.pth: not the Inception weights"):
        evaluate.Inception(path)
    with pytest.raises(UserError, match="No such file"):
        evaluate.Inception(tmp_path / "absent.pth")


# ------------------------------------------------------------------------------------------------------------
# GenEval's verdicts

def things(*boxes):
    return [{"box": box, "score": 0.9 - 0.01 * i} for i, box in enumerate(boxes)]


def verdict(objects, metadata, colors=None):
    asked = []

    def color_of(thing, name):
        asked.append(name)
        return colors[tuple(thing["box"])]
    return (*evaluate.geneval_verdict(objects, metadata, color_of), asked)


BOX = [0, 0, 10, 10]


def test_verdict_counts_at_least_and_excludes_from_count_on():
    four = {"include": [{"class": "dog", "count": 3}], "exclude": [{"class": "dog", "count": 4}]}
    assert verdict({"dog": things(BOX, BOX, BOX)}, four)[:2] == (True, "")
    assert verdict({"dog": things(BOX, BOX)}, four)[0] is False
    correct, reason, _ = verdict({"dog": things(BOX, BOX, BOX, BOX)}, four)
    assert not correct and reason == "expected dog<4, found 4"
    assert verdict({}, four)[0] is False
    assert verdict({}, {"exclude": [{"class": "cat", "count": 1}]})[0] is True


def test_verdict_judges_the_colour_of_the_first_count_objects_and_only_if_there_are_enough():
    two = {"include": [{"class": "cup", "count": 2, "color": "red"}]}
    a, b, c = [0, 0, 1, 1], [0, 0, 2, 2], [0, 0, 3, 3]
    colors = {tuple(a): "red", tuple(b): "red", tuple(c): "blue"}
    assert verdict({"cup": things(a, b, c)}, two, colors) == (True, "", ["cup", "cup"])
    assert verdict({"cup": things(a, c, b)}, two, colors)[0] is False       # the third is never looked at
    assert verdict({"cup": things(a)}, two, colors)[2] == []
    assert verdict({"cup": things(a)}, {"include": [{"class": "cup", "count": 1}]})[2] == []


@pytest.mark.parametrize("box, holds", [
    ([-40, 0, -30, 10], {"left of"}), ([40, 0, 50, 10], {"right of"}), ([0, -40, 10, -30], {"above"}),
    ([0, 40, 10, 50], {"below"}), ([40, 40, 50, 50], {"right of", "below"}), ([1, 1, 11, 11], set()),
    ([2, 0, 12, 10], set()),                                # offset 2 = 0.1 x (10 + 10): shrunk to nothing
    ([2.1, 0, 12.1, 10], set()),                            # shrunk to 0.1, of an offset of 2.1: below a half
    ([3.9, 0, 13.9, 10], set()), ([4.1, 0, 14.1, 10], {"right of"}),        # (4.1 - 2) / 4.1 > 0.5
    ([30, 14, 40, 24], {"right of"}),                       # y: 12 / |(30, 14)| = 0.36
])
def test_relations_follow_the_shrunk_offset_over_the_whole_ones_length(box, holds):
    assert evaluate.relations(box, BOX) == holds


def test_every_pair_must_stand_in_the_relation():
    metadata = {"include": [{"class": "dog", "count": 2},
                            {"class": "cat", "count": 1, "position": ["left of", 0]}]}
    cat, near, far, other = [0, 0, 10, 10], [30, 0, 40, 10], [90, 0, 99, 10], [-90, 0, -80, 10]
    assert verdict({"cat": things(cat), "dog": things(near, far)}, metadata)[0] is True
    assert verdict({"cat": things(cat), "dog": things(near, other)}, metadata)[0] is False
    assert verdict({"cat": things(cat), "dog": things(near, far, other)}, metadata)[0] is True  # first two
    assert "no target" in verdict({"cat": things(cat), "dog": things(near)}, metadata)[1]


def test_position_is_not_judged_after_a_wrong_colour_nor_against_a_target_of_wrong_colour():
    metadata = {"include": [{"class": "dog", "count": 1, "color": "red"},
                            {"class": "cat", "count": 1, "color": "blue", "position": ["above", 0]}]}
    dog, cat = [0, 50, 10, 60], [0, 0, 10, 10]
    for dog_color, cat_color, faults in (
            ("red", "blue", 0), ("red", "pink", 1), ("pink", "blue", 2), ("pink", "red", 2)):
        correct, reason, _ = verdict({"dog": things(dog), "cat": things(cat)}, metadata,
                                     {tuple(dog): dog_color, tuple(cat): cat_color})
        assert (correct, len(reason.split("; ")) * bool(reason)) == (not faults, faults)


def test_verdicts_on_random_scenes_are_those_of_the_rules_applied_clause_by_clause():
    def slow(objects, metadata, color_of):                  # the rules of the benchmark in their longest form
        good, groups = True, []
        for clause in metadata.get("include", []):
            group = objects.get(clause["class"], [])[:clause["count"]]
            ok = len(group) == clause["count"]
            if ok and "color" in clause:
                right = [color_of(thing, clause["class"]) == clause["color"] for thing in group]
                ok = sum(right) == clause["count"]
            if ok and "position" in clause:
                relation, target = clause["position"]
                for thing in group if groups[target] is not None else []:
                    for other in groups[target]:
                        (ax, ay, aX, aY), (bx, by, bX, bY) = thing["box"], other["box"]
                        dx, dy = (ax + aX) / 2 - (bx + bX) / 2, (ay + aY) / 2 - (by + bY) / 2
                        sx = max(abs(dx) - 0.1 * (aX - ax + bX - bx), 0) * np.sign(dx)
                        sy = max(abs(dy) - 0.1 * (aY - ay + bY - by), 0) * np.sign(dy)
                        length = np.hypot(dx, dy) if max(abs(sx), abs(sy)) >= 1e-3 else np.inf
                        along = {"left of": -sx, "right of": sx, "above": -sy, "below": sy}[relation]
                        ok &= along / length > 0.5
                ok = bool(ok) and groups[target] is not None
            groups.append(group if ok else None)
            good &= ok
        return good and all(len(objects.get(clause["class"], [])) < clause["count"]
                            for clause in metadata.get("exclude", []))

    rng, outcomes = RNG(0), []
    for _ in range(2000):
        objects = {}
        for name in "abc":
            corner = rng.integers(0, 60, (rng.integers(0, 4), 2))
            objects[name] = [{"box": [x, y, x + w, y + h], "color": rng.choice(["red", "blue"], p=[0.7, 0.3])}
                             for (x, y), (w, h) in zip(corner.tolist(), rng.integers(5, 40, (4, 2)).tolist())]
        include = [{"class": name, "count": int(rng.integers(1, 3))} for name in "ab"]
        if rng.random() < 0.5:
            include[0]["color"] = "red"
        if rng.random() < 0.7:
            include[1]["position"] = [str(rng.choice(["left of", "right of", "above", "below"])), 0]
        metadata = {"include": include, "exclude": [{"class": "c", "count": 3}]}
        expected = slow(objects, metadata, lambda thing, _: thing["color"])
        assert evaluate.geneval_verdict(objects, metadata, lambda thing, _: thing["color"])[0] == expected
        outcomes.append(expected)
    assert 100 < sum(outcomes) < 1900


# ------------------------------------------------------------------------------------------------------------
# DPG's score

def test_a_no_reaches_grandchildren_and_questions_without_parents_stand_alone():
    dependency = {1: [0], 2: [1], 3: [2], 4: [0], 5: [4, 1]}
    yes = dict.fromkeys(range(1, 6), True)
    assert evaluate.dpg_score(yes, dependency) == 1
    assert evaluate.dpg_score({**yes, 1: False}, dependency) == 1 / 5       # only 4 is left
    assert evaluate.dpg_score({**yes, 3: False}, dependency) == 4 / 5
    assert evaluate.dpg_score({**yes, 4: False}, dependency) == 3 / 5
    assert evaluate.dpg_score({2: True, 1: False}, {1: [0], 2: [1]}) == 0  # by id, not by the dict's order


def test_a_parent_with_a_higher_id_counts_as_answered():
    # 3 depends on 5, 5 on 1: at the turn of 3, 5 is still as it was answered
    assert evaluate.dpg_score({1: False, 3: True, 5: True}, {1: [0], 3: [5], 5: [1]}) == 1 / 3


# ------------------------------------------------------------------------------------------------------------
# Tiny models of the same classes as the real ones, with random weights

def words(*texts):
    return sorted({word for text in texts for word in text.lower().replace("?", " ?").split()})


@pytest.fixture(scope="module")
def models(tmp_path_factory, inception_file):
    import transformers as tf
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tf.Dinov2Model(tf.Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                                   patch_size=14)).save_pretrained(folder / "dino")
    vocabulary = {word: n for n, word in enumerate(["<pad>", "<start>", "<end>", "<unk>", *words(
        "a photo of the dog cup bench in object", *evaluate.COLORS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)])
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>",
                                           bos_token="<start>", eos_token="<end>")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tf.CLIPModel(tf.CLIPConfig(
        text_config={**size, "vocab_size": len(vocabulary), "max_position_embeddings": 20, "eos_token_id": 2},
        vision_config={**size, "image_size": 32, "patch_size": 8},
        projection_dim=8)).save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    backbone = tf.SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=7,
                             out_features=["stage1", "stage2", "stage3", "stage4"])
    tf.Mask2FormerForUniversalSegmentation(tf.Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2,
        dim_feedforward=16, num_queries=10, num_labels=80)).save_pretrained(folder / "detector")
    bert = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words(
        "is there a dog red ? yes no")])}
    text = {**size, "vocab_size": len(bert) + 2, "encoder_hidden_size": 16, "bos_token_id": len(bert),
            "pad_token_id": 0, "eos_token_id": 3, "sep_token_id": 3, "max_position_embeddings": 64}
    tf.BlipForQuestionAnswering(tf.BlipConfig(text_config=text, vision_config={
        **size, "image_size": 32, "patch_size": 8})).save_pretrained(folder / "vqa")
    (folder / "vqa/vocab.txt").write_text("\n".join(bert))
    tf.BlipProcessor(tf.BlipImageProcessorPil(size={"height": 32, "width": 32}),
                     tf.BertTokenizer(str(folder / "vqa/vocab.txt"))).save_pretrained(folder / "vqa")
    return folder


def pictures(folder, count, seed=0, size=(40, 40), suffix="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        pixels = RNG(seed + n).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(folder / f"{n:04}.{suffix}")
    return folder


def run(*args):
    evaluate.main([str(arg) for arg in args])


def results(folder, section):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))[section]


# ------------------------------------------------------------------------------------------------------------
# `quality`

@pytest.fixture
def quality(models, inception_file):
    return lambda *args: run("quality", "--inception", inception_file, "--dino", models / "dino", *args)


def dinov2_positions(positions, side):
    """The original code's interpolation of (1, 1 + n * n, D) positions, one output at a time.

    Output i lies at (i + 0.5) / scale - 0.5 among the inputs, scale = (side + 0.1) / n; it is
    Keys' cubic (a = -0.75) of the four nearest inputs, those beyond the border repeated.
    """
    grid = positions[0, 1:].double().numpy()
    n = int(len(grid) ** 0.5)
    scale = (side + 0.1) / n

    def cubic(t, a=-0.75):
        t = abs(t)
        if t <= 1:
            return (a + 2) * t ** 3 - (a + 3) * t ** 2 + 1
        return a * t ** 3 - 5 * a * t ** 2 + 8 * a * t - 4 * a if t < 2 else 0.0

    weights = np.zeros((side, n))
    for i in range(side):
        source = (i + 0.5) / scale - 0.5
        for j in range(int(np.floor(source)) - 1, int(np.floor(source)) + 3):
            weights[i, min(max(j, 0), n - 1)] += cubic(source - j)
    grid = np.einsum("ai,bj,ijd->abd", weights, weights, grid.reshape(n, n, -1))
    return torch.cat([positions[0, :1].double(), torch.tensor(grid).flatten(0, 1)])[None].float()


def expected_features(folder, models, inception_file, size):
    """Features of a folder's images by other means: Pillow's own crop, the positions above."""
    from transformers import Dinov2Model
    dino = Dinov2Model.from_pretrained(models / "dino").eval()
    dino.embeddings.position_embeddings.data = dinov2_positions(
        dino.embeddings.position_embeddings.data, 16)
    inception = evaluate.Inception(inception_file)
    of_inception, of_dino = [], []
    for path in sorted(folder.rglob("*.*g")):
        image = Image.open(path).convert("RGB")
        if size:
            image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
        of_inception.append(inception(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])[0])
        pixels = np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC)) / 255
        pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        with torch.no_grad():
            pixels = torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None]
            of_dino.append(dino(pixels).pooler_output[0])
    return torch.stack(of_inception), torch.stack(of_dino)


@pytest.mark.parametrize("size", [256, None])
def test_quality_crops_both_sides_and_measures_their_features(quality, models, inception_file,
                                                              tmp_path, capsys, size):
    real = pictures(tmp_path / "real/class", 4, size=(700, 500), suffix="jpg").parent
    fake = pictures(tmp_path / "fake", 3, seed=50, size=(320, 400))
    quality("--real", real, "--fake", fake, "--k", 2, *([] if size else ["--no-crop"]))
    found = results(fake, "quality")
    (x, u), (y, v) = [expected_features(folder, models, inception_file, size)
                      for folder in (real, fake)]
    expected = {"fid": evaluate.frechet_distance(x, y),
                "fid_dino": evaluate.frechet_distance(u, v),
                **evaluate.prdc(u, v, 2)}
    assert found["scores"] == pytest.approx(expected, rel=2e-3)
    assert found["counts"] == {"real": 4, "fake": 3, "skipped": 0} and found["settings"]["k"] == 2
    assert found["settings"]["no_crop"] is (size is None)
    assert found["weights"][str(inception_file)] == evaluate.sha256(inception_file)
    out = capsys.readouterr().out
    assert "| FID Inc. ↓ | FID DINOv2 ↓ | P ↑ | R ↑ | D ↑ | C ↑ |" in out
    assert "3 images against 4" in out


def test_dinov2_has_the_positions_of_its_original_code(models):
    from transformers import Dinov2Model
    original = Dinov2Model.from_pretrained(models / "dino").embeddings.position_embeddings.data
    found = evaluate.load_dinov2(str(models / "dino")).embeddings.position_embeddings
    assert found.shape == (1, 1 + 16 * 16, 16)
    assert (found - dinov2_positions(original, 16)).abs().max() < 1e-5
    # The offset of 0.1 matters: without it positions differ by more than the rounding.
    side = int((original.shape[1] - 1) ** 0.5)
    plain = F.interpolate(original[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2), (16, 16),
                          mode="bicubic").flatten(2).transpose(1, 2)
    assert (found[:, 1:] - plain).abs().max() > 1e-4


def test_quality_explains_what_it_lacks(quality, tmp_path):
    real, empty = pictures(tmp_path / "real", 5), tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="empty: no images"):
        quality("--real", real, "--fake", empty)
    with pytest.raises(UserError, match="k = 3 neighbours need more than k images: real 5, fake 1"):
        quality("--real", real, "--fake", pictures(tmp_path / "one", 1))
    with pytest.raises(UserError, match="real 2, fake 5"):
        quality("--real", pictures(tmp_path / "two", 2), "--fake", real)
    with pytest.raises(UserError, match="--save-stats"):
        quality("--real", real)
    with pytest.raises(UserError, match="no such folder"):
        quality("--real", real, "--fake", real, "--dino", tmp_path / "absent")
    with pytest.raises(UserError, match="stats.safetensors: no such folder"):
        quality("--real", real, "--fake", "stats.safetensors", "--dino", tmp_path / "absent")   # told first


# ------------------------------------------------------------------------------------------------------------
# `clip`

def samples(folder, prompts, **options):
    pictures(folder, len(prompts), **options)
    rows = [{"file": f"{n:04}.png", "prompt": prompt, "seed": n} for n, prompt in enumerate(prompts)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "samples.jsonl"


def test_clip_score_is_the_cosine_of_transformers_own_pipeline(models, tmp_path, capsys):
    import transformers as tf
    prompts = ["a photo of a red dog", "a blue cup", "the bench of a dog " * 30]         # the last one is cut
    path = samples(tmp_path, prompts, size=(48, 32))        # an even margin, which no crop has to round
    run("clip", "--samples", path, "--clip", models / "clip")
    model = tf.CLIPModel.from_pretrained(models / "clip").eval()
    processor = tf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tokenizer = tf.AutoTokenizer.from_pretrained(models / "clip")
    expected = []
    for n, prompt in enumerate(prompts):
        pixels = processor(Image.open(tmp_path / f"{n:04}.png"), return_tensors="pt").pixel_values
        with torch.no_grad():
            tokens = tokenizer([prompt], truncation=True, max_length=20, return_tensors="pt")
            output = model(**tokens, pixel_values=pixels)
        expected.append(max(100 * float((output.image_embeds * output.text_embeds).sum()), 0))
    found = results(tmp_path, "clip")["scores"]
    assert max(expected) > 0
    assert found["clip"] == pytest.approx(np.mean(expected), abs=1e-3)
    assert found["clip_error"] == pytest.approx(np.std(expected, ddof=1) / 3 ** 0.5, abs=1e-3)
    out = capsys.readouterr().out
    assert f"{found['clip']:.2f} ± {found['clip_error']:.2f}" in out
    assert "Jina score left out: jinaai/jina-clip-v2 brings its own code" in out


def test_jina_score_runs_the_models_own_code_only_where_asked(models, tmp_path):
    folder = tmp_path / "jina"
    folder.mkdir()
    (folder / "jina_tiny.py").write_text('''
import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

class TinyConfig(PretrainedConfig):
    model_type = "tiny-jina"

class TinyModel(PreTrainedModel):
    config_class = TinyConfig
    def __init__(self, config):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.post_init()
    def encode_text(self, texts):
        return np.array([[len(text), 3.0] for text in texts], np.float32)
    def encode_image(self, images):
        return np.array([[image.width, 4.0] for image in images], np.float32)
''')
    (folder / "config.json").write_text(json.dumps({
        "model_type": "tiny-jina",
        "auto_map": {"AutoConfig": "jina_tiny.TinyConfig", "AutoModel": "jina_tiny.TinyModel"}}))
    from safetensors.torch import save_file
    save_file({"weight": torch.ones(1)}, folder / "model.safetensors", {"format": "pt"})
    path = samples(tmp_path / "samples", ["a dog"])         # cos((5, 3), (40, 4)) = 212 / sqrt(34 x 1616)
    run("clip", "--samples", path, "--clip", models / "clip", "--jina", folder, "--trust-remote-code")
    found = results(tmp_path / "samples", "clip")["scores"]["jina"]
    assert found == pytest.approx(21200 / (34 * 1616) ** 0.5, rel=1e-5)
    run("clip", "--samples", path, "--clip", models / "clip", "--jina", folder)
    assert "jina" not in results(tmp_path / "samples", "clip")["scores"]


def test_clip_explains_what_it_lacks(models, tmp_path, capsys):
    path = tmp_path / "samples.jsonl"
    for content, message in (("", "no samples"), ('{"file": "a.png"}\n', '"prompt"'),
                             ("[1]\n", "line 1: not a JSON object")):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            run("clip", "--samples", path, "--clip", models / "clip")
    path = samples(tmp_path, ["a dog", "a cup"])
    (tmp_path / "0001.png").unlink()
    run("clip", "--samples", path, "--clip", models / "clip")
    assert "skipped 1 of 2" in capsys.readouterr().err and results(tmp_path, "clip")["counts"]["samples"] == 1
    with pytest.raises(UserError, match="not the weights of a CLIPModel|does not load"):
        run("clip", "--samples", path, "--clip", models / "dino")


# ------------------------------------------------------------------------------------------------------------
# `geneval`

def geneval_folder(folder, *lines, images=2):
    for n, metadata in enumerate(lines):
        pictures(folder / f"{n:05}/samples", images, seed=10 * n)
        row = json.dumps({"prompt": "a photo", **metadata})                 # no newline, as the benchmark's
        (folder / f"{n:05}/metadata.jsonl").write_text(row)
    return folder


DOG = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
RED_DOG = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]}
TWO_DOGS = {"tag": "counting", "include": [{"class": "dog", "count": 2}],
            "exclude": [{"class": "dog", "count": 3}]}


@pytest.fixture
def geneval(models):
    return lambda *args: run("geneval", "--detector", models / "detector", "--clip", models / "clip", *args)


def test_geneval_judges_given_detections_by_task(geneval, tmp_path, capsys):
    folder = geneval_folder(tmp_path / "original", DOG, RED_DOG, TWO_DOGS)
    extended = geneval_folder(tmp_path / "extended", DOG, images=4)
    rows = {"00000": [[0.31], [0.3]], "00001": [[0.8], [0.8]], "00002": [[0.91, 0.95], [0.91, 0.5]]}
    with open(tmp_path / "detections.jsonl", "w") as out:
        for number, images in rows.items():
            for n, scores in enumerate(images):
                dogs = [{"box": [0, 0, 9, 9], "score": x, "color": ["red", "blue"][n]} for x in scores]
                row = {"file": f"{number}/samples/{n:04}.png", "objects": {"dog": dogs}}
                out.write(json.dumps(row) + "\n")
    with open(tmp_path / "others.jsonl", "w") as out:
        for n in range(4):
            dogs = {"dog": [{"box": [0, 0, 9, 9], "score": 0.5}]} if n == 2 else {}
            out.write(json.dumps({"file": f"00000/samples/{n:04}.png", "objects": dogs}) + "\n")
    geneval("--images", folder, "--extended", extended, "--detections", tmp_path / "detections.jsonl",
            tmp_path / "others.jsonl")
    with pytest.raises(UserError, match="a second one for --extended"):
        geneval("--images", folder, "--extended", extended, "--detections", tmp_path / "others.jsonl")
    found = results(folder, "geneval")
    tasks = "overall", "single_object", "colors", "counting"
    assert found["scores"]["original"] == dict.fromkeys(tasks, 0.5)
    assert found["scores"]["extended"] == {"overall": 0.25, "single_object": 0.25}
    assert found["counts"]["extended"] == {"prompts": 1, "images": 4, "skipped": 0}
    out = capsys.readouterr().out
    assert "| | Overall ↑ | One obj. ↑ | Count. ↑ | Col. ↑ |" in out
    assert "| original ◇ | 0.50 | 0.50 | 0.50 | 0.50 |" in out       # apart, so none is the best
    assert "| original ★ | 0.25 | 0.25 |" in out
    verdicts = [json.loads(line) for line in (folder / "geneval.jsonl").read_text().splitlines()]
    assert [row["correct"] for row in verdicts] == [True, False] * 3
    assert verdicts[5]["reason"] == "expected dog>=2, found 1"
    with pytest.raises(UserError, match="no line for 00000/samples/0002.png and 1 more"):
        geneval("--images", extended, "--detections", tmp_path / "detections.jsonl")


def confident_detector(models, folder):
    """The tiny detector, each query half sure of a dog and of a cup (16 and 41), and sure of its mask."""
    from transformers import Mask2FormerForUniversalSegmentation
    model = Mask2FormerForUniversalSegmentation.from_pretrained(models / "detector")
    with torch.no_grad():
        model.class_predictor.weight.zero_()
        model.class_predictor.bias.zero_()
        model.class_predictor.bias[[16, 41]] = torch.tensor([20.0, 19.9])
        for name, x in model.named_parameters():
            if "mask_embedder.2" in name:
                x.mul_(100_000)
    model.save_pretrained(folder)
    return folder


def test_geneval_detects_judges_and_goes_on_where_it_was_killed(geneval, models, tmp_path, monkeypatch):
    detector = confident_detector(models, tmp_path / "detector")
    folder = geneval_folder(tmp_path / "images", DOG, RED_DOG)
    geneval("--images", folder, "--detector", detector)
    log, first = (folder / "detections.jsonl").read_text(), results(folder, "geneval")
    verdicts = (folder / "geneval.jsonl").read_text()
    rows = [json.loads(line) for line in log.splitlines()]
    assert len(rows) == 4 and all(0.3 < dog["score"] <= 1 for row in rows for dog in row["objects"]["dog"])
    assert sum("color" in dog for row in rows for dog in row["objects"]["dog"]) == 2
    assert first["scores"]["original"]["single_object"] == 1
    assert set(first["weights"]) == {str(detector), str(models / "clip")}
    seen, detect = [], evaluate.detect
    monkeypatch.setattr(evaluate, "detect", lambda *args: seen.append(args) or detect(*args))
    (folder / "detections.jsonl").write_text(log[:-30])                     # a torn line
    geneval("--images", folder, "--detector", detector)
    assert len(seen) == 1
    assert (folder / "detections.jsonl").read_text() == log
    assert (folder / "geneval.jsonl").read_text() == verdicts
    assert results(folder, "geneval") == first
    pictures(folder / "00000/samples", 1, seed=77)                          # a new picture is looked at again
    geneval("--images", folder, "--detector", detector)
    assert len(seen) == 2


def test_an_edited_metadata_file_makes_the_detector_look_again(geneval, tmp_path, monkeypatch):
    folder = geneval_folder(tmp_path, DOG, images=1)
    mask = np.zeros((40, 40), bool)
    mask[2:4, 1:5] = True
    mask[2, 1] = False
    looks, crops = [], []

    def detect(name, image):
        looks.append(image)
        return {"dog": [{"box": [1, 2, 5, 4], "score": 0.9, "mask": mask}]}
    monkeypatch.setattr(evaluate, "detect", detect)
    monkeypatch.setattr(evaluate, "clip_images",
                        lambda name, images: crops.extend(images) or torch.eye(10)[[0]])
    monkeypatch.setattr(evaluate, "color_texts", lambda clip, name: torch.eye(10))

    geneval("--images", folder)
    geneval("--images", folder)
    assert (len(looks), len(crops)) == (1, 0)
    # The same prompt with a colour: CLIP has to see the object, and grey around its mask.
    (folder / "00000/metadata.jsonl").write_text(json.dumps({"prompt": "a photo", **RED_DOG}))
    geneval("--images", folder)
    geneval("--images", folder)
    assert (len(looks), len(crops)) == (2, 1)
    assert crops[0].getpixel((0, 0)) == (0x99,) * 3 and crops[0].getpixel((1, 0)) != (0x99,) * 3
    assert results(folder, "geneval")["scores"]["original"] == {"overall": 1, "colors": 1}


def test_detections_are_those_of_transformers_where_masks_have_its_size(models, tmp_path):
    from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessorPil
    detector = str(confident_detector(models, tmp_path))
    model = Mask2FormerForUniversalSegmentation.from_pretrained(detector).eval()
    with torch.no_grad():                                  # the detector's queries differ only by their masks
        image = Image.fromarray(RNG(5).integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((384, 384))
        found = evaluate.detect(detector, image)
        large = evaluate.pixels_of(image.resize((800, 800), Image.Resampling.BILINEAR))
        output = model(pixel_values=evaluate.normalised(large, *evaluate.IMAGENET_PIXELS)[None])
        output.masks_queries_logits = F.interpolate(F.interpolate(
            output.masks_queries_logits, (800, 800), mode="bilinear"), (384, 384), mode="bilinear")
    [expected] = Mask2FormerImageProcessorPil().post_process_instance_segmentation(
        output, threshold=0.3, return_binary_maps=True)
    things = [(thing["score"], "dog", thing) for thing in found["dog"]]  # as many as queries: dogs
    theirs = [(segment["score"], evaluate.COCO[segment["label_id"]], mask.bool().numpy())
              for segment, mask in zip(expected["segments_info"], expected["segmentation"])]
    assert len(theirs) == len(things) == len(found["cup"]) == 10
    for score, name, thing in things:
        # Sure as they are, their scores are nearly equal: pairs are found by their masks.
        other_score, other_name, mask = max(theirs, key=lambda other: (thing["mask"] == other[2]).mean())
        assert (thing["mask"] == mask).mean() > 0.9999
        assert score == pytest.approx(other_score, abs=1e-5) and name == other_name
        ys, xs = np.nonzero(thing["mask"])
        assert thing["box"] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_a_crowd_is_cut_to_the_sixteen_most_confident(geneval, tmp_path):
    folder = geneval_folder(tmp_path / "images", {
        "tag": "two_object", "include": [{"class": "dog", "count": 16}],
        "exclude": [{"class": "dog", "count": 17}]}, images=1)
    dogs = [{"box": [0, 0, 9, 9], "score": 0.5 + n / 100} for n in range(30)]
    (tmp_path / "detections.jsonl").write_text(
        json.dumps({"file": "00000/samples/0000.png", "objects": {"dog": dogs}}) + "\n")
    geneval("--images", folder, "--detections", tmp_path / "detections.jsonl")
    assert results(folder, "geneval")["scores"]["original"]["two_object"] == 1


def test_colour_is_judged_on_the_masked_object_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate, "clip_images",
                        lambda name, images: seen.extend(images) or torch.eye(10)[[4]])
    monkeypatch.setattr(evaluate, "color_texts", lambda clip, name: torch.eye(10))
    image = Image.new("RGB", (8, 8), "red")
    mask = np.zeros((8, 8), bool)
    mask[2:4, 1:5] = True
    mask[2, 1] = False
    assert evaluate.color_of_object("clip", image, {"box": [1, 2, 5, 4], "mask": mask}, "dog") == "blue"
    assert seen[0].size == (4, 2)
    assert seen[0].getpixel((0, 0)) == (0x99,) * 3 and seen[0].getpixel((1, 0)) == (255, 0, 0)
    evaluate.color_of_object("clip", image, {"box": [1.4, 2.6, 1.4, 5]}, "dog")
    assert seen[1].size == (1, 2)


def test_colour_embeddings_average_the_benchmarks_three_templates(models):
    clip = str(models / "clip")
    image = Image.fromarray(RNG(3).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    found = evaluate.clip_images(clip, [image.crop((4, 4, 30, 36))])[0]
    means = [sum(evaluate.clip_texts(clip, [template.format(color)])[0] for template in (
        "a photo of a {} dog", "a photo of a {}-colored dog", "a photo of a {} object"))
        for color in evaluate.COLORS]
    scores = [float(F.cosine_similarity(mean, found, 0)) for mean in means]
    color = evaluate.color_of_object(clip, image, {"box": [4, 4, 30, 36]}, "dog")
    assert color == evaluate.COLORS[int(np.argmax(scores))]


def test_geneval_explains_what_it_lacks(geneval, tmp_path, capsys):
    with pytest.raises(UserError, match="no 00000/metadata.jsonl"):
        geneval("--images", pictures(tmp_path / "flat", 2))
    folder = geneval_folder(tmp_path / "images", DOG)
    (folder / "00000/metadata.jsonl").rename(folder / "kept")
    with pytest.raises(UserError, match="00000: no metadata.jsonl"):
        geneval("--images", folder)
    (folder / "00000/metadata.jsonl").write_text('{"prompt": "a photo"}')
    with pytest.raises(UserError, match="not a line of GenEval's"):
        geneval("--images", folder)
    (folder / "kept").rename(folder / "00000/metadata.jsonl")
    (folder / "00000/samples/0000.png").write_bytes(b"broken")
    geneval("--images", folder)
    assert "skipped 1 of 2" in capsys.readouterr().err
    assert results(folder, "geneval")["counts"]["original"]["skipped"] == 1
    (folder / "00000/samples").rename(folder / "moved")
    with pytest.raises(UserError, match="00000: no images"):
        geneval("--images", folder)


# ------------------------------------------------------------------------------------------------------------
# `dpg`

HEADER = ["item_id", "text", "keywords", "proposition_id", "dependency", "category_broad",
          "category_detailed", "tuple", "question_natural_language"]


def questions(path, prompts=("a", "b"), header=HEADER):
    rows = [(1, "0", "entity - whole (dog)", "Is there a dog?"),
            (2, "1", "attribute - color (dog, red)", "Is the dog red?"),
            (3, "1, 2", "other - count (dog, ==2)", "Are there two dogs?")]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, header, extrasaction="ignore")
        writer.writeheader()
        for prompt in prompts:
            for number, parents, kind, question in rows:
                row = prompt, "a dog", "", number, parents, "", "", kind, question
                writer.writerow(dict(zip(HEADER, row)))
    return path


def test_dpg_scores_given_answers_of_all_images_of_a_grid(tmp_path, capsys):
    grids = pictures(tmp_path / "grids", 2)
    (grids / "0000.png").rename(grids / "a.png")
    (grids / "0001.png").rename(grids / "b.png")
    yes, no_dog = {"1": 1, "2": "yes", "3": True}, {"1": 0, "2": 1, "3": 1}
    not_red = {"1": 1, "2": "no", "3": True}
    (tmp_path / "answers.jsonl").write_text(
        json.dumps({"file": "a.png", "answers": [yes, yes, no_dog, not_red]}) + "\n"
        + json.dumps({"file": "b.png", "answers": [yes] * 4}) + "\n")
    command = "--questions", questions(tmp_path / "dpg.csv", "abc"), "--answers", tmp_path / "answers.jsonl"
    run("dpg", "--images", grids, *command)
    found = results(grids, "dpg")
    assert found["scores"] == pytest.approx({           # a: (1 + 1 + 0 + 1/3) / 4
        "overall": 100 * (7 / 12 + 1) / 2, "entity": 100 * 7 / 8, "attribute": 100 * 7 / 8, "other": 100})
    out = capsys.readouterr().out
    assert "| | Entity ↑ | Attribute ↑ | Other ↑ | Overall ↑ |" in out
    assert "answers.jsonl. The paper's is mPLUG" in out
    assert "1 of 3 prompts have no image, 0 of 2 images no prompt" in out
    (tmp_path / "answers.jsonl").write_text(json.dumps({"file": "a.png", "answers": [{"1": True}]}) + "\n")
    (grids / "b.png").unlink()
    for folder, message in (grids, "must list"), (tmp_path / "other", "no line for b.png"):
        pictures(folder, 1)
        (folder / "0000.png").rename(folder / ("b.png" if folder != grids else "a.png"))
        with pytest.raises(UserError, match=message):
            run("dpg", "--images", folder, *command)


def test_dpg_asks_about_every_quarter_and_goes_on_where_it_was_killed(models, tmp_path, monkeypatch):
    grids = pictures(tmp_path / "grids", 2)
    (grids / "0000.png").rename(grids / "a.png")
    (grids / "0001.png").rename(grids / "b.png")
    command = ["dpg", "--images", grids, "--questions", questions(tmp_path / "dpg.csv"),
               "--vqa", models / "vqa"]
    run(*command)                                           # random weights, in earnest
    found = results(grids, "dpg")
    assert 0 <= found["scores"]["overall"] <= 100 and found["settings"]["judge"] == str(models / "vqa")
    seen = []

    def ask(name, image, texts):
        seen.append((image.size, image.getpixel((0, 0)), len(texts)))
        return [True, False, True]
    monkeypatch.setattr(evaluate, "ask", ask)
    (grids / "answers.jsonl").unlink()
    run(*command)
    grid = Image.open(grids / "a.png")
    assert seen[:4] == [((20, 20), grid.getpixel(xy), 3) for xy in ((0, 0), (20, 0), (0, 20), (20, 20))]
    assert results(grids, "dpg")["scores"] == pytest.approx({
        "overall": 100 / 3, "entity": 100, "attribute": 0, "other": 100})
    log = (grids / "answers.jsonl").read_text()
    (grids / "answers.jsonl").write_text(log[:-9])
    run(*command)
    assert len(seen) == 12 and (grids / "answers.jsonl").read_text() == log


def test_dpg_explains_what_it_lacks(models, tmp_path):
    grids, path = pictures(tmp_path / "grids", 1), questions(tmp_path / "dpg.csv")
    command = ["dpg", "--images", grids, "--questions", path, "--vqa", models / "vqa"]
    with pytest.raises(UserError, match="no image is named after a prompt"):
        run(*command)
    for size in (40, 30), (41, 41):
        pictures(grids, 1, size=size)
        (grids / "0000.png").replace(grids / "a.png")
        with pytest.raises(UserError, match=f"a.png: {size[0]} x {size[1]} pixels are not a 2 x 2 grid"):
            run(*command)
    pictures(grids, 2)
    (grids / "0000.png").replace(grids / "a.png")
    Image.open(grids / "0001.png").resize((80, 80)).save(grids / "b.png")
    with pytest.raises(UserError, match="b.png: 80 x 80 .* as large as the others"):
        run(*command)
    questions(path, header=[name for name in HEADER if name not in ("tuple", "dependency")])
    with pytest.raises(UserError, match="dpg.csv: no column dependency, tuple"):
        run(*command)
    path.write_text(",".join(HEADER) + "\na,,,one,0,,,x,y\n")
    with pytest.raises(UserError, match="dpg.csv line 2"):
        run(*command)
    path.write_text(",".join(HEADER) + "\n")
    with pytest.raises(UserError, match="no questions"):
        run(*command)


# ------------------------------------------------------------------------------------------------------------
# The command line

def test_a_users_mistake_ends_in_one_line_and_exit_code_2(tmp_path):
    root = Path(evaluate.__file__).parent
    done = subprocess.run([sys.executable, root / "evaluate.py", "compare", tmp_path / "absent.json"],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
