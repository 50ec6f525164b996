# From conversations to token ids: the prompts, and for each model and workload the batch that every method gets.


rule prompts:
    input:
        manifest=rules.fetch_dataset.output.manifest,
    output:
        prompts=f"{RESULTS}/prompts/{DATASET}.parquet",
        counts=f"{RESULTS}/prompts/{DATASET}.json",
    log:
        f"{RESULTS}/logs/prompts/{DATASET}.log",
    benchmark:
        f"{RESULTS}/benchmarks/prompts/{DATASET}.tsv"
    conda:
        "../../envs/analysis.yaml"
    params:
        selection=CONFIG.dataset.selection,
        seed=CONFIG.dataset.seed,
        min_chars=CONFIG.dataset.min_chars,
        share=CONFIG.dataset.max_malformed_share,
        provenance=code("prompts"),
    shell:
        "kvbench prompts --manifest {input.manifest} --selection {params.selection}"
        " --seed {params.seed} --min-chars {params.min_chars} --max-malformed-share {params.share}"
        " --provenance {params.provenance:q} --output {output.prompts} --counts {output.counts} 2>&1 | tee {log}"


rule workload:
    input:
        unpack(workload_sources),
    output:
        batch=f"{RESULTS}/workloads/{{model}}/{{workload}}.parquet",
    log:
        f"{RESULTS}/logs/workloads/{{model}}/{{workload}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/workloads/{{model}}/{{workload}}.tsv"
    conda:
        "../../envs/gpu.yaml"
    params:
        batch_size=lambda wildcards: CONFIG.workloads[wildcards.workload].batch_size,
        prompt_tokens=lambda wildcards: CONFIG.workloads[wildcards.workload].prompt_tokens,
        new_tokens=lambda wildcards: CONFIG.workloads[wildcards.workload].new_tokens,
        padding=lambda wildcards: CONFIG.padding(wildcards.workload),
        texts=lambda wildcards, input: (
            f"--prompts {input.prompts} --dataset-manifest {input.dataset}" if has_tokenizer(wildcards.model) else ""
        ),
        seed=CONFIG.dataset.seed,
        provenance=code("workload"),
    shell:
        "kvbench workload --model-manifest {input.manifest} {params.texts} --seed {params.seed}"
        " --batch-size {params.batch_size} --prompt-tokens {params.prompt_tokens} --new-tokens {params.new_tokens}"
        " --padding {params.padding} --provenance {params.provenance:q} --output {output.batch} 2>&1 | tee {log}"
