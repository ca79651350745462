"""The claims of docs/performance.md, one a file.

`measure()` returns the figures, `table(results)` formats them for the page.
"""
