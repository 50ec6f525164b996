# What compression costs: the windows that every variant of a model is judged on, and one job a variant.


rule windows:
    input:
        unpack(workload_sources),
    output:
        windows=f"{RESULTS}/windows/{{model}}.parquet",
    log:
        f"{RESULTS}/logs/windows/{{model}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/windows/{{model}}.tsv"
    conda:
        "../../envs/gpu.yaml"
    threads: 8
    resources:
        gpu=1,
        mem_mb=16000,
        runtime=60,
    params:
        variant=lambda wildcards: canonical({"model": wildcards.model, "method": "none", "spec": {}}),
        loading=loading_of,
        protocol=canonical({}),
        texts=lambda wildcards, input: (
            f"--prompts {input.prompts} --dataset-manifest {input.dataset}" if has_tokenizer(wildcards.model) else ""
        ),
        corpora=CONFIG.quality.corpora,
        windows=CONFIG.quality.windows,
        prefix_tokens=CONFIG.quality.prefix_tokens,
        continuation_tokens=CONFIG.quality.continuation_tokens,
        provenance=code("windows"),
    shell:
        "kvbench windows --manifest {input.manifest} {params.texts} --corpora {params.corpora}"
        " --windows {params.windows} --prefix-tokens {params.prefix_tokens}"
        " --continuation-tokens {params.continuation_tokens}"
        " --variant {params.variant:q} --protocol {params.protocol:q} --loading {params.loading:q}"
        " --provenance {params.provenance:q} --output {output.windows} 2>&1 | tee {log}"


rule quality:
    input:
        manifest=model_manifest,
        windows=lambda wildcards: f"{RESULTS}/windows/{CONFIG.models[wildcards.model].base or wildcards.model}.parquet",
        original=original_manifest,
        adapter=adapter,
    output:
        rows=f"{RESULTS}/quality/{{model}}/{{method}}.parquet",
    log:
        f"{RESULTS}/logs/quality/{{model}}/{{method}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/quality/{{model}}/{{method}}.tsv"
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
        protocol=canonical({}),
        original=lambda wildcards, input: (f"--original {input.original}" if input.original else ""),
        provenance=code("quality"),
    shell:
        "kvbench quality --manifest {input.manifest} --windows {input.windows} {params.original}"
        " --variant {params.variant:q} --protocol {params.protocol:q} --loading {params.loading:q}"
        " --provenance {params.provenance:q} --output {output.rows} 2>&1 | tee {log}"
