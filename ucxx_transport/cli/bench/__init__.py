"""The measuring core of `ucxx-transport bench` and of `bench/throughput.py`: sources, readers, rounds, results."""
