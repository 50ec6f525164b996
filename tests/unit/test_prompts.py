"""Prompts: the article's own list, and every way in which a file can be wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvbench import prompts, scan
from kvbench.errors import UserError
from kvbench.scan import Rules
from kvbench.sharegpt import Records

ANYTHING = settings(deadline=None, suppress_health_check=list(HealthCheck))
STAGE = Path(prompts.__file__).parents[1] / "prompts.py"


def article(path, seed=4387, min_chars=10):
    """The article's code: its list of prompts."""
    df = pd.read_json(path)
    valid_convs = df[df["conversations"].apply(lambda x: len(x) >= 2)]
    sorted_convs = valid_convs.sort_values(by="id")
    shuffled_convs = sorted_convs.sample(frac=1, random_state=seed).reset_index(drop=True)
    all_prompts = []
    for _, data in shuffled_convs.iterrows():
        prompt = data["conversations"][0]["value"]
        completion = data["conversations"][1]["value"]
        if len(prompt) >= min_chars and len(completion) >= min_chars:
            all_prompts.append(prompt)
    return all_prompts


def rules(selection="article", min_chars=10, share=0.01, seed=4387):
    return Rules(selection, seed, min_chars, share)


def select(path, **options):
    """Run the stage; its counts and its rows."""
    output = path.with_suffix(".parquet")
    counts = prompts.select(path, output, rules(**options), {"who": "test"})
    return counts, pq.read_table(output).to_pylist()


def write(path, records, **options):
    path.write_text(json.dumps(records, **options), "utf-8")
    return path


def turn(role, value):
    return {"from": role, "value": value}


def chat(identity, *roles, text="long enough to be kept"):
    return {"id": identity, "conversations": [turn(role, f"{text} {n}") for n, role in enumerate(roles)]}


def kept(counts):
    return [step["kept"] for step in counts["steps"]]


# --- the article's list ---

# All of Unicode that UTF-8 can hold; the encoders below write it raw or escaped.
TEXTS = st.text(max_size=30) | st.text(st.characters(codec="utf-8"), min_size=8, max_size=14)
MESSAGES = st.fixed_dictionaries(
    {"from": st.sampled_from(["human", "gpt", "system", None]), "value": TEXTS},
    optional={"markdown": st.none() | st.floats(), "id": st.just("inner")},
)
IDS = {
    "text": st.sampled_from(["a", "b", "QWJhYvA_0", "QWJhYvA_10", "é", "", "10", "9"]),
    "text of numbers": st.sampled_from(["10", "9", "1e3", "007", "2.5"]),
    "integers": st.integers(-5, 5) | st.integers(2**62, 2**63 - 1),
    "fractions": st.sampled_from([0.1, 0.10000000000000002, 1.5, -2.25, 1e300, 3.0]),
    "text or null": st.sampled_from(["a", "b", "c", None]),
    "numbers or null": st.sampled_from([1, 2.5, None, 3]),
    "booleans": st.booleans(),
    "dates": st.sampled_from(["2023-04-01T00:00:00Z", "2024-01-01", "x"]),
    "stamps": st.integers(1_600_000_000, 1_700_000_000),
}


def records(ids):
    return st.fixed_dictionaries(
        {"id": ids, "conversations": st.lists(MESSAGES, max_size=4)},
        optional={"score": st.floats(), "extra": st.just({"conversations": [{"value": "},{"}], "id": [1]})},
    )


@pytest.mark.parametrize("kind", IDS)
@ANYTHING
@given(data=st.data())
def test_equals_the_article(kind, tmp_path, data):
    some = data.draw(st.lists(records(IDS[kind]), min_size=1, max_size=60))
    if all(len(each["conversations"]) < 2 for each in some):
        some.append({"id": some[0]["id"], "conversations": [turn("gpt", "a prompt of some length")] * 2})
    missing = data.draw(st.sets(st.integers(1, len(some)), max_size=2))
    some = [{k: v for k, v in each.items() if n not in missing or k != "id"} for n, each in enumerate(some)]
    layout = data.draw(st.sampled_from([{}, {"indent": 2}, {"separators": (",", ":")}, {"sort_keys": True}]))
    path = write(tmp_path / "some.json", some, ensure_ascii=data.draw(st.booleans()), **layout)
    expected = article(path)
    if not expected:
        with pytest.raises(UserError, match="No prompt is left"):
            select(path)
    else:
        assert [row["prompt"] for row in select(path)[1]] == expected


