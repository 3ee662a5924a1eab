"""One file for each `config.job`: train, generate, evaluate, compile, quickstart."""
