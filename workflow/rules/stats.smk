# Every cell's files become two tables: one row a repeat, and one row a cell.


rule plan:
    # a file, because a thousand cells do not fit on a command line
    output:
        plan=f"{RESULTS}/plan.json",
    log:
        f"{RESULTS}/logs/plan.log",
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
    conda:
        "../../envs/analysis.yaml"
    params:
        provenance=code("stats"),
    shell:
        "kvbench stats --plan {input.plan} --provenance {params.provenance:q}"
        " --measurements {output.measurements} --stats {output.stats} --csv {output.csv} 2>&1 | tee {log}"
