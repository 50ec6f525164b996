"""A model's tokenizer, from its manifest."""

from typing import Any

from kvbench.manifest import Manifest


def load_tokenizer(manifest: Manifest) -> Any:
    """The tokenizer of a model that has one, by the model's own code only where its source allows that."""
    from transformers import AutoTokenizer  # takes seconds, which a model of random weights does without

    return AutoTokenizer.from_pretrained(manifest.tokenizer, trust_remote_code=manifest.trust_remote_code)
