"""Bundle → text, without torch."""
