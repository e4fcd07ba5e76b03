"""How fast and how good a bundle is, in tables and pages."""
