"""What hosts tell each other by name, without a device: the key-value store of JAX's coordination service.

The first host keeps the store.  Every function but `this_host` needs `jax.distributed` to be initialised, and raises
`jax.errors.JaxRuntimeError` where the first host does not answer.
"""

from __future__ import annotations

import json
from typing import Any

from jax._src import distributed as _jax_distributed  # its key-value store has no public name


def this_host() -> int:
    """The number of this process; 0 where it is alone."""
    return _jax_distributed.global_state.process_id


def tell(name: str, value: Any, *, again: bool = False) -> None:
    """Tells all hosts a value.

    Args:
      name: under which they find it.
      value: plain JSON.
      again: whether the name may have a value already, and is given another; else that is an error.
    """
    _client().key_value_set(_key(name), json.dumps(value), allow_overwrite=again)


def ask(name: str) -> Any:
    """The value that was told last.  Where there is none yet, that is an error as well."""
    return json.loads(_client().key_value_try_get(_key(name)))


def wait_for(name: str, seconds: float) -> Any:
    """The value as soon as it is told; an error where that is not within the time."""
    return json.loads(_client().blocking_key_value_get(_key(name), int(seconds * 1000)))


def _client() -> Any:
    return _jax_distributed.global_state.client


def _key(name: str) -> str:
    return f"dalle_jax/{name}"
