"""The operators that graphs are made of, for each kind of runtime."""
