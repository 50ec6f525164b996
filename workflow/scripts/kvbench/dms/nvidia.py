"""NVIDIA's DMS checkpoint as a method: its own attention and cache, held to what is known of them.

Its code comes with its weights and is pinned by their commit. What is relied on, and checked where it is met:

- It imports flash-attn's ``flash_attn_with_kvcache``, with which it decodes, and was written for transformers 4.57.
- ``config.dms_window_size`` is how many positions after a token marked for eviction still read it; the cache is made
  with one more. A cache of another kind is replaced by the model's forward, in silence.
- ``cache.layers[i]`` has ``key_blocks`` and ``value_blocks`` [blocks, block_size, 1, head_dim], taken ahead for 2048
  tokens a row and head and never given back; ``block_table`` and ``cache_seq_lengths`` (tokens kept) for every row and
  head; ``recent_info``, the window.
- It reads one prompt, then a token at a time. It wants sdpa's kind of mask; of pads it is told by that alone.

Source: Hugging Face ``nvidia/Qwen3-8B-DMS-8x`` at `REVISION`: ``modeling_qwen3_dms.py``, ``dms_attention.py`` and
``dms_cache.py``, as republished in ``westers/kvcompress``; NVIDIA Model-Optimizer, ``experimental/dms/README.md``.
"""

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import transformers

from kvbench.errors import Unsupported, UserError
from kvbench.methods import Dense

REVISION = "da1535fc3bfb52fa340eca692a7e4e650f98838d"
"""The commit of nvidia/Qwen3-8B-DMS-8x whose structure is described above."""

ENVIRONMENT = (
    "envs/dms.yaml has what it was written for (transformers 4.57.3, flash-attn 2.8.3); use it, or --sdm conda"
)

SETTINGS = ("dms_window_size", "max_position_embeddings", "num_hidden_layers", "num_key_value_heads")
LAYER = (
    *("key_blocks", "value_blocks", "block_table", "cache_seq_lengths", "recent_info"),
    *("head_dim", "dtype", "block_size", "dms_window_size"),
)
"""What a layer of its cache must have."""


