"""Tokenizers of every kind in use, with the normalisers, pre-tokenizers, decoders and special
tokens of the families that publish them, and vocabularies trained here on a few lines. Needs
`tokenizers` alone.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

LINES = [
    "the quick brown fox jumps over the lazy dog, and don't you think it's 1984 already?",
    "def main(argument):\n    return [argument[i] for i in range(10)]  # note\n",
    "Grüße aus Köln: naïve cafés, Ålesund, façade, Æsir und œuvre. Привет, мир! Γειά σου.",
    "日本語のテキストと你好世界。한국어 문장입니다 สวัสดี مرحبا بالعالم שלום नमस्ते 🙂👍🏽",
    '{"name": "value", "list": [1, 2, 3.5], "nested": {"a": null}}\t\ttabs\n\n\nand lines',
] * 4

CASES = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
ENDS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
SIGNS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
QWEN = CASES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + SIGNS + ENDS
LLAMA3 = CASES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + SIGNS + ENDS
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CASES}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CASES}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + ENDS
)
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + ENDS
)
DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*" + ENDS,
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHANNELS = (
    "{% for m in messages %}{% if m.role == 'assistant' and '<|channel|>' in m.content %}"
    "{{ raise_exception('a message holds channels') }}{% endif %}"
    "{{ '<|start|>' + m.role }}{% if m.role == 'assistant' %}{{ '<|channel|>final' }}{% endif %}"
    "{{ '<|message|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + "
    "' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)


def _bytes_bpe(
    patterns: tuple[str, ...], special: list[str], normalizer=None, more: list[str] = ()
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=len(patterns) == 1 and patterns[0] == LLAMA3))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in patterns]
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, whole])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in more])
    return tokenizer


def _framed(tokenizer: Tokenizer, frame: str) -> Tokenizer:
    """With tokens of its own around every text."""
    tokens = [(t, tokenizer.token_to_id(t)) for t in frame.split() if not t.startswith("$")]
    tokenizer.post_processor = processors.TemplateProcessing(single=frame, special_tokens=tokens)
    return tokenizer


def _spelled_bpe(special: list[str], gemma: bool) -> Tokenizer:
    """sentencepiece BPE with byte fallback, as converted: Gemma's way, or Llama's and Mistral's."""
    start = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    space = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = (
        space if gemma else normalizers.Sequence([normalizers.Prepend("▁"), space])
    )
    if gemma:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps if gemma else [*steps, decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=start, show_progress=False, limit_alphabet=80
    )
    tokenizer.train_from_iterator(LINES, trainer)
    written = json.loads(tokenizer.to_str())  # byte tokens are no added tokens
    written["added_tokens"] = written["added_tokens"][: len(special)]
    return Tokenizer.from_str(json.dumps(written))


def _unigram(special: list[str], xlnet: bool, spelled: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    spaces = normalizers.Replace(Regex(" {2,}"), " ")
    steps = [normalizers.NFKC(), spaces]
    if xlnet:
        quotes = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
        steps = [*quotes, normalizers.NFKD(), normalizers.StripAccents(), spaces]
    tokenizer.normalizer = normalizers.Sequence(steps)
    words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    tokenizer.pre_tokenizer = words[1] if spelled else pre_tokenizers.Sequence(words)
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    written = json.loads(tokenizer.to_str())
    vocabulary = written["model"]["vocab"]  # training sums in an order of chance
    vocabulary[:] = [[piece, round(score, 4)] for piece, score in vocabulary]
    if spelled:
        written["model"]["byte_fallback"] = True
        vocabulary += [[f"<0x{byte:02X}>", -20.0] for byte in range(256)]
    tokenizer = Tokenizer.from_str(json.dumps(written))
    if not spelled:
        return tokenizer
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)])
    return tokenizer


def _wordpiece() -> Tokenizer:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    return _framed(tokenizer, "[CLS] $A [SEP]")


