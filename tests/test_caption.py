"""Stage 2: class names, captions on disk, LLaVA with pruned tokens (against transformers), longer prompts."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import common
import caption
import cutmix
import encode

ROOT = Path(__file__).resolve().parent.parent

WORDS = """a an the dog cat two red blue left of right image features is on table photo in and small large
with seven clocks . , ! describe this USER : ASSISTANT"""


def tokenizer(path):
    """Whole words, as ids 0, 1, ... of a vocabulary that any test sentence fits into."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", *WORDS.split()]
    vocabulary = {word: k for k, word in enumerate(words)}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", bos_token="<s>",
                                   eos_token="</s>", unk_token="<unk>",
                                   extra_special_tokens={"image_token": "<image>"})
    made.chat_template = ("{{ bos_token }}{% for m in messages %}{{ m['role'] }} : "
                          "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
                          "{% for c in m['content'] %}{{ '<image> ' if c['type'] == 'image' "
                          "else c['text'] }}{% endfor %}{% endif %} {% endfor %}ASSISTANT :")
    made.save_pretrained(path)
    return made


def llama(vocabulary):
    from transformers import LlamaConfig
    return LlamaConfig(vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                       num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
                       bos_token_id=1, eos_token_id=2, pad_token_id=0)


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory):
    """A random LLaVA-NeXT of 4 x 4 patches a view, as a folder."""
    import torch
    from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextProcessor
    from transformers import LlavaNextForConditionalGeneration as LlavaNext
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    path = tmp_path_factory.mktemp("llava")
    words, pinpoints = tokenizer(path), [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                              num_attention_heads=4, image_size=28, patch_size=7, projection_dim=32)
    config = LlavaNextConfig(vision_config=vision, text_config=llama(len(words)), image_token_index=4,
                             image_grid_pinpoints=pinpoints, image_seq_length=16)
    torch.manual_seed(0)
    model = LlavaNext(config)
    with torch.no_grad():
        for weights in model.parameters():      # livelier than the usual start: answers depend on the picture
            if weights.dim() > 1:
                weights.mul_(6)
    model.save_pretrained(path)
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28},
                                        image_grid_pinpoints=pinpoints)
    LlavaNextProcessor(images, words, patch_size=7, vision_feature_select_strategy="default",
                       image_token="<image>", num_additional_image_tokens=1,
                       chat_template=words.chat_template).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """13 photos in two classes, one of them broken, and their composites."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for k in range(13):
        path = folder / "photos" / f"class{k % 2}" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((80, 64), 0).save(path)
    (folder / "photos" / "class0" / "4.png").write_bytes(b"broken")
    cutmix.main(["--images", str(folder / "photos"), "--out", str(folder / "cutmix"), "--size", "64",
                 "--workers", "0"])
    return folder


def run(*args, check=True, **env):
    done = subprocess.run([sys.executable, ROOT / "caption.py", *map(str, args)], check=False, text=True,
                          capture_output=True, env={**os.environ, **env})
    assert not check or done.returncode == 0, done.stderr
    return done


# ----------------------------------------------------------------------------------------------------------
# aio

def test_the_article_is_the_one_that_is_spoken():
    for name in ("umbrella", "ice cream", "hourglass", "African elephant", "otterhound", "X-ray", "egg"):
        assert caption.aio_caption(name) == f"An image of an {name}"
    for name in ("tench", "unicycle", "European fire salamander", "house finch", "uniform", "yurt", "ewe",
                 "ukulele", "one-armed bandit", "honeycomb", "T-shirt"):
        assert caption.aio_caption(name) == f"An image of a {name}"


def test_class_names_come_from_folders_or_from_either_table(tmp_path):
    assert caption.class_names(["hot_dog", "cat"]) == {"hot_dog": "hot dog", "cat": "cat"}
    (tmp_path / "map.txt").write_text("n01440764 tench, Tinca tinca\nn02099601 golden retriever\n")
    (tmp_path / "map.json").write_text('{"0": ["n01440764", "tench"], "1":["n02099601", "golden_retriever"]}')
    for table in ("map.txt", "map.json"):
        names = caption.class_names(["n01440764", "n02099601"], tmp_path / table)
        assert names == {"n01440764": "tench", "n02099601": "golden retriever"}
        with pytest.raises(common.UserError, match="n00000000"):
            caption.class_names(["n00000000"], tmp_path / table)
    with pytest.raises(common.UserError, match="WordNet id"):
        caption.class_names(["n01440764"])
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(common.UserError, match="neither"):
        caption.class_names([], tmp_path / "bad.json")


def test_aio_captions_every_file_of_every_class(pictures, tmp_path):
    caption.main(["aio", "--images", str(pictures / "photos"), "--out", str(tmp_path / "aio.jsonl")])
    files = common.list_images(pictures / "photos")
    assert encode.read_captions(tmp_path / "aio.jsonl") == {
        file: f"An image of a {file.split('/')[0]}" for file in files}


# ----------------------------------------------------------------------------------------------------------
# Captions on disk

def test_both_kinds_of_caption_files_are_read(tmp_path):
    whole, torn = '{"file": "n1/ä b.jpg", "caption": "x\u2028y"}\n', '{"file": "c", "capt'
    (tmp_path / "a.jsonl").write_bytes((whole + torn).encode())
    assert encode.read_captions(tmp_path / "a.jsonl") == {"n1/ä b.jpg": "x\u2028y"}
    (tmp_path / "a.tsv").write_text("n1_1.JPEG\tA dog. It \"sits\".\nn1_2.JPEG\tA cat\twith a tab.\nn1_3")
    assert encode.read_captions(tmp_path / "a.tsv") == {"n1_1.JPEG": 'A dog. It "sits".',
                                                         "n1_2.JPEG": "A cat\twith a tab."}


@pytest.mark.parametrize("name, text, said", [
    ("a.tsv", "1.jpg\tA dog.\n1.jpg\tA cat.\n", "two folders"),
    ("a.tsv", "1.jpg A dog.\n", "needs a file and a caption"),
    ("a.jsonl", '{"file": "a"}\n', "needs a file and a caption"),
    ("a.jsonl", '{"file": "a", "caption": 3}\n', "needs a file and a caption"),
    ("a.jsonl", 'what\n', "not JSON")])
def test_a_bad_captions_file_is_refused_with_the_reason(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(common.UserError, match=said):
        encode.read_captions(tmp_path / name)


ITEMS = [f"f{k}" for k in range(23)]


def produce(batches):
    """A stand-in for a model, in which some pictures are broken and all captions depend on the batch."""
    for batch in batches:
        yield [{"file": item, "reason": "broken"} if int(item[1:]) % 5 == 3 else
               {"file": item, "caption": f"{item} of {batch[0]} ä\u2028"} for item in batch]


def grown(folder, rank=0, world=1, produce=produce, model="a model"):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", str(rank))
        patch.setenv("WORLD_SIZE", str(world))
        args = SimpleNamespace(out=folder / "c.jsonl", batch_size=4, model=model)
        done = caption.grow(args, ITEMS, "file", str, produce, "captions")
    return done, {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_wherever_a_run_was_torn_it_ends_with_the_same_bytes(tmp_path):
    _, whole = grown(tmp_path)
    assert sorted(whole) == ["c.jsonl", "c.skipped.jsonl"]
    rows = [json.loads(line) for line in whole["c.jsonl"].splitlines()]
    assert [row["file"] for row in rows] == [item for item in ITEMS if int(item[1:]) % 5 != 3]
    part = "".join(json.dumps(row) + "\n" for rows in produce([ITEMS[k:k + 4] for k in range(0, 23, 4)])
                   for row in rows).encode()
    for size in range(0, len(part) + 1, 7):
        for path in tmp_path.iterdir():
            path.unlink()
        (tmp_path / "c.jsonl.0of1").write_bytes(part[:size])
        assert grown(tmp_path)[1] == whole, size


def test_whole_batches_are_never_asked_again(tmp_path):
    seen = []

    def interrupted(batches):
        for batch, rows in zip(batches, produce(batches)):
            if len(seen) == 3:
                raise KeyboardInterrupt
            seen.append(batch)
            yield rows

    def watched(batches):
        seen.extend(batches)
        yield from produce(batches)

    with pytest.raises(KeyboardInterrupt):
        grown(tmp_path, produce=interrupted)
    grown(tmp_path, produce=watched)
    assert [item for batch in seen for item in batch] == ITEMS
    assert grown(tmp_path, produce=None)[0]             # complete: nothing is asked at all


def test_ranks_write_parts_that_are_joined_to_the_file_of_one(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "three").mkdir()
    _, one = grown(tmp_path / "one")
    assert [grown(tmp_path / "three", rank, 3)[0] for rank in (2, 0)] == [False, False]
    assert not (tmp_path / "three" / "c.jsonl").exists()
    with pytest.raises(common.UserError, match="another number of ranks"):
        grown(tmp_path / "three")
    assert grown(tmp_path / "three", 1, 3) == (True, one)
    assert grown(tmp_path / "three", 0, 3, produce=None) == (True, one)


def test_captions_of_two_models_are_not_mixed(tmp_path):
    assert not grown(tmp_path, 0, 2)[0]
    with pytest.raises(common.UserError, match="c.json.*other settings .*a model, now another") as error:
        grown(tmp_path, 1, 2, model="another")
    assert "\n" not in str(error.value)
    done, files = grown(tmp_path, 1, 2)
    assert done and sorted(files) == ["c.jsonl", "c.skipped.jsonl"]


def test_a_file_of_other_images_is_not_continued(tmp_path):
    other = '{"file": "other", "caption": "x"}\n'
    (tmp_path / "c.jsonl.0of1").write_text(4 * other)
    with pytest.raises(common.UserError, match="another list"):
        grown(tmp_path)
    (tmp_path / "c.jsonl").write_text(other)
    (tmp_path / "c.skipped.jsonl").write_text("")
    with pytest.raises(common.UserError, match="another list"):
        grown(tmp_path)


# ----------------------------------------------------------------------------------------------------------
# llava

def test_kept_patches_are_the_quadrants_with_most_of_the_second_photo():
    for setting, size in [(s, n) for s in ("1/4", "1/9", "1/16") for n in (36, 64, 101)]:
        for seed in range(40):
            box = cutmix.paste_box(setting, size, np.random.default_rng(seed))
            fine = np.zeros((2 * size, 2 * size), int)  # by counting, on a grid of half pixels
            fine[2 * box[1]:2 * box[3], 2 * box[0]:2 * box[2]] = 1
            counts = [fine[y:y + size, x:x + size].sum() for y in (0, size) for x in (0, size)]
            assert caption.kept_patches(setting, box, size) == [0] + [
                1 + k for k in range(4) if counts[k] == max(counts)]
    assert caption.kept_patches("1/2", (128, 0, 256, 256), 256) == [0]
    assert caption.kept_patches(None, None, 256) == [0]
    assert caption.kept_patches("1/4", (128, 0, 256, 128), 256) == [0, 2]
    assert caption.kept_patches("1/9", (32, 64, 64, 96), 96) == [0, 3, 4]         # bottom border: a tie


def test_answers_end_with_a_whole_sentence_on_one_line():
    assert caption.whole_sentences(' A dog.\nIt is 3.5 m "tall." An') == 'A dog. It is 3.5 m "tall."'
    assert caption.whole_sentences("A dog without end") == "A dog without end"
    assert caption.whole_sentences(" \n") == ""


def loaded(tiny_llava):
    model, processor = caption.load("LlavaNextForConditionalGeneration", str(tiny_llava))
    content = [{"type": "image"}, {"type": "text", "text": "describe this image"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return model, processor, text, processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def images_of(pictures, count=5):
    files = [file for file in common.list_images(pictures / "photos") if "4.png" not in file][:count]
    return [common.load_image(pictures / "photos" / file, 56) for file in files]


def test_without_pruning_it_is_transformers_own_path_to_the_last_bit(tiny_llava, pictures):
    import torch
    model, processor, text, prompt = loaded(tiny_llava)
    answers = set()
    for image in images_of(pictures):
        inputs = processor(images=image, text=text, add_special_tokens=False, return_tensors="pt")
        seen = []
        hook = model.model.language_model.register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.append(kwargs["inputs_embeds"]), with_kwargs=True)
        with torch.no_grad():
            own = model.generate(**inputs, do_sample=False, max_new_tokens=25)
            own = own[0, inputs["input_ids"].shape[1]:]
            hook.remove()
            views = processor.image_processor(images=image, return_tensors="pt")["pixel_values"][0]
            embeds, mask = caption.embed(model, [views], [[0, 1, 2, 3, 4]], prompt)
        assert torch.equal(embeds, seen[0]) and mask.all()
        ours = caption.answer(model, processor.tokenizer, embeds, mask, 25)[0]
        assert ours == processor.tokenizer.decode(own, skip_special_tokens=True)
        answers.add(ours)
    assert len(answers) > 1                             # the answers do depend on the pictures


@pytest.mark.parametrize("kept", [[0], [0, 1], [0, 2], [0, 4], [0, 1, 2], [0, 2, 4], [0, 1, 2, 3, 4]])
def test_pruned_embeddings_are_the_kept_subset_in_order(tiny_llava, pictures, kept):
    """The places in transformers' own sequence are found by drawing the grid and reading it row by row."""
    import torch
    model, processor, _, prompt = loaded(tiny_llava)
    image = images_of(pictures, 1)[0]
    views = processor.image_processor(images=image, return_tensors="pt")["pixel_values"][0]
    quadrant = np.kron([[1, 2], [3, 4]], np.ones((4, 4), int))                  # (8, 8) patches of 7 pixels
    newline = np.where(np.isin(quadrant, kept).any(1), 1, 0)[:, None]       # ends each row that has something
    grid = np.concatenate([np.isin(quadrant, kept), newline], axis=1).astype(bool)
    if kept == [0]:
        grid[0, -1] = True                             # one newline ends the whole view, as for a single view
    image = np.concatenate([np.ones(16, bool), grid.ravel()])
    k = prompt.index(4)
    places = np.concatenate([np.ones(k, bool), image, np.ones(len(prompt) - k - 1, bool)])
    passed = []
    hook = model.model.vision_tower.register_forward_pre_hook(lambda _, args: passed.append(len(args[0])))
    with torch.no_grad():
        full, _ = caption.embed(model, [views], [[0, 1, 2, 3, 4]], prompt)
        pruned, mask = caption.embed(model, [views[kept]], [kept], prompt)
    hook.remove()
    assert passed == [5, len(kept)]                     # the other views do not pass through the vision tower
    assert torch.allclose(pruned[0], full[0, places], atol=1e-5) and mask.all()
    assert len(pruned[0]) == places.sum()


