"""The hub source against a stand-in that answers as the hub answers huggingface_hub."""

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from kvbench import download, sources
from kvbench.errors import UserError

FETCH = Path(__file__).parents[2] / "workflow" / "scripts" / "fetch.py"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_a-secret-token"
CARD = "---\nlicense: apache-2.0\n---\n# A model\n"


@dataclass
class Repo:
    """A repository at `COMMIT`; a name that ends in .safetensors, .bin or .json.lfs lies in large-file storage."""

    files: dict[str, bytes]
    gated: bool = False
    private: bool = False


@dataclass
class Hub:
    """What the stand-in has, how it fails, and what it was asked."""

    repos: dict[str, Repo] = field(default_factory=dict)  # by "models/owner/name" or "datasets/owner/name"
    allowed: set[str] = field(default_factory=set)  # tokens with access to what is gated or private
    cut_once: dict[str, int] = field(default_factory=dict)  # file: bytes after which the connection breaks, once
    broken: set[str] = field(default_factory=set)  # files that the storage does not give
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    def count(self, method, part):
        return sum(m == method and part in path for m, path, _ in self.asked)


def large(name):
    return name.endswith((".safetensors", ".bin", "chats.json"))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path, dict(self.headers)))
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)", path):
            if repo := self.repo(*found.groups(), listing=True):
                self.tree(repo)
        elif found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind = (found[1] or "models/").rstrip("/")
            if repo := self.repo(kind, found[2], found[3], listing=False):
                self.resolve(repo, kind, found[2], found[4])
        elif found := re.fullmatch(r"/(storage|api/resolve-cache)/(models|datasets)/([^/]+/[^/]+)/(.+)", path):
            self.content(self.hub.repos[f"{found[2]}/{found[3]}"], found[4].removeprefix(f"{COMMIT}/"))
        else:
            self.answer(404)

    def repo(self, kind, name, revision, listing):
        """The repository, or None after the error that the hub would answer; it lists gated ones to anyone."""
        repo = self.hub.repos.get(f"{kind}/{name}")
        authorization = self.headers.get("Authorization", "")
        token = authorization.removeprefix("Bearer ")
        if token.startswith("bad"):
            self.answer(401, message="Invalid credentials in Authorization header")
        elif repo is None or (repo.private and token not in self.hub.allowed):
            if token:
                self.answer(404, code="RepoNotFound", message="Repository not found")
            else:
                self.answer(401, message="Invalid username or password.")
        elif revision != COMMIT:
            self.answer(404, code="RevisionNotFound", message=f"Invalid rev id: {revision}")
        elif repo.gated and not listing and token not in self.hub.allowed:
            self.answer(403 if token else 401, code="GatedRepo", message=f"Access to model {name} is restricted.")
        else:
            return repo
        return None

    def tree(self, repo):
        """Two entries a page, as the hub has a thousand."""
        entries = []
        for name, content in sorted(repo.files.items()):
            entry = {"type": "file", "oid": git_hash(content), "size": len(content), "path": name}
            if large(name):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        start = int((re.search(r"cursor=(\d+)", self.path) or [0, 0])[1])
        headers = {}
        if start + 2 < len(entries):
            next_page = f"{self.hub.url}{urlsplit(self.path).path}?recursive=True&cursor={start + 2}"
            headers["Link"] = f'<{next_page}>; rel="next"'
        self.answer(200, json.dumps(entries[start : start + 2]).encode(), headers=headers)

    def resolve(self, repo, kind, owner_name, name):
        if name not in repo.files:
            return self.answer(404, code="EntryNotFound", message="Entry not found", headers={"X-Repo-Commit": COMMIT})
        content = repo.files[name]
        headers = {"X-Repo-Commit": COMMIT}
        if large(name):
            storage = self.hub.url.replace("127.0.0.1", "localhost")  # another host, as the hub's storage is
            headers["Location"] = f"{storage}/storage/{kind}/{owner_name}/{name}"
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            headers["X-Linked-Size"] = str(len(content))
            return self.answer(302, headers=headers)
        headers["Location"] = f"/api/resolve-cache/{kind}/{owner_name}/{COMMIT}/{name}"
        return self.answer(307, headers=headers)

    def content(self, repo, name):
        if name in self.hub.broken:
            return self.answer(500)
        content = repo.files[name]
        etag = f'"{git_hash(content)}"'
        headers = {"ETag": etag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut = self.hub.cut_once.pop(name, None) if self.command == "GET" else None
        return self.answer(206 if wanted else 200, content[start:], headers=headers, cut=cut)

    def answer(self, status, body=b"", *, code=None, message=None, headers=None, cut=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if code:
            self.send_header("X-Error-Code", code)
        if message:
            self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)


def git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def model_files(**extra):
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 512}
    files = {
        "config.json": json.dumps(config).encode(),
        "generation_config.json": b"{}",
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b'{"chat_template": "x"}',
        "merges.txt": b"a b",
        "chat_template.jinja": b"x",
        "README.md": CARD.encode(),
        "model.safetensors": b"weights" * 1000,
        "pytorch_model.bin": b"not wanted",
        "consolidated.safetensors": b"not wanted",
        "onnx/config.json": b"not wanted",
        "modeling_it.py": b"raise RuntimeError",
    }
    return {**files, **extra}


