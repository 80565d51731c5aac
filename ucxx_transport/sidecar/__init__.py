"""Sidecars: helper processes beside a worker. `launch` is the worker's side, `main` the process itself."""
