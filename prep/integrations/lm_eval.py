"""The model `smoe` of lm-evaluation-harness, in its own process:

    python -m smoe.prep.integrations.lm_eval --model smoe \\
        --model_args bundle=model.smoe,memory=2GiB --tasks hellaswag

which is its command line after this module has registered the model."""

from __future__ import annotations

from typing import Any

import lm_eval.models  # noqa: F401  those of the harness register themselves
import numpy as np
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from smoe.artifacts import SmoeError
from smoe.artifacts.errors import printable
from smoe.prep.errors import PrepError
from smoe.runtime import Engine, Policies
from smoe.runtime.evaluate import log_softmax
from smoe.runtime.text import StopWhen

NEW_TOKENS = 256  # of an answer, where a task says nothing; no more than half of the context


@register_model("smoe")
class SmoeModel(TemplateLM):
    """A bundle, opened with `memory`, `context` and `level` as by `Engine.open`, and with `loss`
    nats per token or `bits` as `Policies` have them.

    Likelihoods are those of the decode path, token by token, so that whatever the engine is allowed
    to lose is in them. Batches and devices, which the harness names unasked, mean nothing here: it
    runs on the processor, one text after another."""

    def __init__(
        self,
        bundle: str,
        memory: str | None = None,
        context: int | None = None,
        level: int | None = None,
        loss: float = 0.0,
        bits: str = "none",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        policies = Policies(loss=float(loss), bits=bits)
        self.engine = Engine.open(bundle, memory, context=context, level=level, policies=policies)

    @property
    def eot_token_id(self) -> int:
        ends = self.engine.manifest.model.end_ids
        if not ends:
            raise PrepError(f"{self.tokenizer_name} names no token that ends a text.")
        return ends[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text of which all is scored."""
        return self.eot_token_id if self.begin is None else self.tok_encode(self.begin, False)[0]

    @property
    def begin(self) -> str | None:
        """The text of the token that begins a text, if there is one."""
        return self.engine.text.named()["bos_token"]

    @property
    def tokenizer_name(self) -> str:
        return str(self.engine.bundle.path)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """A text that says itself how it begins, as templates' do, is given no second beginning."""
        begun = self.begin is not None and string.startswith(self.begin)
        special = not begun if add_special_tokens is None else add_special_tokens
        return self.engine.text.encode(string, special)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        ids = self.engine.text.chat(chat_history, add_generation_prompt=add_generation_prompt)
        return self.engine.text.decode(ids, special=True)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """What a request begins with and the one before did is not computed again: they are taken
        in the order of their tokens."""
        order = sorted(range(len(requests)), key=lambda i: requests[i][1] + requests[i][2])
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for i in tqdm(order, disable=disable_tqdm, desc="smoe"):
            key, context, continuation = requests[i]
            answers[i] = self._likelihood(context, continuation)
            self.cache_hook.add_partial("loglikelihood", key, answers[i])
        return answers

    def _likelihood(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Of `continuation` after as much of `context` as there is room for."""
        if not 0 < len(continuation) <= self.engine.context:
            raise PrepError(
                f"A continuation has {len(continuation)} tokens; 1 to {self.engine.context} are "
                "possible. Give the model a larger context."
            )
        ids = np.array(context + continuation, np.int64)[-self.engine.context - 1 :]
        wanted = ids[-len(continuation) :]
        total, greedy = 0.0, True
        rows = self.engine.score(ids[:-1], len(ids) - len(wanted), reuse=True)
        for token, logits in zip(wanted.tolist(), rows, strict=True):
            total += float(log_softmax(logits)[token])
            greedy &= int(logits.argmax()) == token
        return total, greedy

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole texts: every token once, in windows as long as the context."""
        totals = []
        for request in tqdm(requests, disable=disable_tqdm, desc="smoe"):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.engine.context,
                context_len=1,
            )
            parts = [self._likelihood(*make_disjoint_window(window)) for window in windows]
            totals.append(sum(nats for nats, _ in parts))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return [
            self._generated(*request.args)
            for request in tqdm(requests, disable=disable_tqdm, desc="smoe")
        ]

    def _generated(self, prompt: str, asked: dict[str, Any]) -> str:
        until = asked.get("until") or []
        stops = (until,) if isinstance(until, str) else tuple(until)
        sampled = asked.get("do_sample", float(asked.get("temperature", 0)) > 0)
        usual = min(NEW_TOKENS, self.engine.context // 2)
        count = min(int(asked.get("max_gen_toks", usual)), self.engine.context - 1)
        ids = self.tok_encode(prompt)[-(self.engine.context - count) :]
        tokens = self.engine.generate(
            ids,
            count,
            temperature=float(asked.get("temperature", 1.0)) if sampled else 0.0,
            top_k=int(asked.get("top_k", 0)) if sampled else 0,
            top_p=float(asked.get("top_p", 1.0)) if sampled else 1.0,
            stop=StopWhen(strings=stops),
            reuse=True,
        )
        answer = "".join(token.text for token in tokens)
        self.cache_hook.add_partial("generate_until", (prompt, asked), answer)
        return answer


if __name__ == "__main__":
    try:
        cli_evaluate()
    except SmoeError as error:
        raise SystemExit(printable(str(error))) from error
