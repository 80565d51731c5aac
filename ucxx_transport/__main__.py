"""`python -m ucxx_transport`, the same as the command `ucxx-transport`."""

from ucxx_transport.cli.program import main

if __name__ == "__main__":
    main()
