"""The measuring core of `ucxx-transport bench` and of the programs in bench/: sources, readers, rounds, results."""