def test_the_sizes_are_the_papers(tiny_llava):
    import torch
    newline, views = torch.zeros(2), torch.zeros(5, 576, 2)
    assert len(caption.image_tokens(views[:1], [0], newline)) == 577
    assert len(caption.image_tokens(views[:2], [0, 3], newline)) == 577 - 1 + 600
    assert len(caption.image_tokens(views, [0, 1, 2, 3, 4], newline)) == 2928


def test_a_batch_padded_on_the_left_says_what_each_picture_says_alone(tiny_llava, pictures):
    import torch
    model, processor, _, prompt = loaded(tiny_llava)
    pixels = [processor.image_processor(images=image, return_tensors="pt")["pixel_values"][0]
              for image in images_of(pictures, 3)]
    kept = [[0], [0, 2, 4], [0, 1, 2, 3, 4]]
    pixels = [views[k] for views, k in zip(pixels, kept)]
    with torch.no_grad():
        together = caption.answer(model, processor.tokenizer, *caption.embed(model, pixels, kept, prompt), 20)
        alone = [caption.answer(model, processor.tokenizer, *caption.embed(model, [p], [k], prompt), 20)[0]
                 for p, k in zip(pixels, kept)]
    assert together == alone


def test_every_photo_and_composite_gets_a_caption_or_an_entry(tiny_llava, pictures, tmp_path):
    options = ["--model", str(tiny_llava), "--batch-size", "3", "--max-new-tokens", "12", "--workers", "0"]
    caption.main(["llava", "--images", str(pictures / "photos"), "--out", str(tmp_path / "p.jsonl"),
                  *options])
    files = common.list_images(pictures / "photos")
    captions, skipped = (common.read_jsonl(tmp_path / name) for name in ("p.jsonl", "p.skipped.jsonl"))
    assert sorted(row["file"] for row in captions + skipped) == files
    assert "not a readable image" in {row["file"]: row["reason"] for row in skipped}["class0/4.png"]
    manifest = pictures / "cutmix" / "cutmix.jsonl"
    caption.main(["llava", "--cutmix", str(manifest), "--out", str(tmp_path / "c.jsonl"), *options])
    rows = common.read_jsonl(manifest)
    done = common.read_jsonl(tmp_path / "c.jsonl") + common.read_jsonl(tmp_path / "c.skipped.jsonl")
    assert sorted(row["file"] for row in done) == [row["file"] for row in rows]


