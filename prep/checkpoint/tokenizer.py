"""The tokenizer of a checkpoint, as `AutoTokenizer` has it and as one tokenizer.json.

What `AutoTokenizer` does to a text is written in several files (tokenizer.json, tokenizer_config
.json, special_tokens_map.json, the class that the config names), and a device reads one of them. So
`AutoTokenizer` opens them here, what it made of them is what the bundle gets, and a battery of
texts shows that the file alone gives the same ids. No code of a checkpoint is run.
"""

from __future__ import annotations

import decimal
import fractions
import itertools
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import tokenizers
import transformers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from smoe.artifacts.errors import as_sentence, first_line
from smoe.prep.checkpoint.weights import quiet
from smoe.prep.errors import PrepError

# Where a vocabulary may be: of tokenizers, sentencepiece, tiktoken, Mistral, GPT-2 and BERT.
VOCABULARIES = (
    "tokenizer.json", "tokenizer*.model*", "spiece.model", "sentencepiece*.model", "tiktoken.model",
    "*.tiktoken", "tekken*.json", "vocab.json", "vocab.txt",
)  # fmt: skip
COPIED = ("tokenizer_config.json", "chat_template.jinja", "generation_config.json")
CONTROLS_TRIED = 64  # of the added tokens; some models reserve thousands

SNIPPETS = (
    "", "a", "Hello, world!", "I'm sure they'll say it's fine, won't they? HE'LL", "naïve café",
    "The year 1984, 3.14159, 10,000,000 and 0x7f", "1234567890" * 3, "Straße, GROSS, ﬁn, Ⅷ, ½",
    "Привет, мир", "Γειά σου Κόσμε", "你好,世界。", "日本語のテキスト", "한국어 문장입니다",
    "สวัสดีชาวโลก", "नमस्ते दुनिया", "مرحبا بالعالم", "שלום עולם", "ሰላም ልዑል", "བཀྲ་ཤིས།",
    "தமிழ் மொழி", "ქართული", "Tiếng Việt", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚", "🙂", "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪", "👍🏽" * 3, "☃️✈︎",
    "e\u0301 vs \u00e9, A\u030a vs \u00c5", "\u1100\u1161\u11a8 각", "ﷺ", "z\u0351\u0327a\u0336",
    " ", "  ", "   three", "trailing   ", " a  b   c    d ", "\t", "\t\tindented", "a\tb",
    "\n", "\n\n", "a\n\n\nb", "line\r\nline\r", " \n \n ", "a\u00a0b", "a\u3000b\u2003c", "\u200b",
    "\ufeffmark", "▁", "▁a▁▁b", "Ġ", "Ġa Ċ", "##a ##", "</w>", "<0x41><0xE2>", "\u2028\u2029",
    "\x00", "\x01\x02\x1b[31m\x7f", "\x85\u009f", "\ufffd", "\uffff", "\ue000\U000f0000",
    "def f(x):\n    return x**2  # note\n", "if (a != b && c >= d) { e += f[i++]; }", "```py\n```",
    '{"key": ["v", null, 1e-9]}', "https://example.org/a?b=c&d=%20#e", "user@example.org",
    "snake_case camelCase kebab-case SCREAMING", "....!!!???", "--- *** ___ ===", "$x^2_i$ \\alpha",
    "<html><body class='a'>&amp;</body></html>", "<|", "|>", "<s", "[INST", "<unused", "[MASK",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "ß" * 30, "the " * 40,
)  # fmt: skip
PLACES = 23  # powers of ten up to here are exact
MIXED = 160  # texts of several snippets
SOUPS = 80  # texts of random characters and bytes


def open_tokenizer(path: Path) -> PreTrainedTokenizerBase | None:
    """What `AutoTokenizer` makes of the checkpoint at `path`; None where it has no vocabulary."""
    if not any(file.is_file() for name in VOCABULARIES for file in path.glob(name)):
        return None
    with quiet(), as_sentence(lambda said: PrepError(_refusal(path, said))):
        opened = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    if not isinstance(getattr(opened, "backend_tokenizer", None), tokenizers.Tokenizer):
        raise PrepError(
            f"{path}: transformers reads this tokenizer with Python code alone "
            f"({type(opened).__name__}), which a device does not have; give a checkpoint with a "
            "tokenizer.json."
        )
    if not (path / "tokenizer.json").is_file() and len(opened) - len(opened.get_added_vocab()) < 3:
        raise PrepError(_refusal(path, "its class does not read the vocabulary that is there"))
    return opened


