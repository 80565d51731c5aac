"""A store in etcd v3, by its JSON gateway: many machines."""
