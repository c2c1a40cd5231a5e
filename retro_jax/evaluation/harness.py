"""A model of ours as a language model of EleutherAI's lm-evaluation-harness.

lm_eval's conventions are kept: how a text is divided into context and continuation, cutting at the left, windows of long texts
and the token before them (BOS, or the end of document where the tokenizer has no BOS), so that figures compare with those of its
``hf`` models. Of a Retro, each row has a chunk grid of its own (:mod:`retro_jax.evaluation.likelihood`).

    import retro_jax.evaluation.harness
    lm_eval.simple_evaluate(model="retro_jax", model_args={"workdir": "runs/quickstart"}, tasks=["lambada_openai"])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string

from retro_jax.config import GenerateConfig, RetrievalMode
from retro_jax.corpus.tokenizer import Tokenizer
from retro_jax.errors import UserError
from retro_jax.evaluation.likelihood import Continuation, Kept, Scorer
from retro_jax.generation.prompt import Completion, Prompt

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

Complete = Callable[[Sequence[Prompt], GenerateConfig], Iterable[Completion]]


@register_model("retro_jax")
class RetroLM(TemplateLM):
    """Answers lm_eval's requests.

    Args:
        scorer: gives log-likelihoods.
        tokenizer: the one that the model was trained with.
        retrieval: what is read; "given": the texts in the field ``passages`` of a request's document.
        complete: completes prompts as the settings say; None: tasks that generate are refused.
        batch_size: prompts at a time.
        max_new_tokens: where a task does not say how much is generated.
        kept: results of an earlier pass, that takes those of this one.
        name: for progress bars.
    """

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: Tokenizer,
        *,
        retrieval: RetrievalMode = "none",
        complete: Complete | None = None,
        batch_size: int = 16,
        max_new_tokens: int = 256,
        kept: Kept | None = None,
        name: str = "",
    ) -> None:
        super().__init__()
        self._scorer, self._tokenizer, self._retrieval, self._complete = scorer, tokenizer, retrieval, complete
        self._batch_size, self._max_new_tokens, self._kept, self._name = batch_size, max_new_tokens, kept, name

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> RetroLM:
        """As :meth:`create_from_arg_obj`, of "workdir=runs/quickstart,retrieval=none"."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> RetroLM:
        """The model of a run: see :func:`retro_jax.evaluation.harness_models.open_run`. Of lm_eval's own settings only
        ``batch_size`` counts."""
        from retro_jax.evaluation.harness_models import open_run

        batch_size = (additional_config or {}).get("batch_size")
        return open_run(**{"batch_size": None if batch_size is None else int(batch_size), **arg_dict})

    @property
    def eot_token_id(self) -> int:
        """The end of a document."""
        return self._tokenizer.eod_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        return self.eot_token_id if self._tokenizer.bos_id is None else self._tokenizer.bos_id

    @property
    def max_length(self) -> int:
        """Tokens of a row."""
        return self._scorer.longest

    @property
    def tokenizer_name(self) -> str:
        """Tells caches of requests apart."""
        return f"retro_jax-{self._tokenizer.vocab_size}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text, after BOS where the tokenizer has one."""
        ids = self._tokenizer.encode_batch([string], [f"the text {string[:60]!r}"])[0].tolist()
        return ids if add_special_tokens is False or self._tokenizer.bos_id is None else [self._tokenizer.bos_id, *ids]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each request's continuation after its context: its log-likelihood, and whether it is the likeliest."""
        asked = []
        for request in requests:
            context, continuation = self._pair(*request.args)
            asked.append(Continuation(context, continuation, self._passages(request)))
        return [(one.nats, one.greedy) for one in self._scorer(asked, self._kept, name=self._name)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of each request's text, all of it, in windows of ``max_length``; chunks are those of the text from its beginning."""
        windows = [list(self._windows(request)) for request in requests]
        found = iter(self._scorer([window for of_text in windows for window in of_text], self._kept, name=self._name))
        return [float(sum(next(found).nats for _ in of_text)) for of_text in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each request's context."""
        if self._complete is None:
            raise UserError("a task generates text, and this model was opened to score it alone; leave the task out")
        asked = [self._prompt(request) for request in requests]
        found: dict[tuple[Prompt, GenerateConfig], Any] = {}
        for batch in self._batches(list(dict.fromkeys(asked))):
            texts = [None if self._kept is None else self._kept.get(one) for one in batch]
            if None in texts:
                texts = [completion.text for completion in self._complete([prompt for prompt, _ in batch], batch[0][1])]
                if self._kept is not None:
                    self._kept.add(dict(zip(batch, texts, strict=True)))
            found.update(zip(batch, texts, strict=True))
        return [found[one] for one in asked]

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("RetroLM.loglikelihood asks the scorer itself")

    def _pair(self, context: str, continuation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids of context and continuation, divided as lm_eval does."""
        if context:
            before, after = self._encode_pair(context, continuation)
        else:
            after = self.tok_encode(continuation, add_special_tokens=False)
            before = [self.prefix_token_id]
            if after[:1] == before:
                after = after[1:]
        if not after:
            raise UserError(
                f"the continuation {continuation!r} after {context[-40:]!r} has no token of its own; leave the document out"
            )
        return tuple(before), tuple(after)

    def _windows(self, request: Instance) -> Iterator[Continuation]:
        """The windows of a text, each with the part of the text's grid that it lies on: chunks start at BOS, or after the prefix
        where there is no BOS, as in training."""
        tokens = self.tok_encode(request.args[0], add_special_tokens=False)
        chunk_len = self._scorer.chunk_len
        before_grid = 1 if self._tokenizer.bos_id is None else 0
        end = 0
        for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
            context, scored = make_disjoint_window(window)
            end += len(scored)
            start = end - len(window[0])
            first = None if chunk_len is None else chunk_len - (start - before_grid) % chunk_len
            yield Continuation(tuple(context), tuple(scored), self._passages(request), first)

    def _passages(self, request: Instance) -> tuple[tuple[int, ...], ...] | None:
        texts = self._given(request)
        return None if texts is None else tuple(tuple(ids.tolist()) for ids in self._tokenizer.encode_batch(texts))

    def _given(self, request: Instance) -> tuple[str, ...] | None:
        if self._retrieval != "given":
            return None
        texts = request.doc.get("passages") if isinstance(request.doc, Mapping) else None
        if texts is None:
            raise UserError(
                f"a document of {request.task_name} has no field passages, which HarnessConfig.retrieval='given' reads; give it "
                "one, if need be an empty list, or set retrieval='live' or 'none'"
            )
        return tuple(texts)

    def _prompt(self, request: Instance) -> tuple[Prompt, GenerateConfig]:
        context, asked = request.args[0], normalize_gen_kwargs(request.args[1], self._max_new_tokens)
        until = asked.get("until") or []
        config = GenerateConfig(
            max_new_tokens=asked["max_gen_toks"],
            temperature=asked["temperature"] if asked["do_sample"] else 0.0,
            top_k=int(asked.get("top_k", 0)),
            top_p=float(asked.get("top_p", 1.0)),
            stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
            retrieval=self._retrieval,
            batch_size=self._batch_size,
        )
        return Prompt(text=self._cut(context, config.max_new_tokens), passages=self._given(request)), config

    def _cut(self, text: str, new_tokens: int) -> str:
        """The end of a text that leaves room for the new tokens in a row."""
        room = self.max_length - new_tokens
        if room <= 0:
            raise UserError(
                f"a task generates {new_tokens} tokens, and a row has at most {self.max_length}; lower the task's max_gen_toks, "
                "or raise HarnessConfig.max_tokens"
            )
        tokens = self.tok_encode(text)
        return text if len(tokens) <= room else self._tokenizer.decode_batch([np.asarray(tokens[-room:], np.int32)])[0]

    def _batches(self, asked: list[tuple[Prompt, GenerateConfig]]) -> Iterator[list[tuple[Prompt, GenerateConfig]]]:
        """Prompts that are completed in one way, longest first."""
        for config in dict.fromkeys(config for _, config in asked):
            alike = sorted((one for one in asked if one[1] == config), key=lambda one: (-len(one[0].text), one[0].text))
            for start in range(0, len(alike), self._batch_size):
                yield alike[start : start + self._batch_size]
