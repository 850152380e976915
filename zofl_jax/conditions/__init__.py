"""What goes wrong around a method, and what is done about it."""
