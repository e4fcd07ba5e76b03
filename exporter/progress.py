"""What an export tells whoever waits for it."""


class Progress:
    """Hears of every phase as it begins and of every assumption. This one keeps silent."""

    def phase(self, text: str) -> None:
        """Something that takes a while begins."""

    def note(self, text: str) -> None:
        """Something that the user should know was decided. Options are named in backticks."""
