# Training: a model's text, and the eviction heads and weights that it learns on it.


# names of the retrofits that read their model's own text; or what no name is
OWN = "|".join(re.escape(name) for name, each in CONFIG.retrofits.items() if each.text == "own") or "(?!)"
# what of a retrofit its text depends on; a window and a cr that any text is long enough for stand for its own
TEXT = {"model", "text", "tokens", "steps", "batch_size", "held_out", "prose", "prose_from", "seed"}
ANY_LENGTH = {"window": 1, "cr": 1.1}
RETROFIT = dict(
    variant=retrofit_job,
    loading=retrofit_loading,
    protocol=canonical({}),
)


rule corpus:
    input:
        unpack(corpus_sources),
        manifest=lambda wildcards: f"{RESULTS}/models/{retrofit_of(wildcards).model}/manifest.json",
    output:
        sequences=f"{RESULTS}/retrofit/{{retrofit}}/corpus.parquet",
    log:
        f"{RESULTS}/logs/retrofit/{{retrofit}}/corpus.log",
    benchmark:
        f"{RESULTS}/benchmarks/retrofit/{{retrofit}}/corpus.tsv"
    conda:
        "../../envs/gpu.yaml"
    threads: 8
    resources:
        mem_mb=16000,
        runtime=60,
    params:
        **RETROFIT,
        settings=lambda wildcards: canonical(retrofit_of(wildcards).model_dump(mode="json", include=TEXT) | ANY_LENGTH),
        texts=lambda wildcards, input: (
            f"--prompts {input.prompts} --dataset-manifest {input.dataset}" if hasattr(input, "prompts") else ""
        ),
        provenance=code("corpus"),
    shell:
        "kvbench corpus --manifest {input.manifest} {params.texts} --settings {params.settings:q}"
        " --variant {params.variant:q} --protocol {params.protocol:q} --loading {params.loading:q}"
        " --provenance {params.provenance:q} --output {output.sequences} 2>&1 | tee {log}"


use rule corpus as own_corpus with:
    # the model's own text, which it takes a device to write
    wildcard_constraints:
        retrofit=OWN,
    resources:
        gpu=1,
        mem_mb=16000,
        runtime=240,


ruleorder: own_corpus > corpus


rule retrofit:
    # a killed run goes on from the state that it saved in resume/, which is no output and so is left where it is
    input:
        manifest=lambda wildcards: f"{RESULTS}/models/{retrofit_of(wildcards).model}/manifest.json",
        sequences=rules.corpus.output.sequences,
    output:
        curve=f"{RESULTS}/retrofit/{{retrofit}}/curve.parquet",
        adapter=directory(f"{RESULTS}/retrofit/{{retrofit}}/adapter"),
        checkpoints=directory(f"{RESULTS}/retrofit/{{retrofit}}/checkpoints"),
    log:
        f"{RESULTS}/logs/retrofit/{{retrofit}}/train.log",
    benchmark:
        f"{RESULTS}/benchmarks/retrofit/{{retrofit}}/train.tsv"
    conda:
        "../../envs/gpu.yaml"
    threads: 8
    resources:
        gpu=1,
        mem_mb=32000,
        runtime=240,
    params:
        **RETROFIT,
        settings=lambda wildcards: canonical(retrofit_of(wildcards).model_dump(mode="json")),
        provenance=code("retrofit"),
    shell:
        "kvbench retrofit --manifest {input.manifest} --corpus {input.sequences} --settings {params.settings:q}"
        " --variant {params.variant:q} --protocol {params.protocol:q} --loading {params.loading:q}"
        " --provenance {params.provenance:q} --output {output.curve} 2>&1 | tee {log}"


rule training_curve:
    input:
        curve=rules.retrofit.output.curve,
    output:
        svg=report(
            f"{RESULTS}/plots/retrofit-{{retrofit}}.svg",
            caption="../report/curve.rst",
            category="Training",
            labels={"retrofit": "{retrofit}"},
        ),
        png=f"{RESULTS}/plots/retrofit-{{retrofit}}.png",
    log:
        f"{RESULTS}/logs/plots/retrofit-{{retrofit}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/plots/retrofit-{{retrofit}}.tsv"
    localrule: True
    conda:
        "../../envs/analysis.yaml"
    params:
        provenance=code("curve"),
    shell:
        "kvbench curve --curve {input.curve} --name {wildcards.retrofit}"
        " --provenance {params.provenance:q} --output {output.svg} --png {output.png} 2>&1 | tee {log}"