CONTROLS = {
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"],
    "deepseek": ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<|im_start|>", "<|im_end|>"],
    "gpt-oss": [
        *("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|start|>", "<|end|>"),
        *("<|message|>", "<|channel|>", "<|call|>"),
    ],
    "tekken": ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"],
    "mistral": ["<unk>", "<s>", "</s>"],
    "llama2": ["<unk>", "<s>", "</s>"],
    "gemma": ["<pad>", "<eos>", "<bos>", "<unk>", "<|im_start|>", "<|im_end|>"],
    "t5": ["<pad>", "</s>", "<unk>"],
    "xlnet": ["<unk>", "<s>", "</s>", "<cls>", "<sep>"],
    "unigram-bytes": ["<unk>", "<s>", "</s>"],
}


@functools.cache
def tokenizer_json(name: str) -> str:
    """tokenizer.json of a family's kind of tokenizer."""
    special = CONTROLS.get(name, [])
    think = ["<think>", "</think>"]
    makers = {
        "qwen": lambda: _bytes_bpe((QWEN,), special, normalizers.NFC(), think),
        "llama3": lambda: _framed(_bytes_bpe((LLAMA3,), special), f"{special[0]} $A"),
        "deepseek": lambda: _framed(_bytes_bpe(DEEPSEEK, special, more=think), f"{special[0]} $A"),
        "gpt-oss": lambda: _bytes_bpe((O200K,), special),
        "tekken": lambda: _framed(_bytes_bpe((TEKKEN,), special), "<s> $A"),
        "mistral": lambda: _framed(_spelled_bpe(special, gemma=False), "<s> $A"),
        "llama2": lambda: _framed(_spelled_bpe(special, gemma=False), "<s> $A"),
        "gemma": lambda: _framed(_spelled_bpe(special, gemma=True), "<bos> $A"),
        "t5": lambda: _framed(_unigram(special, xlnet=False), "$A </s>"),
        "xlnet": lambda: _framed(_unigram(special, xlnet=True), "$A <sep> <cls>"),
        "unigram-bytes": lambda: _framed(_unigram(special, False, spelled=True), "<s> $A"),
        "wordpiece": _wordpiece,
    }
    return makers[name]().to_str()


# What tokenizer_config.json and config.json say beside it: the class, and the model.
SETTINGS = {
    "qwen": ("qwen3_moe", {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}),
    "llama3": ("qwen3_moe", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    "deepseek": ("deepseek_v3", {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}),
    "gpt-oss": ("gpt_oss", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    "tekken": ("mixtral", {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}),
    "mistral": ("mixtral", {"tokenizer_class": "LlamaTokenizer", "legacy": False}),
    "llama2": ("idefics2", {"tokenizer_class": "LlamaTokenizer", "legacy": False}),
    "gemma": ("gemma4", {"tokenizer_class": "GemmaTokenizer"}),
    "t5": ("switch_transformers", {"tokenizer_class": "T5Tokenizer"}),
    "xlnet": ("mixtral", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    "unigram-bytes": ("mixtral", {"tokenizer_class": "PreTrainedTokenizerFast"}),
    "wordpiece": ("bert", {"tokenizer_class": "BertTokenizer"}),
}
TEMPLATES = {"gpt-oss": CHANNELS, "tekken": INST, "mistral": INST, "llama2": INST}


def write_text_side(path: Path, name: str, **changes: object) -> Path:
    """The text side of a checkpoint of a family's kind, with `changes` to tokenizer_config.json."""
    family, settings = SETTINGS[name]
    path.mkdir(exist_ok=True)
    settings = settings | {"chat_template": TEMPLATES.get(name, CHATML)} | changes
    (path / "tokenizer.json").write_text(tokenizer_json(name), "utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    (path / "config.json").write_text(json.dumps({"model_type": family}))
    return path


def random_rows(name: str, count: int, seed: int) -> Iterator[list[int]]:
    """Rows of ids drawn at random, of the vocabulary and a few beyond it, bytes and special tokens
    more often than the rest."""
    chance, size = random.Random(seed), Tokenizer.from_str(tokenizer_json(name)).get_vocab_size()
    for _ in range(count):
        length = chance.choice((1, 2, 5, 20, 60))
        ranges = ((0, size + 4), (0, min(size, 280)), (max(0, size - 12), size + 4))
        yield [chance.randrange(*chance.choice(ranges)) for _ in range(length)]
