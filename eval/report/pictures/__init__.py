"""Pictures of what a backbone sees, as PNG bytes."""
