"""How the cache is compressed: one small class a kind of method."""

import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from kvbench.errors import Unsupported

# Presses that are wrong on a batch of more than one sequence: each class (subclasses too) with what it does there.
_ONE_ROW_ONLY = {
    "ChunkKVPress": "applies the first row's chunks to every row",
    "SimLayerKVPress": "decides by an average over the batch",
    "FinchPress": "finds its delimiter in the first row only",
    "KVzipPress": "handles one sequence at a time",
    "KVComposePress": "handles one sequence at a time",
    "FastKVzipPress": "handles one sequence at a time",
    "CriticalAdaKVPress": "adds up the rows' budgets of a head",
}
# Presses that are sound on a batch, where a row gets another cache than it would alone.
_ROWS_TOGETHER = {
    "RandomPress": "draws for the whole batch at once",
    "LeverageScorePress": "draws for the whole batch at once, and normalises its scores over it",
    "NonCausalAttnPress": "normalises its scores over the batch",
    "CAMPress": "draws for the whole batch at once",
    "CriticalKVPress": "weighs scores that hold a maximum over the batch",
}
_DRAWS = {"RandomPress", "LeverageScorePress", "CAMPress"}


class Dense:
    """No compression: the baseline."""

    compresses = False
    acts_while_decoding = False
    packs = True
    """Whether it decodes over a cache whose shapes no step changes."""
    unpackable = "a press that compresses while decoding changes the cache's shapes"
    """Why not, where it does not."""
    attention: str | None = None
    """The attention kernel of its prefill and its steps, where it has one of its own."""
    own_code = False
    """Whether the model brings its own attention and cache, of which no engine may change a thing."""
    shares_prefill = False
    """Whether its prefill is the dense one, with each layer's cache pruned or masked after that layer's own pass."""
    changes_model = False
    """Whether it changes the model's weights for good when it first runs, or is checked, on it."""
    rows_are_independent = True
    """Whether a row of a batch of equal lengths gets the tokens that it would get alone."""

    def loading(self, manifest: Any) -> AbstractContextManager[Any]:
        """Context in which the model of a manifest is loaded."""
        return nullcontext()

    def check(self, model: Any, batch_size: int) -> None:
        """Raise `Unsupported` where this method cannot be run as asked."""

    def must_fit(self, model: Any, tokens: int) -> None:
        """Raise `Unsupported` where this method cannot run on a model that reads so many tokens of each sequence."""

    def cache(self, model: Any) -> Any:
        """An empty cache for the prompt."""
        from transformers import DynamicCache

        return DynamicCache(config=model.config)

    def prefill(self, model: Any) -> AbstractContextManager[Any]:
        """Context of the prompt's forward pass; on its exit the cache is compressed."""
        return nullcontext()

    def decoding(self, model: Any) -> AbstractContextManager[Any]:
        """Context of the decode steps."""
        return nullcontext()

    def pack(self, cache: Any, new_tokens: int) -> Any:
        """The compressed cache in a form that decodes ``new_tokens`` tokens without a change of shape."""
        from kvbench.packed import PackedCache

        return PackedCache(cache, new_tokens)

    def join(self, caches: list[Any], new_tokens: int) -> Any:
        """The same of several batches' caches as one, rows behind each other, whatever their lengths."""
        from kvbench.packed import PackedCache, Together

        together = Together(caches)
        return PackedCache(together, new_tokens, together.lengths)

    def steps(self, model: Any) -> AbstractContextManager[Any]:
        """Context of the decode steps over a packed cache."""
        from kvbench import packed

        return packed.attention(model, packed.ATTENTION)

    def everywhere(self, model: Any) -> AbstractContextManager[Any]:
        """Context around a whole ``generate``, as the article has it: hooks stay on while decoding."""
        return nullcontext()

    def facts(self, cache: Any) -> dict[str, float]:
        """What this method says of a cache of its own, beside the bytes that are measured of any.

        ``window`` and ``block_size`` are in tokens.
        """
        return {}

    def next_position(self, prompt_tokens: int, cache: Any) -> int:
        """Position of the first generated token; it goes on from the *uncompressed* length."""
        return prompt_tokens


