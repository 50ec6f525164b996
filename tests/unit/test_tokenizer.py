"""A tokenizer that brings code of its own runs it only where the model's source allows that."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import dynamic_module_utils

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