def _refusal(path: Path, error: str) -> str:
    """Why a tokenizer cannot be opened, and the way out."""
    file = path / "tokenizer.json"
    said = f"{path}: AutoTokenizer cannot open its tokenizer ({error});"
    if file.is_file():
        if not _json(file):
            return f"{said} tokenizer.json is not even JSON: download it again."
        try:
            with as_sentence(PrepError):
                tokenizers.Tokenizer.from_file(str(file))
        except PrepError as unread:
            return (
                f"{file} is not a tokenizer that tokenizers {tokenizers.__version__} reads "
                f"({unread}); a newer version may: `pip install --upgrade tokenizers`, or download "
                "it again."
            )
    if "auto_map" in _json(path / "tokenizer_config.json"):
        return (
            f"{said} tokenizer_config.json names Python code (auto_map), and smoe runs no code out "
            "of a checkpoint: give one with a tokenizer.json, without auto_map."
        )
    if not file.is_file():
        return (
            f"{said} there is no tokenizer.json. `pip install sentencepiece tiktoken protobuf` "
            "lets transformers convert other files; or save one from where it opens, with "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)."
        )
    return f"{said} tokenizer_config.json or another file beside it is damaged: download it again."


def read_text_side(path: Path) -> tuple[dict[str, bytes], int | None]:
    """What a bundle of the checkpoint at `path` gets (`bundle_text`), and the token that ends a
    text, if the tokenizer has one."""
    opened = open_tokenizer(path)
    return bundle_text(path, opened), None if opened is None else opened.eos_token_id


def bundle_text(path: Path, opened: PreTrainedTokenizerBase | None) -> dict[str, bytes]:
    """The files of a bundle's text side by name: those of the checkpoint at `path`, and what
    `opened` was made of in one tokenizer.json; a `PrepError` if that is not possible."""
    files = {name: (path / name).read_bytes() for name in COPIED if (path / name).is_file()}
    if opened is None:
        return files
    baked = _baked(opened)
    _refuse_differences(path, opened, baked)
    settings = _json(path / "tokenizer_config.json") | opened.special_tokens_map
    if isinstance(opened.chat_template, dict):  # several, in whatever files they were
        named = opened.chat_template.items()
        settings["chat_template"] = [{"name": n, "template": t} for n, t in named]
        files.pop("chat_template.jinja", None)
    elif opened.chat_template is not None and "chat_template.jinja" not in files:
        settings["chat_template"] = opened.chat_template
    files["tokenizer.json"] = baked.encode("utf-8")
    files["tokenizer_config.json"] = json.dumps(settings, ensure_ascii=False, indent=2).encode()
    return files


def _json(file: Path) -> dict:
    """The object in a file of settings; empty if there is none."""
    try:
        settings = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):  # AutoTokenizer has opened it, or said so
        settings = None
    return settings if isinstance(settings, dict) else {}


def _baked(opened: PreTrainedTokenizerBase) -> str:
    """tokenizer.json, without what only training wants: cut and filled texts (`AutoTokenizer` does
    not apply these to a text either) and merges that are left out at random."""
    backend = opened.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None
    written = backend.to_str()
    return _exact(written) if isinstance(backend.model, tokenizers.models.Unigram) else written


def _exact(written: str) -> str:
    """tokenizer.json with the scores of its pieces so written that `tokenizers` reads the same: of
    some decimals it reads a neighbour (one in seven at random), and pieces whose scores are alike
    then change places."""
    settings = json.loads(written)
    model = settings.pop("model")
    pieces = [f"[{json.dumps(piece)},{_decimal(score)}]" for piece, score in model.pop("vocab")]
    model_written = f'{json.dumps(model)[:-1]},"vocab":[{",".join(pieces)}]}}'
    return f'{json.dumps(settings)[:-1]},"model":{model_written}}}'


