"""The release pipeline: plans, builds, checks, documents and publishes a ladder of variants."""

__version__ = "0.1.0"
