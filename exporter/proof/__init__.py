"""What an export is held against before anybody may use it."""
