"""Stage 2: class names, LLaVA with pruned tokens (against transformers), longer prompts, files that
ranks make together, and the one reader of captions and prompts."""

import copy
import itertools
import json
import os
import re
import shutil
import signal
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from conftest import photo, refusal, stopped
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.llava_next import image_processing_pil_llava_next as pil

import caption
import common
import cutmix

WORDS = """<pad> <s> </s> <unk> <image> a an the dog cat two red blue left of right image features
is on table photo in and small large with seven clocks . , ! describe this USER : ASSISTANT""".split()
LLAMA = dict(vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
             bos_token_id=1, eos_token_id=2, pad_token_id=0)


def tokenizer(path, content):
    """Save a tokenizer of whole words, which any test sentence fits into, and return it."""
    tokens = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", extra_special_tokens={"image_token": "<image>"})
    made.chat_template = "{{ bos_token }}USER : {{ messages[0]." + content + " }} ASSISTANT :"
    made.save_pretrained(path)
    return made


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory):
    """Make a random LLaVA-NeXT of 4 x 4 patches a view, as a folder."""
    path = tmp_path_factory.mktemp("llava")
    words = tokenizer(path, "content[0].type.replace('image', '<image> ') + messages[0].content[1].text")
    grids = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        image_size=28, patch_size=7, projection_dim=32)
    torch.manual_seed(0)
    model = transformers.LlavaNextForConditionalGeneration(transformers.LlavaNextConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**LLAMA), image_token_index=4,
        image_grid_pinpoints=grids, image_seq_length=16))
    for weights in model.parameters():
        # Livelier than the usual start, so that answers depend on the picture.
        weights.data *= 6 if weights.dim() > 1 else 1
    model.save_pretrained(path)
    images = pil.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=grids)
    transformers.LlavaNextProcessor(
        images, words, patch_size=7, vision_feature_select_strategy="default",
        image_token="<image>", num_additional_image_tokens=1,
        chat_template=words.chat_template).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory):
    """Make a random chat model, as a folder."""
    path = tmp_path_factory.mktemp("llm")
    torch.manual_seed(0)
    tokenizer(path, "content")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Make 13 photos in two classes, one of them broken, and their composites, which are large."""
    folder = tmp_path_factory.mktemp("pictures")
    for k in range(13):
        path = folder / "photos" / f"class{k % 2}" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(k, (80, 64)).save(path)
    (folder / "photos/class0/4.png").write_bytes(b"broken")
    cutmix.main(["--images", str(folder / "photos"), "--out", str(folder / "cutmix"),
                 "--size", "512", "--workers", "0"])
    return folder


def do(*words):
    """Run caption.py in this process."""
    caption.main([str(word) for word in words])


# ---- aio

def test_class_names_come_from_folders_or_from_either_table(tmp_path):
    assert caption.class_names(["hot_dog", "cat"]) == {"hot_dog": "hot dog", "cat": "cat"}
    table = tmp_path / "table"
    for content in ("\ufeffn01440764 tench, Tinca tinca\r\nn02099601 golden retriever\r\n",
                    '{"0": ["n01440764", "tench"], "1": ["n02099601", "golden_retriever"]}'):
        table.write_text(content, encoding="utf-8")
        names = caption.class_names(["n01440764", "n02099601"], table)
        assert names == {"n01440764": "tench", "n02099601": "golden retriever"}
        assert "photos in train" in refusal(caption.class_names, ["train"], table)
    assert "photos in n01440764" in refusal(caption.class_names, ["n01440764"])
    for content in ("[1]", '{"0": ["n01440764", 5]}', "n01440764", "n01440764 tench\nn02099601 5 dog\n",
                    "n01440764 tench 5\n", "n01440764\ttench\t5\n", "n01440764 tench|5\n",
                    "n01440764 tench\nn01440764 dog\n"):
        table.write_text(content)
        assert "table: not lines 'n01440764" in refusal(caption.class_names, [], table)


def test_aio_captions_every_file_with_its_class_and_no_article(pictures, tmp_path):
    do("aio", "--images", pictures / "photos", "--out", tmp_path / "aio.jsonl")
    rows = common.read_jsonl(tmp_path / "aio.jsonl")
    assert [row["file"] for row in rows] == common.list_images(pictures / "photos")
    assert all(row["caption"] == f"An image of {row['file'].split('/')[0]}" for row in rows)


# ---- llava: which views, and what becomes of them

def test_kept_patches_are_the_quadrants_with_most_of_the_second_photo():
    for setting, size, seed in itertools.product(("1/4", "1/9", "1/16"), (36, 101), range(40)):
        box = cutmix.paste_box(setting, size, np.random.default_rng(seed))
        # By counting, on a grid of half pixels.
        x0, y0, x1, y1 = (2 * v for v in box)
        covered = np.zeros((2 * size, 2 * size), int)
        covered[y0:y1, x0:x1] = 1
        counts = covered.reshape(2, size, 2, size).sum((1, 3)).flatten()
        most = 1 + np.flatnonzero(counts == counts.max())
        assert caption.kept_patches(setting, box, size) == [0, *most]
    assert caption.kept_patches(None, None, 256) == [0]
    assert caption.kept_patches("1/2", (128, 0, 256, 256), 256) == [0]


class Llava:
    """The tiny LLaVA, some pictures, and the views that its own processor makes of them."""

    def __init__(self, folder, pictures):
        self.model, self.processor, side, self.prompt = caption.load_llava(folder, "describe this image")
        self.images = [common.load_image(file, side) for file in pictures.glob("photos/class1/*.png")]
        self.views = self.processor.image_processor(images=self.images, return_tensors="pt")["pixel_values"]

    def answers(self, pixels, kept):
        embeddings, mask = caption.embed_question(self.model, pixels, kept, self.prompt)
        return caption.greedy_answers(self.model, self.processor.tokenizer, mask, 20,
                                      inputs_embeds=embeddings)


@pytest.fixture(scope="session")
def llava(tiny_llava, pictures):
    return Llava(tiny_llava, pictures)


def test_without_pruning_it_is_transformers_own_path_to_the_last_bit(llava):
    text = llava.processor.tokenizer.decode(llava.prompt)
    answers = set()
    for image, views in zip(llava.images, llava.views):
        inputs = llava.processor(images=image, text=text, add_special_tokens=False, return_tensors="pt")
        theirs = llava.model(**inputs, output_hidden_states=True).hidden_states[0]
        embeddings, mask = caption.embed_question(llava.model, [views], [caption.ALL_VIEWS], llava.prompt)
        assert torch.equal(embeddings, theirs) and mask.all()
        own = llava.model.generate(**inputs, do_sample=False, max_new_tokens=20)
        own = own[0, inputs["input_ids"].shape[1]:]
        [ours] = llava.answers([views], [caption.ALL_VIEWS])
        assert ours == llava.processor.tokenizer.decode(own, skip_special_tokens=True)
        answers.add(ours)
    assert len(answers) > 1, "the answers should depend on the pictures"


@pytest.mark.parametrize("kept", [[0], [0, 1], [0, 4], [0, 1, 2], [0, 2, 4], [0, 1, 2, 3, 4]])
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
    places = np.concatenate([np.ones(before + 16, bool), grid.ravel(), np.ones(after, bool)])

    views = llava.views[0]
    full, _ = caption.embed_question(llava.model, [views], [caption.ALL_VIEWS], llava.prompt)
    with mock.patch.object(caption, "view_features", wraps=caption.view_features) as tower:
        pruned, mask = caption.embed_question(llava.model, [views[kept]], [kept], llava.prompt)
    assert len(tower.call_args.args[1]) == len(kept), "other views should not pass through the vision tower"
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
    pixels = [views[numbers] for views, numbers in zip(llava.views, kept)]
    alone = [llava.answers([pixels[k]], [kept[k]])[0] for k in range(3)]
    assert llava.answers(pixels, kept) == alone


def test_an_answer_ends_at_the_models_end_token_and_at_the_tokenizers(llava):
    views = [llava.views[0]], [caption.ALL_VIEWS]
    words = llava.answers(*views)[0].split()
    assert len(words) > 1
    of_model = copy.deepcopy(llava)
    of_model.model.generation_config.eos_token_id = [WORDS.index(words[0]), 2]
    of_tokenizer = copy.deepcopy(llava)
    of_tokenizer.processor.tokenizer.eos_token = words[0]
    for ended in (of_model, of_tokenizer):
        assert ended.answers(*views) == words[:1]


def test_answers_end_with_a_whole_sentence_on_one_line():
    text = ' A dog.\nIt is 3.5 m "tall." An'
    assert caption.whole_sentences(text) == 'A dog. It is 3.5 m "tall."'
    assert caption.whole_sentences("A dog without end") == "A dog without end"


# ---- llava: the command

def test_every_photo_gets_a_caption_or_a_reason_unless_it_has_one(tiny_llava, pictures, tmp_path, capsys):
    (tmp_path / "some.csv").write_text("image_path,caption\n0.png,A dog.\n")
    (tmp_path / "more.tsv").write_text("class1/11.png\tA cat.\nclass0/2.png\t \n")
    do("llava", "--images", pictures / "photos", "--captioned", tmp_path / "some.csv", tmp_path / "more.tsv",
       "--model", tiny_llava, "--batch-size", 3, "--max-new-tokens", 12, "--out", tmp_path / "p.jsonl")
    assert "2 pictures have captions, 11 need one" in capsys.readouterr().out
    skipped = common.read_jsonl(tmp_path / "p.skipped.jsonl")
    found = [row["file"] for row in common.read_jsonl(tmp_path / "p.jsonl") + skipped]
    captioned = ["class0/0.png", "class1/11.png"]
    assert sorted(found + captioned) == common.list_images(pictures / "photos")
    reasons = {row["file"]: row["reason"] for row in skipped}
    assert reasons["class0/4.png"].startswith("not a readable image")


@pytest.mark.parametrize("flags", [[], ["--no-prune"]])
def test_composites_are_shown_the_views_of_their_setting(tiny_llava, pictures, tmp_path, flags):
    with mock.patch.object(caption, "embed_question", wraps=caption.embed_question) as watched:
        do("llava", "--cutmix", pictures / "cutmix/cutmix.jsonl", "--model", tiny_llava, *flags,
           "--max-new-tokens", 2, "--out", tmp_path / "c.jsonl")
    [(_, pixels, kept, prompt)] = [call.args for call in watched.call_args_list]
    rows = common.read_jsonl(pictures / "cutmix/cutmix.jsonl")
    assert {row["setting"] for row in rows} == {"1/2", "1/4", "1/9", "1/16"}
    # Boxes are in pixels of the file, a JPEG that is decoded at a part of its size.
    pruned = [caption.kept_patches(row["setting"], row["box"], 512) for row in rows]
    assert list(kept) == ([caption.ALL_VIEWS] * len(rows) if flags else pruned)
    assert [len(views) for views in pixels] == [len(numbers) for numbers in kept]
    # The question is the composites' own: <s> user : <image> ... ASSISTANT :
    assert len(prompt) == 6 + len(re.findall(r"\w+|[.,]", caption.PROMPT_CUTMIX))


def test_captions_find_their_files_with_a_folder_or_by_a_name_that_is_the_only_one():
    files = ["a/1.jpg", "a/2.jpg", "b/1.jpg", "b/3.jpg", "b/4.jpg"]
    # The authors' files leave out the folder.
    captions = {"2.jpg": "two", "1.jpg": "which?", "b/3.jpg": "three", "9.jpg": "none"}
    matched, skipped = caption.match(files, captions)
    assert list(matched.items()) == [("a/2.jpg", "two"), ("b/3.jpg", "three")]
    assert [(row["file"], row["reason"]) for row in skipped] == [
        ("a/1.jpg", "no caption"), ("b/1.jpg", "no caption"), ("b/4.jpg", "no caption"),
        ("1.jpg", "caption, but images of this name in several folders"),
        ("9.jpg", "caption, but no such image")]
    assert caption.match(["1.jpg", "a/1.jpg"], {"1.jpg": "flat"})[0] == {"1.jpg": "flat"}
    # A later file wins, whichever of the two ways it names an image in.
    for later in {"2.jpg": "new"}, {"a/2.jpg": "new"}:
        matched, skipped = caption.match(files, {"a/2.jpg": "old"}, {"2.jpg": "older"}, later)
        assert matched == {"a/2.jpg": "new"} and len(skipped) == 4


def test_a_killed_command_goes_on_with_other_ranks_to_the_same_bytes(
        tiny_llava, pictures, tmp_path, monkeypatch):
    one, many = tmp_path / "one/c.jsonl", tmp_path / "many/c.jsonl"
    words = ["llava", "--images", pictures / "photos", "--model", tiny_llava, "--batch-size", 1,
             "--workers", 0, "--max-new-tokens", 2, "--out"]
    do(*words, one)
    assert stopped(signal.SIGKILL, caption, "load_views", 10, lambda: do(*words, many)) == -signal.SIGKILL
    # Of two units the first, of 8 pictures, is there.
    assert [path.name for path in many.parent.glob("*.parts/*.jsonl")] == ["00000.jsonl"]

    def join_rows(*arguments):
        # While this rank is about to join the units, another one joins and removes them.
        monkeypatch.setattr(caption, "join_rows", common.join_rows)
        do(*words, many)
        common.join_rows(*arguments)

    monkeypatch.setattr(caption, "join_rows", join_rows)
    monkeypatch.setenv("WORLD_SIZE", "3")
    # The third rank has none to make, and the second completes the file.
    for rank in "210":
        assert many.exists() == (rank == "0")
        monkeypatch.setenv("RANK", rank)
        do(*words, many)
    assert sorted(os.listdir(many.parent)) == ["c.jsonl", "c.jsonl.settings", "c.skipped.jsonl"]
    for path in many.parent.iterdir():
        assert path.read_bytes() == (one.parent / path.name).read_bytes()
    # Another command's file is left alone.
    assert "c.jsonl: begun with other settings (no prune False" in refusal(do, *words, many, "--no-prune")
    # What a crash of the machine may do to it.
    many.write_bytes(b"")
    monkeypatch.setenv("WORLD_SIZE", "1")
    do(*words, many)
    assert many.read_bytes() == one.read_bytes()


# ---- extend

def test_lost_words_are_found():
    kept = "The image shows 2 red benches. A knife, blue and small, is left of them."
    assert caption.missing_words("a photo of two red benches", kept) == []
    assert caption.missing_words("a photo of a red bench left of blue knives", kept) == []
    prompt = "a photo of three green benches right of a dog"
    assert caption.missing_words(prompt, kept) == ["three", "green", "right", "dog"]
    for one, many in {"berry": "berries", "bus": "buses", "mouse": "mouse", "vase": "vases",
                      "sandwich": "sandwiches", "knife": "knives", "leaf": "leaves"}.items():
        assert caption.missing_words(f"a photo of {one}", f"There are {many}.") == []


def test_prompts_become_long_stay_whole_or_stay_short(tiny_llm, tmp_path, monkeypatch, capsys):
    """Play the model: one prompt fits at once, one when told what is missing, one never."""
    asked = []

    def answer(question):
        if "red dog" in question:
            return '"The image features a red dog. The dog is on a table."'
        more = question.count("seven") == 2
        return "The image features seven clocks. And" if more else "The image features clocks."

    def greedy_answers(model, tokenizer, mask, max_new_tokens, input_ids):
        # Padded on the left.
        assert input_ids.shape == mask.shape and mask[:, -1].all()
        asked.append(len(mask))
        return [answer(tokenizer.decode(ids[is_text.bool()])) for ids, is_text in zip(input_ids, mask)]

    monkeypatch.setattr(caption, "greedy_answers", greedy_answers)
    dog = {"tag": "colors", "include": [{"class": "dog"}], "prompt": "a photo of a red dog"}
    cat = {"tag": "colors", "prompt": "a photo of a blue cat"}
    # As GenEval's verdicts are kept.
    clocks = {"tag": "counting", "reason": "found 3", "prompt": "a photo of seven clocks"}
    common.write_jsonl(tmp_path / "p.jsonl", [dog, {"prompt": ""}, clocks, cat, {**dog, "tag": "again"}])
    do("extend", "--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "long.jsonl",
       "--model", tiny_llm, "--batch-size", 3)
    long_dog = {**dog, "prompt": "The image features a red dog. The dog is on a table.",
                "short_prompt": dog["prompt"]}
    assert common.read_jsonl(tmp_path / "long.jsonl") == [
        long_dog,
        {**clocks, "prompt": "The image features seven clocks.", "short_prompt": clocks["prompt"]},
        {**cat, "short_prompt": cat["prompt"]},
        {**long_dog, "tag": "again"}]
    # The first is the trial of the model.
    assert asked == [1, 3, 2, 1, 1]
    assert "1 of 4 prompts were kept short\n  a photo of a blue cat" in capsys.readouterr().out
    assert common.read_jsonl(tmp_path / "long.skipped.jsonl") == [
        {"file": "p.jsonl row 2", "reason": "no word in it"}]


@pytest.mark.parametrize("command, name, change, words", [
    ("llava", "model.safetensors", lambda content: content[:5000], "does not load"),
    ("llava", "chat_template.jinja", lambda _: b"text", "no <image> in its chat"),
    ("llava", "processor_config.json", lambda content: content.replace(b"56", b"84"), "no 2 x 2 grid"),
    ("extend", "chat_template.jinja", lambda _: b"", "not a model that can be asked")])
def test_a_model_that_cannot_be_asked_is_refused_before_anything_is_made(
        tiny_llava, tiny_llm, pictures, tmp_path, command, name, change, words):
    (tmp_path / "prompts.txt").write_text("a dog\n")
    options = {"llava": ["--images", pictures / "photos"], "extend": ["--prompts", tmp_path / "prompts.txt"]}
    model = shutil.copytree({"llava": tiny_llava, "extend": tiny_llm}[command], tmp_path / "model")
    (model / name).write_bytes(change((model / name).read_bytes()))
    assert words in refusal(do, command, *options[command], "--out", tmp_path / "out", "--model", model)
    assert not list(tmp_path.glob("out*"))


# ---- Captions and prompts

TEXT = "x\u2028y\x85\nz"


def coco(count, texts, indent=None):
    """Return COCO's captions, some for each image but the first; the last id comes first."""
    images = [{"id": k, "file_name": f"{k}.jpg"} for k in reversed(range(count + 1))]
    annotations = [{"id": 100 * i + k, "image_id": k, "caption": texts[i].format(k)}
                   for k, i in itertools.product(range(count), reversed(range(len(texts))))]
    return json.dumps({"images": images, "annotations": annotations}, indent=indent)