def test_composites_are_shown_the_views_of_their_setting(tiny_llava, pictures, tmp_path, monkeypatch):
    seen = []

    def embed(model, pixels, kept, prompt):
        seen.extend(zip(kept, map(len, pixels), [prompt] * len(kept)))
        return original(model, pixels, kept, prompt)

    original = caption.embed
    monkeypatch.setattr(caption, "embed", embed)
    manifest = pictures / "cutmix" / "cutmix.jsonl"
    options = ["llava", "--cutmix", str(manifest), "--model", str(tiny_llava), "--max-new-tokens", "2",
              "--workers", "0"]
    caption.main([*options, "--out", str(tmp_path / "c.jsonl")])
    rows = common.read_jsonl(manifest)
    assert {row["setting"] for row in rows} == {"1/2", "1/4", "1/9", "1/16"}
    expected = [caption.kept_patches(row["setting"], row["box"], 64) for row in rows]
    assert [kept for kept, _, _ in seen] == expected
    assert all(len(kept) == views for kept, views, _ in seen)
    said = len(re.findall(r"\w+|[.,]", caption.PROMPT_CUTMIX))         # <s> user : <image> ... ASSISTANT :
    assert len(seen[0][2]) == 6 + said
    seen.clear()
    caption.main([*options, "--out", str(tmp_path / "d.jsonl"), "--no-prune"])
    assert all(kept == [0, 1, 2, 3, 4] for kept, _, _ in seen) and len(seen) == len(rows)


