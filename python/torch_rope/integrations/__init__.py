"""torch-rope inside other projects' models; each module here is imported by name."""
