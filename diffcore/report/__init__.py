"""Figures of results, and the report of a run as one page of HTML."""
