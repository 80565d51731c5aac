"""Integrations: one file a framework. Each needs its framework, which nothing else here imports."""
