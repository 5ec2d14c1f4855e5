"""Whether a machine, and what it stands on, is as Fovea needs it."""
