# What comes out, as figures: speed and memory, and quality.


rule bars:
    input:
        stats=rules.stats.output.stats,
    output:
        svg=report(
            f"{RESULTS}/plots/bars-{{workload}}.svg",
            caption="../report/bars.rst",
            category="Speed and memory",
            labels={"workload": "{workload}"},
        ),
        png=f"{RESULTS}/plots/bars-{{workload}}.png",
    log:
        f"{RESULTS}/logs/plots/bars-{{workload}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/plots/bars-{{workload}}.tsv"
    localrule: True
    conda:
        "../../envs/analysis.yaml"
    params:
        provenance=code("plots"),
    shell:
        "kvbench plots --stats {input.stats} --workload {wildcards.workload}"
        " --provenance {params.provenance:q} --output {output.svg} --png {output.png} 2>&1 | tee {log}"


rule roofline:
    input:
        stats=rules.stats.output.stats,
    output:
        svg=report(
            f"{RESULTS}/plots/roofline.svg",
            caption="../report/roofline.rst",
            category="Speed and memory",
            labels={"workload": "all, beside the device's limits"},
        ),
        png=f"{RESULTS}/plots/roofline.png",
    log:
        f"{RESULTS}/logs/plots/roofline.log",
    benchmark:
        f"{RESULTS}/benchmarks/plots/roofline.tsv"
    localrule: True
    conda:
        "../../envs/analysis.yaml"
    params:
        provenance=code("roofline"),
    shell:
        "kvbench roofline --stats {input.stats}"
        " --provenance {params.provenance:q} --output {output.svg} --png {output.png} 2>&1 | tee {log}"


rule quality_plots:
    input:
        quality=rules.quality_stats.output.quality,
    output:
        svg=report(
            f"{RESULTS}/plots/{{figure}}.svg",
            caption="../report/quality.rst",
            category="Quality",
            labels={"figure": "{figure}"},
        ),
        png=f"{RESULTS}/plots/{{figure}}.png",
    log:
        f"{RESULTS}/logs/plots/{{figure}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/plots/{{figure}}.tsv"
    wildcard_constraints:
        figure="kl-by-kept-fraction|kl-by-distance|retrieval",
    localrule: True
    conda:
        "../../envs/analysis.yaml"
    params:
        provenance=code("quality_plots"),
    shell:
        "kvbench quality_plots --quality {input.quality} --figure {wildcards.figure}"
        " --provenance {params.provenance:q} --output {output.svg} --png {output.png} 2>&1 | tee {log}"