class Press(Dense):
    """A kvpress press, which prunes or masks the cache after each layer's prefill.

    Source: NVIDIA kvpress, ``presses/base_press.py``.
    """

    compresses = True

    def __init__(self, spec: dict[str, Any]) -> None:
        self.press = build_press(spec)
        self.kept_tokens: int | None = spec.get("kept_tokens")
        self.acts_while_decoding = _acts_while_decoding(self.press)
        self.packs = not self.acts_while_decoding
        self.shares_prefill = _shares_prefill(self.press)
        kinds = {kind.__name__ for press in _nested(self.press) for kind in type(press).__mro__}
        random_projection = any(getattr(press, "use_random_leverage", False) for press in _nested(self.press))
        self.draws = random_projection or not kinds.isdisjoint(_DRAWS)
        self.rows_are_independent = not self.draws and kinds.isdisjoint(_ONE_ROW_ONLY.keys() | _ROWS_TOGETHER.keys())

    def check(self, model: Any, batch_size: int) -> None:
        if batch_size > 1:
            for press in _nested(self.press):
                for kind in type(press).__mro__:
                    if kind.__name__ in _ONE_ROW_ONLY:
                        raise Unsupported(f"{kind.__name__} {_ONE_ROW_ONLY[kind.__name__]}; use batch_size: 1")
        attention = model.config._attn_implementation
        if attention != "eager" and any(type(p).__name__ == "ObservedAttentionPress" for p in _nested(self.press)):
            raise Unsupported(
                f"ObservedAttentionPress reads attention weights, which {attention} does not give; set the model's"
                " attention: eager"
            )

    def must_fit(self, model: Any, tokens: int) -> None:
        from kvbench.architecture import windows

        if type(model).__name__ == "Gemma3ForConditionalGeneration":
            return  # kvpress prunes its full layers only
        window = min((window for window in windows(model.config) if window is not None), default=None)
        if window is not None and tokens >= window:
            raise Unsupported(
                f"a press would prune layers with a sliding window of {window} tokens, whose cache counts on every"
                f" token once the window is full; prompt and answer have {tokens}: lower prompt_tokens or new_tokens"
            )

    def prefill(self, model: Any) -> AbstractContextManager[Any]:
        from kvpress import DecodingPress

        return nullcontext() if isinstance(self.press, DecodingPress) else self._applied(model)

    def decoding(self, model: Any) -> AbstractContextManager[Any]:
        # hooks of the others do nothing here, but each would make the host wait for the device once a layer
        return self._applied(model) if self.acts_while_decoding else nullcontext()

    def everywhere(self, model: Any) -> AbstractContextManager[Any]:
        return self._applied(model)

    def next_position(self, prompt_tokens: int, cache: Any) -> int:
        from kvpress import FinchPress, KeyRerotationPress, RestoreKVPress

        rotates = isinstance(self.press, KeyRerotationPress | RestoreKVPress)
        rotates = rotates or (isinstance(self.press, FinchPress) and self.press.rerotate_keys)
        # these give the kept keys new, dense positions, so the next token follows the compressed length
        return cache.get_seq_length() if rotates else prompt_tokens

    @contextmanager
    def _applied(self, model: Any) -> Iterator[None]:
        hook = None
        if self.draws or self.kept_tokens is not None:
            hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        try:
            with _own_random_numbers(model) if self.draws else nullcontext(), self.press(model):
                yield
        except AssertionError as error:
            raise Unsupported(
                f"{type(self.press).__name__} refuses this input: {error or 'assertion failed'}"
            ) from error
        finally:
            if hook is not None:
                hook.remove()

    def _before_forward(self, _model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What a press must know of its prompt: the ratio that keeps a budget, and where its draws begin."""
        import torch

        input_ids = args[0] if args else kwargs["input_ids"]
        if self.draws:  # from the prompt itself, so that it draws the same wherever it stands in a run
            torch.manual_seed(zlib.crc32(input_ids.cpu().numpy().tobytes()))
        tokens = input_ids.shape[1]
        if self.kept_tokens is not None and tokens > 1:
            self.press.compression_ratio = ratio_that_keeps(self.kept_tokens, tokens)


def build(spec: dict[str, Any]) -> Dense:
    """The method of a spec: ``{}`` none, ``{"press": Class, "args": {…}, "kept_tokens": …}``, ``{"dms": {…}}``.

    Raises
    ------
    Unsupported : the press refuses its arguments.
    """
    if "dms" in spec:
        if spec["dms"].get("checkpoint"):
            from kvbench.dms.nvidia import Checkpoint

            return Checkpoint(spec["dms"]["checkpoint"], spec["dms"]["revision"])
        from kvbench.dms import layout
        from kvbench.dms.method import Dms

        return Dms(layout.find(Path(spec["dms"]["adapter"])), spec["dms"].get("threshold", 0.0))
    return Press(spec) if "press" in spec else Dense()


def build_press(spec: dict[str, Any]) -> Any:
    """Build a kvpress press by class name, wrapped ones first.

    Raises
    ------
    Unsupported : the press refuses its arguments.
    """
    import kvpress

    args = {key: _built(value) for key, value in (spec.get("args") or {}).items()}
    try:
        return getattr(kvpress, spec["press"])(**args)
    except (AssertionError, TypeError, ValueError) as error:
        raise Unsupported(f"{spec['press']} refuses its arguments: {error or 'assertion failed'}") from error


def ratio_that_keeps(kept_tokens: int, tokens: int) -> float:
    """Compression ratio at which a press keeps ``kept_tokens`` of ``tokens``; 0 where there are no more than that."""
    # presses keep int(n * (1 - ratio)) of n tokens, a few round it: a thousandth more outlasts the rounding in both
    return 0.0 if tokens <= kept_tokens else 1 - (kept_tokens + 1e-3) / tokens


@contextmanager
def _own_random_numbers(model: Any) -> Iterator[None]:
    import torch

    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        yield


def _acts_while_decoding(press: Any) -> bool:
    from kvpress import DecodingPress, DMSPress, PrefillDecodingPress

    return isinstance(press, DecodingPress | PrefillDecodingPress) or (isinstance(press, DMSPress) and press.decoding)


def _shares_prefill(press: Any) -> bool:
    """Presses with a context of their own change the forward pass, or run more of them."""
    from kvpress.presses.base_press import BasePress

    return all(type(each).__call__ is BasePress.__call__ for each in _nested(press))


def _built(value: Any) -> Any:
    if isinstance(value, dict) and "press" in value:
        return build_press(value)
    return [_built(item) for item in value] if isinstance(value, list) else value


def _nested(press: Any) -> Iterator[Any]:
    yield press
    for value in vars(press).values():
        for item in value if isinstance(value, list) else [value]:
            if any(kind.__name__ == "BasePress" for kind in type(item).__mro__):
                yield from _nested(item)
