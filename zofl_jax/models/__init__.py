"""Models, as functions of params."""