def test_equals_the_article_where_ids_repeat(tmp_path):
    """Enough equal ids that the unstable sort moves them."""
    draw = np.random.default_rng(0)
    some = [chat(f"{draw.integers(300)}_x", "gpt", "human", text=f"prompt {n}") for n in range(4000)]
    path = write(tmp_path / "repeated.json", some)
    assert [row["prompt"] for row in select(path)[1]] == article(path)


def test_equals_the_article_beside_records_it_can_read_and_utf8_cannot_hold(tmp_path):
    """A record that cannot be kept still has its place in the shuffle."""
    some = [chat(f"c{n}", "human", "gpt", text=f"prompt {n}") for n in range(300)]
    for n in range(0, 300, 60):
        some[n]["conversations"][0]["value"] = "half a pair \ud83d"  # which pandas leaves out
    path = write(tmp_path / "surrogates.json", some)
    counts, rows = select(path, share=0.02)
    assert counts["malformed"] == {"lone_surrogate": 5}
    assert [row["prompt"] for row in rows] == [text for text in article(path) if text != "half a pair "]


def test_parts_equal_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "PART_BYTES", 10_000)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    some = [chat(f"{n // 3}_x", *["gpt", "human"] * (n % 3), text=f"prompt {n}") for n in range(2000)]
    some[1500] = 17
    some[1700]["conversations"] = None
    path = write(tmp_path / "parts.json", some)
    path_whole = write(tmp_path / "whole.json", some)
    with scan.scan(path, rules(), tmp_path) as read:
        assert len(read()) > 1
    counts, rows = select(path)
    monkeypatch.setattr(scan, "PART_BYTES", 1 << 40)
    assert (counts, rows) == select(path_whole)
    assert [example["index"] for example in counts["malformed_examples"]] == [1500, 1700]


@pytest.mark.parametrize("nested", [1200, 3])
def test_a_part_that_begins_inside_a_record_is_read_again(nested, tmp_path, monkeypatch):
    """What parts records also parts messages here, so that a part's beginning is guessed wrong."""
    monkeypatch.setattr(scan, "PART_BYTES", 10_000)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    inner = [{"id": "m", "from": "human", "value": "a message with an id of its own"} for _ in range(nested)]
    some = [{"id": f"c{n}", "conversations": inner} for n in range(4 if nested > 3 else 1000)]
    path = write(tmp_path / "nested.json", some)
    counts, rows = select(path)
    assert counts["conversations_read"] == len(rows) == len(some)
    assert [row["prompt"] for row in rows] == article(path)


# --- what is stored ---


def test_columns(tmp_path):
    some = [
        chat("a_0", "human", "gpt", "human", text="größer"),
        chat(None, "gpt", "human", text="begins with the assistant"),
        {"id": 7.50, "conversations": [{"value": "nobody says it"}, {"value": "nor this one"}]},
    ]
    path = tmp_path / "some.json"
    path.write_text(json.dumps(some).replace("7.5", "7.50").replace('"a_0"', "1"), "utf-8")
    _, rows = select(path, min_chars=8)
    assert [row["rank"] for row in rows] == [0, 1, 2]
    assert {row["source_index"]: row for row in rows}[0] == {
        "rank": next(row["rank"] for row in rows if row["source_index"] == 0),
        "conversation_id": "1",
        "source_index": 0,
        "first_role": "human",
        "prompt": "größer 0",
        "completion": "größer 1",
        "prompt_chars": 8,
        "completion_chars": 8,
        "turns": 3,
        "conversation_chars": 24,
    }
    assert {row["source_index"]: (row["conversation_id"], row["first_role"]) for row in rows} == {
        0: ("1", "human"),
        1: (None, "gpt"),
        2: ("7.50", None),
    }
    stored = pq.ParquetFile(path.with_suffix(".parquet"))
    assert json.loads(stored.schema_arrow.metadata[b"kvbench"]) == {"who": "test"}
    assert stored.metadata.row_group(0).column(4).compression == "ZSTD"


def test_human_first(tmp_path):
    some = [
        chat("a", "human", "gpt"),
        chat("b", "user", "bing", "user"),
        chat("c", "gpt", "human"),
        chat("d", "system", "human", "gpt"),
        chat("e", "human", "human", "gpt"),
        chat("f", "human"),
        chat("g", "human", "tool"),
        chat("h", "human", None),
    ]
    counts, rows = select(write(tmp_path / "roles.json", some), selection="human_first")
    assert sorted(row["conversation_id"] for row in rows) == ["a", "b"]
    assert kept(counts) == [8, 7, 7, 2, 2]


