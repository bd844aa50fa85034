"""Stage 2: class names, LLaVA with pruned tokens (against transformers), longer prompts,
and files that several ranks write together."""

import itertools
import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, refused
from PIL import Image

import caption
import common
import cutmix
from metrics.coco import read_coco_captions

WORDS = """a an the dog cat two red blue left of right image features is on table photo in
and small large with seven clocks . , ! describe this USER : ASSISTANT""".split()


def tokenizer(path):
    """Save a tokenizer of whole words, which any test sentence fits into, and return it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", *WORDS]
    vocabulary = {word: k for k, word in enumerate(words)}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", extra_special_tokens={"image_token": "<image>"})
    made.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] }} : "
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for c in m['content'] %}{{ '<image> ' if c['type'] == 'image' else c['text'] }}"
        "{% endfor %}{% endif %} {% endfor %}ASSISTANT :")
    made.save_pretrained(path)
    return made


def llama(vocabulary):
    from transformers import LlamaConfig
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
        bos_token_id=1, eos_token_id=2, pad_token_id=0)


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory):
    """Make a random LLaVA-NeXT of 4 x 4 patches a view, as a folder."""
    from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextProcessor
    from transformers import LlavaNextForConditionalGeneration as LlavaNext
    from transformers.models.llava_next import image_processing_pil_llava_next as pil
    path = tmp_path_factory.mktemp("llava")
    words = tokenizer(path)
    grids = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        image_size=28, patch_size=7, projection_dim=32)
    config = LlavaNextConfig(
        vision_config=vision, text_config=llama(len(words)), image_token_index=4,
        image_grid_pinpoints=grids, image_seq_length=16)
    torch.manual_seed(0)
    model = LlavaNext(config)
    with torch.no_grad():
        for weights in model.parameters():
            # Livelier than the usual start, so that answers depend on the picture.
            if weights.dim() > 1:
                weights.mul_(6)
    model.save_pretrained(path)
    images = pil.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=grids)
    LlavaNextProcessor(
        images, words, patch_size=7, vision_feature_select_strategy="default",
        image_token="<image>", num_additional_image_tokens=1,
        chat_template=words.chat_template).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory):
    """Make a random chat model, as a folder."""
    from transformers import LlamaForCausalLM
    path = tmp_path_factory.mktemp("llm")
    LlamaForCausalLM(llama(len(tokenizer(path)))).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Make 13 photos in two classes, one of them broken, and their composites."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for k in range(13):
        path = folder / "photos" / f"class{k % 2}" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((80, 64), Image.Resampling.NEAREST).save(path)
    (folder / "photos/class0/4.png").write_bytes(b"broken")
    cutmix.main(["--images", str(folder / "photos"), "--out", str(folder / "cutmix"),
                 "--size", "64", "--workers", "0"])
    return folder


def do(*words):
    """Run caption.py in this process."""
    caption.main([str(word) for word in words])


# --------------------------------------------------------------------------------------
# aio

def test_class_names_come_from_folders_or_from_either_table(tmp_path):
    assert caption.class_names(["hot_dog", "cat"]) == {"hot_dog": "hot dog", "cat": "cat"}
    (tmp_path / "map.txt").write_text(
        "n01440764 tench, Tinca tinca\nn02099601 golden retriever\n")
    (tmp_path / "map.json").write_text(
        '{"0": ["n01440764", "tench"], "1": ["n02099601", "golden_retriever"]}')
    for table in (tmp_path / "map.txt", tmp_path / "map.json"):
        names = caption.class_names(["n01440764", "n02099601"], table)
        assert names == {"n01440764": "tench", "n02099601": "golden retriever"}
        with pytest.raises(common.UserError, match="n00000000"):
            caption.class_names(["n00000000"], table)
    with pytest.raises(common.UserError, match="WordNet id"):
        caption.class_names(["n01440764"])


@pytest.mark.parametrize("content", [b"[1]", b'{"0": 5}', b'{"0": ["n01440764"]}', b"\xff"])
def test_a_file_that_is_no_table_of_classes_is_refused(tmp_path, content):
    (tmp_path / "table").write_bytes(content)
    with pytest.raises(common.UserError, match="neither"):
        caption.class_names([], tmp_path / "table")


def test_aio_captions_every_file_with_its_class_and_no_article(pictures, tmp_path):
    do("aio", "--images", pictures / "photos", "--out", tmp_path / "aio.jsonl")
    rows = common.read_jsonl(tmp_path / "aio.jsonl")
    assert [row["file"] for row in rows] == common.list_images(pictures / "photos")
    for row in rows:
        assert row["caption"] == "An image of " + row["file"].split("/")[0]


# --------------------------------------------------------------------------------------
# llava: which views, and what becomes of them

def test_kept_patches_are_the_quadrants_with_most_of_the_second_photo():
    sizes = itertools.product(("1/4", "1/9", "1/16"), (36, 64, 101), range(40))
    for setting, size, seed in sizes:
        box = cutmix.paste_box(setting, size, np.random.default_rng(seed))
        # By counting, on a grid of half pixels.
        x0, y0, x1, y1 = (2 * v for v in box)
        covered = np.zeros((2 * size, 2 * size), int)
        covered[y0:y1, x0:x1] = 1
        counts = [covered[:size, :size].sum(), covered[:size, size:].sum(),
                  covered[size:, :size].sum(), covered[size:, size:].sum()]
        most = [1 + k for k in range(4) if counts[k] == max(counts)]
        assert caption.kept_patches(setting, box, size) == [0, *most]


def test_kept_patches_of_some_boxes():
    assert caption.kept_patches(None, None, 256) == [0]
    assert caption.kept_patches("1/2", (128, 0, 256, 256), 256) == [0]
    assert caption.kept_patches("1/4", (128, 0, 256, 128), 256) == [0, 2]
    # In the middle of the lower border: a tie of two quadrants.
    assert caption.kept_patches("1/9", (32, 64, 64, 96), 96) == [0, 3, 4]


class WholeAndQuadrants:
    """Stands for LLaVA's processor: five views, which tell nothing."""

    def __call__(self, images, return_tensors):
        return {"pixel_values": torch.zeros(1, 5, 3, 2, 2)}


