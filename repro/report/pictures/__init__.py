"""Draw pictures of a run as SVG."""
