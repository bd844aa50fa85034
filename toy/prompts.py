"""The toy's GenEval: prompts of the benchmark's six tasks, once short and once long; and the tiny T5."""

import random
from itertools import product

import torch

import cutmix
from common import write_jsonl
from toy.world import (COLORS, PLACES, RELATIONS, SHAPES, describe_background, describe_composite,
                       describe_original, random_scene)

TASKS = ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
# Where CutMix pastes with each setting (cells of a 3 x 3 grid); 1/16 pastes in any of them.
WHERE = {"1/2": [(2, 1), (1, 2)],
         "1/4": [(0, 0), (2, 0), (0, 2), (2, 2)],
         "1/9": [(1, 0), (0, 1), (2, 1), (1, 2)],
         "1/16": sorted(PLACES)}


def make_prompts(out, count, seed):
    """Write OUT/prompts-short.jsonl and OUT/prompts-long.jsonl: `count` prompts for each task.

    Each row has GenEval's metadata (`tag`, `include`, `exclude`) and `prompt`.
    """
    short = []
    long = []
    for task, n in product(TASKS, range(count)):
        metadata, brief, detailed = make_prompt(task, random.Random(f"{seed} {task} {n}"))
        short.append({**metadata, "prompt": f"a photo of {brief}"})
        long.append({**metadata, "prompt": detailed})
    write_jsonl(out / "prompts-short.jsonl", short)
    write_jsonl(out / "prompts-long.jsonl", long)


def make_prompt(task, rng):
    """Return (metadata, short text, long text) of a random prompt for one task."""
    base, paste = [random_scene(rng, shape) for shape in rng.sample(SHAPES, 2)]
    one = base["objects"][0]
    two = paste["objects"][0]
    one["color"], two["color"] = rng.sample(list(COLORS), 2)
    setting = rng.choice(cutmix.SETTINGS)
    place = rng.choice(sorted(PLACES))
    if setting != "1/16":
        place = rng.choice(WHERE[setting])
    if task == "position":
        setting = rng.choice(["1/2", "1/9"])
        place = rng.choice(WHERE["1/2"] if setting == "1/2" else list(RELATIONS))

    first = {"class": one["shape"], "count": 1}
    second = {"class": two["shape"], "count": 1}
    if task in ("single_object", "colors"):
        brief = f"a {one['shape']}"
        if task == "colors":
            first["color"] = one["color"]
            brief = f"a {one['color']} {one['shape']}"
        return {"tag": task, "include": [first]}, brief, describe_original(base, rng)

    if task == "counting":
        many, word = rng.choice([(2, "two"), (3, "three")])
        plural = one["shape"] + ("es" if one["shape"] == "cross" else "s")
        metadata = {"tag": task,
                    "include": [{"class": one["shape"], "count": many}],
                    "exclude": [{"class": one["shape"], "count": many + 1}]}
        background = describe_background(rng, base)
        detailed = f"the image shows {word} {one['color']} {plural} {background}"
        return metadata, f"{word} {plural}", detailed

    if task == "two_object":
        brief = f"a {one['shape']} and a {two['shape']}"
    elif task == "position":
        second["position"] = [RELATIONS[place], 0]
        brief = f"a {two['shape']} {RELATIONS[place]} a {one['shape']}"
    else:
        first["color"] = one["color"]
        second["color"] = two["color"]
        brief = f"a {one['color']} {one['shape']} and a {two['color']} {two['shape']}"
    layout = {"colors": [one["color"], two["color"]], "setting": setting, "place": place}
    metadata = {"tag": task, "include": [first, second], "layout": layout}
    return metadata, brief, describe_composite(base, paste, setting, place, rng)


def make_text_encoder(folder, texts, seed, dim=128):
    """Save a tiny random T5, and a tokenizer of the words in `texts`, as any T5 on the hub is saved."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel
    known = {word for text in texts for word in text.split()}
    words = ["<pad>", "</s>", "<unk>", *sorted(known)]
    numbers = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)

    torch.manual_seed(seed)
    config = T5Config(vocab_size=len(words), d_model=dim, d_kv=32, d_ff=2 * dim, num_layers=2,
                      num_heads=4, decoder_start_token_id=0)
    t5 = T5EncoderModel(config)
    # Trained heads look at neighbours, random ones everywhere: a caption would be a bag of words.
    # T5 has a bias for each distance: 1 and 2 are one and two words back, 17 and 18 ahead. Each
    # of the four heads gets one of them.
    attention = t5.encoder.block[0].layer[0].SelfAttention
    bias = attention.relative_attention_bias.weight.data                            # (32, heads)
    bias.zero_()
    bias[[1, 2, 17, 18], range(4)] = 6.0
    t5.save_pretrained(folder)
