"""What the package is measured by: one file a claim, results/*.json what came out."""
