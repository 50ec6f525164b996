"""DMS as a method of a run."""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from kvbench import packed
from kvbench.architecture import windows
from kvbench.dms import adapter, evict
from kvbench.dms.attention import ATTENTION
from kvbench.dms.cache import CompactCache, join
from kvbench.errors import Unsupported
from kvbench.methods import Dense
from kvbench.ragged import fits_kernel


def check(model: Any) -> None:
    """Raise `Unsupported` for a model that DMS cannot run on: of another kind, with sliding windows, or odd heads."""
    evict.check_kind(model.config.model_type)
    if any(window is not None for window in windows(model.config)):
        raise Unsupported("DMS decides itself which tokens a head sees, and this model has sliding-window layers")
    head_dim = model.model.layers[0].self_attn.head_dim
    if model.device.type == "cuda" and not fits_kernel(head_dim):
        raise Unsupported(f"the DMS kernels want a head_dim that is a power of two from 16 on, not {head_dim}")


class Dms(Dense):
    """Trained eviction, in the prompt and while decoding, in a cache that frees the bytes.

    Source: arXiv 2506.05345.

    Parameters
    ----------
    folder : of an adapter; `adapter.load` says what is in it. It is merged into the first model that this method
        runs on, and stays.
    threshold : the logit above which a head evicts.
    """

    compresses = True
    acts_while_decoding = True
    changes_model = True
    attention = ATTENTION

    def __init__(self, folder: Path, threshold: float = 0.0) -> None:
        self.folder = folder
        self.threshold = threshold
        self._model: Any = None
        self._heads: evict.Heads | None = None

    def loading(self, manifest: Any) -> AbstractContextManager[Any]:
        """Say in the job's log where the adapter was trained on other weights, which changes what it is worth."""
        trained = json.loads(evict.load(self.folder).about.get("base_sha256", "{}"))
        own = {file["path"]: file["sha256"] for file in manifest.files}
        if any(own.get(name) != digest for name, digest in trained.items()):
            print(f"{self.folder} was trained on other weights than those of {manifest.name}", flush=True)
        return nullcontext()

    def heads(self, model: Any) -> evict.Heads:
        """The eviction heads, attached to the model; the adapter is read and merged when first asked for.

        Raises
        ------
        UserError, Unsupported : as `adapter.load`.
        """
        if self._heads is None or self._model is not model:
            check(model)
            self._heads = adapter.load(model, self.folder, self.threshold)
            evict.attach(model, self._heads)
            self._model = model
        return self._heads

    def check(self, model: Any, batch_size: int) -> None:
        self.heads(model)

    def cache(self, model: Any) -> CompactCache:
        return CompactCache(self.heads(model).window)

    def prefill(self, model: Any) -> AbstractContextManager[Any]:
        self.heads(model)
        return packed.attention(model, ATTENTION)

    @contextmanager
    def decoding(self, model: Any) -> Iterator[None]:
        def reserve(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            kwargs["past_key_values"].reserve()

        hook = model.register_forward_pre_hook(reserve, with_kwargs=True)
        try:
            with packed.attention(model, ATTENTION):
                yield
        finally:
            hook.remove()

    def steps(self, model: Any) -> AbstractContextManager[Any]:
        return packed.attention(model, ATTENTION)

    def pack(self, cache: CompactCache, new_tokens: int) -> CompactCache:
        cache.pack(new_tokens)
        return cache

    def join(self, caches: list[CompactCache], new_tokens: int) -> CompactCache:
        return self.pack(join(caches), new_tokens)

    def everywhere(self, model: Any) -> AbstractContextManager[Any]:
        raise Unsupported("DMS has a cache of its own, which the article's way of generating does not take")

    def facts(self, cache: CompactCache) -> dict[str, float]:
        """What was achieved, whatever was asked: ``window``, ``kept_fraction``, ``compression_factor``."""
        kept = cache.kept_fraction()
        return {"window": cache.window, "kept_fraction": kept, "compression_factor": 1 / kept}