def test_a_killed_captioner_resumes_to_the_same_bytes(tiny_llava, pictures, tmp_path):
    common = ["llava", "--images", str(pictures / "photos"), "--model", str(tiny_llava), "--batch-size", "1",
              "--max-new-tokens", "60"]
    caption.main([*common, "--out", str(tmp_path / "whole.jsonl"), "--workers", "0"])
    out = tmp_path / "out.jsonl"
    process = subprocess.Popen([sys.executable, ROOT / "caption.py", *common, "--out", out, "--workers", "1"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part = tmp_path / "out.jsonl.0of1"
    while process.poll() is None and not (part.exists() and part.stat().st_size > 100):
        time.sleep(0.002)
    killed = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert killed and 0 < part.read_bytes().count(b"\n") < 13
    caption.main([*common, "--out", str(out), "--workers", "0"])
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert (tmp_path / "out.skipped.jsonl").read_bytes() == (tmp_path / "whole.skipped.jsonl").read_bytes()


def test_the_benchmark_prints_both_speeds(tiny_llava, pictures, capsys, tmp_path):
    caption.main(["llava", "--images", str(pictures / "photos"), "--model", str(tiny_llava), "--workers", "0",
                  "--batch-size", "4", "--max-new-tokens", "3", "--benchmark", "2",
                  "--out", str(tmp_path / "no")])
    said = capsys.readouterr().out
    assert "with pruning" in said and "without pruning" in said and not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------
# extend

def test_lost_words_are_found_and_other_forms_of_a_word_are_the_same():
    kept = "The image shows 2 red benches. A knife, blue and small, is left of them."
    assert caption.missing_words("a photo of two red benches", kept) == []
    assert caption.missing_words("a photo of a red bench left of blue knives", kept) == []
    assert caption.missing_words("a photo of three green benches right of a dog", kept) == [
        "three", "green", "right", "dog"]
    for one, many in [("berry", "berries"), ("bus", "buses"), ("glass", "glasses"), ("orange", "oranges"),
                      ("giraffe", "giraffes"), ("mouse", "mouse"), ("tie", "ties"), ("horse", "horses"),
                      ("skis", "skis"), ("vase", "vases"), ("sandwich", "sandwiches"), ("zebra", "zebras"),
                      ("potted plant", "potted plants"), ("scissors", "scissors"), ("knife", "knives"),
                      ("leaf", "leaves")]:
        assert caption.missing_words(f"a photo of {one}", f"There are {many}.") == [], (one, many)


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory):
    from transformers import LlamaForCausalLM
    path = tmp_path_factory.mktemp("llm")
    LlamaForCausalLM(llama(len(tokenizer(path)))).save_pretrained(path)
    return path


def test_prompts_become_long_stay_whole_or_stay_short(tiny_llm, tmp_path, monkeypatch, capsys):
    """The model is played: one prompt fits at once, one when told what is missing, one never."""
    asked = []

    def answer(model, tokenizer, ids, mask, max_new_tokens):
        assert ids.shape == mask.shape and mask[:, -1].all()                    # padded on the left
        texts = [tokenizer.decode(row[on.bool()]) for row, on in zip(ids, mask)]
        asked.append(texts)
        return ["\"The image features a red dog. The dog is on a table.\"" if "red dog" in text else
                "The image features seven clocks. And" if text.count("seven") == 2 else
                "The image features clocks." for text in texts]

    monkeypatch.setattr(caption, "answer", answer)
    (tmp_path / "evaluation_metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [
        {"tag": "colors", "include": [{"class": "dog"}], "prompt": "a photo of a red dog"},
        {"tag": "counting", "prompt": "a photo of seven clocks"},
        {"tag": "colors", "prompt": "a photo of a blue cat"},
        {"tag": "again", "prompt": "a photo of a red dog"}]))
    caption.main(["extend", "--prompts", str(tmp_path / "evaluation_metadata.jsonl"), "--out",
                  str(tmp_path / "long.jsonl"), "--model", str(tiny_llm), "--batch-size", "3"])
    rows = common.read_jsonl(tmp_path / "long.jsonl")
    assert rows[0] == {"tag": "colors", "include": [{"class": "dog"}], "short_prompt": "a photo of a red dog",
                       "prompt": "The image features a red dog. The dog is on a table."}
    assert rows[1]["prompt"] == "The image features seven clocks." and rows[3]["tag"] == "again"
    assert rows[2]["prompt"] == rows[2]["short_prompt"] == "a photo of a blue cat"
    assert list(map(len, asked)) == [3, 2, 1, 1]
    said = capsys.readouterr().out
    assert "1 of them kept short" in said and "a photo of a blue cat" in said


