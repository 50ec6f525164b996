"""A tokenizer runs code of its own only where the model's source allows that; one that transformers 5 saved."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, dynamic_module_utils

import tinyrun
from kvbench import sources
from kvbench.tokenizer import load_tokenizer

OWN = "from transformers import PreTrainedTokenizerFast\n\n\nclass Own(PreTrainedTokenizerFast):\n    pass\n"


def test_code_of_its_own_needs_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "model"
    tinyrun.save_model(folder)
    manifest = sources.fetch_model("tiny", {"path": str(folder)}, tmp_path / "manifest.json")
    described = folder / "tokenizer_config.json"
    settings = json.loads(described.read_text()) | {"auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    described.write_text(json.dumps(settings | {"tokenizer_class": "Own"}))
    (folder / "own.py").write_text(OWN)
    assert type(load_tokenizer(replace(manifest, trust_remote_code=True))).__name__ == "Own"
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_tokenizer(manifest)


def test_what_transformers_5_has_saved_is_read_by_4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    tinyrun.save_model(folder)
    manifest = sources.fetch_model("tiny", {"path": str(folder)}, tmp_path / "manifest.json")
    tokenizer, text = load_tokenizer(manifest), "the cache</s> keeps"

    def as_in_4(*_: Any, **__: Any) -> None:
        raise ValueError("Tokenizer class TokenizersBackend does not exist or is not currently imported.")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", as_in_4)
    found = load_tokenizer(manifest)
    assert found(text)["input_ids"] == tokenizer(text)["input_ids"] and found.eos_token == tokenizer.eos_token
    assert found.chat_template == tokenizer.chat_template
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="TokenizersBackend"):
        load_tokenizer(manifest)
