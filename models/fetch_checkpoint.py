"""A checkpoint fetched from the Hugging Face hub: asked for, resumable, checked, whole or not there.

The library huggingface_hub finds the file and moves the bytes, by plain http; its settings hold
(HF_ENDPOINT, a mirror; HF_HUB_OFFLINE). Where bytes are kept is decided here, as the library's
`hf_hub_download` throws away what a broken download has brought (since its version 2). They lie
beside the file's place as `<file>.<first digits of its checksum>.part` until their SHA-256 is the
hub's, and only then take the name. No account is used: tokens are neither read nor sent.

Only checkpoints of models/checkpoints.py are fetched; there is no way in for an address of one's own.
"""

from __future__ import annotations

import errno
import hashlib
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from .checkpoints import HUB, Checkpoint, gigabytes

Answer = TypeVar("Answer")
OnBytes = Callable[[int, int], None]
"""(bytes that are there, bytes in all); what it raises ends the download and keeps what came."""

SHA256 = re.compile(r"[0-9a-f]{64}")
BLOCK = 2**23
"""Bytes that are read at once for the checksum: some 20 ms."""
A_MOMENT = 0.2
"""Seconds between two looks at whether to stop."""
TRIES = 5
"""Connections in a row that bring nothing before it is given up, and seconds between them."""
PAUSE = 1.0
SPARE = 2**28
"""Bytes of a disk that stay free."""


class _Partial:
    """The unfinished file, as the library writes to it. After `close` nothing more is written, even
    if the thread that downloads still waits for the network."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")
        self._lock = threading.Lock()
        self.there = self._file.tell()

    def write(self, chunk: bytes) -> int:
        with self._lock:
            written = self._file.write(chunk)  # a ValueError once it is closed
            self.there = self._file.tell()
        return written

    def tell(self) -> int:
        return self.there

    def seek(self, place: int) -> int:
        return self._file.seek(place)

    def truncate(self) -> int:
        with self._lock:
            self.there = self._file.truncate()
        return self.there

    def close(self) -> None:
        with self._lock:
            self._file.close()


def is_whole(path: Path) -> bool:
    """Whether a file is safetensors to its last byte; reads its header only."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt"):
            return True
    except (SafetensorError, OSError):
        return False


def check_room(wanted: dict[Checkpoint, Path]) -> None:
    """One sentence before the first byte instead of a full disk after an hour.

    Raises:
        ValueError: the files, each with its folder, don't fit.
    """
    needs: dict[int, int] = {}
    for checkpoint, folder in wanted.items():
        folder.mkdir(parents=True, exist_ok=True)
        disk = folder.stat().st_dev
        begun = sum(p.stat().st_size for p in folder.glob(f"{checkpoint.file}.*.part"))
        needs[disk] = needs.get(disk, 0) + max(0, checkpoint.size - begun)
        free = shutil.disk_usage(folder).free
        if needs[disk] + SPARE > free:
            raise ValueError(
                f"{gigabytes(needs[disk])} are needed in {folder}, but only {gigabytes(free)} are "
                "free on that disk: make room, or name a folder on another disk in ComfyUI's "
                "extra_model_paths.yaml."
            )


def fetch(checkpoint: Checkpoint, folder: Path, on_bytes: OnBytes) -> Path:
    """Bring a checkpoint into a folder, going on from what an earlier try has left there.

    Raises:
        ValueError: it can't be had, or what came is not what was promised: one sentence.
        Whatever `on_bytes` raises, within a second; what came stays.
    """
    if not checkpoint.fetchable:
        raise ValueError(
            f"'{checkpoint.file}' is not safetensors: get it by hand, {_hint(checkpoint)}."
        )
    final = folder / checkpoint.file
    if final.exists():
        if is_whole(final):
            return final
        raise ValueError(
            f"{final} is there but damaged or not whole: move it away and run this node again."
        )
    try:
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise ValueError(
            "The package huggingface-hub is missing: install it into ComfyUI's Python."
        ) from None
    # An error of the hub has the base of whatever http library this version speaks with.
    troubles = (*HfHubHTTPError.__bases__, OSError)
    try:
        address, size, checksum = _beside(
            lambda: _look_up(checkpoint), lambda: on_bytes(0, checkpoint.size)
        )
        partial = folder / f"{checkpoint.file}.{checksum[:12]}.part"
        folder.mkdir(parents=True, exist_ok=True)
        if partial.exists() and partial.stat().st_size > size:
            partial.unlink()  # no part of this file: the server would refuse to go on from there
        _download(address, partial, size, on_bytes, troubles)
    except troubles as error:
        raise ValueError(_sentence(error, checkpoint)) from error
    _check(partial, checksum, checkpoint, lambda: on_bytes(size, size))
    partial.replace(final)
    return final


