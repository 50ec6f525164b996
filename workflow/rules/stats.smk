# Every cell's files become two tables: one row a repeat, and one row a cell.


rule plan:
    # a file, because a thousand cells do not fit on a command line
    output:
        plan=f"{RESULTS}/plan.json",
    params:
        plan=canonical(grid.plan(CONFIG)),
    run:
        Path(output.plan).write_text(params.plan + "\n", "utf-8")


rule stats:
    input:
        rules.plan.output.plan,
        cell_files("prefill", "json"),
        cell_files("generation", "parquet"),
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
        results=RESULTS,
        provenance=code("stats"),
    shell:
        "{PYTHON} {SCRIPTS}/stats.py --plan {input[0]} --results {params.results} --provenance {params.provenance:q}"
        " --measurements {output.measurements} --stats {output.stats} --csv {output.csv} 2>&1 | tee {log}"
