"""What storage says when it fails, however deep in a chain of errors it lies."""

from __future__ import annotations

import errno

import jax

from dalle_jax.storage.files import remote_cause


def storage_cause(error: BaseException | None) -> str | None:
    """What is wrong with the storage, None where the error is about something else."""
    texts = {
        "No space left on device": "no space left on the device",
        "RESOURCE_EXHAUSTED": "no space left on the device",
        "Disk quota exceeded": "disk quota exceeded",
        "File too large": "file too large for this file system or its limits",
        "Permission denied": "permission denied",
        "PERMISSION_DENIED": "permission denied",
        "UNAUTHENTICATED": "no valid credentials",
        "Read-only file system": "read-only file system",
        "UNAVAILABLE": "the storage cannot be reached",
        "DEADLINE_EXCEEDED": "the storage does not answer in time",
    }
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):  # devices and other hosts use the same words
            error = error.__cause__ or error.__context__
            continue
        if isinstance(error, OSError) and error.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
            errno.EACCES,
            errno.EROFS,
        ):
            return (error.strerror or str(error)).lower()
        if cause := remote_cause(error):
            return cause
        for text, meaning in texts.items():
            if text.lower() in str(error).lower():
                return meaning
        error = error.__cause__ or error.__context__
    return None
