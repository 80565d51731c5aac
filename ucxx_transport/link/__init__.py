"""Links: endpoints that carry ordered messages, over UCX between processes and hosts, or in memory for tests."""
