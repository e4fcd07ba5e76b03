"""What lies on disk: the contract of the graphs, the manifest, the folder."""
