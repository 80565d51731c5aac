"""The command `ucxx-transport`: its verbs, and what they print."""
