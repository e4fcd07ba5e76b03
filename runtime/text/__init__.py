"""str ↔ ids."""