def shards(*names):
    index = json.dumps({"weight_map": {str(i): name for i, name in enumerate(names)}}).encode()
    return {"model.safetensors.index.json": index}


@pytest.fixture
def hub():
    hub = Hub(allowed={TOKEN})
    hub.repos["models/me/it"] = Repo(model_files())
    hub.repos["datasets/me/chats"] = Repo(
        {"chats.json": b"[1, 2]", "README.md": b"---\nlicense: other\nlicense_name: mine\n---\n"}
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def fetch(hub, tmp_path):
    """Run the command line against the stand-in; returns the manifest, or the last line of stderr."""

    def run(kind="model", options=(), env=None, log=False, **source):
        default = {"hub": "me/it" if kind == "model" else "me/chats", "revision": COMMIT}
        output = tmp_path / kind / "manifest.json"
        command = [sys.executable, str(FETCH), kind, "--name", "it", "--output", str(output), *options]
        command += ["--source", json.dumps({**default, **source})]
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        home = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            command, env={**clean, **home, **(env or {})}, capture_output=True, text=True, timeout=120, check=False
        )
        assert TOKEN not in done.stderr + done.stdout
        if log:
            return done.stderr
        if done.returncode == 0:
            assert TOKEN not in output.read_text()
            return sources.load_manifest(output)
        assert [path for path in tmp_path.rglob("*") if path.suffix == ".incomplete"] == []
        assert not output.parent.exists() or list(output.parent.iterdir()) == []
        return done.stderr.splitlines()[-1]

    return run


def cache(tmp_path):
    return tmp_path / "hf" / "hub" / "models--me--it"


# --- what is fetched ---


