"""Networks as pure Flax linen modules, without configuration files, I/O or mesh."""
