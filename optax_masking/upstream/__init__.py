"""Pull requests to Optax: its losses, masked in its own source."""
