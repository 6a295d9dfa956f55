"""Makes the golden bundle of the current format version:  python tests/golden/make.py DIRECTORY

A pico model (every dimension different), a tokenizer trained on a few lines, and what
`transformers` answers, so that the runtime can be tested where torch is not installed. Run once per
format version; the result is checked in and must open for ever. v1 is a qwen3_moe in f32; v2 a
jamba in int8, whose state is a mixture of what is appended to and what keeps its shape, and which
takes one token at a time; v3 a gpt_oss, whose experts have biases and a clamped gate, in nested
planes; v4 a qwen3_moe of three layers in nested planes, with prices and linear predictors, so that
every policy runs on it, and with what only people read in study/; v5 a gpt_oss that was stored in
mxfp4, with its own codes; v6 a qwen2_moe (biases, a shared expert) with prices, an int8 backbone
and its program; v7 a deepseek_v2, whose attention is latent, with its state in int8; v8 an olmoe
with prices and routers of levels (python tests/golden/make.py, with tests/ on PYTHONPATH).

The answer's `logits` and `greedy` are those of `transformers`; `program` are the logits of the
program in its own arithmetic, keys and values in the bundle's kind (of v6 in float16), which every
machine gives to the bit.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from support.pico import make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel

from smoe.artifacts import safetensors_file
from smoe.prep.bits.train import train_bits
from smoe.prep.build import build
from smoe.prep.checkpoint.text import Calibration
from smoe.prep.options import Recipe
from smoe.runtime import Engine

LINES = [
    "def main(argument): return argument + 1",
    "Grüße aus Köln: ä, ö, ü und ß",
    "日本語のテキスト 🙂 emoji",
] * 4
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def checkpoint(path: Path) -> PreTrainedModel:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=307,
        special_tokens=["<end>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(LINES, trainer)
    model = make_model(
        "olmoe", seed=15, vocab_size=307, num_hidden_layers=2,
        max_position_embeddings=300, eos_token_id=0, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model.save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<end>", "chat_template": CHAT})
    )
    return model


def main(output: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch)
        model = checkpoint(source)
        ids = np.random.default_rng(3).integers(1, 307, (40, 200)).tolist()
        text = source / "text.jsonl"
        text.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
        calibration = Calibration(str(text), tokens=2048, length=100)
        recipe = Recipe("nested:2+1+1:32", "int8", prices=1024, self_tokens=0, state="f16")
        build(source, output, calibration, recipe)
        train_bits(output, source, calibration)
        prompt = torch.tensor([ids[0][:150]])  # longer than a chunk
        with torch.no_grad():
            logits = model(prompt).logits[0].numpy()
            greedy = model.generate(prompt, max_new_tokens=24, do_sample=False)[0, 150:].numpy()
        answer = {"prompt": prompt[0].numpy(), "logits": logits, "greedy": greedy}
        with Engine.open(output, executor="program") as engine:
            answer["program"] = engine.logits(answer["prompt"])
        safetensors_file.save(output.with_suffix(".answer.safetensors"), answer)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
