# The config, validated once; where things lie; and what each job depends on, as strings that change when it does.
import atexit
import os
import re
import sys
import time
from pathlib import Path

SCRIPTS = Path(workflow.current_basedir.get_path_or_uri(secret_free=True)).parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

from kvbench import checkpoint, grid, options, stats
from kvbench import config as configs
from kvbench.dms import layout
from kvbench.errors import UserError
from kvbench.provenance import canonical, fingerprint


def say_last(text):
    """Print to stderr when Snakemake has said all its own words, so that the cause is the last line that one reads."""
    atexit.register(lambda: print(text, file=sys.stderr))


try:
    CONFIG = configs.load(config, [str(file) for file in workflow.configfiles])
except UserError as error:
    say_last(f"error: {error}")
    raise WorkflowError("the config is not valid") from None

STARTED = time.time()
RESULTS = CONFIG.results
DATASET = CONFIG.dataset.name
VARIANTS = grid.variants(CONFIG)
CELLS = grid.cells(CONFIG)
SPECS = {method: grid.method_spec(CONFIG, method) for method in CONFIG.methods}
# inside a deployed environment its own python comes first on the path; elsewhere, the one that runs Snakemake
PYTHON = "python" if workflow.deployment_settings.deployment_method else sys.executable
# jobs on this machine are forked from one process that has imported the libraries; those of a cluster run alone
RUN = "" if workflow.remote_exec else os.getpid()
# compiled kernels outlive their job, so that a second one of the same shapes starts in seconds
COMPILED = Path(RESULTS, "compiled").resolve()
# what a rule's shell calls by a script's name
shell.prefix(
    'set -euo pipefail; export KVBENCH_RUN={RUN} TORCHINDUCTOR_CACHE_DIR="${{TORCHINDUCTOR_CACHE_DIR:-{COMPILED}}}";'
    ' kvbench() {{ "{PYTHON}" "{SCRIPTS}/$1.py" "${{@:2}}"; }}; '
)


wildcard_constraints:
    model=options.NAME,
    method=options.NAME,
    workload=options.NAME,
    retrofit=options.NAME,


def script(name):
    """Path of a script."""
    return SCRIPTS / f"{name}.py"


def code(name):
    """What a result of a script says of the code that made it; changes when that code does."""
    return canonical({"script": name, "code": fingerprint(script(name))})


def local_files(source):
    """The user's own files of a source, so that a change of one is seen; other sources name their content.

    Of a checkpoint those that loading reads. They lie on this machine, whatever storage the results are in.
    """
    if not isinstance(source, options.PathSource):
        return []
    if source.path.is_file():
        return [local(str(source.path))]
    read = checkpoint.BESIDE_WEIGHTS + ("*.safetensors",) if (source.path / "config.json").exists() else ("*",)
    found = {path for pattern in read for path in source.path.glob(pattern) if path.is_file()}
    return [local(str(path)) for path in sorted(found)]


def model_manifest(wildcards):
    """Manifest of the model that a job loads."""
    return f"{RESULTS}/models/{wildcards.model}/manifest.json"


def original_manifest(wildcards):
    """Manifest of the model that a job's model is a retrofit of, if it is one."""
    base = CONFIG.models[wildcards.model].base
    return f"{RESULTS}/models/{base}/manifest.json" if base else []


def adapter(wildcards):
    """The adapter that a job's method runs: of a retrofit here, or the user's own files."""
    method = CONFIG.methods[wildcards.method]
    if not isinstance(method, options.DmsMethod) or method.dms.checkpoint:
        return []
    if method.dms.retrofit:
        return grid.adapter_folder(CONFIG, method.dms.retrofit)
    # the spec has their hashes, so that a change is seen whatever the files' times are
    return [ancient(local(str(path))) for path in layout.contents(method.dms.adapter)]


def environment(wildcards):
    """What a variant's jobs run in: the code that a DMS checkpoint brings wants older libraries than all the rest."""
    method = CONFIG.methods[wildcards.method]
    own = isinstance(method, options.DmsMethod) and method.dms.checkpoint
    return "../../envs/dms.yaml" if own else "../../envs/gpu.yaml"


def workload_sources(wildcards):
    """A model that has no tokenizer needs no prompts."""
    needed = {"manifest": model_manifest(wildcards)}
    if has_tokenizer(wildcards.model):
        needed |= {
            "prompts": f"{RESULTS}/prompts/{DATASET}.parquet",
            "dataset": f"{RESULTS}/datasets/{DATASET}/manifest.json",
        }
    return needed


