"""The toy's text encoder, in flan-T5's stead: a tiny T5 that nobody has trained."""

import torch

# T5 has a bias for each distance between two words: its numbers 1 and 2 are for one
# and two words back, 17 and 18 for one and two words ahead. Each head looks at one
# distance.
DISTANCES = [1, 2, 17, 18]
# Attention weighs words by e to the power of this: a word at a head's own distance
# gets e^6 = 400 times the weight of any other, so that the head sees almost only it.
STRENGTH = 6.0


def make_text_encoder(folder, texts, seed, dim=128):
    """Save a tiny random T5 of width `dim`, and a tokenizer of the words in `texts`.

    The folder is like that of any T5 on the hub.
    """
    # Imported here: they are slow to import, and --help need not wait for them.
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    # Every word of the texts becomes a token, so that none of them is unknown.
    known = set(" ".join(texts).split())
    words = ["<pad>", "</s>", "<unk>", *sorted(known)]
    numbers = {word: i for i, word in enumerate(words)}

    # The ends of a text are marked as T5 does it: encode.py treats both alike.
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)])

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)

    torch.manual_seed(seed)
    config = T5Config(vocab_size=len(words), decoder_start_token_id=0,
                      d_model=dim, d_ff=2 * dim, num_layers=2,
                      d_kv=32, num_heads=len(DISTANCES))
    t5 = T5EncoderModel(config)

    # Trained heads look at neighbours, random ones everywhere: a caption would be a bag
    # of words. T5 keeps the biases of positions in its first block, and all blocks use
    # them.
    attention = t5.encoder.block[0].layer[0].SelfAttention
    bias = attention.relative_attention_bias.weight.data                # (32, heads)
    bias.zero_()
    for head, distance in enumerate(DISTANCES):
        bias[distance, head] = STRENGTH
    t5.save_pretrained(folder)
