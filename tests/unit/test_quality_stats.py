"""From made-up jobs' files to quality.parquet: every figure recomputed the slow way, and the verdicts."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import quality_fixture as made
from report_fixture import MODEL

from conftest import SCRIPTS
from kvbench import observations, quality_stats, summaries, verdicts

Row = dict[str, Any]


@pytest.fixture(scope="module")
def rows(quality_table: Path) -> list[Row]:
    return list(pq.read_table(quality_table).to_pylist())


def one(rows: list[Row], variant: str, metric: str, part: str, reference: str | None = "full") -> Row:
    (found,) = [
        row
        for row in rows
        if (row["variant"], row["metric"], row["slice"]) == (variant, metric, part)
        and row.get("reference") in (reference, None)
    ]
    return found


def tokens(method: str, reference: str = "full", **where: Any) -> list[Row]:
    rows = [row for row in made.quality(method) if row["reference"] == reference]
    return [row for row in rows if all(row[key] == value for key, value in where.items())]


def test_distribution_metrics_are_those_of_the_tokens(rows: list[Row]) -> None:
    ours, floor = tokens("snapkv-0.5"), tokens("baseline", "dtype")
    kl = one(rows, "snapkv-0.5", "kl_mean", "all")
    assert kl["value"] == pytest.approx(np.mean([row["kl"] for row in ours]))
    assert kl["baseline_value"] == pytest.approx(np.mean([row["kl"] for row in floor]))  # the greater of the two
    assert kl["difference"] == pytest.approx(kl["value"] - kl["baseline_value"])
    assert kl["low"] <= kl["value"] <= kl["high"] and kl["difference_low"] <= kl["difference"] <= kl["difference_high"]
    assert (kl["n"], kl["documents"]) == (26 * 24, 13)
    assert one(rows, "snapkv-0.5", "kl_p99", "all")["value"] == sorted(row["kl"] for row in ours)[617]
    assert one(rows, "snapkv-0.5", "top1_agreement", "book")["value"] == pytest.approx(
        np.mean([row["agrees"] for row in ours if row["corpus"] == "book"])
    )
    ratio = math.exp(np.mean([row["nll"] for row in ours]) - np.mean([row["nll_full"] for row in ours]))
    assert one(rows, "snapkv-0.5", "perplexity_ratio", "all")["value"] == pytest.approx(ratio)


def test_kl_is_given_by_corpus_and_distance(rows: list[Row]) -> None:
    near = one(rows, "snapkv-0.5", "kl_mean", "book/1-16")
    assert near["value"] == pytest.approx(
        np.mean([row["kl"] for row in tokens("snapkv-0.5", corpus="book") if row["distance"] <= 16])
    )
    assert near["value"] > one(rows, "snapkv-0.5", "kl_mean", "book/17-24")["value"]
    parts = {row["slice"] for row in rows if row["metric"] == "kl_mean" and row["variant"] == "snapkv-0.5"}
    spans = {f"{corpus}/{span}" for corpus in ("all", *made.CORPORA) for span in ("1-16", "17-24")}
    assert parts == spans | {"all"} | set(made.CORPORA)


def test_the_baseline_shows_its_noise_floors_and_is_compared_with_nothing(rows: list[Row]) -> None:
    for reference in ("batch", "dtype"):
        floor = one(rows, "baseline", "kl_mean", "all", reference)
        assert floor["value"] == pytest.approx(np.mean([row["kl"] for row in tokens("baseline", reference)]))
    own = [row for row in rows if row["variant"] == "baseline"]
    assert {row.get("difference") for row in own} == {row["verdict"] for row in own} == {None}
    assert not [row for row in own if row["metric"] in ("rouge_l", "first_divergence")]


def samples(method: str, **where: Any) -> list[bool]:
    rows = made.retrieval(method)
    return [row["correct"] for row in rows if all(row[key] == value for key, value in where.items())]


def test_retrieval_is_given_by_task_and_by_point(rows: list[Row]) -> None:
    whole = one(rows, "snapkv-0.5", "retrieval_accuracy", "needle")
    assert whole["value"] == np.mean(samples("snapkv-0.5", task="needle"))
    assert whole["difference"] == whole["value"] - np.mean(samples("baseline", task="needle"))
    point = one(rows, "snapkv-0.5", "retrieval_accuracy", "needle/1024/0.5")
    assert point["value"] == np.mean(samples("snapkv-0.5", task="needle", prompt_tokens=1024, depth=0.5))
    assert (point["n"], point["documents"]) == (40, 10)
    assert one(rows, "snapkv-0.5", "retrieval_accuracy", "words/512")["n"] == 40
    partly = one(rows, "snapkv-0.5", "retrieval_score", "variables")
    assert partly["value"] > one(rows, "snapkv-0.5", "retrieval_accuracy", "variables")["value"]


def test_texts_are_compared_with_the_baselines(rows: list[Row]) -> None:
    rouge = one(rows, "snapkv-0.5", "rouge_l", "outputs")
    assert 0.8 < rouge["value"] < 1 and rouge["n"] == 10 and rouge["difference"] is None
    assert one(rows, "knorm-0.8", "rouge_l", "outputs")["value"] < 0.5
    assert one(rows, "expected-attention-0.5", "chrf", "outputs")["value"] == 1
    assert one(rows, "expected-attention-0.5", "length_ratio", "outputs")["value"] == 1
    # half of the answers are the baseline's to the end
    assert one(rows, "snapkv-0.5", "first_divergence", "outputs")["n"] == 5
    assert not [
        row for row in rows if row["variant"] == "expected-attention-0.5" and row["metric"] == "first_divergence"
    ]


def test_the_control_is_the_random_variant_of_the_same_budget(rows: list[Row]) -> None:
    controls = {row["variant"]: row["control"] for row in rows if row["metric"] == "kl_mean" and row["slice"] == "all"}
    assert controls["snapkv-0.5"] == controls["expected-attention-0.5"] == controls["adakv-snapkv-0.5"] == "random-0.5"
    assert {controls[name] for name in ("baseline", "random-0.5", "knorm-0.8")} == {None}
    kl = one(rows, "snapkv-0.5", "kl_mean", "all")
    expected = kl["value"] - one(rows, "random-0.5", "kl_mean", "all")["value"]
    assert kl["control_difference"] == pytest.approx(expected)
    assert kl["control_low"] <= expected <= kl["control_high"] < 0


def test_holm_corrects_over_the_variants_of_a_level(rows: list[Row]) -> None:
    family = [row for row in rows if row["metric"] == "retrieval_accuracy" and row["slice"] in made.TASKS]
    tested = sorted((row["p"], row["p_holm"]) for row in family if row["p"] is not None)
    assert len(tested) == 4 * 4  # four tasks, four variants that came out
    assert tested[0][1] == pytest.approx(min(1, 16 * tested[0][0]))
    assert all(p <= adjusted <= 1 for p, adjusted in tested)


def test_verdicts_tell_the_variants_apart(rows: list[Row]) -> None:
    verdict = {row["variant"]: row["verdict"] for row in rows if row["metric"] == quality_stats.OVERALL}
    assert verdict == {
        "baseline": None,
        "knorm-0.8": "collapsed",
        "snapkv-0.5": "worse",
        "random-0.5": "worse",
        "adakv-snapkv-0.5": "worse",
        "expected-attention-0.5": "indistinguishable",
        "finch-0.5": None,
    }
    assert one(rows, "expected-attention-0.5", "kl_mean", "all")["verdict"] == "indistinguishable"
    assert one(rows, "expected-attention-0.5", "collapsed", "outputs")["verdict"] == "unknown"  # ten texts
    assert one(rows, "snapkv-0.5", "kl_mean", "all")["verdict"] == "worse"
    assert one(rows, "snapkv-0.5", "kl_p99", "all")["verdict"] is None


def test_what_did_not_come_out_keeps_its_status(rows: list[Row]) -> None:
    def states(variant: str) -> set[tuple[str, str, str]]:
        return {(row["metric"], row["slice"], row["status"]) for row in rows if row["variant"] == variant}

    finch = states("finch-0.5")
    assert ("kl_mean", "all", "unsupported") in finch and ("retrieval_accuracy", "needle", "failed") in finch
    assert ("collapsed", "outputs", "unsupported") in finch and ("overall", "all", "unsupported") in finch
    assert all(row.get("value") is None for row in rows if row["variant"] == "finch-0.5")
    assert ("retrieval_accuracy", "words", "oom") in states("adakv-snapkv-0.5")
    assert one(rows, "adakv-snapkv-0.5", "kl_mean", "all")["simulated"] is True


def test_the_script_writes_the_same_rows_with_their_provenance(
    quality_table: Path, rows: list[Row], tmp_path: Path
) -> None:
    folder = shutil.copytree(quality_table.parent, tmp_path / "results")
    plan, output = folder / "plan.json", folder / "quality.parquet"
    plan.write_text(json.dumps(made.plan()), "utf-8")
    command = [sys.executable, str(SCRIPTS / "quality_stats.py"), "--plan", str(plan)]
    subprocess.run([*command, "--provenance", '{"code": "abc"}', "--output", str(output)], check=True)
    table = pq.read_table(output)
    assert table.schema.remove_metadata().equals(quality_stats.QUALITY)
    assert table.to_pylist() == rows
    assert b'"code": "abc"' in table.schema.metadata[b"kvbench"]
    keys = table.select(["variant", "metric", "slice", "reference"]).to_pylist()
    assert len({tuple(key.values()) for key in keys}) == len(keys)


def test_stages_that_the_config_leaves_out_are_not_looked_for(tmp_path: Path) -> None:
    plan = made.plan(windows=0, retrieval={"samples": 0, "tasks": []})
    plan["config"]["outputs"] = {"prompts": 0}
    rows = quality_stats.merge(plan, tmp_path)
    assert {row["metric"] for row in rows} == {quality_stats.OVERALL}
    assert {row["verdict"] for row in rows} == {None}


def small(folder: Path, methods: list[str], files: dict[str, list[Row]]) -> list[Row]:
    """The rows of a run of few methods, some of whose files are replaced."""
    made.write(folder)
    for path, changed in files.items():
        made.parquet(changed, pq.read_schema(folder / path), folder / path)
    plan = made.plan()
    plan["cells"] = [cell for cell in plan["cells"] if cell["method"] in methods]
    return quality_stats.merge(plan, folder)


def test_without_a_baseline_that_came_out_nothing_is_known(tmp_path: Path) -> None:
    failed = [{"model": MODEL, "method": "baseline", "status": "failed", "status_reason": "RuntimeError: no"}]
    files = {f"{stage}/{MODEL}/baseline.parquet": failed for stage in quality_stats.STAGES}
    rows = small(tmp_path, ["baseline", "snapkv-0.5"], files)
    kl = one(rows, "snapkv-0.5", "kl_mean", "all")
    assert kl["value"] > 0 and kl["difference"] is kl["baseline_value"] is kl["p"] is None
    assert kl["verdict"] == one(rows, "snapkv-0.5", "overall", "all")["verdict"] == "unknown"
    assert not [row for row in rows if row["metric"] == "rouge_l" and row["status"] == "ok"]
    assert one(rows, "baseline", "kl_mean", "all")["status_reason"] == "RuntimeError: no"


def test_a_noise_floor_that_did_not_fit_leaves_the_other(tmp_path: Path) -> None:
    lacking = {
        "model": MODEL,
        "method": "baseline",
        "reference": "dtype",
        "status": "oom",
        "status_reason": "no memory",
    }
    floors = [*tokens("baseline", "batch"), lacking]
    rows = small(tmp_path, ["baseline", "snapkv-0.5"], {f"quality/{MODEL}/baseline.parquet": floors})
    assert one(rows, "baseline", "kl_mean", "all", "dtype")["status"] == "oom"
    batch = one(rows, "baseline", "kl_mean", "all", "batch")["value"]
    assert one(rows, "snapkv-0.5", "kl_mean", "all")["baseline_value"] == pytest.approx(batch)


def test_points_that_did_not_come_out_are_named_and_the_others_stand(tmp_path: Path) -> None:
    def lacking(row: Row) -> bool:
        return row["task"] == "words" or (row["task"], row["prompt_tokens"], row["depth"]) == ("needle", 1024, 0.5)

    found = made.retrieval("snapkv-0.5")
    gaps = [
        row | {"sample": None, "status": "unsupported", "status_reason": "too long"} for row in found if lacking(row)
    ]
    changed = gaps + [row for row in found if not lacking(row)]
    rows = small(tmp_path, ["baseline", "snapkv-0.5"], {f"retrieval/{MODEL}/snapkv-0.5.parquet": changed})
    point = one(rows, "snapkv-0.5", "retrieval_accuracy", "needle/1024/0.5")
    assert (point["status"], point["status_reason"], point["value"]) == ("unsupported", "too long", None)
    assert one(rows, "snapkv-0.5", "retrieval_accuracy", "words")["status"] == "unsupported"
    assert one(rows, "snapkv-0.5", "retrieval_accuracy", "needle")["n"] == 5 * made.SAMPLES


def test_a_variant_that_lost_points_which_the_baseline_has_is_not_called_as_good(tmp_path: Path) -> None:
    def without(method: str) -> list[Row]:
        return [
            row | {"sample": None, "status": "oom", "status_reason": "too long"}
            if (row["task"], row["prompt_tokens"]) == ("needle", 1024)
            else row
            for row in made.retrieval(method)
        ]

    name = "expected-attention-0.5"
    lost = {f"retrieval/{MODEL}/{name}.parquet": without(name)}
    rows = small(tmp_path / "one", ["baseline", name], lost)
    assert one(rows, name, "retrieval_accuracy", "needle")["verdict"] == "indistinguishable"
    assert one(rows, name, "overall", "all")["verdict"] == "unknown"
    both = lost | {f"retrieval/{MODEL}/baseline.parquet": without("baseline")}
    rows = small(tmp_path / "both", ["baseline", name], both)
    assert one(rows, name, "overall", "all")["verdict"] == "indistinguishable"


def test_twice_as_many_tokens_are_no_control() -> None:
    def seen(kept: float) -> quality_stats.Seen:
        table = observations.Observed("ok", None, pd.DataFrame(), kept, False)
        return quality_stats.Seen({"full": table}, None, None)

    variants = [quality_stats.Variant("m", name, name, None, name == "random") for name in ("press", "random")]
    for kept, control in ((0.05, None), (0.09, "random"), (0.13, "random"), (0.16, None)):
        assert quality_stats._control(variants[0], {"press": seen(kept), "random": seen(0.1)}, variants) == control


def test_a_retrofit_is_compared_with_its_bases_baseline_and_control(tmp_path: Path) -> None:
    written = made.write(tmp_path)
    plan = made.plan()
    plan["cells"] = [cell for cell in plan["cells"] if cell["method"] in ("baseline", "random-0.5", "snapkv-0.5")]
    plan["cells"][1] = plan["cells"][1] | {"model": "retrofit"}  # snapkv-0.5
    for path in (paths[made.METHODS.index("snapkv-0.5")] for paths in written.values() if len(paths) > 1):
        moved = path.parent.parent / "retrofit" / path.name
        moved.parent.mkdir()
        path.rename(moved)
    kl = one(quality_stats.merge(plan, tmp_path), "snapkv-0.5", "kl_mean", "all")
    assert (kl["model"], kl["baseline"], kl["control"]) == ("retrofit", "baseline", "random-0.5")
    assert kl["difference"] > 0 > kl["control_difference"] and kl["verdict"] == "worse"


def test_texts_of_a_padded_batch_are_compared_with_the_baselines_of_one(tmp_path: Path) -> None:
    files = {}
    for method in ("baseline", "snapkv-0.5"):
        alone = made.outputs(method)
        batch = [
            row | {"way": "batch", "text": "x " + row["text"], "token_ids": [0, *row["token_ids"]]} for row in alone
        ]
        files[f"outputs/{MODEL}/{method}.parquet"] = alone + batch
    rows = small(tmp_path, ["baseline", "snapkv-0.5"], files)
    alone, batch = (one(rows, "snapkv-0.5", "common_prefix_tokens", part) for part in ("outputs", "outputs/batch"))
    assert batch["value"] == alone["value"] + 1 and batch["n"] == alone["n"] == 10


def test_buckets_go_on_doubling() -> None:
    names = observations._buckets(np.arange(1, 301))
    assert list(dict.fromkeys(names)) == ["1-16", "17-64", "65-128", "129-256", "257-300"]
    assert names.count("65-128") == 64
    assert observations._buckets(np.array([5, 1])) == ["1-5", "1-5"]


def judged(**row: Any) -> str | None:
    plain = {"metric": "kl_mean", "status": "ok", "reference": "full", "is_baseline": False, "documents": 10}
    plain |= {
        "baseline_value": 0.001,
        "difference": 0.0,
        "difference_low": -0.001,
        "difference_high": 0.001,
        "p_holm": 1.0,
    }
    return verdicts.of_metric(plain | row)


def test_indistinguishable_needs_an_interval_that_covers_nothing_else_and_documents_enough() -> None:
    assert judged() == "indistinguishable"
    assert judged(difference_high=0.02) == "unknown"  # it may be worse by more than the margin
    assert judged(documents=5) == "unknown"
    assert judged(difference_low=None, difference_high=None) == "unknown"
    assert judged(difference_low=0.0005) == "unknown"  # not 0, and not beyond the other variants' noise either


def test_worse_needs_interval_and_test() -> None:
    surely = {"difference": 0.1, "difference_low": 0.05, "difference_high": 0.2}
    assert judged(**surely, p_holm=0.01) == "worse"
    assert judged(**surely, p_holm=0.06) == "unknown"
    assert judged(**surely, p_holm=0.01, metric="top1_agreement") == "better"
    assert judged(**surely, p_holm=0.01, is_baseline=True) is None
    assert judged(**surely, p_holm=0.01, metric="rouge_l") is None


def test_collapsed_means_half_of_the_texts_more_than_the_baselines() -> None:
    texts = {"metric": "collapsed", "reference": None, "p": 0.04, "p_holm": 0.2, "difference_high": 0.9}
    assert judged(**texts, difference=0.6, difference_low=0.2) == "collapsed"
    assert judged(**texts | {"p": 0.06}, difference=0.6, difference_low=0.2) == "unknown"
    assert judged(**texts, difference=0.4, difference_low=0.1) == "unknown"
    assert judged(**texts | {"p_holm": 0.01}, difference=0.4, difference_low=0.1) == "worse"


@pytest.mark.parametrize(
    ("fell", "baselines", "texts", "verdict"),
    [
        (5, 0, 5, "unknown"),  # however clear, five texts are too few
        (6, 0, 6, "collapsed"),
        (5, 0, 10, "unknown"),
        (6, 0, 10, "collapsed"),
        (6, 0, 14, "unknown"),  # surely more than the baseline's, but not half of all
        (9, 4, 10, "unknown"),
        (10, 4, 10, "collapsed"),
    ],
)
def test_a_collapse_takes_six_texts_that_fell_where_the_baselines_did_not(
    fell: int, baselines: int, texts: int, verdict: str
) -> None:
    frames = [
        pd.DataFrame({"collapsed": np.arange(texts) < count, "document": np.arange(texts).astype(str)})
        for count in (fell, baselines)
    ]
    part = observations.Slice("outputs", "whole", np.full(texts, True))
    found = summaries.summary(verdicts.METRICS["collapsed"], part, summaries.Compared(*frames, None))
    assert found is not None and judged(**found, metric="collapsed", p_holm=1.0) == verdict


def test_a_task_that_the_baseline_fails_says_nothing() -> None:
    row = {"metric": "retrieval_accuracy", "reference": None}
    assert judged(**row, baseline_value=0.02) is None
    assert judged(**row, baseline_value=0.98) == "indistinguishable"


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (["worse", "collapsed"], "collapsed"),
        (["worse", "unknown", "better"], "worse"),
        (["indistinguishable"] * 3, "indistinguishable"),
        (["indistinguishable", "better"], "better"),
        (["indistinguishable", "unknown"], "unknown"),
        (["indistinguishable", None], "indistinguishable"),
        ([], "unknown"),
    ],
)
def test_a_variant_is_as_good_as_its_worst_metric(found: list[Any], verdict: str) -> None:
    rows = [{"metric": "kl_mean", "status": "ok", "verdict": word} for word in found]
    assert verdicts.overall(rows) == verdict
    assert verdicts.overall([*rows, {"metric": "retrieval_accuracy", "status": "oom", "verdict": None}]) in (
        verdict if verdict in ("collapsed", "worse") else "unknown"
    )


def test_few_texts_can_show_a_collapse_and_not_that_there_is_none() -> None:
    equal = {"metric": "kl_mean", "status": "ok", "verdict": "indistinguishable"}
    assert verdicts.overall([equal, equal | {"metric": "collapsed", "verdict": "unknown"}]) == "indistinguishable"
    assert verdicts.overall([equal, equal | {"metric": "collapsed", "verdict": "collapsed"}]) == "collapsed"
    assert set(verdicts.DECIDES) <= set(verdicts.METRICS)
