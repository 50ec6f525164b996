"""The article's list on the real ShareGPT file, as far as the package index has it: it is cut off in the middle."""

import json
import shutil

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from conftest import ROOT
from kvbench import prompts, sources
from kvbench.manifest import load_manifest
from kvbench.scan import Rules

pytestmark = pytest.mark.network


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The file of the default config, fetched as the pipeline fetches it."""
    folder = tmp_path_factory.mktemp("sharegpt")
    source = yaml.safe_load((ROOT / "config" / "config.yaml").read_text("utf-8"))["dataset"]["source"]
    sources.fetch_dataset("sharegpt", source, folder / "manifest.json")
    yield load_manifest(folder / "manifest.json").file
    shutil.rmtree(folder)


def article(path):
    """The article's code on the records that are whole: its list of prompts."""
    text = path.read_text("utf-8")
    whole = path.with_name("whole.json")
    whole.write_text(text[: text.rindex("\n  },\n  {")] + "\n  }\n]", "utf-8")
    df = pd.read_json(whole)
    valid_convs = df[df["conversations"].apply(lambda x: len(x) >= 2)]
    sorted_convs = valid_convs.sort_values(by="id")
    shuffled_convs = sorted_convs.sample(frac=1, random_state=4387).reset_index(drop=True)
    all_prompts = []
    for _, data in shuffled_convs.iterrows():
        prompt = data["conversations"][0]["value"]
        completion = data["conversations"][1]["value"]
        if len(prompt) >= 10 and len(completion) >= 10:
            all_prompts.append(prompt)
    return all_prompts


def test_equals_the_article(real, tmp_path):
    counts = prompts.select(real, tmp_path / "prompts.parquet", Rules("article", 4387, 10, 0.0), {})
    rows = pq.read_table(tmp_path / "prompts.parquet")
    assert rows["prompt"].to_pylist() == article(real)
    assert rows["rank"].to_pylist() == list(range(16_652))
    assert (counts["conversations_read"], counts["truncated"], counts["malformed"]) == (17_671, True, {})
    records = json.loads((real.with_name("whole.json")).read_text("utf-8"))
    for row in rows.slice(0, 50).to_pylist():
        record = records[row["source_index"]]
        texts = [message["value"] for message in record["conversations"]]
        assert (row["conversation_id"], row["prompt"], row["completion"]) == (record["id"], *texts[:2])
        assert row["first_role"] == record["conversations"][0]["from"]
        assert (row["turns"], row["conversation_chars"]) == (len(texts), sum(map(len, texts)))


def test_a_human_asks_and_an_assistant_answers(real, tmp_path):
    prompts.select(real, tmp_path / "prompts.parquet", Rules("human_first", 4387, 10, 0.0), {})
    rows = pq.read_table(tmp_path / "prompts.parquet")
    assert len(rows) == 10_793
    assert set(rows["first_role"].to_pylist()) == {"human", "user"}