def test_the_box_of_a_composite_is_in_pixels_of_its_file_even_if_less_is_decoded(tmp_path):
    # A JPEG as large as this is decoded at half its size: its views have 64 pixels.
    Image.new("RGB", (512, 512), "red").save(tmp_path / "large.jpg")
    composite = caption.Picture("large.jpg", "1/4", (256, 256, 512, 512))
    loaded, = caption.load_pictures([composite], tmp_path, WholeAndQuadrants(), 64, prune=True)
    assert loaded.kept == [0, 4]


def test_answers_end_with_a_whole_sentence_on_one_line():
    text = ' A dog.\nIt is 3.5 m "tall." An'
    assert caption.whole_sentences(text) == 'A dog. It is 3.5 m "tall."'
    assert caption.whole_sentences("A dog without end") == "A dog without end"
    assert caption.whole_sentences(" \n") == ""


class Llava:
    """The tiny LLaVA, and the views that its own processor makes of some pictures."""

    def __init__(self, folder, pictures):
        self.model, self.processor = caption.load_chat_model(
            "LlavaNextForConditionalGeneration", str(folder))
        content = [{"type": "image"}, {"type": "text", "text": "describe this image"}]
        self.text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True)
        self.prompt = self.processor.tokenizer(
            self.text, add_special_tokens=False)["input_ids"]
        files = common.list_images(pictures / "photos")
        self.images = [common.load_image(pictures / "photos" / file, 56)
                       for file in files if "4.png" not in file]

    def views(self, image):
        make = self.processor.image_processor
        return make(images=image, return_tensors="pt")["pixel_values"][0]

    @torch.no_grad()
    def embed(self, pixels, kept):
        return caption.embed_question(self.model, pixels, kept, self.prompt)

    def answers(self, pixels, kept, longest=20):
        embeddings, mask = self.embed(pixels, kept)
        return caption.greedy_answers(self.model, self.processor.tokenizer, mask, longest,
                                      inputs_embeds=embeddings)


@pytest.fixture(scope="session")
def llava(tiny_llava, pictures):
    return Llava(tiny_llava, pictures)