def test_human_first_is_the_same_order_of_steps(tmp_path):
    some = [chat(f"c{n // 2}", *(("human", "gpt") if n % 3 else ("gpt", "human")), text=f"q {n}") for n in range(90)]
    asked = [each for n, each in enumerate(some) if n % 3]
    expected = article(write(tmp_path / "asked.json", asked), min_chars=1)
    rows = select(write(tmp_path / "all.json", some), selection="human_first", min_chars=1)[1]
    assert [row["prompt"] for row in rows] == expected


def test_short_texts_and_ranks(tmp_path):
    some = [{"id": f"c{n}", "conversations": [turn("human", "é" * n), turn("gpt", "x" * 10)]} for n in range(8, 13)]
    counts, rows = select(write(tmp_path / "short.json", some))
    assert sorted(row["prompt_chars"] for row in rows) == [10, 11, 12]
    assert kept(counts) == [5, 5, 5, 3]


# --- files cut off, broken or odd ---

SOME = [
    chat("a", "human", "gpt"),
    chat("é", "gpt", "human", text='größer 😀 \\ " \u2028'),
    {"id": -1.5e-7, "x": [True]},
]
SEVERAL = json.dumps(SOME, ensure_ascii=False).encode() + b"\n"
ESCAPED = json.dumps(SOME, indent=1).encode()


@pytest.mark.parametrize("content", [SEVERAL, ESCAPED])
def test_cut_off_at_any_byte(content, tmp_path):
    path = tmp_path / "cut.json"
    decoder = json.JSONDecoder()
    ends, text, position = [], content.decode(), 1
    for _ in SOME:
        position += len(text[position:]) - len(text[position:].lstrip(" \n,"))
        _, position = decoder.raw_decode(text, position)
        ends.append(len(text[:position].encode()))
    for size in range(1, len(content.rstrip())):
        path.write_bytes(content[:size])
        found = Records(path)
        number = len(list(found))
        assert (number, found.truncated) == (sum(end <= size for end in ends), True), content[:size]
        after = content[ends[number - 1] if number else 1 : size].lstrip(b" \n,")
        assert found.bytes_left_out == len(after)
    path.write_bytes(content)
    whole = Records(path)
    assert len(list(whole)) == len(SOME)
    assert not whole.truncated


