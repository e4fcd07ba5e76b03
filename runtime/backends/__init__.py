"""What can run a bundle's graphs; each module is imported only when its backend is asked for."""
