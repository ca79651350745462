"""One file a claim of docs/performance.md: `measure()` gives the figures, `table(results)` the page's table of them."""