def test_a_model_stays_in_the_cache_and_only_what_is_needed_comes(fetch, hub, tmp_path):
    manifest = fetch()
    assert manifest.path == cache(tmp_path) / "snapshots" / COMMIT == manifest.tokenizer
    named = [entry["path"] for entry in manifest.files]
    assert named == [
        "chat_template.jinja", "config.json", "generation_config.json", "merges.txt", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    for entry in manifest.files:
        content = hub.repos["models/me/it"].files[entry["path"]]
        assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert (manifest.revision, manifest.licence, manifest.context) == (COMMIT, "apache-2.0", 512)
    assert manifest.chat_template and not manifest.trust_remote_code
    got = {path.name for path in manifest.path.rglob("*") if path.is_file()}
    assert got == {*named, "README.md"}
    sources.check_manifest_files(manifest)


def test_shards_come_by_the_index(fetch, hub):
    parts = {f"model-{i}-of-2.safetensors": bytes([i]) * 5000 for i in (1, 2)}
    files = {**model_files(), **shards(*parts), **parts}
    hub.repos["models/me/it"].files = files
    names = [entry["path"] for entry in fetch().files if entry["path"].endswith(".safetensors")]
    assert names == sorted(parts)
    assert hub.count("GET", "/storage/models/me/it/model.safetensors") == 0


def test_a_dataset_is_one_file(fetch):
    good = hashlib.sha256(b"[1, 2]").hexdigest()
    manifest = fetch("dataset", file="chats.json", sha256=good.upper())
    assert manifest.file.read_bytes() == b"[1, 2]"
    assert (manifest.licence, manifest.revision) == ("mine", COMMIT)
    assert [entry["sha256"] for entry in manifest.files] == [good]


def test_a_repository_without_a_card_has_no_known_licence(fetch, hub):
    for repo in hub.repos.values():
        del repo.files["README.md"]
    assert fetch().licence is None
    assert fetch("dataset", file="chats.json").licence is None


def test_an_unreadable_card_is_no_failure(fetch, hub):
    hub.repos["models/me/it"].files["README.md"] = b"---\nlicense: [\n---\n\xff"
    assert fetch().licence is None


def test_progress_is_shown(fetch):
    log = fetch(log=True)
    assert "Fetching 8 files: 100%" in log
    assert re.search(r"Download complete: .*7\.00kB", log), "bytes too, although stderr is a pipe"


def test_a_gguf_of_a_repository_is_converted(fetch, hub, tmp_path):
    from test_sources import build_gguf

    hub.repos["models/me/it"].files["it.gguf"] = build_gguf(tmp_path / "it.gguf").read_bytes()
    manifest = fetch(file="it.gguf")
    assert manifest.path == tmp_path / "model"
    assert (manifest.converted_from["file"], manifest.revision) == ("it.gguf", COMMIT)


# --- the cache ---


def test_a_warm_cache_needs_no_network(fetch, hub):
    first = fetch()
    hub.asked.clear()
    offline = fetch(env={"HF_HUB_OFFLINE": "1"})
    assert hub.asked == [] and offline.files == first.files and offline.licence == "apache-2.0"
    unreachable = fetch(env={"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert unreachable.files == first.files

    data = fetch("dataset", file="chats.json")
    assert fetch("dataset", file="chats.json", env={"HF_HUB_OFFLINE": "1"}).files == data.files


def test_a_cache_without_a_listing_serves_offline(fetch, tmp_path):
    first = fetch()
    shutil.rmtree(cache(tmp_path) / "trees")  # as clients before 1.0 left it
    assert fetch(env={"HF_HUB_OFFLINE": "1"}).files == first.files


def test_a_cut_connection_is_taken_up_where_it_broke(fetch, hub):
    content = os.urandom(24_000_000)  # the client writes, and so keeps, 10 MB at a time
    hub.repos["models/me/it"].files["model.safetensors"] = content
    hub.cut_once["model.safetensors"] = 15_000_000
    manifest = fetch()
    assert (manifest.path / "model.safetensors").read_bytes() == content
    ranges = [headers.get("Range") for _, path, headers in hub.asked if path.startswith("/storage/")]
    assert len(ranges) == 2 and re.fullmatch(r"bytes=1\d{7}-", ranges[1])


def test_what_was_complete_is_not_fetched_again(fetch, hub):
    parts = {f"model-{i}-of-2.safetensors": bytes([i]) * 5000 for i in (1, 2)}
    hub.repos["models/me/it"].files = {**model_files(), **shards(*parts), **parts}
    hub.broken = {"model-2-of-2.safetensors"}
    assert fetch().startswith("error: The hub answered 500 for me/it. Check the connection and run again: files")
    hub.broken = set()
    fetch()
    assert hub.count("GET", "model-1-of-2.safetensors") == 1
    assert hub.count("GET", "model-2-of-2.safetensors") == 2
    assert hub.count("GET", "merges.txt") == 1


def test_a_damaged_cache_is_told(fetch, tmp_path):
    manifest = fetch()
    blob = (manifest.path / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    shutil.rmtree(tmp_path / "model")
    line = fetch()
    assert "model.safetensors is damaged: its sha256 is" in line
    assert line.endswith(f"Delete {blob} and run again.")
    blob.unlink()
    assert fetch().files == manifest.files


# --- tokens ---


def test_gated_and_private_repositories_open_with_the_token_of_the_environment(fetch, hub):
    for change in ({"gated": True}, {"private": True}):
        hub.repos["models/me/it"] = Repo(model_files(), **change)
        assert fetch(env={"HF_TOKEN": TOKEN}).path.exists()
    to_storage = [headers for _, path, headers in hub.asked if path.startswith("/storage/")]
    assert to_storage and all("Authorization" not in headers for headers in to_storage)


def test_a_stored_login_is_not_used(fetch, hub, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text(TOKEN)
    fetch()
    assert all("authorization" not in {name.lower() for name in headers} for *_, headers in hub.asked)


# --- what goes wrong: the last line says why and what to do ---


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ({}, ["me/it is gated, and there is no token. Accept its terms at", "/me/it, make a token and set HF_TOKEN"]),
        ({"HF_TOKEN": "other"}, ["me/it is gated, and the token in HF_TOKEN has no access to it. Accept its terms at"]),
        ({"HF_TOKEN": "bad"}, ["The hub refuses the token in HF_TOKEN for me/it. Set a valid one, or none."]),
    ],
)
def test_gated(fetch, hub, token, words):
    hub.repos["models/me/it"].gated = True
    line = fetch(env=token)
    assert all(word in line for word in words), line


def test_unknown_repository(fetch):
    for env in ({}, {"HF_TOKEN": TOKEN}):
        line = fetch(hub="me/nothing", env=env)
        assert line.startswith("error: The hub has no model me/nothing that you may see. Check `hub`")
    line = fetch("dataset", hub="me/nothing", file="x")
    assert line.startswith("error: The hub has no dataset me/nothing that you may see.")


def test_unknown_revision(fetch):
    line = fetch(revision="f" * 40)
    assert line.startswith(f"error: me/it has no revision {'f' * 40}. Take a full commit from http")


@pytest.mark.parametrize("revision", ["main", "0123456", COMMIT.upper()])
def test_a_revision_is_a_full_commit(fetch, hub, revision):
    line = fetch(revision=revision)
    assert line.startswith(f"error: me/it: revision '{revision}' is no full commit hash. Pin the 40 hex digits")
    assert hub.asked == []


def test_missing_keys(fetch):
    assert fetch("dataset").startswith("error: it: the source me/chats names no file. Add `file`")
    assert fetch(hub="no name").startswith("error: 'no name' is no name of a hub repository. Write it as owner/name")


def test_unknown_file(fetch):
    line = fetch("dataset", file="chat.json")
    assert line == f"error: me/chats holds no file chat.json at {COMMIT}. Did you mean chats.json."


def test_wrong_hash(fetch):
    line = fetch("dataset", file="chats.json", sha256="0" * 64)
    assert f"chats.json of me/chats has sha256 {hashlib.sha256(b'[1, 2]').hexdigest()}, not {'0' * 64}" in line
    assert "Correct `sha256`, or delete" in line


def test_no_network(fetch):
    line = fetch(env={"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert line.startswith("error: http://127.0.0.1:9 cannot be reached for me/it (")
    assert line.endswith("Check the connection and run again: files that are complete are kept.")


def test_a_full_cache():
    full = OSError(errno.ENOSPC, "No space left on device")
    line = str(download._hub_error(full, "me/it", COMMIT, "model", None))
    assert line.startswith("No space left for me/it in the hub cache /")
    assert line.endswith("Free disk space or point HF_HOME to another disk, and run again.")


def test_offline_with_half_a_model(fetch, tmp_path):
    manifest = fetch()
    weights = manifest.path / "model.safetensors"
    weights.resolve().unlink()
    with pytest.raises(UserError, match=r"safetensors is gone from the hub cache.*--forcerun fetch_model"):
        sources.check_manifest_files(manifest)
    shutil.rmtree(tmp_path / "model")
    line = fetch(env={"HF_HUB_OFFLINE": "1"})
    assert line.startswith(f"error: HF_HUB_OFFLINE is set and me/it at {COMMIT} is not whole in the hub cache.")


def test_offline_and_cold(fetch, hub):
    line = fetch(env={"HF_HUB_OFFLINE": "1"})
    assert line.startswith(f"error: HF_HUB_OFFLINE is set and me/it at {COMMIT} is not whole in the hub cache.")
    line = fetch("dataset", file="chats.json", env={"HF_HUB_OFFLINE": "1"})
    assert line.startswith("error: HF_HUB_OFFLINE is set and me/chats at")
    assert hub.asked == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config.json": None}, "me/it holds no config.json."),
        ({"model.safetensors": None}, "me/it holds no model.safetensors. Name a checkpoint in safetensors"),
        (shards("model-1.safetensors"), "me/it: model.safetensors.index.json names model-1.safetensors, not there."),
        ({"tokenizer.json": None}, "me/it ships no tokenizer. Name the model that lends it one as `base`."),
    ],
)
def test_incomplete_repositories(fetch, hub, change, words):
    files = {**model_files(), **change}
    hub.repos["models/me/it"].files = {name: content for name, content in files.items() if content is not None}
    assert words in fetch()


def test_remote_code_runs_only_when_asked_and_pinned(fetch, hub):
    config = json.loads(model_files()["config.json"])
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_it.It"}
    files = hub.repos["models/me/it"].files
    files["config.json"] = json.dumps(config).encode()
    files["nested/part.py"] = b"part = 1"
    line = fetch()
    assert line.startswith("error: me/it: config.json has auto_map, so loading it would run Python code")
    assert line.endswith("Read that code, then set `trust_remote_code: true` for this model.")
    assert hub.count("GET", ".safetensors") == 0, "refused before the weights come"

    manifest = fetch(options=["--trust-remote-code"])
    assert manifest.trust_remote_code
    assert {"modeling_it.py", "nested/part.py"} <= {entry["path"] for entry in manifest.files}


def test_code_of_another_repository_is_refused(fetch, hub):
    config = json.loads(model_files()["config.json"])
    config["auto_map"] = {"AutoModelForCausalLM": "other/code--modeling_it.It"}
    hub.repos["models/me/it"].files["config.json"] = json.dumps(config).encode()
    line = fetch(options=["--trust-remote-code"])
    assert "auto_map in config.json takes code from another repository, which no revision pins" in line
