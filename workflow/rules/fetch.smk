# What goes in: checkpoints and the dataset, each with a manifest that says exactly what was got.


rule fetch_model:
    input:
        base=original_manifest,
        local=lambda wildcards: local_files(CONFIG.models[wildcards.model].source),
    output:
        manifest=f"{RESULTS}/models/{{model}}/manifest.json",
    log:
        f"{RESULTS}/logs/models/{{model}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/models/{{model}}.tsv"
    # needs the network, which compute nodes often lack
    localrule: True
    conda:
        "../../envs/gpu.yaml"
    params:
        source=lambda wildcards: canonical(
            CONFIG.models[wildcards.model].source.model_dump(mode="json", exclude_none=True)
        ),
        trust=lambda wildcards: "--trust-remote-code" * CONFIG.models[wildcards.model].trust_remote_code,
        base=lambda wildcards, input: (f"--tokenizer-from {input.base}" if input.base else ""),
        code=code("fetch"),
    shell:
        "kvbench fetch model --name {wildcards.model} --source {params.source:q} {params.trust}"
        " {params.base} --output {output.manifest} 2>&1 | tee {log}"


rule fetch_dataset:
    input:
        local_files(CONFIG.dataset.source),
    output:
        manifest=f"{RESULTS}/datasets/{DATASET}/manifest.json",
    log:
        f"{RESULTS}/logs/datasets/{DATASET}.log",
    benchmark:
        f"{RESULTS}/benchmarks/datasets/{DATASET}.tsv"
    # needs the network, which compute nodes often lack
    localrule: True
    conda:
        "../../envs/gpu.yaml"
    params:
        name=DATASET,
        source=canonical(CONFIG.dataset.source.model_dump(mode="json", exclude_none=True)),
        code=code("fetch"),
    shell:
        "kvbench fetch dataset --name {params.name} --source {params.source:q}"
        " --output {output.manifest} 2>&1 | tee {log}"
