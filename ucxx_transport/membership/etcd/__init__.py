"""A store in etcd v3, by its JSON gateway: many machines."""

from ucxx_transport.membership.etcd.store import EtcdStore

__all__ = ["EtcdStore"]
