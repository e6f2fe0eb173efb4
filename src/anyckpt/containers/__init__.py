"""Files that hold tensors, whatever a framework put there: read, and written."""