def token_ids(wildcards):
    """The batch of a cell: the same token ids for every method, and for a retrofit those of its base."""
    return f"{RESULTS}/workloads/{CONFIG.models[wildcards.model].base or wildcards.model}/{wildcards.workload}.parquet"


def retrofit_of(wildcards):
    """What the config says of a retrofit."""
    return CONFIG.retrofits[wildcards.retrofit]


def retrofit_job(wildcards):
    """What a job of a retrofit runs: its model, uncompressed."""
    return canonical({"model": retrofit_of(wildcards).model, "method": "none", "spec": {}})


def retrofit_loading(wildcards):
    """How the retrofitted model is loaded."""
    model = CONFIG.models[retrofit_of(wildcards).model]
    return canonical({"dtype": model.dtype, "attention": model.attention})


def corpus_sources(wildcards):
    """A text file needs no prompts."""
    text = retrofit_of(wildcards).text
    if isinstance(text, options.TextFile):
        return {"file": local(str(text.path))}
    prompts = f"{RESULTS}/prompts/{DATASET}.parquet"
    return {"prompts": prompts, "dataset": f"{RESULTS}/datasets/{DATASET}/manifest.json"}


def cell_files(stage, suffix):
    """The files of one stage for every cell."""
    return [f"{RESULTS}/{stage}/{c.variant.model}/{c.variant.method}/{c.workload}.{suffix}" for c in CELLS]


def capacity_files(wildcards):
    """What fits, for every cell, if the config asks."""
    return cell_files("capacity", "json") if CONFIG.protocol.capacity else []


def smaller_first(wildcards):
    """A cell that does not fit spares the larger ones of its variant the attempt."""
    workload = CONFIG.workloads[wildcards.workload]
    return -workload.batch_size * (workload.prompt_tokens + workload.new_tokens)


def output_files(wildcards):
    """The outputs of every variant, if the config wants any."""
    return [f"{RESULTS}/outputs/{v.model}/{v.method}.parquet" for v in VARIANTS if CONFIG.outputs.prompts]


def quality_files(wildcards):
    """What compression does to the next token's distribution, for every variant, if the config wants it."""
    return [f"{RESULTS}/quality/{v.model}/{v.method}.parquet" for v in VARIANTS if CONFIG.quality.windows]


def retrieval_files(wildcards):
    """What every variant still retrieves, if the config wants it."""
    return [f"{RESULTS}/retrieval/{v.model}/{v.method}.parquet" for v in VARIANTS if CONFIG.quality.retrieval.samples]


def quality_figures(wildcards):
    """The figures of quality that the config's settings give data for."""
    if not any_text():
        return []
    names = ["kl-by-kept-fraction", "kl-by-distance"] * bool(CONFIG.quality.windows)
    names += ["retrieval"] * bool(CONFIG.quality.retrieval.samples and CONFIG.quality.retrieval.tasks)
    return [f"{RESULTS}/plots/{name}.svg" for name in names]


def has_tokenizer(model):
    """Whether a model's token ids come from prompts; those of random weights are drawn."""
    return not isinstance(CONFIG.models[model].source, options.RandomSource)


def any_text():
    """Whether any variant's token ids come from prompts."""
    return any(has_tokenizer(variant.source_of_tokens) for variant in VARIANTS)


def variant_of(wildcards):
    """A variant for its jobs: what to run, not how the report calls it."""
    return canonical({"model": wildcards.model, "method": wildcards.method, "spec": SPECS[wildcards.method]})


def loading_of(wildcards):
    """How a variant's model is loaded."""
    model = CONFIG.models[wildcards.model]
    return canonical({"dtype": model.dtype, "attention": model.attention})


def summary():
    """What a finished run says: where the report lies, and what is missing from it."""
    gaps = stats.missing(Path(RESULTS, "stats.parquet")) if Path(RESULTS, "stats.parquet").exists() else []
    again = f"To measure them again, delete their files under {RESULTS} and run again."
    where = [f"Report: {RESULTS}/report.html"] * Path(RESULTS, "report.html").exists()
    return "\n".join(where + [f"Not measured: {gap}" for gap in gaps] + [again] * bool(gaps))


def last_error():
    """The causes of a failed run, from the logs of its jobs."""
    logs = [path for path in Path(RESULTS, "logs").rglob("*.log") if path.stat().st_mtime >= STARTED]
    texts = [path.read_text("utf-8", "replace") for path in logs]
    return "\n".join(sorted({found for text in texts for found in re.findall(r"^error: .*", text, re.M)}))
