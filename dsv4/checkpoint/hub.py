"""Checkpoints of the Hugging Face Hub, by huggingface_hub (an extra): of one commit, weights and settings, no code.

NAME is owner/model; NAME@REVISION a branch, a tag or a commit of it. Whatever revision was given, the commit that it
means is said, and everything comes from that one.
"""

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from dsv4 import files
from dsv4.checkpoint.headers import header_length
from dsv4.checkpoint.shards import CONFIG, GENERATION, INDEX, listed_files
from dsv4.errors import UserError, shown

log = logging.getLogger("dsv4")

SMALL = (CONFIG, GENERATION, INDEX, "tokenizer.json", "tokenizer_config.json")
PATTERNS = ("*.safetensors", *SMALL)  # all that is ever fetched
_GUESS = 1 << 19  # bytes of a shard that are asked for first: more than most headers
_Result = TypeVar("_Result")


def download(spec: str) -> Path:
    """The folder of a whole checkpoint, from the hub or from its cache on this machine.

    UserError in one sentence: no huggingface_hub, no such model or revision, no network and no copy in the cache.
    """
    hub = _library()
    name, revision = _split(spec)
    try:
        commit = _resolve(hub, name, revision).sha
    except _Unreachable as error:
        try:
            folder = hub.snapshot_download(
                name, revision=revision, allow_patterns=list(PATTERNS), local_files_only=True
            )
        except Exception:
            raise UserError(
                f"{error}, and there is no copy of it in the cache: connect, name the commit of a copy, as "
                f"{name}@COMMIT, or give a folder"
            ) from None
        log.info("the hub cannot be reached: taking the copy of %s in the cache, commit %s", name, Path(folder).name)
        return Path(folder)
    return Path(_asked(name, lambda: hub.snapshot_download(name, revision=commit, allow_patterns=list(PATTERNS))))


@contextmanager
def headers_of(spec: str) -> Iterator[tuple[Path, str]]:
    """(folder, NAME@COMMIT): a stand-in for the checkpoint in which the headers are real and the tensors are holes.

    What `dsv4 inspect` looks at, for some megabytes of traffic and none on the disk when it is left.
    """
    hub = _library()
    name, revision = _split(spec)
    try:
        info = _resolve(hub, name, revision)
    except _Unreachable as error:
        raise UserError(f"{error}: connect, or give a folder") from None
    sizes = {file.rfilename: file.size for file in info.siblings or [] if isinstance(file.size, int) and file.size >= 0}
    with TemporaryDirectory(prefix="dsv4-") as temporary:
        folder = Path(temporary)
        for small in (CONFIG, INDEX):
            if small in sizes:
                if sizes[small] > files.LARGEST_JSON:
                    raise UserError(f"{small} of {name} has {sizes[small]:,} bytes: it is no {small}")
                got = _asked(name, lambda small=small: hub.hf_hub_download(name, small, revision=info.sha))
                shutil.copyfile(got, folder / small)
        shards = (
            listed_files(folder)
            if INDEX in sizes
            else {n for n in sizes if "/" not in n and n.endswith(".safetensors")}
        )
        for shard in sorted(shards & sizes.keys()):
            url = hub.hf_hub_url(name, shard, revision=info.sha)
            _stand_in(folder / shard, sizes[shard], lambda n, url=url: _asked(name, lambda: _first_bytes(hub, url, n)))
        yield folder, f"{name}@{info.sha}"


def _stand_in(file: Path, size: int, first: Callable[[int], bytes]) -> None:
    """Write the header of a file and holes for the rest; what is no header is left for the reader to say."""
    start = first(min(size, _GUESS))
    try:
        length = 8 + header_length(start)
    except UserError:
        length = 0
    if len(start) < length <= size:
        start = first(length)
    file.parent.mkdir(parents=True, exist_ok=True)
    with files.explained(file), file.open("wb") as out:
        out.write(start[: length or None])
        out.truncate(size)


def _first_bytes(hub: Any, url: str, count: int) -> bytes:
    """The first bytes of a file on the hub, no more even where the server would send all of it."""
    if not count:
        return b""
    headers = {**hub.utils.build_hf_headers(), "Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"}
    got = bytearray()
    with hub.get_session().stream("GET", url, headers=headers, timeout=30, follow_redirects=True) as response:
        if response.status_code >= 400:
            response.read()
            hub.utils.hf_raise_for_status(response)
        for part in response.iter_bytes():
            got += part
            if len(got) >= count:
                break
    return bytes(got[:count])


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            "--from-hub needs the package huggingface_hub: pip install 'dsv4[hub]', or give a folder"
        ) from None
    for library in ("httpx", "httpx2"):  # what it connects with says every request otherwise
        logging.getLogger(library).setLevel(logging.WARNING)
    return huggingface_hub


def _split(spec: str) -> tuple[str, str | None]:
    name, at, revision = spec.partition("@")
    if name.count("/") != 1 or not all(name.split("/")) or (at and not revision):
        raise UserError(f"--from-hub {shown(spec)} is no model's name: give OWNER/MODEL or OWNER/MODEL@REVISION")
    return name, revision or None


class _Unreachable(Exception):
    """There is no way to the hub, or it is switched off."""


def _resolve(hub: Any, name: str, revision: str | None) -> Any:
    """What the hub says of a model: `sha`, the commit, which is logged, and `siblings`, its files with their sizes."""
    try:
        info = hub.HfApi().model_info(name, revision=revision, files_metadata=True)
    except hub.errors.HfHubHTTPError as error:
        raise _refusal(hub, name, revision, error) from None
    except hub.errors.HFValidationError:
        raise UserError(
            f"--from-hub {shown(name)} is no model's name: give OWNER/MODEL or OWNER/MODEL@REVISION"
        ) from None
    except Exception as error:  # of the library, and of the two that it connects with
        raise _Unreachable(f"the hub cannot be asked for {name} ({files.reason_of(error)[:200]})") from None
    if not isinstance(info.sha, str) or not info.sha:
        raise UserError(f"the hub does not say which commit {name} is at: give a folder")
    if revision != info.sha:
        log.info("%s is at commit %s; to have the same one again: --from-hub %s@%s", name, info.sha, name, info.sha)
    return info


def _asked(name: str, call: Callable[[], _Result]) -> _Result:
    try:
        return call()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name} cannot be fetched from the hub ({files.reason_of(error)[:200]}): try again") from None


def _refusal(hub: Any, name: str, revision: str | None, error: Exception) -> UserError:
    if isinstance(error, hub.errors.RevisionNotFoundError):
        return UserError(f"the hub has no revision {shown(revision)} of {name}: give a branch, a tag or a commit of it")
    if isinstance(error, hub.errors.GatedRepoError):
        return UserError(
            f"{name} is given only to who has agreed to its terms: do so on the hub, and log in with hf auth login"
        )
    if isinstance(error, hub.errors.RepositoryNotFoundError):
        return UserError(f"the hub has no model {name}, or not for you: mend the name, or log in with hf auth login")
    return UserError(f"the hub does not give {name} ({files.reason_of(error)[:200]}): try again later")
