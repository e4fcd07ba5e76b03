"""Models → bundles: the graphs, their lowerings, the formats and the proof."""
