"""Image tokenizers: images to grids of tokens and back."""
