"""ids → hypotheses. Knows no str, no file and no thread."""