@pytest.mark.parametrize("name, content, captions, skipped", [
    ("a.jsonl", '\ufeff{"file": "ä.jpg", "caption": "x\u2028y\x85\\nz"}\n{"file": "b", "text": " "}\n',
     {"ä.jpg": TEXT}, []),
    ("a.CSV", f'\ufeff,Image_Path,caption\r\n0,ä.jpg,"{TEXT}"\r\n1,b\r\n', {"ä.jpg": TEXT}, []),
    ("a.tsv", f'Filename\tText\nä.jpg\t"{TEXT}"\nb\t...\n', {"ä.jpg": TEXT}, []),
    # Quotation marks in several rows, and none that quote.
    ("a.tsv", 'file\tcaption\na\t"Stop\nb\tlong\nc\tgo"\n', {"a": '"Stop', "b": "long", "c": 'go"'}, []),
    # The authors' has no line of names.
    ("a.tsv", '1.JPEG\t"A dog" sits.\n2.JPEG\tA cat\twith a tab.\n3',
     {"1.JPEG": '"A dog" sits.', "2.JPEG": "A cat\twith a tab."}, []),
    ("p.txt", "\ufeffa\u2028b\x85c\x0cd\r\n...\r\n[V] dog\r\n\r\n", ["a\u2028b\x85c\x0cd", "[V] dog"],
     ["p.txt row 2"]),
    ("p.txt", "a star\ra dog\r", ["a star", "a dog"], []),
    ("p.json", '{"caption": "a\u2028b"}\n{"prompt": ""}\n', ["a\u2028b"], ["p.json row 2"]),
    # As PartiPrompts has it, and as pandas writes it.
    ("p.tsv", 'Prompt\tNote\n"G I G" in paint\tx\na "red" tag\t\n', ['"G I G" in paint', 'a "red" tag'], []),
    ("p.tsv", 'Prompt\tNote\n"""G I G"" in paint"\tx\n', ['"G I G" in paint'], []),
    ("p.csv", 'id,PROMPT\n1,"a, b"\n2,\n', ["a, b"], ["p.csv row 2"]),
    # An image's first caption that has a word.
    ("p.json", coco(2, ["- ", "eins {} ä ", "zwei"]), ["eins 0 ä", "eins 1 ä"], ["p.json 2"]),
    ("p.json", coco(1, ["eins"], indent=1), ["eins"], ["p.json 1"])])
