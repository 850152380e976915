"""What is watched of a run: divergence, curvature, figures."""
