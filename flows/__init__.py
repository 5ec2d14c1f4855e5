"""Prefect flows and the command line. The only room that knows the order of the stages."""
