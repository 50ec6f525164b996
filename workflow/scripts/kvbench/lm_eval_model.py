"""A variant as a language model of EleutherAI's lm-evaluation-harness.

A prompt is read in two parts. The first is compressed; the rest follows over what was kept, and the answer after it,
so that no token of an answer is predicted from the full cache. Query-aware, the rest is the prompt's last token alone;
otherwise it begins with the question.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm
from transformers import DynamicCache

from kvbench.answers import end_ids
from kvbench.decode import continue_from, prefill
from kvbench.errors import Unsupported, UserError
from kvbench.kept import Kept, kept
from kvbench.methods import Dense
from kvbench.rows import equal_lengths, tokens_at_once

NEW_TOKENS = 256
"""Most tokens of an answer where a task does not say."""


@dataclass(frozen=True)
class _Prompt:
    """A prompt in two parts, how long its answer may be, and the texts that end it."""

    first: list[int]
    rest: list[int]
    new_tokens: int
    until: list[str]


class CompressedLM(TemplateLM):
    """A model that compresses what it reads of a prompt before it answers.

    Parameters
    ----------
    model, tokenizer : of transformers, the model in evaluation mode.
    method : what compresses the cache.
    question_marker : text at whose last occurrence in a prompt the question begins, which is then not compressed;
        None where it is (query-aware).

    Attributes
    ----------
    kept : for each prompt that was compressed, what its cache still lets the model read; after its answer where the
        method acts while decoding.
    """

    def __init__(self, model: Any, tokenizer: Any, method: Dense, question_marker: str | None) -> None:
        super().__init__()
        self.model, self.tokenizer, self.method, self.question_marker = model, tokenizer, method, question_marker
        self.max_length = int(model.config.get_text_config().max_position_embeddings)
        self.ends = end_ids(model, tokenizer)
        self.kept: list[Kept] = []
        self._cut: set[str] = set()
        # a task's choices for one context follow each other
        self._first_tokens = lru_cache(maxsize=1)(self._before_question)
        self._device = model.device
        method.check(model, 1)

    @property
    def cut_prompts(self) -> int:
        """How many prompts were longer than the model's context, and lost their beginning."""
        return len(self._cut)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no prompt."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat; without a generation prompt, the last message is one to be continued."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; a text that begins with the token of a beginning gets no second one."""
        if add_special_tokens is None:
            add_special_tokens = self._wants_a_beginning(string)
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def _wants_a_beginning(self, string: str) -> bool:
        return not string.startswith(self.tokenizer.decode(self.prefix_token_id))

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise UserError(
            "A task here scores whole texts, which have no prompt that could be compressed before them",
            "Choose other tasks; the workflow's quality stage measures perplexity after compression",
        )

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the greedy one.

        Continuations of the same context share the work of its first part; of a context that is too long, a longer
        continuation leaves less.
        """
        shared: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
        for place, ((context, _), ids, continuation) in enumerate(requests):
            first, rest = self._split(context, list(ids), self.max_length + 1 - len(continuation))
            shared.setdefault((tuple(first), tuple(rest)), []).append(place)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for (first, rest), places in tqdm(shared.items(), desc="loglikelihood", disable=disable_tqdm):
            for place, (cache, position) in zip(places, self._copies(list(first), len(places)), strict=True):
                continuation = requests[place][2]
                read = torch.tensor([[*rest, *continuation[:-1]]], device=self.device)
                logits = self._follow(cache, read, position)[0, -len(continuation) :].float()
                if self.method.acts_while_decoding and place == places[0]:
                    self._note(cache, 1, len(first) + read.shape[1])
                target = torch.tensor(continuation, device=self.device)
                likelihood = logits.log_softmax(-1).gather(-1, target[:, None]).sum()
                found[place] = (float(likelihood), bool((logits.argmax(-1) == target).all()))
                self.cache_hook.add_partial("loglikelihood", requests[place][0], found[place])
        return found

    @torch.no_grad()
    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Greedy answers up to a text that ends them, which is left off.

        Raises
        ------
        UserError : a task wants sampled answers.
        """
        prompts = [self._prompt(*request.args) for request in requests]
        texts = [""] * len(prompts)
        shapes = [(len(prompt.first), len(prompt.rest)) for prompt in prompts]
        groups = equal_lengths(shapes, self.method, tokens_at_once(self.model))
        for group in tqdm(groups, desc="generate", unit="batch", disable=disable_tqdm):
            for place, tokens in zip(group, self._answers([prompts[place] for place in group]), strict=True):
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                texts[place] = postprocess_generated_text(text, prompts[place].until, None)
                self.cache_hook.add_partial("generate_until", requests[place].args, texts[place])
        return texts

    def _prompt(self, context: str, settings: dict[str, Any]) -> _Prompt:
        wanted = normalize_gen_kwargs(settings, NEW_TOKENS)
        if wanted["do_sample"]:
            raise UserError(
                "A task here wants answers drawn at random, and kvbench decodes greedily",
                "Give --gen-kwargs do_sample=False, or choose other tasks",
            )
        room = self.max_length - wanted["max_gen_toks"]
        first, rest = self._split(context, self.tok_encode(context), room)
        return _Prompt(first, rest, wanted["max_gen_toks"], [text for text in wanted["until"] if text])

    def _split(self, context: str, ids: list[int], room: int) -> tuple[list[int], list[int]]:
        """The token ids of a prompt to compress, and those to read after it, one at least.

        Parameters
        ----------
        room : tokens that the prompt may have; a longer one loses its beginning.

        Raises
        ------
        UserError : there is no room, the question's marker is not there, or nothing stands before it to compress.
        """
        if room < 1:
            raise UserError(
                f"A task here wants answers that leave no room for a prompt in {self.max_length} tokens of context",
                "Lower its length with --gen-kwargs max_gen_toks=…, or choose another model",
            )
        rest = 1 if self.question_marker is None or not context else len(ids) - self._first_tokens(context)
        if len(ids) > room:
            self._cut.add(context)
        ids = ids[-room:]
        rest = min(max(1, rest), len(ids))
        compresses = self.method.compresses and not self.method.acts_while_decoding
        if compresses and self.question_marker is not None and context and rest == len(ids):
            raise UserError(
                f"Nothing stands before the question to be compressed in the prompt that begins with {context[:80]!r}",
                "Choose tasks with a text or solved examples before the question, or give --query-aware",
            )
        return ids[:-rest], ids[-rest:]

    def _before_question(self, context: str) -> int:
        """How many tokens of a prompt end before its question's marker begins."""
        begins = context.rfind(self.question_marker or "")
        if begins < 0:
            raise UserError(
                f"{self.question_marker!r} is not in the prompt that begins with {context[:80]!r}",
                "Name a text that stands before the question in every prompt of the tasks, or give --query-aware",
            )
        if begins == 0:
            return 0
        if not self.tokenizer.is_fast:
            return len(self.tok_encode(context[:begins]))
        encoded = self.tokenizer(
            context, add_special_tokens=self._wants_a_beginning(context), return_offsets_mapping=True
        )
        return next(i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > begins)

    def _compressed(self, prompts: Sequence[list[int]]) -> tuple[Any, int]:
        """The cache of prompts of equal lengths, compressed, and the position of the token after them."""
        if not prompts[0]:
            return self.method.cache(self.model), 0
        ids = torch.tensor(prompts, device=self.device)
        try:
            _, cache = prefill(self.model, ids, self.method)
        except Unsupported as error:
            raise UserError(
                f"A prompt of {ids.shape[1]} tokens cannot be compressed: {error}",
                "Choose tasks with longer prompts, or another method",
            ) from error
        return cache, self.method.next_position(ids.shape[1], cache)

    def _note(self, cache: Any, rows: int, tokens: int) -> None:
        """Keep what is left to read of so many rows, after so many tokens of each."""
        self.kept += [kept(self.model, cache, rows, tokens)] * rows

    def _copies(self, prompt: list[int], count: int) -> Iterator[tuple[Any, int]]:
        """What `_compressed` gives for a prompt, ``count`` times."""
        cache, position = self._compressed([prompt])
        if prompt and not self.method.acts_while_decoding:
            self._note(cache, 1, len(prompt))
        for _ in range(count - 1):
            if isinstance(cache, DynamicCache):
                yield deepcopy(cache), position
            else:  # one of its own kind may hold addresses, which a copy would share
                yield self._compressed([prompt])
        yield cache, position

    def _follow(self, cache: Any, ids: torch.Tensor, position: int) -> torch.Tensor:
        """Logits at tokens read after a cache, [batch, tokens, vocabulary]; where it is empty they are the prompt."""
        if position == 0:
            # what acts while decoding has to see its prompt; the others would compress the question
            with self.method.prefill(self.model) if self.method.acts_while_decoding else nullcontext():
                return self.model(ids, past_key_values=cache, use_cache=True).logits
        return continue_from(self.model, cache, ids, self.method, position)

    def _answers(self, prompts: Sequence[_Prompt]) -> list[list[int]]:
        """Greedy tokens of prompts whose parts have equal lengths, each up to its own end."""
        cache, position = self._compressed([prompt.first for prompt in prompts])
        read = len(prompts[0].first)
        if read and not self.method.acts_while_decoding:
            self._note(cache, len(prompts), read)
        rest = torch.tensor([prompt.rest for prompt in prompts], device=self.device)
        token = self._follow(cache, rest, position)[:, -1:].argmax(-1)
        read += rest.shape[1]
        position_ids = torch.full_like(token[:1], position + rest.shape[1])
        answers: list[list[int]] = [[int(row)] for row in token]
        going = list(range(len(prompts)))
        with self.method.decoding(self.model):
            while going := [row for row in going if not self._ended(answers[row], prompts[row])]:
                logits = self.model(token, position_ids=position_ids, past_key_values=cache, use_cache=True).logits
                token = logits[:, -1:].argmax(-1)
                read += 1
                position_ids = position_ids + 1
                for row in going:
                    answers[row].append(int(token[row]))
        if self.method.acts_while_decoding:
            self._note(cache, len(prompts), read)
        return answers

    def _ended(self, tokens: list[int], prompt: _Prompt) -> bool:
        if tokens[-1] in self.ends or len(tokens) >= prompt.new_tokens:
            return True
        # a token is a byte of text at least, so that an end just written lies within so many of the last
        tail = self.tokenizer.decode(tokens[-max((len(text.encode()) for text in prompt.until), default=1) :])
        return any(text in tail for text in prompt.until)
