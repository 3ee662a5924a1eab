"""An emulated bucket of Google Cloud Storage on this machine, for this process and others.

`gcp-storage-emulator` implements the HTTP interface of Google in memory. This module adds two features that the
database of tensorstore and our locks need: the generation of an object that is read, and changes that require one.
Permissions, quotas, rate limits, slowness and outages are not emulated.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest
from etils import epath

from dalle_jax.storage.files import disable_listings_cache


@contextlib.contextmanager
def emulated_bucket() -> Iterator[epath.Path]:
    """Provides an empty bucket, to which the environment of this process and its children points."""
    disable_listings_cache()  # tests list what other processes write
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")  # tensorstore
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # would ask another service about the bucket
        patch.setenv("NO_GCE_CHECK", "true")
        server = pytest.importorskip("gcp_storage_emulator.server", reason="needs gcp-storage-emulator (extra: test)")
        pytest.importorskip("gcsfs", reason="needs gcsfs (extras: gcs, test)")
        _add_generations(patch, server.objects, server.HANDLERS)
        with server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket"):
            yield epath.Path("gs://bucket")


def names(folder: epath.Path) -> list[str]:
    """Returns the names of all objects below a folder."""
    found = []
    for path in folder.iterdir():
        found += [f"{path.name}/{name}" for name in names(path)] if path.is_dir() else [path.name]
    return sorted(found)


def _add_generations(patch: pytest.MonkeyPatch, objects, routes) -> None:
    download, media, parts = objects.download, objects._media_upload, objects._multipart_upload
    delete, one_at_a_time = objects.delete, threading.Lock()

    def generation(storage, bucket: str, name: str) -> str:
        try:
            return storage.get_file_obj(bucket, name)["generation"]
        except objects.NotFound:
            return "0"

    def download_with_generation(request, response, storage, *rest, **named):
        bucket, name = request.params["bucket_name"], request.params["object_id"]
        response["x-goog-generation"] = generation(storage, bucket, name)
        download(request, response, storage, *rest, **named)

    def on_condition(upload, name):
        def upload_on_condition(request, response, storage):
            expected = request.query.get("ifGenerationMatch")
            with one_at_a_time:
                current = generation(storage, request.params["bucket_name"], name(request))
                if expected and expected[0] != current:
                    response.status = objects.HTTPStatus.PRECONDITION_FAILED
                else:
                    upload(request, response, storage)

        return upload_on_condition

    def delete_on_condition(request, response, storage, *rest, **named):
        expected = request.query.get("ifGenerationMatch")
        current = generation(storage, request.params["bucket_name"], request.params["object_id"])
        if expected and expected[0] != current:
            response.status = objects.HTTPStatus.PRECONDITION_FAILED
        else:
            delete(request, response, storage, *rest, **named)

    patch.setattr(objects, "download", download_with_generation)
    for _, handlers in routes:
        if handlers.get("DELETE") is delete:
            patch.setitem(handlers, "DELETE", delete_on_condition)
    patch.setattr(objects, "_media_upload", on_condition(media, lambda request: request.query["name"][0]))
    patch.setattr(objects, "_multipart_upload", on_condition(parts, lambda request: request.data["meta"]["name"]))
