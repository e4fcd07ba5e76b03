"""The commands of `kvx`, one file each."""
