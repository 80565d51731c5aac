"""A store by its URL."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ucxx_transport.config import StoreConfig
from ucxx_transport.membership.store_url import LocalAddress, parse_store_url

if TYPE_CHECKING:
    from ucxx_transport.membership.store import Store

__all__ = ["open_store"]


def open_store(url: str, config: StoreConfig | None = None) -> Store:
    """The store that membership is kept in. Close it, or use `with`.

    Args:
        url: `local://` or `local:///abs/path` for the processes of one machine; `etcd://host:2379,…` (`etcds://` over
            TLS) for several machines.
        config: its settings; None: those of the environment and the file.

    Raises:
        ConfigError: the URL or a setting is wrong, or etcd is asked for and httpx is not installed.
        StorePermissionError: the file of a local store is not this user's to use.
    """
    address = parse_store_url(url)
    config = config or StoreConfig()
    if isinstance(address, LocalAddress):
        from ucxx_transport.membership.local import LocalStore

        return LocalStore(None if address.path is None else Path(address.path), config)
    from ucxx_transport.membership.etcd import EtcdStore

    return EtcdStore(address, config)
