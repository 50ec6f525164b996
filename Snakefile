# kvbench: what compressing the KV cache buys, and what it costs. A table of contents; README.md says how to use it.
from snakemake.utils import min_version

min_version("9.27")


if not workflow.overwrite_configfiles and "models" not in config:

    # only where no other config is given: Snakemake would merge the two, methods and all
    configfile: workflow.current_basedir.join("config/config.yaml").get_path_or_uri(secret_free=True)


include: "workflow/rules/common.smk"  # the config, validated; names, paths and what each job depends on
include: "workflow/rules/fetch.smk"  # models, dataset  -> models/*/manifest.json, datasets/*/manifest.json
include: "workflow/rules/prompts.smk"  # dataset          -> prompts/*.parquet, workloads/*/*.parquet
include: "workflow/rules/retrofit.smk"  # a retrofit       -> retrofit/*/corpus.parquet, adapter, curve.parquet
include: "workflow/rules/measure.smk"  # device, a cell   -> device/rates.json; prefill/*.json, generation/*.parquet; outputs/*.parquet
include: "workflow/rules/quality.smk"  # a variant        -> windows/*.parquet, quality/*/*.parquet
include: "workflow/rules/retrieval.smk"  # a variant        -> retrieval/*/*.parquet
include: "workflow/rules/stats.smk"  # every job        -> measurements, stats, quality
include: "workflow/rules/plots.smk"  # stats            -> plots/*.svg, *.png
include: "workflow/rules/report.smk"  # everything       -> report.html


rule all:
    default_target: True
    input:
        f"{RESULTS}/report.html",
        f"{RESULTS}/stats.csv",


onsuccess:
    print(summary())


onerror:
    say_last(last_error())
