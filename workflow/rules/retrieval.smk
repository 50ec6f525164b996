# What a variant still finds of what was hidden in long texts: one job a variant.


rule retrieval:
    input:
        manifest=model_manifest,
        adapter=adapter,
    output:
        rows=f"{RESULTS}/retrieval/{{model}}/{{method}}.parquet",
    log:
        f"{RESULTS}/logs/retrieval/{{model}}/{{method}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/retrieval/{{model}}/{{method}}.tsv"
    conda:
        environment
    threads: 8
    resources:
        gpu=1,
        mem_mb=16000,
        runtime=240,
    params:
        variant=variant_of,
        loading=loading_of,
        protocol=canonical({}),
        request=canonical(CONFIG.quality.retrieval.model_dump()),
        provenance=code("retrieval"),
    shell:
        "kvbench retrieval --manifest {input.manifest} --request {params.request:q}"
        " --variant {params.variant:q} --protocol {params.protocol:q} --loading {params.loading:q}"
        " --provenance {params.provenance:q} --output {output.rows} 2>&1 | tee {log}"
