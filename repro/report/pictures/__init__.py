"""Pictures of a run as SVG."""
