"""A model's tokenizer, from its manifest."""

from typing import Any

from kvbench.manifest import Manifest


def load_tokenizer(manifest: Manifest) -> Any:
    """The tokenizer of a model that has one, by the model's own code only where its source allows that.

    Whichever version of transformers has saved it, this one reads it.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # seconds that random weights do without

    assert manifest.tokenizer is not None
    try:
        return AutoTokenizer.from_pretrained(manifest.tokenizer, trust_remote_code=manifest.trust_remote_code)
    except ValueError as error:
        # transformers 5 gives the class a name that 4 does not know; what it saves is the same
        if "Tokenizer class" not in str(error) or not (manifest.tokenizer / "tokenizer.json").exists():
            raise
        return PreTrainedTokenizerFast.from_pretrained(manifest.tokenizer)
