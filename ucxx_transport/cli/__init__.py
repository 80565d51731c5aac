"""The command `ucxx-transport`: one file or folder a verb."""
