# Every job's files become three tables: one row a repeat, one row a cell, and one row a figure of quality.


# a file, because a thousand cells do not fit on a command line
rule plan:
    output:
        plan=f"{RESULTS}/plan.json",
    log:
        f"{RESULTS}/logs/plan.log",
    localrule: True
    params:
        plan=canonical(grid.plan(CONFIG)),
    run:
        Path(output.plan).write_text(f"{params.plan}\n", "utf-8")


rule stats:
    input:
        plan=rules.plan.output.plan,
        prefill=cell_files("prefill", "json"),
        generation=cell_files("generation", "parquet"),
        capacity=capacity_files,
        rates=rules.device_rates.output.rates,
    output:
        measurements=f"{RESULTS}/measurements.parquet",
        stats=f"{RESULTS}/stats.parquet",
        csv=report(
            f"{RESULTS}/stats.csv",
            caption="../report/table.rst",
            category="Measurements",
            labels={"what": "every cell"},
        ),
    log:
        f"{RESULTS}/logs/stats.log",
    benchmark:
        f"{RESULTS}/benchmarks/stats.tsv"
    localrule: True
    conda:
        "../../envs/analysis.yaml"
    params:
        provenance=code("stats"),
    shell:
        "kvbench stats --plan {input.plan} --provenance {params.provenance:q}"
        " --measurements {output.measurements} --stats {output.stats} --csv {output.csv} 2>&1 | tee {log}"


rule quality_stats:
    input:
        plan=rules.plan.output.plan,
        quality=quality_files,
        retrieval=retrieval_files,
        outputs=output_files,
    output:
        quality=f"{RESULTS}/quality.parquet",
    log:
        f"{RESULTS}/logs/quality_stats.log",
    benchmark:
        f"{RESULTS}/benchmarks/quality_stats.tsv"
    localrule: True
    conda:
        "../../envs/analysis.yaml"
    params:
        provenance=code("quality_stats"),
    shell:
        "kvbench quality_stats --plan {input.plan} --provenance {params.provenance:q}"
        " --output {output.quality} 2>&1 | tee {log}"
