"""Run directories, metrics, hand-over records, console, report."""