@ANYTHING
@given(data=st.data(), window=st.integers(1, 40), chunk=st.integers(1, 60))
def test_records_do_not_depend_on_where_chunks_end(data, window, chunk, tmp_path):
    some = data.draw(st.lists(records(IDS["text or null"]), max_size=6))
    path = write(tmp_path / "chunks.json", some, ensure_ascii=data.draw(st.booleans()), indent=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvbench.sharegpt.CHUNK_BYTES", chunk)
        patch.setattr("kvbench.sharegpt.WINDOW_BYTES", window)
        found = Records(path)
        assert [record["conversations"] for record in found] == [
            json.loads(json.dumps(each["conversations"]), parse_constant=float) for each in some
        ] or any("markdown" in message for each in some for message in each["conversations"])
        assert not found.truncated


def test_a_file_cut_off_is_reported(tmp_path):
    path = write(tmp_path / "cut.json", [chat(f"c{n}", "human", "gpt") for n in range(20)])
    path.write_bytes(path.read_bytes()[:-30])
    counts, rows = select(path)
    assert counts["truncated"] is True
    assert counts["conversations_read"] == len(rows) == 19
    assert counts["bytes_left_out"] > 0


MALFORMED = {
    "record_not_an_object": [17, None, "text", ["a"]],
    "conversations_missing": [{"id": "x"}, {}],
    "conversations_not_a_list": [{"id": "x", "conversations": each} for each in (None, "ab", {"a": 1, "b": 2}, {}, 3)],
    "message_not_an_object": [
        {"id": "x", "conversations": [turn("human", "one of two"), each]} for each in ("a", None)
    ],
    "value_missing": [{"id": "x", "conversations": [{"from": "human"}, turn("gpt", "an answer to it")]}],
    "value_not_a_string": [
        {"id": "x", "conversations": [turn("human", "a question to it"), turn("gpt", each)]}
        for each in (None, 1, 1.5, ["a list that is long"] * 12, {}, False)
    ],
    "lone_surrogate": [chat("\ud800", "human", "gpt"), chat("x", "human", "gpt", text="half \udc00 a pair")],
}


@pytest.mark.parametrize(("kind", "record"), [(kind, each) for kind, some in MALFORMED.items() for each in some])
def test_malformed_records_are_counted_and_named(kind, record, tmp_path):
    some = [chat(f"c{n}", "human", "gpt") for n in range(9)]
    some.insert(4, record)
    path = write(tmp_path / "malformed.json", some)
    counts, rows = select(path, share=0.1)
    assert counts["malformed"] == {kind: 1}
    (example,) = counts["malformed_examples"]
    assert (example["kind"], example["index"]) == (kind, 4)
    assert example["id"] in {"x", None, "\\ud800"}
    assert (counts["conversations_read"], len(rows)) == (10, 9)
    with pytest.raises(UserError, match=rf"1 malformed records of 10, more than the share of 0.05.*{kind} 1.*record 4"):
        select(path, share=0.05)


def test_a_later_message_that_cannot_be_read_ends_the_conversation(tmp_path):
    some = chat("a", "human", "gpt", "human", "gpt")
    some["conversations"][2]["value"] = None
    counts, rows = select(write(tmp_path / "later.json", [some]), share=1)
    assert (rows[0]["turns"], rows[0]["conversation_chars"]) == (2, 48)
    assert counts["malformed"] == {"value_not_a_string": 1}


def test_only_few_examples_of_a_kind_are_named(tmp_path):
    some = [chat("a", "human", "gpt"), *({"id": f"x{n}"} for n in range(20))]
    counts, _ = select(write(tmp_path / "many.json", some), share=1)
    assert counts["malformed"] == {"conversations_missing": 20}
    assert [example["id"] for example in counts["malformed_examples"]] == [f"x{n}" for n in range(5)]


GOOD = json.dumps([chat("a", "human", "gpt")] * 3).encode()
BAD_FILES = {
    "empty": (b"", "is empty"),
    "blank": (b" \n ", "is empty"),
    "object": (b'{"id": "a"}', r"holds an object.*jq -s"),
    "scalars": (b"[1, 2, 3]", r"3 malformed records of 3.*record_not_an_object 3.*a number"),
    "text": (b"hello", "no JSON array: it begins with"),
    "latin-1": (GOOD.replace(b"long", "l\u00f6ng".encode("latin-1"), 1), r"not UTF-8 at byte \d+.*iconv"),
    "utf-16": (GOOD.decode().encode("utf-16"), "not UTF-8 at byte 0"),
    "no prompts": (b"[]", r"No prompt is left.*read: 0"),
    "cut to nothing": (b"[", r"No prompt is left of .* \(the file is cut off\)"),
    "missing comma": (GOOD.replace(b'}, {"id"', b'} {"id"', 1), r"broken JSON in record 1, at byte \d+: Expecting ','"),
    "missing quote": (GOOD.replace(b'"from"', b'from"', 1), "broken JSON in record 0, at byte 32: Expecting property"),
    "missing bracket": (GOOD.replace(b"}]}", b"}}", 1), "broken JSON in record 0"),
    "trailing comma": (GOOD[:-1] + b",]", "broken JSON in record 3, at byte .*: Expecting value"),
    "more": (GOOD + b"[]", "broken JSON in record 3, at byte .*follows the end of the array"),
    "deep": (b"[" * 100_000 + b"]" * 100_000, "Nested too deeply"),
    "mixed ids": (json.dumps([chat("a", "human", "gpt"), chat(1, "human", "gpt")]).encode(), "ids .* cannot be sorted"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_say_what_is_wrong(name, tmp_path):
    content, message = BAD_FILES[name]
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as refusal:
        select(path)
    assert str(path) in str(refusal.value)
    assert list(tmp_path.iterdir()) == [path], "something half written is left"


def test_the_byte_of_a_break_is_exact(tmp_path):
    text = json.dumps([chat(f"é{n}", "human", "gpt") for n in range(50)], ensure_ascii=False)
    place = text.index('"é33"')
    path = tmp_path / "broken.json"
    path.write_text(text[:place] + "?" + text[place:], "utf-8")
    with pytest.raises(UserError, match=f"record 33, at byte {len(text[:place].encode())}: Expecting value"):
        select(path)


def test_a_process_that_is_killed_costs_nothing_but_time(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "PART_BYTES", 10_000)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    path = write(tmp_path / "killed.json", [chat(f"c{n}", "human", "gpt", text=f"prompt {n}") for n in range(2000)])
    expected = select(path)
    scan_part = scan.scan_part

    def killed(path, rules, texts, start=None, *rest, **options):
        if start is not None and texts.name != "rest":
            os.kill(os.getpid(), signal.SIGKILL)
        return scan_part(path, rules, texts, start, *rest, **options)

    monkeypatch.setattr(scan, "scan_part", killed)
    assert select(path) == expected


def test_a_break_far_behind_a_parts_beginning_names_its_record(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "PART_BYTES", 10_000)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    text = json.dumps([chat(f"c{n}", "human", "gpt") for n in range(2000)])
    path = tmp_path / "broken.json"
    path.write_text(text.replace('{"id": "c1900"', '{"id" "c1900"'), "utf-8")
    with pytest.raises(UserError, match="broken JSON in record 1900"):
        select(path)


def test_a_byte_order_mark_is_no_matter(tmp_path):
    path = tmp_path / "bom.json"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD)
    assert len(select(path)[1]) == 3


def test_without_ids_the_files_order_is_shuffled(tmp_path):
    some = [{"conversations": chat("", "human", "gpt", text=f"prompt {n}")["conversations"]} for n in range(9)]
    ids = [{"id": f"{n}", **each} for n, each in enumerate(some)]
    rows = select(write(tmp_path / "none.json", some))[1]
    assert [row["prompt"] for row in rows] == article(write(tmp_path / "ids.json", ids))
    assert {row["conversation_id"] for row in rows} == {None}


# --- the command line ---


def stage(tmp_path, path):
    """The command that selects the prompts of the file."""
    entry = {"path": path.name, "bytes": path.stat().st_size, "sha256": ""}
    manifest = {
        "kind": "dataset", "name": "chats", "source": {"path": str(path)}, "revision": None, "path": ".",
        "files": [entry], "licence": None, "fetched": "2024-01-01T00:00:00Z",
    }  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    output, counts = tmp_path / "out" / "chats.parquet", tmp_path / "out" / "chats.json"
    command = [sys.executable, str(STAGE), "--manifest", str(tmp_path / "manifest.json"), "--selection", "human_first"]
    command += ["--seed", "4387", "--min-chars", "10", "--max-malformed-share", "0.01"]
    return [*command, "--provenance", '{"code": "abc"}', "--output", str(output), "--counts", str(counts)]


def run_stage(tmp_path, content):
    path = tmp_path / "chats.json"
    path.write_bytes(content)
    done = subprocess.run(stage(tmp_path, path), capture_output=True, text=True, timeout=120, check=False)
    return done, tmp_path / "out" / "chats.parquet", tmp_path / "out" / "chats.json"


def test_command_line(tmp_path):
    done, output, counts = run_stage(tmp_path, GOOD[:-3])
    assert done.returncode == 0, done.stderr
    assert "2 conversations, cut off" in done.stdout
    written = json.loads(counts.read_text("utf-8"))
    assert (written["dataset"], written["selection"], written["seed"]) == ("chats", "human_first", 4387)
    assert (written["file"], written["truncated"], written["conversations_read"]) == ("chats.json", True, 2)
    stored = json.loads(pq.read_schema(output).metadata[b"kvbench"])
    assert (stored["code"], stored["dataset"], stored["min_chars"]) == ("abc", "chats", 10)
    assert sorted(output.parent.iterdir()) == [counts, output]


def test_command_line_cleans_up_when_it_is_cancelled(tmp_path):
    """All processes of the job get the signal, as from a scheduler, or the first alone."""
    content = b"[" + b",".join([GOOD[1:-1]] * 200_000) + b"]"
    path, output = tmp_path / "chats.json", tmp_path / "out"
    path.write_bytes(content)
    for send in (os.kill, os.killpg):
        running = subprocess.Popen(stage(tmp_path, path), start_new_session=True)
        while not list(output.glob(".chats.parquet.*/0")):
            assert running.poll() is None
            time.sleep(0.01)
        send(running.pid, signal.SIGTERM)
        assert running.wait(timeout=20) == 128 + signal.SIGTERM
        assert list(output.iterdir()) == []


def test_command_line_refuses_with_its_last_line(tmp_path):
    done, output, _ = run_stage(tmp_path, b'{"a": 1}')
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert not output.exists()
