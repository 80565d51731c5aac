"""Stores for the tests with real processes."""

from tests.support.store_fixtures import etcd_binary, own_etcd, own_rig

__all__ = ["etcd_binary", "own_etcd", "own_rig"]