def test_without_pruning_it_is_transformers_own_path_to_the_last_bit(llava):
    answers = set()
    for image in llava.images[:5]:
        inputs = llava.processor(images=image, text=llava.text, add_special_tokens=False,
                                 return_tensors="pt")
        seen = []

        def watch(module, args, kwargs, seen=seen):
            seen.append(kwargs["inputs_embeds"])

        hook = llava.model.model.language_model.register_forward_pre_hook(
            watch, with_kwargs=True)
        with torch.no_grad():
            own = llava.model.generate(**inputs, do_sample=False, max_new_tokens=25)
        hook.remove()
        own = own[0, inputs["input_ids"].shape[1]:]

        pixels = [llava.views(image)]
        embeddings, mask = llava.embed(pixels, [caption.ALL_VIEWS])
        assert torch.equal(embeddings, seen[0]) and mask.all()
        ours = llava.answers(pixels, [caption.ALL_VIEWS], 25)[0]
        assert ours == llava.processor.tokenizer.decode(own, skip_special_tokens=True)
        answers.add(ours)
    assert len(answers) > 1, "the answers should depend on the pictures"


@pytest.mark.parametrize("kept", [[0], [0, 1], [0, 2], [0, 4], [0, 1, 2], [0, 2, 4],
                                  [0, 1, 2, 3, 4]])
def test_pruned_embeddings_are_the_kept_subset_in_order(llava, kept):
    """Places in transformers' own sequence: draw the grid, then read it row by row."""
    # (8, 8) patches of 7 pixels; a newline ends each row that has something in it.
    quadrant = np.kron([[1, 2], [3, 4]], np.ones((4, 4), int))
    is_kept = np.isin(quadrant, kept)
    grid = np.column_stack([is_kept, is_kept.any(1)])
    if kept == [0]:
        # One newline ends the whole view, as for a picture of a single view.
        grid[0, -1] = True
    before = llava.prompt.index(4)
    after = len(llava.prompt) - before - 1
    places = np.concatenate([np.ones(before + 16, bool), grid.ravel(),
                             np.ones(after, bool)])

    passed = []
    hook = llava.model.model.vision_tower.register_forward_pre_hook(
        lambda module, args: passed.append(len(args[0])))
    views = llava.views(llava.images[0])
    full, _ = llava.embed([views], [caption.ALL_VIEWS])
    pruned, mask = llava.embed([views[kept]], [kept])
    hook.remove()
    assert passed == [5, len(kept)], "other views should not pass through the vision tower"
    assert mask.all() and len(pruned[0]) == places.sum()
    assert torch.allclose(pruned[0], full[0, places], atol=1e-5)


def test_the_numbers_of_tokens_are_the_papers():
    newline = torch.zeros(2)
    views = torch.zeros(5, 576, 2)
    assert len(caption.image_tokens(views[:1], [0], newline)) == 577
    assert len(caption.image_tokens(views[:2], [0, 3], newline)) == 577 - 1 + 600
    assert len(caption.image_tokens(views, [0, 1, 2, 3, 4], newline)) == 2928


def test_a_batch_padded_on_the_left_says_what_each_picture_says_alone(llava):
    kept = [[0], [0, 2, 4], [0, 1, 2, 3, 4]]
    pixels = []
    for image, numbers in zip(llava.images, kept):
        pixels.append(llava.views(image)[numbers])
    together = llava.answers(pixels, kept)
    alone = [llava.answers([pixels[k]], [kept[k]])[0] for k in range(3)]
    assert together == alone


# --------------------------------------------------------------------------------------
# llava: the command

def test_every_photo_and_composite_gets_a_caption_or_an_entry(tiny_llava, pictures,
                                                              tmp_path):
    options = ["--model", tiny_llava, "--batch-size", 3, "--max-new-tokens", 12,
               "--workers", 0]
    do("llava", "--images", pictures / "photos", "--out", tmp_path / "p.jsonl", *options)
    captions = common.read_jsonl(tmp_path / "p.jsonl")
    skipped = common.read_jsonl(tmp_path / "p.skipped.jsonl")
    done = [row["file"] for row in captions + skipped]
    assert sorted(done) == common.list_images(pictures / "photos")
    reasons = {row["file"]: row["reason"] for row in skipped}
    assert "not a readable image" in reasons["class0/4.png"]

    manifest = pictures / "cutmix/cutmix.jsonl"
    do("llava", "--cutmix", manifest, "--out", tmp_path / "c.jsonl", *options)
    captions = common.read_jsonl(tmp_path / "c.jsonl")
    skipped = common.read_jsonl(tmp_path / "c.skipped.jsonl")
    composites = [row["file"] for row in common.read_jsonl(manifest)]
    assert sorted(row["file"] for row in captions + skipped) == composites


