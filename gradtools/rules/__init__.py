"""How a user states a derivative."""