def _beside(work: Callable[[], Answer], poll: Callable[[], None]) -> Answer:
    """The answer of `work`, done in a thread of its own while `poll` is called again and again."""
    answers: list[Answer] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(A_MOMENT)
        poll()
    if errors:
        raise errors[0]
    return answers[0]


def _look_up(checkpoint: Checkpoint) -> tuple[str, int, str]:
    """Address, bytes and SHA-256 of the hub's file."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    found = get_hf_file_metadata(hf_hub_url(checkpoint.repository, checkpoint.path), token=False)
    if not found.size or not SHA256.fullmatch(found.etag or ""):
        raise ValueError(
            f"The server tells no size and checksum of '{checkpoint.file}', so nothing is fetched: "
            f"{_hint(checkpoint)}."
        )
    if checkpoint.sha256 and checkpoint.sha256 != found.etag:
        raise ValueError(
            f"'{checkpoint.file}' is another file on the hub now than the one this pack was made "
            f"for (its checksum begins with {found.etag[:8]}, not {checkpoint.sha256[:8]}), so it is "
            f"not fetched: look at {checkpoint.page}, or update Turnaround."
        )
    # The address on the hub, not where that leads to: those addresses run out during long downloads.
    address = hf_hub_url(checkpoint.repository, checkpoint.path, revision=found.commit_hash)
    return address, found.size, found.etag


def _download(
    address: str, partial: Path, size: int, on_bytes: OnBytes, troubles: tuple[type, ...]
) -> None:
    """All bytes into the partial file; a connection that breaks is made anew as long as more comes.

    Some versions of the library go on by themselves after a break, some don't.
    """
    written = _Partial(partial)
    in_vain = 0
    try:
        while True:
            before = written.there
            try:
                return _attempt(address, written, size, on_bytes)
            except troubles as error:
                if written.there > size:
                    # A server that knows no ranges has sent all behind what was there.
                    written.seek(0)
                    written.truncate()
                in_vain = in_vain + 1 if written.there <= before else 0
                refused = getattr(error, "response", None) is not None
                full = isinstance(error, OSError) and error.errno == errno.ENOSPC
                if refused or full or in_vain == TRIES:
                    raise
            _beside(lambda: time.sleep(PAUSE), lambda: on_bytes(written.there, size))
    finally:
        written.close()


def _attempt(address: str, written: _Partial, size: int, on_bytes: OnBytes) -> None:
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    headers = {**build_hf_headers(token=False), "Accept-Encoding": "identity"}
    _beside(
        lambda: http_get(
            address, written, resume_size=written.there, headers=headers, expected_size=size
        ),
        lambda: on_bytes(written.there, size),
    )


def _check(partial: Path, checksum: str, checkpoint: Checkpoint, poll: Callable[[], None]) -> None:
    digest = hashlib.sha256()
    with partial.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            poll()
    if digest.hexdigest() != checksum:
        partial.unlink()
        raise ValueError(
            f"What came of '{checkpoint.file}' is not what the hub has (another checksum); it was "
            "thrown away: run this node again."
        )
    if not is_whole(partial):
        partial.unlink()
        raise ValueError(
            f"'{checkpoint.file}' is not a safetensors file, though the hub calls it one; it was "
            "thrown away."
        )


def _hint(checkpoint: Checkpoint) -> str:
    return f"{checkpoint.page} → ComfyUI/models/{checkpoint.folder}"


def _sentence(error: Exception, checkpoint: Checkpoint) -> str:
    """What went wrong on the way, for someone who can't read an http trace."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        return (
            "HF_HUB_OFFLINE is set, so nothing may be fetched: start ComfyUI without it, or bring "
            f"the file by hand: {_hint(checkpoint)}."
        )
    if status in (401, 403):
        return (
            f"The hub gives '{checkpoint.file}' to people with an account only: accept its terms in "
            f"a browser and bring the file by hand: {_hint(checkpoint)}."
        )
    if status == 404:
        return (
            f"The hub has no '{checkpoint.file}' any more: look at {HUB}/{checkpoint.repository}."
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "The disk is full: make room and run this node again; what has come is kept."
    why = f"answered with {status}" if status else "could not be reached, or the connection broke"
    return (
        f"The hub {why} while '{checkpoint.file}' was fetched: run this node again later, it goes "
        f"on from where it was; or bring the file by hand: {_hint(checkpoint)}."
    )
