# What is measured: what the device does at best, then one job a cell for prefill, one for generation, and one a variant
# for its texts. Each takes one device; a failure inside a job becomes a row with its reason, so nothing here stops the
# run.


MEASURE = dict(
    variant=variant_of,
    loading=loading_of,
    # whether capacity is searched too changes nothing that is measured
    protocol=canonical(CONFIG.protocol.model_dump(exclude={"capacity"})),
    provenance=code("measure"),
)


rule device_rates:
    # as many threads as a measurement has, since a CPU's rates are those of its threads
    output:
        rates=f"{RESULTS}/device/rates.json",
    log:
        f"{RESULTS}/logs/device/rates.log",
    benchmark:
        f"{RESULTS}/benchmarks/device/rates.tsv"
    conda:
        "../../envs/gpu.yaml"
    threads: 8
    resources:
        gpu=1,
        mem_mb=16000,
        runtime=10,
    params:
        provenance=code("rates"),
    shell:
        "kvbench rates --provenance {params.provenance:q} --output {output.rates} 2>&1 | tee {log}"


rule prefill:
    input:
        manifest=model_manifest,
        batch=token_ids,
        adapter=adapter,
    output:
        record=f"{RESULTS}/prefill/{{model}}/{{method}}/{{workload}}.json",
    log:
        f"{RESULTS}/logs/prefill/{{model}}/{{method}}/{{workload}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/prefill/{{model}}/{{method}}/{{workload}}.tsv"
    priority: smaller_first
    conda:
        environment
    threads: 8
    resources:
        gpu=1,
        mem_mb=16000,
        runtime=60,
    params:
        **MEASURE,
    shell:
        "kvbench measure prefill --manifest {input.manifest} --workload {input.batch}"
        " --variant {params.variant:q} --protocol {params.protocol:q} --loading {params.loading:q}"
        " --provenance {params.provenance:q} --output {output.record} 2>&1 | tee {log}"


rule generation:
    input:
        manifest=model_manifest,
        batch=token_ids,
        adapter=adapter,
    output:
        rows=f"{RESULTS}/generation/{{model}}/{{method}}/{{workload}}.parquet",
    log:
        f"{RESULTS}/logs/generation/{{model}}/{{method}}/{{workload}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/generation/{{model}}/{{method}}/{{workload}}.tsv"
    priority: smaller_first
    conda:
        environment
    threads: 8
    resources:
        gpu=1,
        mem_mb=16000,
        runtime=60,
    params:
        **MEASURE,
    shell:
        "kvbench measure generation --manifest {input.manifest} --workload {input.batch}"
        " --variant {params.variant:q} --protocol {params.protocol:q} --loading {params.loading:q}"
        " --provenance {params.provenance:q} --output {output.rows} 2>&1 | tee {log}"


rule capacity:
    input:
        manifest=model_manifest,
        batch=token_ids,
        adapter=adapter,
    output:
        record=f"{RESULTS}/capacity/{{model}}/{{method}}/{{workload}}.json",
    log:
        f"{RESULTS}/logs/capacity/{{model}}/{{method}}/{{workload}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/capacity/{{model}}/{{method}}/{{workload}}.tsv"
    conda:
        environment
    threads: 8
    resources:
        gpu=1,
        mem_mb=16000,
        runtime=60,
    params:
        **MEASURE,
    shell:
        "kvbench measure capacity --manifest {input.manifest} --workload {input.batch}"
        " --variant {params.variant:q} --protocol {params.protocol:q} --loading {params.loading:q}"
        " --provenance {params.provenance:q} --output {output.record} 2>&1 | tee {log}"


rule outputs:
    input:
        manifest=model_manifest,
        prompts=lambda wildcards: (rules.prompts.output.prompts if has_tokenizer(wildcards.model) else []),
        adapter=adapter,
    output:
        texts=f"{RESULTS}/outputs/{{model}}/{{method}}.parquet",
    log:
        f"{RESULTS}/logs/outputs/{{model}}/{{method}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/outputs/{{model}}/{{method}}.tsv"
    conda:
        environment
    threads: 8
    resources:
        gpu=1,
        mem_mb=16000,
        runtime=60,
    params:
        variant=variant_of,
        loading=loading_of,
        protocol=canonical({"name": CONFIG.protocol.name}),
        prompts_count=CONFIG.outputs.prompts,
        new_tokens=CONFIG.outputs.new_tokens,
        max_prompt_tokens=CONFIG.outputs.max_prompt_tokens,
        prompts=lambda wildcards, input: (f"--prompts {input.prompts}" if input.prompts else ""),
        provenance=code("outputs"),
    shell:
        "kvbench outputs --manifest {input.manifest} {params.prompts} --count {params.prompts_count}"
        " --new-tokens {params.new_tokens} --max-prompt-tokens {params.max_prompt_tokens}"
        " --variant {params.variant:q} --protocol {params.protocol:q} --loading {params.loading:q}"
        " --provenance {params.provenance:q} --output {output.texts} 2>&1 | tee {log}"
