# What a person reads.


report: "../report/workflow.rst"


rule report:
    input:
        stats=rules.stats.output.stats,
        measurements=rules.stats.output.measurements,
        outputs=output_files,
        quality=rules.quality_stats.output.quality,
        counts=rules.prompts.output.counts if any_text() else [],
        dataset=rules.fetch_dataset.output.manifest if any_text() else [],
        models=sorted({f"{RESULTS}/models/{v.model}/manifest.json" for v in VARIANTS}),
        plots=[f"{RESULTS}/plots/bars-{workload}.svg" for workload in CONFIG.workloads]
        + [f"{RESULTS}/plots/retrofit-{retrofit}.svg" for retrofit in CONFIG.retrofits]
        + [rules.roofline.output.svg],
        quality_plots=quality_figures,
        plan=rules.plan.output.plan,
    output:
        html=report(
            f"{RESULTS}/report.html",
            caption="../report/report.rst",
            category="Report",
            labels={"what": "the report"},
        ),
    log:
        f"{RESULTS}/logs/report.log",
    benchmark:
        f"{RESULTS}/benchmarks/report.tsv"
    localrule: True
    conda:
        "../../envs/analysis.yaml"
    params:
        provenance=code("report"),
        prompts=lambda wildcards, input: (
            f"--prompts-counts {input.counts} --dataset-manifest {input.dataset}" if input.counts else ""
        ),
        outputs=lambda wildcards, input: (f"--outputs {input.outputs}" if input.outputs else ""),
    shell:
        "kvbench report --stats {input.stats} --measurements {input.measurements} --quality {input.quality}"
        " {params.outputs} {params.prompts} --model-manifests {input.models}"
        " --plots {input.plots} {input.quality_plots} --plan {input.plan}"
        " --provenance {params.provenance:q} --output {output.html} 2>&1 | tee {log}"
