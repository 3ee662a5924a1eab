"""Networks as pure Flax linen modules: no configuration, no files, no mesh."""