def _decimal(score: float) -> str:
    """`score` as a whole number by a power of ten that gives it back in floating point too, as
    `tokenizers` computes it (serde_json), and not only exactly; one in a thousand has none."""
    _, _, exponent = decimal.Decimal(repr(score)).as_tuple()
    for places in range(max(0, -int(exponent) - 2), PLACES):
        nearest = round(fractions.Fraction(score) * 10**places)
        step = max(1, int(math.ulp(score) * 10**places / 20))  # 19 numbers that all round to it
        for digits in (nearest, *range(nearest - 9 * step, nearest + 10 * step, step)):
            read = float(digits) / 10.0**places
            if read == score == float(f"{digits}e-{places}") and abs(digits) < 1 << 64:
                return f"{digits}e-{places}"
    return repr(score)


def _refuse_differences(path: Path, opened: PreTrainedTokenizerBase, baked: str) -> None:
    plain = tokenizers.Tokenizer.from_str(baked)

    def original(text: str, special: bool) -> list[int]:
        with quiet():
            return opened(text, add_special_tokens=special)["input_ids"]

    def alone(text: str, special: bool) -> list[int]:
        return plain.encode(text, add_special_tokens=special).ids

    controls = dict.fromkeys([*opened.all_special_tokens, *opened.get_added_vocab()])
    for text, special in itertools.product(battery(controls), (True, False)):
        wanted, made = _attempt(original, text, special), _attempt(alone, text, special)
        if wanted != made:
            split = getattr(opened, "split_special_tokens", False)
            mend = "set split_special_tokens to false there" if split else "please report it"
            raise PrepError(
                f"{path}: AutoTokenizer gives {text!r} the ids {wanted}, a tokenizer.json alone "
                f"{made}: its tokenizer_config.json asks for what no tokenizer.json can say; "
                f"{mend}."
            )


def _attempt(encode: Callable[[str, bool], list[int]], text: str, special: bool) -> list[int] | str:
    try:
        return encode(text, special)
    except Exception as error:  # noqa: BLE001  a text that it has no token for: both are to say so
        return first_line(error)


def battery(controls: Iterable[str] = ()) -> list[str]:
    """Texts on which tokenizers differ, the same each time: scripts, emoji, spaces, control
    characters, code, byte soup, and some of the `controls` in company."""
    chance = random.Random(0)
    texts = list(SNIPPETS)
    for number in range(MIXED):
        joint = ("", " ", "\n", "  ")[number % 4]
        texts.append(joint.join(chance.choices(SNIPPETS, k=chance.randint(2, 6))))
    for number in range(SOUPS):
        if number % 2:
            texts.append(chance.randbytes(chance.randint(1, 40)).decode("utf-8", "replace"))
        else:
            planes = ((0, 0x250), (0, 0xD800), (0x2000, 0x3000), (0xE000, 0x20000))
            codes = [chance.randrange(*chance.choice(planes)) for _ in range(20)]
            texts.append("".join(map(chr, codes)))
    for control in itertools.islice(controls, CONTROLS_TRIED):
        for frame in ("{0}", "a{0}b", " {0} a", "a {0}{0}\n", "x{0}\n {0}y"):
            texts.append(frame.replace("{0}", control))
    return texts


def end_ids(
    path: Path, config: transformers.PreTrainedConfig, end_of_text: int | None
) -> tuple[int, ...]:
    """The tokens that end a generation: all that generation_config.json and config.json write, and
    the tokenizer's end of text; what the config's class has only where nothing is written, since a
    class knows nothing of this vocabulary."""
    places: list[int | list[int] | None] = []
    if (path / "generation_config.json").is_file():
        try:
            generation = GenerationConfig.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise PrepError(
                f"{path}/generation_config.json is damaged: {first_line(error)}"
            ) from error
        places.append(generation.eos_token_id)
    own = [getattr(part, "eos_token_id", None) for part in (config, config.get_text_config())]
    said = list(_values(json.loads((path / "config.json").read_text("utf-8")), "eos_token_id"))
    places += [value for value in own if value in said]
    places.append(end_of_text)
    if not any(value is not None for value in places):
        places += own
    ids = itertools.chain(*(v if isinstance(v, list) else [v] for v in places))
    vocabulary = config.get_text_config().vocab_size
    return tuple(dict.fromkeys(i for i in ids if i is not None and 0 <= i < vocabulary))


def _values(tree: object, name: str) -> Iterator[object]:
    """What a JSON document says of `name`, wherever it does."""
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if key == name:
            yield value
        yield from _values(value, name)
