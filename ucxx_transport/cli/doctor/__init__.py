"""`ucxx-transport doctor`: whether this machine can run the transport, and what to change if not."""