def test_captions_and_prompts_are_read_as_people_have_them(tmp_path, name, content, captions, skipped):
    (tmp_path / name).write_bytes(content.encode())
    if isinstance(captions, dict):
        # Those without a word are none.
        found, left_out = caption.read_captions(tmp_path / name), []
    else:
        rows, left_out = caption.read_prompts(tmp_path / name)
        found = [row["prompt"] for row in rows]
    assert found == captions
    assert [row["file"] for row in left_out] == skipped
    assert all(row["reason"].startswith("no word in it") for row in left_out)


def test_a_folder_of_texts_gives_each_prompt_its_name(tmp_path):
    for name, content in {"0.TXT": "\ufeffa star\r\n", "1.txt": " \n", ".2.txt": "x"}.items():
        (tmp_path / name).write_bytes(content.encode())
    os.mkfifo(tmp_path / "pipe.txt")
    rows, skipped = caption.read_prompts(tmp_path)
    assert rows == [{"prompt": "a star", "name": "0", "prompt_file": f"{tmp_path}/0.TXT"}]
    assert skipped == [{"file": f"{tmp_path.name} 1", "reason": "no word in it"}]


# What commit cf74f17 chose; a lower limit takes a part of COCO's images.
@pytest.mark.parametrize("name, limit, seed, chosen", [
    ("coco.json", 5, 0, [6, 14, 34, 38, 44]), ("coco.json", 5, 1, [1, 16, 32, 35, 47]),
    ("coco.json", 3, 0, [6, 38, 44]), ("p.txt", 5, 0, [2, 16, 24, 26, 48]),
    ("p.txt", 5, 1, [4, 8, 16, 36, 48]), ("p.txt", 99, 0, range(50))])
