"""A GGUF file turned, once, into what transformers loads fast: safetensors, config and a right tokenizer.

The weights go through transformers' own GGUF reader. The tokenizer is built here from the file's tokens,
merges and token types: ``AutoTokenizer(gguf_file=...)`` gives a Llama one with ids beyond the vocabulary.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTROL = 3  # token_type of a special token in GGUF
USER_DEFINED = 4  # one that is matched whole in text but is no control token

# whether digits are split one by one before the byte-level split, by the file's tokenizer.ggml.pre
PRE_TOKENIZERS = {"smollm": True, "gpt-2": False, "default": False}

# A 4-bit file's values need more bits than bfloat16 has, but rounding them adds 20 times less (KL 6e-5 on
# SmolLM2-135M Q4_1) than bfloat16 arithmetic does, and on a GPU a model runs in the dtype it has on disk.
DTYPE = "bfloat16"


def convert(gguf: Path, folder: Path) -> dict[str, Any]:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer to ``folder``.

    Parameters
    ----------
    gguf : a GGUF file with a byte-level BPE vocabulary, of an architecture that transformers reads.

    Returns
    -------
    ``{"file", "name", "licence", "quantization", "dtype"}``; name and licence may be None.

    Raises
    ------
    UserError : no GGUF, a tokenizer other than byte-level BPE, an architecture that transformers cannot read.
    """
    fields, quantization = _read(gguf)
    tokenizer = _tokenizer(fields, gguf)
    print(f"Converting {gguf.name} to safetensors ({DTYPE})", file=sys.stderr, flush=True)
    _convert_weights(gguf, folder, fields)
    tokenizer.save_pretrained(folder)
    named = {"name": fields.get("general.name"), "licence": fields.get("general.license")}
    return named | {"file": gguf.name, "quantization": quantization, "dtype": DTYPE}


def _read(gguf: Path) -> tuple[dict[str, Any], str]:
    """The metadata of the file, and the type that most of its weights are stored in."""
    from collections import Counter

    from gguf import GGUFReader

    try:
        reader = GGUFReader(gguf)
    except (ValueError, IndexError, OSError) as error:
        cause = f"{gguf.name} is no readable GGUF file ({error})"
        raise UserError(cause, "Fetch it again, or name another file") from error
    sizes: Counter[str] = Counter()
    for tensor in reader.tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    return {key: field.contents() for key, field in reader.fields.items()}, sizes.most_common(1)[0][0]


def _convert_weights(gguf: Path, folder: Path, fields: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    with _no_weight_bars():
        try:
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=getattr(torch, DTYPE))
        except (ValueError, KeyError, NotImplementedError) as error:
            cause = f"transformers cannot read {gguf.name}: {str(error).splitlines()[0]}"
            raise UserError(cause, "Use the model's safetensors checkpoint instead") from error
        ids = {f"{role}_token_id": token for role, token in _special_ids(fields).items() if role != "unk"}
        model.generation_config = GenerationConfig(**ids)
        vars(model.config).pop("_model_name_or_path", None)  # free text of the file, not a repository
        model.save_pretrained(folder)


@contextlib.contextmanager
def _no_weight_bars() -> Iterator[None]:
    """Without the bar that redraws once a tensor, thousands of lines in a log."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def _special_ids(fields: dict[str, Any]) -> dict[str, int]:
    """Ids of the special tokens that the file names, by transformers' name of their role."""
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {role: fields.get(f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}
    return {role: int(token) for role, token in ids.items() if token is not None}


def _tokenizer(fields: dict[str, Any], gguf: Path) -> Any:
    """A `PreTrainedTokenizerFast` with the ids, specials and chat template of the file."""
    from transformers import PreTrainedTokenizerFast

    bpe = _byte_level_bpe(fields, gguf)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        model_max_length=next((v for k, v in fields.items() if k.endswith(".context_length")), None),
        clean_up_tokenization_spaces=False,
        chat_template=fields.get("tokenizer.chat_template"),
        **{f"{role}_token": bpe.id_to_token(token) for role, token in _special_ids(fields).items()},
    )


def _byte_level_bpe(fields: dict[str, Any], gguf: Path) -> "Tokenizer":
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        known = ", ".join(f"gpt2/{name}" for name in PRE_TOKENIZERS)
        cause = f"{gguf.name} has a {kind}/{pre} tokenizer; those that can be converted are {known}"
        raise UserError(cause, "Use the model's safetensors checkpoint, which brings its tokenizer")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    digits = [pre_tokenizers.Digits(individual_digits=True)] if PRE_TOKENIZERS[pre] else []
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    whole = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)]
    bpe.add_tokens([AddedToken(token, special=kind == CONTROL, normalized=False) for token, kind in whole])
    if fields.get("tokenizer.ggml.add_bos_token"):
        bos = fields["tokenizer.ggml.bos_token_id"]
        specials = [(tokens[bos], bos)]
        bpe.post_processor = processors.TemplateProcessing(single=f"{tokens[bos]} $A", special_tokens=specials)
    return bpe