def test_a_text_file_of_prompts_goes_through_a_real_model(tiny_llm, tmp_path):
    (tmp_path / "prompts.txt").write_text("a photo of a dog\n\na photo of two cats\n")
    caption.main(["extend", "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "long.jsonl"),
                  "--model", str(tiny_llm), "--max-new-tokens", "5", "--attempts", "2"])
    rows = common.read_jsonl(tmp_path / "long.jsonl")
    assert [row["short_prompt"] for row in rows] == ["a photo of a dog", "a photo of two cats"]


# ----------------------------------------------------------------------------------------------------------

def test_mistakes_end_in_one_line(tiny_llava, tiny_llm, pictures, tmp_path):
    photos, out = str(pictures / "photos"), ["--out", str(tmp_path / "out.jsonl")]
    (tmp_path / "none.txt").write_text("\n")
    (tmp_path / "bad.jsonl").write_text('{"file": "a"}\n')
    for args, said in [(["llava", "--images", photos, "--model", str(tmp_path / "no")], "cannot be loaded"),
                       (["llava", "--images", photos, "--model", str(tiny_llm)], "not LLaVA-NeXT"),
                       (["llava", "--model", str(tiny_llava)], "--images"),
                       (["llava", "--cutmix", str(tmp_path / "bad.jsonl")], "without 'setting'"),
                       (["llava", "--images", photos, "--batch-size", "0"], "--batch-size 0"),
                       (["aio", "--images", str(pictures / "photos" / "class0")], "no class folder"),
                       (["extend", "--prompts", str(tmp_path / "none.txt")], "empty"),
                       (["extend", "--prompts", str(tmp_path / "bad.jsonl")], "without a prompt")]:
        with pytest.raises(common.UserError, match=said) as caught:
            caption.main([*args, *out])
        assert "\n" not in str(caught.value)
    done = run("aio", "--images", tmp_path / "nowhere", *out, check=False)
    assert done.returncode == 2 and done.stderr == f"caption.py: {tmp_path / 'nowhere'}: no such folder\n"


def test_the_help_of_every_stage_shows_a_command():
    for stage in ([], ["llava"]):
        said = run(*stage, "--help").stdout
        assert "python caption.py llava --images imagenet/train --out captions.jsonl" in said
