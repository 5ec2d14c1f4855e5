"""Curation steps: each looks at what is still kept and gives verdicts."""
