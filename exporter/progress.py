"""What an export tells whoever waits for it."""


class Report:
    """Hears of every phase as it begins and of every assumption; this one keeps silent."""

    def phase(self, text: str) -> None:
        """Something that takes a while begins."""

    def note(self, text: str) -> None:
        """Something that the user should know was decided."""