def test_a_limit_chooses_by_seed_what_it_always_chose(tmp_path, name, limit, seed, chosen):
    (tmp_path / "coco.json").write_text(coco(50, ["caption {}"]))
    (tmp_path / "p.txt").write_text("".join(f"caption {k}\n" for k in range(50)))
    rows, _ = caption.read_prompts(tmp_path / name, limit, seed)
    assert [row["prompt"] for row in rows] == [f"caption {k}" for k in chosen]


IMAGE = b'{"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": ['
BOX = b'{"file": "a", "setting": "1/4", "box": '


@pytest.mark.parametrize("read, name, content, words", [
    ("captions", "a.tsv", b"1.jpg\tA dog.\n1.jpg\tA cat.\n", "row 2: 1.jpg had another caption"),
    ("captions", "a.tsv", b"1.jpg A dog.\n2.jpg A cat.\n", "row 1: needs a text called file or image_path"),
    ("captions", "a.jsonl", b'{"file": "a", "caption": 3}\n', "caption or text, and has file, caption"),
    ("captions", "a.jsonl", b'{"file": "a", "caption": "x \\ud83d"}\n', "row 1: not text that UTF-8"),
    ("captions", "a.csv", b"file,caption\n1.jpg,A dog, a cat\n", "row 1 has more cells"),
    ("captions", "a.csv", b"file,caption\n1.jpg," + 200_000 * b"x", "not a table of cells (Error: field"),
    ("captions", "a.jsonl", b'{"a": 1}\n{"a": \n{"a": 2}\n', "a.jsonl line 2: not JSON"),
    ("captions", "a.jsonl", b"[1]\n", "a.jsonl line 1: not a JSON object"),
    ("composites", "c.jsonl", BOX + b'[0, 0, 8.5, 8]}', "row 1: not a composite of cutmix.py"),
    ("composites", "c.jsonl", BOX + b'[8, 8, 0, 0]}', "row 1: not a composite of cutmix.py"),
    ("composites", "c.jsonl", b'{"file": "a", "setting": "1/5", "box": [0, 0, 8, 8]}', "row 1: not a"),
    ("prompts", "p.tsv", b"a star\tred\na ring\tblue\n", "prompt or caption or text, and has a star, red"),
    ("prompts", "p.txt", b"a star\tred\n", "begins like a table"),
    ("prompts", "p.dat", b"Category, Prompt\nx,a star\n", "begins like a table"),
    ("prompts", "p.ndjson", b'{"prompt": "a"}\n', "begins like a table or JSON"),
    ("prompts", "p.txt", b"a star\n\0", "it holds bytes of 0"),
    ("prompts", "p.txt", b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    ("prompts", "p.json", IMAGE + b'{"id": 1, "image_id": 7, "caption": "x"}]}', "COCO's captions (no 7)"),
    ("prompts", "p.json", IMAGE + b'{"id": 1, "image_id": 1, "caption": 3}]}', "not COCO's captions")])
def test_a_file_that_is_not_understood_is_refused(tmp_path, read, name, content, words):
    (tmp_path / name).write_bytes(content)
    message = refusal(getattr(caption, f"read_{read}"), tmp_path / name)
    assert name in message and words in message
