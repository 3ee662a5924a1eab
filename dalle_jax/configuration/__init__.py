"""From config files and flags to typed options."""
