"""A key-value store shared by all hosts: the one of JAX's coordination service. It uses no device.

The first host keeps the store. Every function but `this_host` needs `jax.distributed` to be initialised. Each raises
`jax.errors.JaxRuntimeError` if the first host does not answer.
"""

from __future__ import annotations

import json
from typing import Any

from jax._src import distributed as _jax_distributed  # its key-value store has no public name


def this_host() -> int:
    """Returns the index of this host, 0 in a run on one host."""
    return _jax_distributed.global_state.process_id


def put(name: str, value: Any, *, overwrite: bool = False) -> None:
    """Stores a value for all hosts.

    Args:
      name: its key.
      value: plain JSON.
      overwrite: allows a key that has a value already, which is an error otherwise.
    """
    _client().key_value_set(_key(name), json.dumps(value), allow_overwrite=overwrite)


def get(name: str) -> Any:
    """Returns the latest value of a key. A key without a value is an error as well."""
    return json.loads(_client().key_value_try_get(_key(name)))


def wait_for(name: str, seconds: float) -> Any:
    """Returns the value of a key as soon as it has one. It is an error if that takes longer than `seconds`."""
    return json.loads(_client().blocking_key_value_get(_key(name), int(seconds * 1000)))


def _client() -> Any:
    return _jax_distributed.global_state.client


def _key(name: str) -> str:
    return f"dalle_jax/{name}"
