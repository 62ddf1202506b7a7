"""Import: to be written."""