def test_composites_are_shown_the_views_of_their_setting(tiny_llava, pictures, tmp_path,
                                                         monkeypatch):
    seen = []
    embed_question = caption.embed_question

    def watch(model, pixels, kept, prompt):
        for views, numbers in zip(pixels, kept):
            seen.append((len(views), numbers, prompt))
        return embed_question(model, pixels, kept, prompt)

    monkeypatch.setattr(caption, "embed_question", watch)
    manifest = pictures / "cutmix/cutmix.jsonl"
    rows = common.read_jsonl(manifest)
    assert {row["setting"] for row in rows} == {"1/2", "1/4", "1/9", "1/16"}
    options = ["llava", "--cutmix", manifest, "--model", tiny_llava, "--max-new-tokens", 2,
               "--workers", 0]
    do(*options, "--out", tmp_path / "c.jsonl")
    expected = [caption.kept_patches(row["setting"], row["box"], 64) for row in rows]
    assert [kept for _, kept, _ in seen] == expected
    assert all(views == len(kept) for views, kept, _ in seen)
    # The question is the composites' own: <s> user : <image> ... ASSISTANT :
    words = re.findall(r"\w+|[.,]", caption.PROMPT_CUTMIX)
    assert all(len(prompt) == 6 + len(words) for _, _, prompt in seen)

    seen.clear()
    do(*options, "--out", tmp_path / "d.jsonl", "--no-prune")
    assert [kept for _, kept, _ in seen] == [[0, 1, 2, 3, 4]] * len(rows)


def test_pictures_that_have_a_caption_are_left_out(tiny_llava, pictures, tmp_path, capsys):
    """A caption names its picture with the folder or, as the authors' do, without."""
    authors = tmp_path / "authors.csv"
    authors.write_text("image_path,caption\n0.png,A dog.\n11.png,A cat.\n")
    ours = tmp_path / "ours.jsonl"
    common.write_jsonl(ours, [{"file": "class0/2.png", "caption": "A dog."},
                              {"file": "class0/1.png", "caption": "No such picture."}])
    do("llava", "--images", pictures / "photos", "--captioned", authors, ours, "--model",
       tiny_llava, "--max-new-tokens", 2, "--workers", 0, "--out", tmp_path / "c.jsonl")
    done = common.read_jsonl(tmp_path / "c.jsonl")
    done += common.read_jsonl(tmp_path / "c.skipped.jsonl")
    missing = set(common.list_images(pictures / "photos"))
    missing -= {"class0/0.png", "class1/11.png", "class0/2.png"}
    assert {row["file"] for row in done} == missing
    assert "3 pictures have captions, 10 need one" in capsys.readouterr().out


def test_a_name_of_two_pictures_captions_neither(tmp_path):
    captions = tmp_path / "captions.jsonl"
    common.write_jsonl(captions, [{"image_path": "7.jpg", "caption": "A dog."},
                                  {"image_path": "8.jpg", "caption": "A cat."}])
    pictures = [caption.Picture(file) for file in ("a/7.jpg", "b/7.jpg", "b/8.jpg")]
    missing = caption.without_caption(pictures, [captions])
    assert [picture.file for picture in missing] == ["a/7.jpg", "b/7.jpg"]


