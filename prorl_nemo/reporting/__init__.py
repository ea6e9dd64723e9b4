"""What a run looked like: one HTML file, or one figure."""

from prorl_nemo.reporting.page import write_report

__all__ = ["write_report"]
