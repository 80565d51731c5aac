"""The demo: rollout workers and a trainer that learn a real environment through the transport."""