def test_a_killed_captioner_resumes_to_the_same_bytes(tiny_llava, pictures, tmp_path):
    options = ["llava", "--images", pictures / "photos", "--model", tiny_llava,
               "--batch-size", 1, "--max-new-tokens", 60]
    do(*options, "--out", tmp_path / "whole.jsonl", "--workers", 0)
    out = tmp_path / "out.jsonl"
    words = [*options, "--out", out, "--workers", 1]
    process = subprocess.Popen([sys.executable, "caption.py", *map(str, words)], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part = tmp_path / "out.jsonl.0of1"
    while process.poll() is None and not (part.exists() and part.stat().st_size > 100):
        time.sleep(0.002)
    killed = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert killed and 0 < part.read_bytes().count(b"\n") < 13
    do(*options, "--out", out, "--workers", 0)
    for name in ("{}.jsonl", "{}.skipped.jsonl"):
        whole = (tmp_path / name.format("whole")).read_bytes()
        assert (tmp_path / name.format("out")).read_bytes() == whole


def test_the_benchmark_prints_both_speeds_and_writes_nothing(tiny_llava, pictures, capsys,
                                                             tmp_path):
    do("llava", "--images", pictures / "photos", "--model", tiny_llava, "--workers", 0,
       "--batch-size", 4, "--max-new-tokens", 3, "--benchmark", 2,
       "--out", tmp_path / "none.jsonl")
    said = capsys.readouterr().out
    assert "with pruning" in said and "without pruning" in said
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------
# extend

def test_lost_words_are_found():
    kept = "The image shows 2 red benches. A knife, blue and small, is left of them."
    assert caption.missing_words("a photo of two red benches", kept) == []
    prompt = "a photo of a red bench left of blue knives"
    assert caption.missing_words(prompt, kept) == []
    prompt = "a photo of three green benches right of a dog"
    assert caption.missing_words(prompt, kept) == ["three", "green", "right", "dog"]


@pytest.mark.parametrize("one, many", [
    ("berry", "berries"), ("bus", "buses"), ("glass", "glasses"), ("orange", "oranges"),
    ("giraffe", "giraffes"), ("mouse", "mouse"), ("tie", "ties"), ("horse", "horses"),
    ("skis", "skis"), ("vase", "vases"), ("sandwich", "sandwiches"), ("zebra", "zebras"),
    ("potted plant", "potted plants"), ("scissors", "scissors"), ("knife", "knives"),
    ("leaf", "leaves")])
def test_the_plural_of_a_word_is_not_lost(one, many):
    assert caption.missing_words(f"a photo of {one}", f"There are {many}.") == []


def test_prompts_become_long_stay_whole_or_stay_short(tiny_llm, tmp_path, monkeypatch,
                                                      capsys):
    """Play the model: one prompt fits at once, one when told what is missing, one never."""
    asked = []

    def answer(question):
        if "red dog" in question:
            return '"The image features a red dog. The dog is on a table."'
        if question.count("seven") == 2:
            return "The image features seven clocks. And"
        return "The image features clocks."

    def greedy_answers(model, tokenizer, mask, max_new_tokens, input_ids):
        # Padded on the left.
        assert input_ids.shape == mask.shape and mask[:, -1].all()
        questions = [tokenizer.decode(ids[is_text.bool()])
                     for ids, is_text in zip(input_ids, mask)]
        asked.append(questions)
        return [answer(question) for question in questions]

    monkeypatch.setattr(caption, "greedy_answers", greedy_answers)
    prompts = tmp_path / "evaluation_metadata.jsonl"
    dog = {"tag": "colors", "include": [{"class": "dog"}], "prompt": "a photo of a red dog"}
    common.write_jsonl(prompts, [
        dog, {"tag": "counting", "prompt": "a photo of seven clocks"},
        {"tag": "colors", "prompt": "a photo of a blue cat"}, {**dog, "tag": "again"}])
    do("extend", "--prompts", prompts, "--out", tmp_path / "long.jsonl", "--model",
       tiny_llm, "--batch-size", 3)
    rows = common.read_jsonl(tmp_path / "long.jsonl")
    assert rows[0] == {**dog, "short_prompt": "a photo of a red dog",
                       "prompt": "The image features a red dog. The dog is on a table."}
    assert rows[1]["prompt"] == "The image features seven clocks."
    assert rows[2]["prompt"] == rows[2]["short_prompt"] == "a photo of a blue cat"
    assert rows[3] == {**rows[0], "tag": "again"}
    assert [len(questions) for questions in asked] == [3, 2, 1, 1]
    said = capsys.readouterr().out
    assert "1 of them kept short" in said and "a photo of a blue cat" in said


def test_a_text_file_of_prompts_goes_through_a_real_model(tiny_llm, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes(b"\xef\xbb\xbfa photo of a dog\r\n\r\na photo of two cats\r\n")
    do("extend", "--prompts", prompts, "--out", tmp_path / "long.jsonl", "--model",
       tiny_llm, "--max-new-tokens", 5, "--attempts", 2)
    rows = common.read_jsonl(tmp_path / "long.jsonl")
    short = [row["short_prompt"] for row in rows]
    assert short == ["a photo of a dog", "a photo of two cats"]


def test_cocos_captions_keep_the_names_of_their_images(tiny_llm, tmp_path):
    images = [{"id": k, "file_name": f"COCO_val2014_{k:012d}.jpg"} for k in range(5)]
    annotations = [{"id": 10 * k + i, "image_id": k, "caption": f"Bild {k}, caption {i}: ü"}
                   for k in range(5) for i in (2, 1, 0)]
    prompts = tmp_path / "captions_val2014.json"
    prompts.write_text(json.dumps({"images": images, "annotations": annotations}))
    do("extend", "--prompts", prompts, "--limit", 3, "--out", tmp_path / "long.jsonl",
       "--model", tiny_llm, "--max-new-tokens", 3, "--attempts", 1)
    rows = common.read_jsonl(tmp_path / "long.jsonl")
    chosen = read_coco_captions(prompts, limit=3)
    assert len(rows) == 3
    for row, image in zip(rows, chosen):
        assert row["short_prompt"] == image["prompt"]
        assert (row["name"], row["file"]) == (image["name"], image["file"])


# --------------------------------------------------------------------------------------
# A file that ranks write together

ITEMS = [f"f{k}" for k in range(23)]


def rows_of(batch):
    """Return the rows of a batch, in which some pictures are broken.

    All captions depend on the batch, and have letters that are not ASCII.
    """
    rows = []
    for item in batch:
        if int(item[1:]) % 5 == 3:
            rows.append({"file": item, "reason": "broken"})
        else:
            rows.append({"file": item, "caption": f"{item} of {batch[0]} ä\u2028"})
    return rows


def write(folder, rank=0, world=1, produce=lambda batches: map(rows_of, batches),
          model="a model"):
    """Write ITEMS as one of several ranks; return whether all is there, and all files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", str(rank))
        patch.setenv("WORLD_SIZE", str(world))
        out = caption.SharedFile(folder / "c.jsonl", "file", ITEMS, str, batch_size=4)
        done = out.write(produce, {"model": model}, "captions")
    return done, {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_wherever_a_run_was_torn_it_ends_with_the_same_bytes(tmp_path):
    _, whole = write(tmp_path)
    assert sorted(whole) == ["c.jsonl", "c.jsonl.settings", "c.skipped.jsonl"]
    rows = [json.loads(line) for line in whole["c.jsonl"].splitlines()]
    assert [row["file"] for row in rows] == [f for f in ITEMS if int(f[1:]) % 5 != 3]
    lines = []
    for start in range(0, 23, 4):
        for row in rows_of(ITEMS[start:start + 4]):
            lines.append(json.dumps(row) + "\n")
    part = "".join(lines).encode()
    for size in range(0, len(part) + 1, 7):
        for path in tmp_path.iterdir():
            path.unlink()
        (tmp_path / "c.jsonl.0of1").write_bytes(part[:size])
        assert write(tmp_path)[1] == whole, size


def test_whole_batches_are_never_asked_again(tmp_path):
    asked = []

    def interrupted(batches):
        for batch in batches:
            if len(asked) == 3:
                raise KeyboardInterrupt
            asked.append(batch)
            yield rows_of(batch)

    def watched(batches):
        asked.extend(batches)
        return map(rows_of, batches)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, produce=interrupted)
    write(tmp_path, produce=watched)
    assert list(itertools.chain(*asked)) == ITEMS
    done, _ = write(tmp_path, produce=None)
    assert done, "nothing should be asked of a finished file"


def test_ranks_write_parts_that_are_joined_to_the_file_of_one(tmp_path):
    one, three = tmp_path / "one", tmp_path / "three"
    one.mkdir()
    three.mkdir()
    _, expected = write(one)
    for rank in (2, 0):
        done, files = write(three, rank, 3)
        assert not done and "c.jsonl" not in files
    with pytest.raises(common.UserError, match="another number of ranks"):
        write(three)
    assert write(three, 1, 3) == (True, expected)
    assert write(three, 0, 3, produce=None) == (True, expected)


def test_captions_of_two_models_are_not_mixed(tmp_path):
    done, _ = write(tmp_path, 0, 2)
    assert not done
    message = "c.json.*other settings .*a model, now another"
    with pytest.raises(common.UserError, match=message) as error:
        write(tmp_path, 1, 2, model="another")
    assert "\n" not in str(error.value)
    done, files = write(tmp_path, 1, 2)
    assert done and sorted(files) == ["c.jsonl", "c.jsonl.settings", "c.skipped.jsonl"]
    # Nor are those of a finished file taken for another model's.
    with pytest.raises(common.UserError, match=message):
        write(tmp_path, 1, 2, model="another")
    (tmp_path / "c.jsonl.settings").unlink()
    assert write(tmp_path, model="another")[0]


def test_a_file_of_other_images_is_not_continued(tmp_path):
    other = '{"file": "other", "caption": "x"}\n'
    (tmp_path / "c.jsonl.0of1").write_text(4 * other)
    with pytest.raises(common.UserError, match="another list"):
        write(tmp_path)
    (tmp_path / "c.jsonl").write_text(other)
    (tmp_path / "c.skipped.jsonl").write_text("")
    with pytest.raises(common.UserError, match="another list"):
        write(tmp_path)


def test_a_second_command_on_the_same_file_is_refused(tmp_path):
    seen = []

    def produce(batches):
        # While this command is at work, another one begins.
        with pytest.raises(common.UserError, match="another command is writing"):
            write(tmp_path)
        seen.append("refused")
        return map(rows_of, batches)

    assert write(tmp_path, produce=produce)[0]
    assert seen == ["refused"]


@pytest.mark.parametrize("content", ["not JSON\n", "[1]\n", '{"prompt": "x"}\n'])
def test_a_file_that_is_something_else_is_left_alone(tmp_path, content):
    (tmp_path / "c.jsonl").write_text(content)
    with pytest.raises(common.UserError, match="not a file that this command writes"):
        write(tmp_path)
    assert (tmp_path / "c.jsonl").read_text() == content


# --------------------------------------------------------------------------------------
# Mistakes, help

def test_mistakes_end_in_one_line(tiny_llava, tiny_llm, pictures, tmp_path):
    photos = pictures / "photos"
    (tmp_path / "none.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"ein B\xe4r\n")
    (tmp_path / "bad.jsonl").write_text('{"file": "a"}\n')
    (tmp_path / "half.jsonl").write_text('{"prompt": "\\ud800"}\n')
    (tmp_path / "coco.json").write_text("[]")
    some = tmp_path / "some.jsonl"
    common.write_jsonl(some, [{"file": file, "caption": "x"}
                              for file in common.list_images(photos)])
    for words, expected in [
            (["llava", "--images", photos, "--model", tmp_path / "no"], "cannot be loaded"),
            (["llava", "--images", photos, "--model", tiny_llm], "not LLaVA-NeXT"),
            (["llava", "--model", tiny_llava], "--images"),
            (["llava", "--cutmix", tmp_path / "bad.jsonl"], "without 'setting'"),
            (["llava", "--images", photos, "--captioned", some], "have captions"),
            (["llava", "--images", photos, "--batch-size", 0], "--batch-size 0"),
            (["llava", "--images", photos, "--workers", -1], "--workers -1"),
            (["aio", "--images", photos / "class0"], "no class folder"),
            (["aio", "--images", tmp_path / "nowhere"], "nowhere: no such folder"),
            (["extend", "--prompts", tmp_path / "none.txt"], "empty"),
            (["extend", "--prompts", tmp_path / "latin.txt"], "not UTF-8"),
            (["extend", "--prompts", tmp_path / "bad.jsonl"], "row 1: without a prompt"),
            (["extend", "--prompts", tmp_path / "half.jsonl"], "row 1: half a character"),
            (["extend", "--prompts", tmp_path / "coco.json"], "not COCO's captions"),
            (["extend", "--prompts", tmp_path / "none.txt", "--limit", 3], "--limit")]:
        line = refused("caption.py", *words, "--out", tmp_path / "out.jsonl")
        assert expected in line, words
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("words", [["--help"], ["llava", "--help"]])
def test_the_help_shows_a_command_that_works(words, capsys):
    with pytest.raises(SystemExit) as stop:
        do(*words)
    assert stop.value.code == 0
    command = "python caption.py llava --images imagenet/train --out captions.jsonl"
    assert command in capsys.readouterr().out