class Checkpoint(Dense):
    """A checkpoint with trained eviction that brings its own code.

    Source: arXiv 2506.05345.

    Parameters
    ----------
    repository, revision : where on the hub it lies, and the commit that pins its weights and its code.
    """

    compresses = True
    acts_while_decoding = True
    packs = False
    unpackable = "a DMS checkpoint decodes with the code that it brings, over a cache that grows in blocks"
    own_code = True

    def __init__(self, repository: str, revision: str) -> None:
        self.repository, self.revision = repository, revision
        self._rope_theta: float | None = None

    @contextmanager
    def loading(self, manifest: Any) -> Iterator[None]:
        """Load only what this method names, where its code can run.

        Raises
        ------
        UserError : the manifest is of another repository or commit, or does not trust its code.
        Unsupported : flash-attn is missing, or the code does not load with this version of transformers.
        """
        self._must_be_its_own(manifest)
        self._must_have_flash_attention()
        config = json.loads((manifest.path / "config.json").read_text("utf-8"))
        self._rope_theta = None if config.get("rope_scaling") else config.get("rope_theta")
        try:
            yield
        except (ImportError, AttributeError, TypeError, KeyError) as error:
            raise self._differs(f"its code does not load: {type(error).__name__}: {error}") from error

    def check(self, model: Any, batch_size: int) -> None:
        for name in SETTINGS:
            if not isinstance(getattr(model.config, name, None), int):
                raise self._differs(f"its {type(model.config).__name__} has no {name}")
        attention = model.config._attn_implementation
        if attention != "sdpa":
            raise Unsupported(
                f"{self.repository} reads sdpa's masks, not {attention}'s; set its model's attention: sdpa"
            )
        self._cache_class(model)
        self._must_rotate_as_configured(model)

    def cache(self, model: Any) -> Any:
        kind = self._cache_class(model)
        window, context = model.config.dms_window_size + 1, model.config.max_position_embeddings
        try:
            return kind(dms_window_size=window, max_context_length=context)
        except (TypeError, AssertionError) as error:
            raise self._differs(f"its {kind.__name__} cannot be made for a window of {window}: {error}") from error

    def prefill(self, model: Any) -> AbstractContextManager[Any]:
        return self._guarded(model, pads=False)

    def decoding(self, model: Any) -> AbstractContextManager[Any]:
        return self._guarded(model, pads=False)

    def everywhere(self, model: Any) -> AbstractContextManager[Any]:
        """Around the article's forward pass and ``generate``, whose padding mask the checkpoint's own code reads."""
        return self._guarded(model, pads=True)

    def facts(self, cache: Any) -> dict[str, float]:
        """What was achieved, as against what was asked, and the size of its blocks.

        Returns
        -------
        ``window`` (positions that an evicted token stays readable), ``block_size`` (tokens), ``kept_fraction`` of the
        tokens read so far, pads among them, and ``compression_factor``, its inverse.
        """
        layers = cache.layers
        kept = sum(int(layer.cache_seq_lengths.sum()) for layer in layers)
        kept_fraction = kept / (cache.get_seq_length() * sum(len(layer.cache_seq_lengths) for layer in layers))
        return {
            "window": layers[0].dms_window_size - 1,
            "block_size": layers[0].block_size,
            "kept_fraction": kept_fraction,
            "compression_factor": 1 / kept_fraction,
        }

    @contextmanager
    def _guarded(self, model: Any, pads: bool) -> Iterator[None]:
        """The model refuses what its cache would get wrong, and its cache is looked at after the prompt."""

        def before(_model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tokens, past = _input_ids(args, kwargs).shape[1], kwargs.get("past_key_values")
            mask = kwargs.get("attention_mask")
            if tokens > 1 and past is not None and past.get_seq_length():
                raise Unsupported(
                    f"{self.repository} reads one prompt, then a token at a time: {tokens} tokens came after"
                    f" {past.get_seq_length()}"
                )
            if not pads and mask is not None and not bool(mask.bool().all()):
                raise Unsupported(f"{self.repository} is measured without pads; give it prompts of equal lengths")

        def after(_model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            ids = _input_ids(args, kwargs)
            if ids.shape[1] > 1:
                self._must_be_known(output.past_key_values, model, len(ids))

        hooks = (
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, with_kwargs=True),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _must_be_its_own(self, manifest: Any) -> None:
        found = manifest.source.get("hub"), manifest.revision
        if found != (self.repository, self.revision):
            raise UserError(
                f"the method is {self.repository} at {self.revision}, and {manifest.name} is {found[0]} at {found[1]}",
                "Give the model's source and the method the same repository and revision",
            )
        if not manifest.trust_remote_code:
            raise UserError(
                f"{self.repository} runs Python code that comes with it",
                "Read that code, then set `trust_remote_code: true` for this model",
            )

    def _must_have_flash_attention(self) -> None:
        try:
            found = hasattr(importlib.import_module("flash_attn"), "flash_attn_with_kvcache")
            why = "" if found else ": it has no flash_attn_with_kvcache"
        except ImportError as error:
            found, why = False, f": {error}"
        if not found:
            raise Unsupported(
                f"{self.repository} decodes with flash-attn, which cannot be used here{why}; {ENVIRONMENT}"
            )

    def _cache_class(self, model: Any) -> Any:
        kind = getattr(sys.modules[type(model).__module__], "DMSCache", None)
        if kind is None:
            raise self._differs(f"{type(model).__module__} has no DMSCache beside {type(model).__name__}")
        return kind

    def _must_rotate_as_configured(self, model: Any) -> None:
        """A version of transformers that looks for the rotary base elsewhere takes a default in silence."""
        frequencies = getattr(getattr(model.model, "rotary_emb", None), "inv_freq", None)
        if frequencies is None or self._rope_theta is None:
            return
        second = self._rope_theta ** (-1 / len(frequencies))
        if not torch.isclose(frequencies[1].float().cpu(), torch.tensor(second), rtol=1e-2):
            found = float(frequencies[1]) ** -len(frequencies)
            raise self._differs(
                f"its positions rotate by a base of {found:.0f}, its config says {self._rope_theta:.0f}"
            )

    def _must_be_known(self, cache: Any, model: Any, rows: int) -> None:
        """Hold the cache against what `cache.cache_bytes` and `facts` read of it; nothing here waits for the device."""
        layers, config = getattr(cache, "layers", None) or [], model.config
        if len(layers) != config.num_hidden_layers:
            raise self._differs(f"its {type(cache).__name__} has {len(layers)} layers, not {config.num_hidden_layers}")
        for layer in layers:
            kind = type(layer).__name__
            lacking = [name for name in LAYER if getattr(layer, name, None) is None]
            if lacking:
                raise self._differs(f"its cache's {kind} has no {', '.join(lacking)}")
            block = (layer.block_size, 1, layer.head_dim)
            sequences = rows * config.num_key_value_heads
            for name, found, expected in (
                ("key_blocks", tuple(layer.key_blocks.shape[1:]), block),
                ("value_blocks", tuple(layer.value_blocks.shape[1:]), block),
                ("cache_seq_lengths", tuple(layer.cache_seq_lengths.shape), (sequences,)),
                ("block_table", len(layer.block_table), sequences),
                ("dms_window_size", layer.dms_window_size, config.dms_window_size + 1),
            ):
                if found != expected:
                    raise self._differs(f"{name} of its cache's {kind} is {found}, not {expected}")

    def _differs(self, what: str) -> Unsupported:
        return Unsupported(
            f"{self.repository} at {self.revision[:8]} is not as kvbench knows it at {REVISION[:8]}: {what};"
            f" found transformers {transformers.__version__}; {ENVIRONMENT}"
        )


def _input_ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    ids: torch.Tensor = args[0] if args else kwargs["input_ids"]
    return ids
