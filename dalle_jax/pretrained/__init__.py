"""Public weights turned into our parameters, without running any code that a file brings along."""
