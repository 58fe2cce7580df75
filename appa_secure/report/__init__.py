"""Reports over run directories: one HTML page per run, a comparison of several, a study over the seeds of a sweep,
tables for terminal and documents.

Pages are self-contained (figures inlined, no scripts, no external resources; a content security policy says
so) and everything that came from data is escaped. Nothing here writes to a run except `report.html`.
"""

from appa_secure.report.html import compare, render
from appa_secure.report.study_page import render_study, study_markdown
from appa_secure.report.tables import results_markdown, terminal_table

__all__ = ["compare", "render", "render_study", "results_markdown", "study_markdown", "terminal_table"]
