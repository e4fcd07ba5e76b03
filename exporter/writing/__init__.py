"""The graphs of the contract, and the files they are written to."""
